// The products of many rows: router, linear_many, experts_many.
//   --test-case="bench: many*" --no-skip     times on the shapes of the 80B model

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <span>
#include <vector>

#include "backends/cuda/experts_many.hpp"
#include "backends/cuda/linear_many.hpp"
#include "backends/cuda/router.hpp"
#include "backends/cuda/weights.hpp"
#include "tests/cuda/gpu.hpp"
#include "tests/ops/cpu_ops.hpp"

using namespace qwen3next;
using namespace qwen3next::test;
using cuda::CudaTensor;

namespace {

// A tensor in the card's memory, and its way there and back.
struct DeviceTensor {
  DeviceTensor(int rows, int cols) {
    const std::ptrdiff_t stride = (cols + 63) / 64 * 64;
    const auto n = static_cast<std::size_t>(rows * stride);
    memory = cuda::DeviceBytes(gpu(), n * 6, "a test");
    gpu()->clear(memory.data(), memory.size());
    auto* data = memory.data<float>();
    t = {data, reinterpret_cast<std::uint16_t*>(data + n), rows, cols, stride};
  }
  explicit DeviceTensor(const Rows& rows)
      : DeviceTensor(static_cast<int>(rows.size()), static_cast<int>(rows[0].size())) {
    std::vector<float> data(static_cast<std::size_t>(t.n_rows * t.stride));
    std::vector<std::uint16_t> half(data.size());
    for (int r = 0; r < t.n_rows; ++r) {
      for (int c = 0; c < t.n_cols; ++c) {
        const float value = rows[static_cast<std::size_t>(r)][static_cast<std::size_t>(c)];
        data[static_cast<std::size_t>(r * t.stride + c)] = value;
        half[static_cast<std::size_t>(r * t.stride + c)] = f32_to_f16(value);
      }
    }
    gpu()->copy_to_device(t.data, data.data(), data.size() * 4);
    gpu()->copy_to_device(t.half, half.data(), half.size() * 2);
  }
  Rows read() const {
    std::vector<float> data(static_cast<std::size_t>(t.n_rows * t.stride));
    gpu()->copy_to_host(data.data(), t.data, data.size() * 4);
    Rows rows;
    for (int r = 0; r < t.n_rows; ++r)
      rows.emplace_back(data.begin() + r * t.stride, data.begin() + r * t.stride + t.n_cols);
    return rows;
  }

