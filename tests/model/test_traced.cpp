// What a traced backend counts, and that counting changes nothing.

#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/traced_backend.hpp"
#include "model/traffic.hpp"
#include "tests/support/backends.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/run_model.hpp"

using namespace qwen3next;

namespace {

CpuBackend cpu_backend() { return CpuBackend(test::cpu("", 2, KvType::f16)); }

struct TracedRun {
  Trace trace;
  test::RunModel<Traced<CpuBackend>> run;
  explicit TracedRun(const Checkpoint& checkpoint, int sequences = 1)
      : run(checkpoint, Traced<CpuBackend>(cpu_backend(), trace), 100, sequences) {}
  OpCost of(std::string_view name) const {
    for (const Trace::Op& op : trace.ops()) {
      if (op.name == name) return op.cost;
    }
    return {};
  }
};

// Has the boxes of a layer whole, as a GPU has.
struct Boxed : CpuBackend {
  using T = HostTensor;
  using Delta = std::span<const Segment<HostDeltaState>>;
  using Kv = std::span<const Segment<HostKvCache>>;
  using Projections = std::initializer_list<Projection<WeightView, T>>;

  explicit Boxed(CpuBackend backend) : CpuBackend(std::move(backend)) {}
  void norm_linear(T h, T x, const VectorView& norm, float eps, Projections projections) {
    rms_norm(h, x, norm, eps);
    linear(h, projections);
  }
  void linear_add(T x, T in, const WeightView& w, T y) {
    linear(in, {{w, y}});
    add(x, y);
  }
  void gated_norm_linear_add(T x, T o, T z, const VectorView& norm, float eps, const WeightView& w, T y) {
    gated_rms_norm(o, o, z, norm, eps);
    linear_add(x, o, w, y);
  }
  void gated_attention(T out, T q, T gate, T k, T v, const VectorView& q_norm, const VectorView& k_norm, float eps,
                       T angles, AttentionShape shape, Kv segments) {
    rms_norm(q, q, q_norm, eps), rms_norm(k, k, k_norm, eps);
    rope(q, angles, shape.head_dim), rope(k, angles, shape.head_dim);
    attention(out, q, k, v, shape, segments);
    sigmoid_gate(out, gate);
  }
  void delta_net(T out, T mixed, T in, T b, T a, T beta, T g, const VectorView& taps, const VectorView& A,
                 const VectorView& dt_bias, DeltaShape shape, Delta segments) {
    delta_gates(beta, g, b, a, A, dt_bias);
    causal_conv1d(mixed, in, taps, segments);
    gated_delta_rule(out, mixed, beta, g, shape, segments);
  }
  void experts_add(T x, T h, T logits, HostRouting& routing, const ExpertViews& views,
                   const SharedExpert<WeightView, T>& shared, int k, bool normalise) {
    T mix = tensor(x.n_rows, x.n_cols);
    linear(h, {{shared.gate_proj, shared.hidden}, {shared.up_proj, shared.up}});
    router(routing, logits, k, normalise);
    experts(mix, h, views, routing);
    swiglu(shared.hidden, shared.hidden, shared.up);
    linear(shared.hidden, {{shared.down_proj, shared.y}});
    add_gated(mix, shared.y, shared.gate);
    add(x, mix);
  }
};

}  // namespace

TEST_CASE("a traced backend computes what its base computes") {
  for (const std::string name : {"release", "fp8"}) {
    const Checkpoint checkpoint = Checkpoint::open(test::golden(name));
    const std::vector<std::int32_t> tokens{5, 6, 7, 8, 9};
    TracedRun traced(checkpoint);
    test::RunModel<CpuBackend> plain(checkpoint, cpu_backend(), 100);
    CHECK(traced.run.logits(tokens) == plain.logits(tokens));
    CHECK(traced.run.mtp_logits(tokens) == plain.mtp_logits(tokens));
  }
}

TEST_CASE("the operations of a decoded token move the bytes that traffic.hpp foretells") {
  for (const std::string name : {"release", "fused", "yarn"}) {
    CAPTURE(name);
    const Checkpoint checkpoint = Checkpoint::open(test::golden(name));
    TracedRun traced(checkpoint);
    auto s = traced.run.state();
    std::vector<std::int32_t> context(30);
    std::iota(context.begin(), context.end(), 1);
    traced.run.step(s, context);
    traced.trace.clear();
    traced.run.step(s, std::vector<std::int32_t>{3});
    const Traffic expected = pass_traffic(checkpoint.config, checkpoint.weights, KvType::f16, 1, 30);
    CHECK(traced.trace.total().memory == doctest::Approx(expected.total()));
    CHECK(traced.of("experts").memory == doctest::Approx(expected.experts));
    CHECK(traced.of("attention").memory == doctest::Approx(expected.kv_cache));
  }
}

