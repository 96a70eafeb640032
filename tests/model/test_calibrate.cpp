// What a calibration counts, and that counting changes nothing.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "backends/calibrating_backend.hpp"
#include "backends/cpu/cpu_backend.hpp"
#include "backends/reference/reference_backend.hpp"
#include "blocks/codec.hpp"
#include "generate/calibrate.hpp"
#include "tests/support/backends.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/run_model.hpp"
#include "tests/support/temp_folder.hpp"
#include "weights/quantize.hpp"

using namespace qwen3next;
using test::nmse;

namespace {

using Watched = CalibratingBackend<ReferenceBackend>;
static_assert(BackendOps<Watched> && BackendOps<CalibratingBackend<CpuBackend>>);

WeightView view_of(const std::vector<float>& values, int rows, int cols) {
  return WeightView::contiguous(reinterpret_cast<const std::byte*>(values.data()), DType::f32, rows, cols);
}

std::vector<float> importance(const ActivationStatistics& statistics, const WeightView& matrix) {
  std::vector<float> out;
  statistics.importance(matrix, out);
  REQUIRE(out.size() == static_cast<std::size_t>(matrix.cols));
  return out;
}

// All matrices of a layer, in the order of model/weights.hpp.
template <class F>
void for_matrices(const ModelWeights<Views>& w, F f) {
  struct Ask {
    F& f;
    void operator()(const WeightView& v, WeightView&) const { f(v); }
    void operator()(const VectorView&, VectorView&) const {}
    void operator()(const ExpertViews& experts, ExpertViews&) const {
      for (const ExpertView& e : experts) f(e.gate), f(e.up), f(e.down);
    }
  };
  ModelWeights<Views> unused;
  zip(w, unused, Ask{f});
}

}  // namespace

TEST_CASE("a calibrating backend computes what its base computes") {
  for (const std::string name : {"release", "fused", "yarn"}) {
    CAPTURE(name);
    const Checkpoint checkpoint = Checkpoint::open(test::golden(name));
    const std::vector<std::int32_t> tokens = test::Expected(name).tokens();
    ActivationStatistics statistics;
    const auto compare = [&](auto base, auto watched) {
      test::RunModel plain(checkpoint, std::move(base), static_cast<int>(tokens.size()));
      test::RunModel run(checkpoint, std::move(watched), static_cast<int>(tokens.size()));
      CHECK(nmse(run.logits(tokens), plain.logits(tokens)) < 1e-9);
      if (checkpoint.config.has_mtp) CHECK(nmse(run.mtp_logits(tokens), plain.mtp_logits(tokens)) < 1e-9);
    };
    compare(ReferenceBackend(), Watched(ReferenceBackend(), statistics));
    const auto cpu = [] { return CpuBackend(test::cpu("", 2, KvType::f32)); };
    compare(cpu(), CalibratingBackend(cpu(), statistics));
  }
}

TEST_CASE("importance is the mean square of the inputs, as if 32 more rows had been alike") {
  const std::vector<float> w(12), v(12);
  const WeightView a = view_of(w, 4, 3), b = view_of(v, 4, 3);
  ActivationStatistics statistics;
  Watched be(ReferenceBackend(), statistics);
  auto x = be.tensor(2, 3), y = be.tensor(2, 4), z = be.tensor(2, 4);
  const float rows[2][3] = {{1, -2, 0}, {3, 4, 0}};
  for (int t = 0; t < 2; ++t) std::copy_n(rows[t], 3, x.row(t));
  be.linear(x, {{a, y}, {b, z}});
  statistics.finish();
  const float alike = (1 + 9 + 4 + 16) / 6.0f;
  const float expected[] = {(1 + 9 + 32 * alike) / 34, (4 + 16 + 32 * alike) / 34, 32 * alike / 34};
  for (const WeightView& matrix : {a, b}) {
    const std::vector<float> found = importance(statistics, matrix);
    for (int c = 0; c < 3; ++c) CHECK(found[static_cast<std::size_t>(c)] == doctest::Approx(expected[c]));
    CHECK(statistics.rows(matrix) == 2);
  }
  const std::vector<float> other(3);
  CHECK(!statistics.has(view_of(other, 1, 3)));
}