  cuda::DeviceBytes memory;
  CudaTensor t;
};

template <class T>
std::vector<T> read(const T* from, std::ptrdiff_t n) {
  std::vector<T> values(static_cast<std::size_t>(n));
  if (n > 0) gpu()->copy_to_host(values.data(), from, values.size() * sizeof(T));
  return values;
}

// Values that f16 holds: then only the weights' rounding is an error.
Rows f16_rows(Random& random, int rows, int cols, float scale = 1) {
  Rows x = random_rows(random, rows, cols, scale);
  for (auto& row : x) {
    for (float& value : row) value = f16_to_f32(f32_to_f16(value));
  }
  return x;
}

// Where the first bad one is, for the log.
std::string first_difference(const Rows& found, const Rows& expected, double tolerance) {
  for (std::size_t r = 0; r < found.size(); ++r) {
    double scale = 0;
    for (const float v : expected[r]) scale += static_cast<double>(v) * static_cast<double>(v);
    scale = std::sqrt(scale / static_cast<double>(expected[r].size()));
    for (std::size_t c = 0; c < found[r].size(); ++c) {
      if (std::abs(found[r][c] - expected[r][c]) <= tolerance * scale) continue;
      return "row " + std::to_string(r) + " column " + std::to_string(c) + ": " + std::to_string(found[r][c]) +
             ", expected " + std::to_string(expected[r][c]);
    }
  }
  return "none";
}

constexpr DType all_types[] = {DType::q4_k, DType::q6_k, DType::q8_0,    DType::f16,  DType::iq4_nl, DType::mxfp4,
                               DType::f32,  DType::bf16, DType::f8_e4m3, DType::q4_0, DType::q4_1,   DType::q5_0,
                               DType::q5_1, DType::q2_k, DType::q3_k,    DType::q5_k, DType::iq4_xs, DType::nvfp4};

Rows with_ties(Random& random, int rows, int experts) {
  Rows logits = random_rows(random, rows, experts, 2);
  for (std::size_t t = 0; t < logits.size(); t += 2) {
    for (float& value : logits[t]) value = std::round(value);  // many equal ones
  }
  return logits;
}

struct RoutingOnHost {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

// A routing in the card's memory, of given ids.
cuda::CudaRouting to_device(const RoutingOnHost& r, int rows, int k) {
  cuda::CudaRouting routing(gpu(), rows, k);
  gpu()->copy_to_device(routing.ids, r.ids.data(), r.ids.size() * 4);
  gpu()->copy_to_device(routing.weights, r.weights.data(), r.weights.size() * 4);
  return routing;
}

// `k` different experts for each row.  Skewed: expert 0 for all, others rarely.
RoutingOnHost random_routing(Random& random, int rows, int k, int experts, bool skewed) {
  RoutingOnHost r;
  for (int t = 0; t < rows; ++t) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    if (!skewed) std::shuffle(order.begin(), order.end(), random.engine);
    for (int i = 0; i < k; ++i) {
      r.ids.push_back(order[static_cast<std::size_t>(i)]);
      r.weights.push_back(0.1f + 0.01f * static_cast<float>(random.below(50)));
    }
  }
  return r;
}

}  // namespace

TEST_CASE("router: as the reference") {
  Random random;
  struct Case {
    int rows, experts, k;
  };
  for (const Case c : {Case{1, 5, 3},
                       {9, 32, 4},
                       {33, 128, 8},
                       {300, 512, 10},
                       {17, 512, 16},
                       {5, 700, 10},
                       {3, 64, 64},
                       {4, 100, 40},
                       {2000, 512, 10}}) {
    for (const bool normalise : {true, false}) {
      CAPTURE(c.rows);
      CAPTURE(c.experts);
      CAPTURE(c.k);
      CAPTURE(normalise);
      Rows logits = with_ties(random, c.rows, c.experts);
      if (c.rows > 4) logits[3][2] = NAN;
      if (c.rows > 4) logits[4][1] = -INFINITY;
      ReferenceBackend reference;
      auto expected = reference.routing(c.rows, c.k);
      reference.router(expected, make(reference, logits), c.k, normalise);
      const DeviceTensor on_device(logits);
      cuda::CudaRouting routing(gpu(), c.rows, c.k);
      cuda::router(*gpu(), routing, on_device.t, c.k, normalise);
      const auto ids = read(routing.ids, routing.picks());
      const auto weights = read(routing.weights, routing.picks());
      int wrong = 0;
      double error = 0;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        // Sums in another order may part or join probabilities that are neighbours: the weight tells.
        if (ids[i] != expected.ids[i]) ++wrong;
        error = std::max(error, static_cast<double>(std::abs(weights[i] - expected.weights[i])));
      }
      CHECK(wrong == 0);
      CHECK(error < 1e-6);
    }
  }
}

