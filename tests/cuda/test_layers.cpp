// Every box of a layer, as the model calls it, against the reference backend on the very same inputs: names the first
// one that is wrong.

#include <doctest/doctest.h>

#include <map>
#include <string>
#include <vector>

#include "backends/cuda/cuda_backend.hpp"
#include "backends/reference/reference_backend.hpp"
#include "model/forward.hpp"
#include "tests/cuda/gpu.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/run_model.hpp"
#include "weights/checkpoint.hpp"

using namespace qwen3next;

namespace {

const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";

// The boxes, each followed by the reference's.
class Checked : public test::Gpu {
 public:
  using Gpu::Gpu;
  double bound = 1e-4;  // of activations as f16: a projection to one or two columns may cancel most of what it adds up

  void take(const WeightView& view, cuda::CudaWeight& w) { Gpu::take(view, w), weights_[w.matrix().data] = view; }
  void take(const VectorView& view, cuda::CudaVector& v) { Gpu::take(view, v), vectors_[v.data] = view; }
  void take(const ExpertViews& views, cuda::CudaExperts& e) { Gpu::take(views, e), experts_[e.matrices.slots] = views; }
  bool gathered = false;
  bool begin_pass() { return gathered && Gpu::begin_pass(); }

  void embed(Tensor out, std::span<const std::int32_t> tokens, const Weight& w) {
    Gpu::embed(out, tokens, w);
    HostTensor expected = like(out);
    reference_.embed(expected, tokens, of(w));
    check("embed", out, expected);
  }
  void norm_linear(Tensor h, Tensor x, const Vector& norm, float eps, Projections projections) {
    HostTensor in = read(x), expected_h = like(h);
    Gpu::norm_linear(h, x, norm, eps, projections);
    reference_.rms_norm(expected_h, in, of(norm), eps);
    check("rms_norm", h, expected_h);
    int i = 0;
    for (const auto& p : projections) {
      HostTensor y = like(p.y);
      reference_.linear(expected_h, {{of(p.weight), y}});
      if (y.n_cols == 1) continue;  // nearly cancels now and then: experts_add is where it counts
      check("projection " + std::to_string(i++) + " of a norm", p.y, y);
    }
  }
  void linear_add(Tensor x, Tensor in, const Weight& w, Tensor y) {
    HostTensor before = read(x), from = read(in), product = like(x);
    Gpu::linear_add(x, in, w, y);
    reference_.linear(from, {{of(w), product}});
    reference_.add(before, product);
    check("linear_add", x, before);
  }
  void gated_norm_linear_add(Tensor x, Tensor o, Tensor z, const Vector& norm, float eps, const Weight& w, Tensor y) {
    HostTensor before = read(x), from = read(o), gate = read(z), product = like(x);
    Gpu::gated_norm_linear_add(x, o, z, norm, eps, w, y);
    reference_.gated_rms_norm(from, from, gate, of(norm), eps);
    reference_.linear(from, {{of(w), product}});
    reference_.add(before, product);
    check("gated_norm_linear_add", x, before);
  }
  void delta_net(Tensor o, Tensor conv, Tensor qkv, Tensor b, Tensor a, Tensor beta, Tensor g, const Vector& taps,
                 const Vector& A, const Vector& dt_bias, DeltaShape shape,
                 std::span<const Segment<DeltaState>> segments) {
    HostTensor in = read(qkv), b_in = read(b), a_in = read(a);
    std::vector<HostDeltaState> states;
    for (const auto& s : segments) states.push_back(s.state->to_host());
    Gpu::delta_net(o, conv, qkv, b, a, beta, g, taps, A, dt_bias, shape, segments);
    std::vector<Segment<HostDeltaState>> theirs;
    for (std::size_t i = 0; i < states.size(); ++i)
      theirs.push_back({segments[i].begin, segments[i].count, segments[i].position, &states[i]});
    HostTensor beta_out = like(b), g_out = like(a), mixed = like(qkv), out = like(o);
    reference_.delta_gates(beta_out, g_out, b_in, a_in, of(A), of(dt_bias));
    reference_.causal_conv1d(mixed, in, of(taps), theirs);
    reference_.gated_delta_rule(out, mixed, beta_out, g_out, shape, theirs);
    check("delta_net", o, out);
  }
  void gated_attention(Tensor heads, Tensor q, Tensor gate, Tensor k, Tensor v, const Vector& q_norm,
                       const Vector& k_norm, float eps, Tensor angles, AttentionShape shape,
                       std::span<const Segment<KvCache>> segments) {
    HostTensor q_in = read(q), gate_in = read(gate), k_in = read(k), v_in = read(v), turn = read(angles);
    std::vector<HostKvCache> caches;
    for (const auto& s : segments) caches.push_back(s.state->to_host());
    Gpu::gated_attention(heads, q, gate, k, v, q_norm, k_norm, eps, angles, shape, segments);
    std::vector<Segment<HostKvCache>> theirs;
    for (std::size_t i = 0; i < caches.size(); ++i)
      theirs.push_back({segments[i].begin, segments[i].count, segments[i].position, &caches[i]});
    HostTensor out = like(heads);
    reference_.rms_norm(q_in, q_in, of(q_norm), eps);
    reference_.rms_norm(k_in, k_in, of(k_norm), eps);
    reference_.rope(q_in, turn, shape.head_dim);
    reference_.rope(k_in, turn, shape.head_dim);
    reference_.attention(out, q_in, k_in, v_in, shape, theirs);
    reference_.sigmoid_gate(out, gate_in);
    check("gated_attention", heads, out);
  }
  void experts_add(Tensor x, Tensor h, Tensor logits, Routing& routing, const Experts& experts,
                   const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) {
    HostTensor before = read(x), in = read(h), scores = read(logits), shared_gate = read(shared.gate);
    Gpu::experts_add(x, h, logits, routing, experts, shared, k, normalise);
    HostRouting picks(in.n_rows, k);
    HostTensor mix = like(x), y = like(x), gate = like(shared.hidden), up = like(shared.up);
    reference_.router(picks, scores, k, normalise);
    reference_.experts(mix, in, experts_.at(experts.matrices.slots), picks);
    reference_.linear(in, {{of(shared.gate_proj), gate}, {of(shared.up_proj), up}});
    reference_.swiglu(gate, gate, up);
    reference_.linear(gate, {{of(shared.down_proj), y}});
    reference_.add_gated(mix, y, shared_gate);
    reference_.add(before, mix);
    check("experts_add", x, before);
  }