TEST_CASE("an expert counts its own tokens, and leans on the layer's where it has few") {
  constexpr int E = 3, H = 4, I = 2, T = 40;
  std::vector<float> w(E * 3 * H * I);
  for (std::size_t i = 0; i < w.size(); ++i) w[i] = std::sin(static_cast<float>(i));
  ExpertViews experts(E);
  for (std::size_t e = 0; e < E; ++e) {
    const auto* at = reinterpret_cast<const std::byte*>(w.data() + e * 3 * H * I);
    experts[e].gate = WeightView::contiguous(at, DType::f32, I, H);
    experts[e].up = WeightView::contiguous(at + experts[e].gate.bytes(), DType::f32, I, H);
    experts[e].down = WeightView::contiguous(at + 2 * experts[e].gate.bytes(), DType::f32, H, I);
  }
  ActivationStatistics statistics;
  Watched be(ReferenceBackend(), statistics);
  auto x = be.tensor(T, H), out = be.tensor(T, H);
  auto routing = be.routing(T, 1);
  routing.rows = T, routing.k = 1;
  std::vector<double> sum(H), first(H);
  for (int t = 0; t < T; ++t) {
    for (int c = 0; c < H; ++c) {
      x.row(t)[c] = std::cos(static_cast<float>(t * H + c)) * static_cast<float>(c);
      sum[static_cast<std::size_t>(c)] += x.row(t)[c] * x.row(t)[c];
      if (t < 4) first[static_cast<std::size_t>(c)] += x.row(t)[c] * x.row(t)[c];
    }
    routing.ids[static_cast<std::size_t>(t)] = t < 4 ? 0 : 1;  // the last expert gets none
    routing.weights[static_cast<std::size_t>(t)] = 1;
  }
  be.experts(out, x, experts, routing);
  statistics.finish();

  CHECK(statistics.rows(experts[0].gate) == 4);
  CHECK(statistics.rows(experts[0].down) == 4);
  CHECK(statistics.rows(experts[1].up) == T - 4);
  CHECK(statistics.rows(experts[2].gate) == 0);
  const double flat = std::accumulate(sum.begin(), sum.end(), 0.0) / (T * H);
  const std::vector<float> own = importance(statistics, experts[0].gate), none = importance(statistics, experts[2].up);
  for (std::size_t c = 0; c < H; ++c) {
    const double layer = (sum[c] + 32 * flat) / (T + 32);
    CHECK(static_cast<double>(none[c]) == doctest::Approx(layer));
    CHECK(static_cast<double>(own[c]) == doctest::Approx((first[c] + 32 * layer) / (4 + 32)));
  }
  for (const float c : importance(statistics, experts[2].down)) CHECK(c == 1);
}

TEST_CASE("calibration sees every matrix, and batches do not show") {
  const Checkpoint checkpoint = Checkpoint::open(test::golden("release"));
  const Config& c = checkpoint.config;
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < 101; ++i) tokens.push_back(i * i % c.vocab_size);
  const auto collect = [&](int window, int batch) {
    std::int64_t last = 0;
    auto statistics = calibrate(checkpoint, tokens, {.threads = 2, .window = window, .batch = batch},
                                [&](std::int64_t done, std::int64_t total) {
                                  CHECK(done >= last);
                                  CHECK(total == 100);
                                  return last = done, true;
                                });
    CHECK(last == 100);
    return statistics;
  };
  const ActivationStatistics one = collect(24, 24), many = collect(24, 80), again = collect(24, 80);
  for_matrices(checkpoint.weights, [&](const WeightView& m) {
    if (m.data == checkpoint.weights.embed_tokens.data) return;
    REQUIRE(one.has(m));
    CHECK(one.rows(m) == many.rows(m));
    CHECK(nmse(importance(one, m), importance(many, m)) < 1e-9);
    CHECK(importance(many, m) == importance(again, m));
  });
  CHECK(!one.has(checkpoint.weights.embed_tokens));
  CHECK(one.rows(checkpoint.weights.lm_head) == 100);
  for (const LayerWeights<Views>* layer : {&checkpoint.weights.layers[0], &checkpoint.weights.mtp->layer}) {
    std::int64_t routed = 0;
    for (const ExpertView& e : layer->mlp.experts) routed += one.rows(e.down);
    CHECK(routed == 100 * c.num_experts_per_tok);
    CHECK(one.rows(layer->mlp.gate) == 100);
  }
  // A window that is cut elsewhere is another context, so other inputs.
  CHECK(importance(one, checkpoint.weights.lm_head) != importance(collect(50, 80), checkpoint.weights.lm_head));
}