TEST_CASE("router: picks sorted by expert") {
  Random random;
  struct Case {
    int rows, experts, k, tile_rows;
  };
  for (const Case c : {Case{1, 4, 1, 8},
                       {9, 32, 4, 8},
                       {64, 512, 10, 16},
                       {300, 512, 10, 16},
                       {500, 40, 10, 32},
                       {3000, 512, 10, 128},
                       {8192, 512, 10, 128},
                       {700, 1100, 10, 16}}) {
    for (const bool skewed : {false, true}) {
      CAPTURE(c.rows);
      CAPTURE(c.experts);
      CAPTURE(skewed);
      const RoutingOnHost host = random_routing(random, c.rows, c.k, c.experts, skewed);
      const cuda::CudaRouting routing = to_device(host, c.rows, c.k);
      cuda::DeviceBytes memory(gpu(), cuda::pick_groups_bytes(c.rows, c.k, c.experts, c.tile_rows), "a test");
      const cuda::PickGroups groups = cuda::group_picks(*gpu(), routing, c.experts, c.tile_rows, memory.data());
      std::vector<std::int32_t> expected(host.ids.size()), offsets{0};
      std::iota(expected.begin(), expected.end(), 0);
      std::stable_sort(expected.begin(), expected.end(), [&](int a, int b) {
        return host.ids[static_cast<std::size_t>(a)] < host.ids[static_cast<std::size_t>(b)];
      });
      for (int e = 0; e < c.experts; ++e)
        offsets.push_back(offsets.back() + static_cast<int>(std::count(host.ids.begin(), host.ids.end(), e)));
      CHECK(read(groups.picks, routing.picks()) == expected);
      CHECK(read(groups.offsets, c.experts + 1) == offsets);
      const int n_tiles = read(groups.n_tiles, 1)[0];
      CHECK(n_tiles <= groups.max_tiles);
      int at = 0;  // tiles cover the picks of every expert in order
      bool good = true;
      for (const cuda::PickTile& tile : read(groups.tiles, n_tiles)) {
        good = good && tile.first == at && tile.count > 0 && tile.count <= c.tile_rows && tile.expert < c.experts &&
               tile.first >= offsets[static_cast<std::size_t>(tile.expert)] &&
               tile.first + tile.count <= offsets[static_cast<std::size_t>(tile.expert) + 1];
        at += tile.count;
      }
      CHECK(good);
      CHECK(at == routing.picks());
    }
  }
}

TEST_CASE("linear_many: every type, many row counts") {
  Random random;
  for (const DType type : all_types) {
    for (const auto& [N, D] : {std::pair{80, 768}, {272, 256}, {35, 1536}}) {
      const Matrix a(random, type, N, D, 1, 0.5f), b(random, type, 16, D, 0, 0.5f);
      cuda::Uploader uploader(gpu());
      const cuda::CudaWeight wa = uploader.weight(a.view), wb = uploader.weight(b.view);
      uploader.finish();
      const Rows all = f16_rows(random, 300, D);
      const Rows all_a = exact_product(a.view, all, false), all_b = exact_product(b.view, all, false);
      for (const int T : {9, 16, 17, 33, 64, 100, 300}) {
        const DeviceTensor x(slice(all, 0, T)), ya(T, N), yb(T, 16);
        const cuda::ManyOutput outputs[] = {{wa.matrix(), ya.t}, {wb.matrix(), yb.t}};
        cuda::linear_many(*gpu(), x.t, outputs);
        cuda::linear_many(*gpu(), x.t, std::span(outputs).first(1), 2, true);
        Rows expected = slice(all_a, 0, T);
        for (auto& row : expected) {
          for (float& value : row) value *= 3;
        }
        const double error = std::max(nmse(ya.read(), expected), nmse(yb.read(), slice(all_b, 0, T)));
        const std::string name(info(type).name), where = first_difference(ya.read(), expected, 0.01);
        CAPTURE(name);
        CAPTURE(N);
        CAPTURE(D);
        CAPTURE(T);
        CAPTURE(where);
        CHECK(error < (type == DType::f32 ? 1e-12 : 3e-6));
        if (T == 300) std::printf("%s %d x %d: nmse %.2g\n", name.c_str(), N, D, error);
      }
    }
  }
}