 private:
  HostTensor like(const Tensor& t) { return reference_.tensor(t.n_rows, t.n_cols); }
  HostTensor read(const Tensor& t) {
    HostTensor host = like(t);
    for (int r = 0; r < t.n_rows; ++r) {
      const std::span<const float> row = this->host(t.rows(r, 1));
      std::copy(row.begin(), row.end(), host.row(r));
    }
    return host;
  }
  const WeightView& of(const Weight& w) const { return weights_.at(w.matrix().data); }
  const VectorView& of(const Vector& v) const { return vectors_.at(v.data); }
  void check(const std::string& what, const Tensor& found, const HostTensor& expected) {
    const HostTensor mine = read(found);
    double error = 0, power = 0;
    for (int r = 0; r < mine.n_rows; ++r) {
      for (int c = 0; c < mine.n_cols; ++c) {
        const double d = static_cast<double>(mine.row(r)[c]) - static_cast<double>(expected.row(r)[c]);
        error += d * d, power += static_cast<double>(expected.row(r)[c]) * static_cast<double>(expected.row(r)[c]);
      }
    }
    const double nmse = error / (power > 0 ? power : 1);
    CAPTURE(what);
    CAPTURE(mine.n_rows);
    CHECK(nmse < bound);
  }

  ReferenceBackend reference_;
  std::map<const void*, WeightView> weights_;
  std::map<const void*, VectorView> vectors_;
  std::map<const void*, ExpertViews> experts_;
};

}  // namespace

TEST_CASE("layers on a GPU: each box gives what the reference gives on the same inputs") {
  std::vector<std::string> paths{tiny};
  for (const char* name : {"release", "fused", "sharded", "yarn", "fp8"}) paths.push_back(test::golden(name).string());
  for (const std::string& path : paths) {
    CAPTURE(path);
    const Checkpoint checkpoint = Checkpoint::open(path);
    test::RunModel<Checked> run(checkpoint, Checked(KvType::f32), 40);
    auto state = run.state();
    for (const int T : {1, 1, 21, 1, 1, 2, 5, 8, 9, 1}) {
      run.be.gathered = state.position % 2 == 1;
      CAPTURE(run.be.gathered);
      std::vector<std::int32_t> tokens;
      for (int i = 0; i < T; ++i)
        tokens.push_back(static_cast<std::int32_t>(((state.position + i) * 7919 + 13) % checkpoint.config.vocab_size));
      const SequenceRows<Checked> rows{0, T, state.position, &state};
      forward<Checked>(run.be, run.config, run.weights, tokens, {&rows, 1}, run.a);
    }
  }
}