TEST_CASE("calibration can be cancelled in the middle of a batch, and refuses what it cannot read") {
  const Checkpoint checkpoint = Checkpoint::open(test::golden("release"));
  std::vector<std::int32_t> tokens(50, 3);
  int calls = 0;
  CHECK_THROWS_AS(calibrate(checkpoint, tokens, {}, [&](std::int64_t, std::int64_t) { return ++calls < 3; }),
                  Cancelled);
  CHECK(calls == 3);
  CHECK_THROWS_WITH_AS(calibrate(checkpoint, std::span(tokens).first(1), {}), doctest::Contains("too short"), Error);
  tokens[7] = checkpoint.config.vocab_size;
  CHECK_THROWS_WITH_AS(calibrate(checkpoint, tokens, {}), doctest::Contains("vocabulary"), Error);
}

TEST_CASE("calibrated weights err less where it matters") {
  const test::TempFolder folder;
  const Checkpoint in = Checkpoint::open(QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf");
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < 400; ++i) tokens.push_back((i * i + 7 * i) % 8000);
  const ActivationStatistics statistics = calibrate(in, tokens, {.window = 100});
  QuantizeOptions options{.type = "BF16"};
  for (const char* name : {R"(blk\.0\.ffn_down_exps)", R"(blk\.1\.ffn_up_shexp)", R"(blk\.8\.attn_q\.)"}) {
    options.tensor_types.emplace_back(name, DType::q3_k);
  }
  quantize(in, folder / "plain.gguf", options);
  options.calibration = {&statistics, "squares", 399};
  quantize(in, folder / "calibrated.gguf", options);
  const Checkpoint plain = Checkpoint::open(folder / "plain.gguf"), best = Checkpoint::open(folder / "calibrated.gguf");
  CHECK(best.metadata.get<std::string_view>("quantize.calibration.file") == "squares");
  CHECK(best.metadata.get<std::int64_t>("quantize.calibration.tokens") == 399);
  CHECK(!plain.metadata.has("quantize.calibration.file"));

  const auto error = [&](const WeightView& source, const WeightView& stored) {
    const std::vector<float> weight = importance(statistics, source);
    std::vector<float> a(weight.size()), b(weight.size());
    double sum = 0;
    for (int r = 0; r < source.rows; ++r) {
      dequantize_row(source.type, source.row(r), a.data(), source.cols);
      dequantize_row(stored.type, stored.row(r), b.data(), stored.cols);
      for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(weight[i] * (a[i] - b[i]) * (a[i] - b[i]));
    }
    return sum;
  };
  const auto better = [&](auto matrix, double factor) {
    const double without = error(matrix(in.weights), matrix(plain.weights));
    const double with = error(matrix(in.weights), matrix(best.weights));
    CAPTURE(without);
    CAPTURE(with);
    CHECK(without > 0);
    CHECK(with < factor * without);
  };
  better([](const auto& w) { return w.layers[0].mlp.experts[5].down; }, 0.995);
  better([](const auto& w) { return w.layers[1].mlp.shared_up_proj; }, 0.995);
  better([](const auto& w) { return w.mtp->layer.self_attn->q_proj; }, 0.995);

  // Statistics of one object say nothing about another.
  const Checkpoint other = Checkpoint::open(folder / "plain.gguf");
  CHECK_THROWS_WITH_AS(quantize(other, folder / "x.gguf", {.type = "Q8_0", .calibration = options.calibration}),
                       doctest::Contains("no part in the calibration"), Error);
}