TEST_CASE("linear_many: odd shapes, mixed types") {
  Random random;
  for (const int D : {20, 72, 136}) {
    const Matrix a(random, DType::f16, 7, D, 0), b(random, DType::f32, 1, D, 0), c(random, DType::bf16, 50, D, 0),
        d(random, DType::f32, 40, D, 0);
    cuda::Uploader uploader(gpu());
    const Matrix* const matrices[] = {&a, &b, &c, &d};
    std::vector<cuda::CudaWeight> weights;
    for (const Matrix* m : matrices) weights.push_back(uploader.weight(m->view));
    uploader.finish();
    for (const int T : {9, 40, 130}) {
      const Rows rows = f16_rows(random, T, D);
      const DeviceTensor x(rows);
      std::vector<DeviceTensor> y;
      std::vector<cuda::ManyOutput> outputs;
      for (const auto& w : weights) y.emplace_back(T, w.rows());
      for (std::size_t i = 0; i < y.size(); ++i) outputs.push_back({weights[i].matrix(), y[i].t});
      cuda::linear_many(*gpu(), x.t, outputs);
      for (std::size_t i = 0; i < y.size(); ++i) {
        const Rows expected = exact_product(matrices[i]->view, rows, false);
        CAPTURE(D);
        CAPTURE(T);
        CAPTURE(i);
        CHECK(nmse(y[i].read(), expected) < (matrices[i]->view.type == DType::f32 ? 1e-12 : 3e-6));
      }
    }
  }
}

TEST_CASE("linear_many: f32 products are those of f32") {
  Random random;
  const Matrix m(random, DType::f32, 512, 2048, 0, 0.02f);
  cuda::Uploader uploader(gpu());
  const cuda::CudaWeight w = uploader.weight(m.view);
  uploader.finish();
  for (const int T : {16, 200}) {
    const Rows rows = random_rows(random, T, 2048);
    const DeviceTensor x(rows), y(T, 512);
    const cuda::ManyOutput output{w.matrix(), y.t};
    cuda::linear_many(*gpu(), x.t, {&output, 1});
    const double error = nmse(y.read(), exact_product(m.view, rows, false));
    std::printf("f32 512 x 2048, %d rows: nmse %.2g\n", T, error);
    CHECK(error < 1e-13);
  }
}