TEST_CASE("boxes that a backend has whole count what their operations do") {
  const Checkpoint checkpoint = Checkpoint::open(test::golden("release"));
  const std::vector<std::int32_t> tokens{5, 6, 7, 8, 9};
  TracedRun plain(checkpoint);
  Trace trace;
  test::RunModel<Traced<Boxed>> boxed(checkpoint, Traced<Boxed>(Boxed(cpu_backend()), trace), 100);
  CHECK(boxed.logits(tokens) == plain.run.logits(tokens));
  const OpCost whole = trace.total(), parts = plain.trace.total();
  CHECK(whole.memory == doctest::Approx(parts.memory));
  CHECK(whole.integer_macs + whole.floating_macs == doctest::Approx(parts.integer_macs + parts.floating_macs));
  CHECK(whole.activations < parts.activations);
  std::vector<std::string> names;
  for (const Trace::Op& op : trace.ops()) names.push_back(op.name);
  std::sort(names.begin(), names.end());
  CHECK(names == std::vector<std::string>{"attention", "delta_net", "embed", "experts, shared", "linear", "rms_norm",
                                          "rope_angles"});

  trace.on = false;  // nothing is counted, and nothing else changes
  trace.clear();
  CHECK(boxed.logits(tokens) == plain.run.logits(tokens));
  CHECK(trace.ops().empty());
}

TEST_CASE("a batch counts shared weights once, and experts as the router picked them") {
  const Checkpoint checkpoint = Checkpoint::open(test::golden("release"));
  const Config& c = checkpoint.config;
  auto memory = [&](int sequences, bool same) {
    TracedRun traced(checkpoint, sequences);
    std::vector<std::unique_ptr<SequenceState<Traced<CpuBackend>>>> owned;
    std::vector<SequenceState<Traced<CpuBackend>>*> states;
    std::vector<std::vector<std::int32_t>> tokens;
    for (int i = 0; i < sequences; ++i) {
      owned.push_back(std::make_unique<SequenceState<Traced<CpuBackend>>>(traced.run.be, c));
      states.push_back(owned.back().get());
      tokens.push_back({same ? 7 : (7 + 31 * i) % c.vocab_size});
    }
    traced.run.step(states, tokens);
    return traced.of("experts").memory;
  };
  const Traffic one = pass_traffic(c, checkpoint.weights, KvType::f16, 1, 0);
  CHECK(memory(1, true) == doctest::Approx(one.experts));
  CHECK(memory(8, true) == doctest::Approx(one.experts));  // eight times the same experts
  CHECK(memory(8, false) > 1.1 * one.experts);
  CHECK(memory(8, false) < 8 * one.experts);
}

TEST_CASE("multiply-adds of a pass") {
  const Checkpoint checkpoint = Checkpoint::open(test::golden("release"));
  const Config& c = checkpoint.config;
  TracedRun traced(checkpoint);
  auto s = traced.run.state();
  traced.run.step(s, std::vector<std::int32_t>(7, 3));
  const double T = 7, attention_layers = c.num_hidden_layers -
                                         static_cast<double>(std::count(c.layer_types.begin(), c.layer_types.end(),
                                                                        LayerType::linear_attention));
  const double delta_layers = c.num_hidden_layers - attention_layers;
  const OpCost experts = traced.of("experts");
  CHECK(experts.integer_macs + experts.floating_macs ==
        T * c.num_hidden_layers * c.num_experts_per_tok * 3 * c.hidden_size * c.moe_intermediate_size);
  CHECK(traced.of("attention").floating_macs ==
        attention_layers * (1 + 2 + 3 + 4 + 5 + 6 + 7) * 2 * c.num_attention_heads * c.head_dim);
  CHECK(traced.of("gated_delta_rule").floating_macs ==
        delta_layers * T * 3 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim);
  CHECK(traced.of("causal_conv1d").floating_macs == delta_layers * T * c.conv_dim() * c.linear_conv_kernel_dim);
}
