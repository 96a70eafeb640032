// What a traced backend counts, and that counting changes nothing.

#include <doctest/doctest.h>

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