TEST_CASE("experts_many: every type, empty and crowded experts") {
  Random random;
  struct Case {
    int experts, k, width, hidden;
  };
  for (const DType type : all_types) {
    const bool blocks = info(type).elements > 64;
    const std::vector<Case> cases =
        blocks ? std::vector<Case>{{12, 3, 256, 256}} : std::vector<Case>{{12, 3, 64, 192}, {5, 2, 128, 320}};
    for (const Case& c : cases) {
      std::vector<Matrix> matrices;
      ExpertViews views;
      for (int e = 0; e < c.experts; ++e) {
        for (int i = 0; i < 3; ++i) {
          const DType other = type == DType::q4_k && i == 1 ? DType::q6_k : type;  // up's
          matrices.emplace_back(random, other, i < 2 ? c.width : c.hidden, i < 2 ? c.hidden : c.width, 0, 0.1f);
        }
      }
      for (std::size_t e = 0; e < matrices.size(); e += 3)
        views.push_back({matrices[e].view, matrices[e + 1].view, matrices[e + 2].view});
      cuda::Uploader uploader(gpu());
      const cuda::CudaExperts experts = uploader.experts(views);
      uploader.finish();
      cuda::DeviceScratch scratch(gpu());
      for (const bool skewed : {false, true}) {
        constexpr int most = 300;
        const Rows all = f16_rows(random, most, c.hidden);
        RoutingOnHost host = random_routing(random, most, c.k, c.experts, skewed);
        ReferenceBackend reference;
        auto routing_of_reference = reference.routing(most, c.k);
        routing_of_reference.rows = most;
        std::copy(host.ids.begin(), host.ids.end(), routing_of_reference.ids.begin());
        std::copy(host.weights.begin(), host.weights.end(), routing_of_reference.weights.begin());
        const HostTensor out = reference.tensor(most, c.hidden);
        reference.experts(out, make(reference, all), views, routing_of_reference);
        const Rows all_expected = test::read(out);
        for (const int T : {300, 100, 64, 33, 16, 9}) {
          const Rows rows = slice(all, 0, T), expected = slice(all_expected, 0, T);
          host.ids.resize(static_cast<std::size_t>(T * c.k)), host.weights.resize(host.ids.size());
          const cuda::CudaRouting routing = to_device(host, T, c.k);
          const DeviceTensor x(rows), y(T, c.hidden);
          cuda::experts_many(*gpu(), scratch, {.out = y.t, .x = x.t, .experts = &experts, .routing = &routing});
          const Rows found = y.read();
          const double error = nmse(found, expected);
          const std::string name(info(type).name), where = first_difference(found, expected, 0.05);
          CAPTURE(name);
          CAPTURE(c.width);
          CAPTURE(c.hidden);
          CAPTURE(T);
          CAPTURE(skewed);
          CAPTURE(where);
          CHECK(error < 3e-6);
          if (T == 300 && !skewed) std::printf("experts %s width %d: nmse %.2g\n", name.c_str(), c.width, error);

          // With the shared expert, added to what is there; and once more: the same bits.
          const Rows shared_rows = random_rows(random, T, c.hidden), gate_rows = random_rows(random, T, 1);
          const DeviceTensor shared(shared_rows), gate(gate_rows);
          const cuda::ExpertsMany with_shared{.out = y.t,
                                              .x = x.t,
                                              .experts = &experts,
                                              .routing = &routing,
                                              .shared = shared.t,
                                              .shared_gate = gate.t,
                                              .add = true};
          cuda::experts_many(*gpu(), scratch, with_shared);
          Rows sums = expected;
          for (std::size_t t = 0; t < sums.size(); ++t) {
            for (std::size_t i = 0; i < sums[t].size(); ++i)
              sums[t][i] = 2 * sums[t][i] + shared_rows[t][i] / (1 + std::exp(-gate_rows[t][0]));
          }
          CHECK(nmse(y.read(), sums) < 3e-6);
          const DeviceTensor again(T, c.hidden);
          cuda::experts_many(*gpu(), scratch, {.out = again.t, .x = x.t, .experts = &experts, .routing = &routing});
          CHECK(again.read() == found);
        }
      }
    }
  }
}

// ---- times ----

namespace {

// Microseconds of f(i), over many calls.
template <class F>
double microseconds(F f) {
  cuda::DeviceTimer timer(gpu());
  f(0);
  timer.start();
  for (int i = 1; i <= 3; ++i) f(i);
  const double once = timer.seconds() / 3;
  const int calls = std::clamp(static_cast<int>(0.05 / once), 5, 300);
  timer.start();
  for (int i = 0; i < calls; ++i) f(i);
  return timer.seconds() / calls * 1e6;
}

struct ManyMatrices {  // > 200 MB of them: none is in the cache
  ManyMatrices(Random& random, DType type, int rows, int cols) {
    const Matrix m(random, type, rows, cols, 0, 0.1f);
    const int count = static_cast<int>(220e6 / static_cast<double>(m.view.bytes())) + 1;
    cuda::Uploader uploader(gpu());
    for (int i = 0; i < count; ++i) weights.push_back(uploader.weight(m.view));
    uploader.finish();
    bytes = weights[0].bytes();
  }
  const cuda::Matrix& operator[](int i) const { return weights[static_cast<std::size_t>(i) % weights.size()].matrix(); }
  std::vector<cuda::CudaWeight> weights;
  std::size_t bytes;
};

}  // namespace

TEST_CASE("bench: many, router" * doctest::skip()) {
  Random random;
  for (const int T : {16, 64, 512, 2048, 8192}) {
    const DeviceTensor logits(random_rows(random, T, 512, 2));
    cuda::CudaRouting routing(gpu(), T, 10);
    cuda::DeviceBytes memory(gpu(), cuda::pick_groups_bytes(T, 10, 512, 16), "a test");
    const double route = microseconds([&](int) { cuda::router(*gpu(), routing, logits.t, 10, true); });
    const double group =
        microseconds([&](int) { cuda::group_picks(*gpu(), routing, 512, T > 2048 ? 128 : 16, memory.data()); });
    std::printf("router T %5d: top-k %7.1f us   sort %7.1f us\n", T, route, group);
  }
}

TEST_CASE("bench: many, linear" * doctest::skip()) {
  Random random;
  struct Case {
    DType type;
    int rows, cols;
  };
  for (const Case c : {Case{DType::q4_k, 12288, 2048},
                       {DType::q4_k, 2048, 4096},
                       {DType::q4_k, 1024, 2048},
                       {DType::q6_k, 12288, 2048},
                       {DType::q8_0, 12288, 2048},
                       {DType::f16, 12288, 2048},
                       {DType::f32, 512, 2048}}) {
    const ManyMatrices w(random, c.type, c.rows, c.cols);
    for (const int T : {16, 32, 64, 128, 512, 2048, 8192}) {
      const DeviceTensor x(random_rows(random, T, c.cols)), y(T, c.rows);
      const double us = microseconds([&](int i) {
        const cuda::ManyOutput output{w[i], y.t};
        cuda::linear_many(*gpu(), x.t, {&output, 1});
      });
      const double flop = 2.0 * T * c.rows * c.cols;
      std::printf("linear %-6s %5d x %4d T %5d: %8.1f us %7.0f GB/s %6.1f TFLOP/s\n", info(c.type).name.data(), c.rows,
                  c.cols, T, us, static_cast<double>(w.bytes) / us * 1e-3, flop / us * 1e-6);
    }
  }
}

TEST_CASE("bench: many, experts" * doctest::skip()) {
  Random random;
  const int E = 512, k = 10, width = 512, H = 2048;
  const Matrix gate(random, DType::q4_k, width, H, 0, 0.1f);
  for (const DType down_type : {DType::q4_k, DType::q6_k}) {
    const Matrix down(random, down_type, H, width, 0, 0.1f);
    const ExpertViews views(static_cast<std::size_t>(E), {gate.view, gate.view, down.view});
    cuda::Uploader uploader(gpu());
    const cuda::CudaExperts experts = uploader.experts(views);
    uploader.finish();
    cuda::DeviceScratch scratch(gpu());
    const double slot = static_cast<double>(experts.matrices.slot_bytes());
    for (const int T : {9, 16, 64, 128, 256, 512, 2048, 8192}) {
      const DeviceTensor x(random_rows(random, T, H)), y(T, H);
      // Other rows each time: other experts, so that few rows do not find theirs in the cache.
      std::vector<cuda::CudaRouting> routings;
      double distinct = 0;
      const int draws = T < 512 ? 8 : 1;
      for (int i = 0; i < draws; ++i) {
        RoutingOnHost host = random_routing(random, T, k, E, false);
        routings.push_back(to_device(host, T, k));
        std::sort(host.ids.begin(), host.ids.end());
        distinct += static_cast<double>(std::unique(host.ids.begin(), host.ids.end()) - host.ids.begin()) / draws;
      }
      const double us = microseconds([&](int i) {
        cuda::experts_many(
            *gpu(), scratch,
            {.out = y.t, .x = x.t, .experts = &experts, .routing = &routings[static_cast<std::size_t>(i % draws)]});
      });
      std::printf("experts down %s T %5d: %8.1f us  %5.1f experts %6.0f GB/s %6.1f TFLOP/s\n",
                  info(down_type).name.data(), T, us, distinct, distinct * slot / us * 1e-3,
                  2.0 * T * k * 3 * width * H / us * 1e-6);
    }
  }
}
