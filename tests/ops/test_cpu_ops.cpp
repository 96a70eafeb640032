// Every operation of the CPU backend, on every ISA of this machine, against the reference backend; and the properties
// that hold whatever the batch: thread counts, batch sizes and neighbours don't change results.

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/reference/reference_backend.hpp"
#include "blocks/codec.hpp"
#include "tests/ops/levels.hpp"

using namespace qwen3next;

namespace {

CpuBackend cpu_backend(std::string_view isa, int threads = 2, KvType kv = KvType::f16) {
  return CpuBackend({&cpu::choose_kernels(isa, test::tested_levels()), threads, kv});
}

template <class F>
void on_every_isa(F f) {
  for (const cpu::Level& level : test::tested_levels()) {
    const std::string_view isa = level.name;
    CAPTURE(isa);
    f(isa);
  }
}

struct Random {
  std::mt19937 engine{42};
  float normal() { return std::normal_distribution<float>()(engine); }
  int below(int n) { return static_cast<int>(engine() % static_cast<unsigned>(n)); }
  std::vector<float> normals(std::size_t n, float scale = 1) {
    std::vector<float> v(n);
    for (float& x : v) x = scale * normal();
    return v;
  }
};

using Rows = std::vector<std::vector<float>>;

template <class B>
HostTensor make(B& be, const Rows& rows) {
  HostTensor t = be.tensor(static_cast<int>(rows.size()), static_cast<int>(rows[0].size()));
  for (int r = 0; r < t.n_rows; ++r)
    std::copy(rows[static_cast<std::size_t>(r)].begin(), rows[static_cast<std::size_t>(r)].end(), t.row(r));
  return t;
}
Rows random_rows(Random& random, int rows, int cols, float scale = 1) {
  Rows out(static_cast<std::size_t>(rows));
  for (auto& row : out) row = random.normals(static_cast<std::size_t>(cols), scale);
  return out;
}
Rows read(const HostTensor& t) {
  Rows out;
  for (int r = 0; r < t.n_rows; ++r) out.emplace_back(t.row(r), t.row(r) + t.n_cols);
  return out;
}

double nmse(const Rows& found, const Rows& expected) {
  double error = 0, power = 0;
  REQUIRE(found.size() == expected.size());
  for (std::size_t r = 0; r < found.size(); ++r) {
    REQUIRE(found[r].size() == expected[r].size());
    for (std::size_t i = 0; i < found[r].size(); ++i) {
      const double d = static_cast<double>(found[r][i]) - static_cast<double>(expected[r][i]);
      error += d * d;
      power += static_cast<double>(expected[r][i]) * static_cast<double>(expected[r][i]);
    }
  }
  return std::isfinite(error) ? error / std::max(power, 1e-30) : 1e30;
}

// A matrix with random contents at an odd address.
struct Matrix {
  // `natural`: normal values, quantised; else quantised types get random bits.
  Matrix(Random& random, DType t, int rows, int cols, int offset = 1, float scale = 1, bool natural = false) {
    const std::size_t bytes = static_cast<std::size_t>(rows) * row_bytes(t, cols);
    memory.resize(bytes + static_cast<std::size_t>(offset));
    std::byte* p = memory.data() + offset;
    view = WeightView::contiguous(p, t, rows, cols);
    if (natural || !info(t).quantised) {
      for (int r = 0; r < rows; ++r) {
        const auto row = random.normals(static_cast<std::size_t>(cols), scale);
        quantize_row(t, row.data(), p + static_cast<std::size_t>(r) * row_bytes(t, cols), cols);
      }
      return;
    }
    // Any bits are a valid block once its halves are sane numbers.
    for (std::size_t i = 0; i < bytes; ++i) p[i] = static_cast<std::byte>(random.below(256));
    std::vector<std::size_t> halves{0};
    if (t == DType::q4_1 || t == DType::q5_1 || t == DType::q4_k || t == DType::q5_k) halves = {0, 2};
    if (t == DType::q2_k) halves = {80, 82};
    if (t == DType::q3_k) halves = {108};
    if (t == DType::q6_k) halves = {208};
    if (t == DType::mxfp4 || t == DType::nvfp4) halves = {};
    for (std::size_t block = 0; block < bytes; block += static_cast<std::size_t>(info(t).bytes)) {
      for (std::size_t at : halves)
        store(p + block + at, f32_to_f16(0.01f * scale * (0.2f + std::abs(random.normal()))));
      if (t == DType::mxfp4) p[block] = static_cast<std::byte>(120 + random.below(4));
      if (t == DType::nvfp4) {
        for (std::size_t k = 0; k < 4; ++k) p[block + k] = static_cast<std::byte>(random.below(0x30));
      }
    }
  }
  std::vector<std::byte> memory;
  WeightView view;
};

// y = W x in double with x rounded to int8 as the CPU backend does it: what its integer arithmetic must give.
Rows exact_product(const WeightView& w, const Rows& x, bool int8) {
  Rows y;
  for (const auto& row : x) {
    std::vector<double> rounded(row.begin(), row.end());
    for (std::size_t b = 0; int8 && b < row.size(); b += 32) {
      float amax = 0;
      for (std::size_t i = b; i < b + 32; ++i) amax = std::max(amax, std::abs(row[i]));
      const float d = amax / 127, inverse = amax > 0 ? 127 / amax : 0;
      for (std::size_t i = b; i < b + 32; ++i) {
        const float scaled = row[i] * inverse;
        rounded[i] = static_cast<double>(d) * static_cast<double>(std::nearbyint(scaled));
      }
    }
    auto& out = y.emplace_back();
    std::vector<float> weights(row.size());
    for (int r = 0; r < w.rows; ++r) {
      dequantize(w, r, weights.data());
      double sum = 0;
      for (std::size_t i = 0; i < row.size(); ++i) sum += rounded[i] * static_cast<double>(weights[i]);
      out.push_back(static_cast<float>(sum));
    }
  }
  return y;
}

template <class B>
Rows run_linear(B& be, const WeightView& w, const Rows& x) {
  HostTensor y = be.tensor(static_cast<int>(x.size()), w.rows);
  be.linear(make(be, x), {{w, y}});
  return read(y);
}

// Whole blocks of every quantised type.
std::vector<int> column_counts(DType type) {
  const int block = info(type).elements;
  if (!info(type).quantised) return {1, 7, 16, 33, 130};
  if (block == 256) return {256, 768};
  return {block, 3 * block, 288 / block * block};
}

}  // namespace

TEST_CASE("linear: every type, odd shapes, any address") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      const bool quantised = info(type).quantised;
      for (int cols : column_counts(type)) {
        for (int rows : {1, 3, 4, 16, 37}) {
          for (int T : {1, 2, 3, 4, 5, 13, 50}) {
            CAPTURE(cols);
            CAPTURE(rows);
            CAPTURE(T);
            Matrix w(random, type, rows, cols, 1 + random.below(7));
            const Rows x = random_rows(random, T, cols);
            const Rows y = run_linear(be, w.view, x);
            CHECK(nmse(y, exact_product(w.view, x, quantised)) < 1e-10);
          }
        }
      }
      if (quantised) {  // the price of int8 activations
        Matrix w(random, type, 64, 1024);
        const Rows x = random_rows(random, 6, 1024);
        ReferenceBackend reference;
        CHECK(nmse(run_linear(be, w.view, x), run_linear(reference, w.view, x)) < 1e-4);
      }
    }
  });
}

TEST_CASE("linear: several matrices of one input, interleaved in memory, into slices of one output") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa, 3);
    ReferenceBackend reference;
    for (int T : {1, 9}) {
      Matrix all(random, DType::f32, 4 * 5, 64), other(random, DType::q4_k, 33, 256), tiny(random, DType::q8_0, 2, 256),
          wide(random, DType::bf16, 20, 256);
      const Rows x64 = random_rows(random, T, 64), x256 = random_rows(random, T, 256);
      auto interleaved = [&](auto& b) {
        HostTensor y = b.tensor(T, 20);
        b.linear(make(b, x64),
                 {{all.view.every(5, 0, 2), y.columns(0, 8)}, {all.view.every(5, 2, 3), y.columns(8, 12)}});
        return read(y);
      };
      CHECK(nmse(interleaved(be), interleaved(reference)) < 1e-12);
      HostTensor a = be.tensor(T, 33), b = be.tensor(T, 2), c = be.tensor(T, 20);
      be.linear(make(be, x256), {{other.view, a}, {tiny.view, b}, {wide.view, c}});
      CHECK(read(a) == run_linear(be, other.view, x256));
      CHECK(read(b) == run_linear(be, tiny.view, x256));
      CHECK(read(c) == run_linear(be, wide.view, x256));
    }
  });
}

TEST_CASE("F8_E4M3 with a factor for every 128 x 128 values: linear, strided views, embeddings, experts") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa, 3);
    ReferenceBackend reference;
    for (const DType factor_type : {DType::f32, DType::bf16}) {
      for (const int cols : {1, 100, 128, 129, 333, 520}) {
        CAPTURE(info(factor_type).name);
        CAPTURE(cols);
        const int rows = 2 * 7 * 19;  // 266: three rows of blocks
        Matrix w(random, DType::f8_e4m3, rows, cols);
        const int grid_cols = (cols + 127) / 128;
        Matrix grid(random, factor_type, (rows + 127) / 128, grid_cols, 3);
        w.view.grid = {grid.view.data, factor_type, grid_cols, 0};
        std::vector<float> row(static_cast<std::size_t>(cols));
        for (int r : {0, 127, 128, 265}) {  // the definition itself
          dequantize(w.view, r, row.data());
          float factor;
          dequantize_row(factor_type, grid.view.row(r / 128) + row_bytes(factor_type, (cols - 1) / 128), &factor, 1);
          REQUIRE(row.back() == f8_e4m3_to_f32(static_cast<std::uint8_t>(w.view.row(r)[cols - 1])) * factor);
        }
        std::vector<WeightView> views{w.view, w.view.slice(100, 57)};
        for (int first : {0, 7, 12}) views.push_back(w.view.every(19, first, 7));
        for (const WeightView& view : views) {
          for (int T : {1, 2, 3, 60}) {
            const Rows x = random_rows(random, T, cols), y = run_linear(be, view, x);
            REQUIRE(nmse(y, exact_product(view, x, false)) < 1e-11);
            if (T > 3) REQUIRE(run_linear(be, view, {x[5]})[0] == y[5]);
          }
          const std::vector<std::int32_t> tokens{view.rows - 1, 0, 33};
          auto embed = [&](auto& b) {
            HostTensor out = b.tensor(3, cols);
            b.embed(out, tokens, view);
            return read(out);
          };
          CHECK(embed(be) == embed(reference));
        }
      }
    }
    Matrix in(random, DType::f8_e4m3, 3 * 2 * 150, 140), out(random, DType::f8_e4m3, 3 * 140, 150);
    Matrix in_grid(random, DType::bf16, 3 * 3, 2), out_grid(random, DType::f32, 3 * 2, 2);
    ExpertViews experts;
    for (int e = 0; e < 3; ++e) {  // a grid for each
      WeightView gate_up = WeightView::contiguous(in.view.row(300 * e), DType::f8_e4m3, 300, 140);
      gate_up.grid = {in_grid.view.row(3 * e), DType::bf16, 2, 0};
      WeightView down = WeightView::contiguous(out.view.row(140 * e), DType::f8_e4m3, 140, 150);
      down.grid = {out_grid.view.row(2 * e), DType::f32, 2, 0};
      experts.push_back({gate_up.slice(0, 150), gate_up.slice(150, 150), down});
    }
    for (int T : {1, 2, 30, 120}) {
      const Rows x = random_rows(random, T, 140, 0.05f), logits = random_rows(random, T, 3);
      auto run = [&](auto& b) {
        HostRouting routing = b.routing(T, 2);
        b.router(routing, make(b, logits), 2, true);
        HostTensor y = b.tensor(T, 140);
        b.experts(y, make(b, x), experts, routing);
        return read(y);
      };
      CHECK(nmse(run(be), run(reference)) < 1e-11);
    }
  });
}

TEST_CASE("F8_E4M3: every code in every lane, NaN included") {
  on_every_isa([](std::string_view isa) {
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    std::vector<std::byte> codes(256 * 37);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::byte>(i / 37 + i % 37);
    const WeightView w = WeightView::contiguous(codes.data(), DType::f8_e4m3, 256, 37);
    std::vector<std::int32_t> tokens;
    for (int r = 0; r < 256; ++r) tokens.push_back(r);
    auto rows = [&](auto& b) {
      HostTensor out = b.tensor(256, 37);
      b.embed(out, tokens, w);
      return read(out);
    };
    const Rows found = rows(be), expected = rows(reference);
    for (int T : {1, 3}) {
      const Rows y = run_linear(be, w, Rows(static_cast<std::size_t>(T), std::vector<float>(37, 0.0f)));
      for (std::size_t r = 0; r < found.size(); ++r) {
        bool nan = false;
        for (std::size_t c = 0; c < found[r].size(); ++c) {
          REQUIRE((std::isnan(expected[r][c]) ? std::isnan(found[r][c]) : found[r][c] == expected[r][c]));
          nan |= std::isnan(expected[r][c]);
        }
        REQUIRE(std::isnan(y.back()[r]) == nan);  // 0 * NaN
      }
    }
  });
}

TEST_CASE("a matrix with a scale: every type, with few and many tokens") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      Matrix w(random, type, 70, 512, 1, 0.1f, true), other(random, type, 512, 256, 1, 0.1f, true);
      WeightView scaled = w.view, down = other.view;
      scaled.scale = 0.375f;  // few bits: y is scaled exactly
      auto times = [](Rows rows, float factor) {
        for (auto& row : rows)
          for (float& x : row) x *= factor;
        return rows;
      };
      for (int T : {1, 2, 3, 50}) {
        const Rows x = random_rows(random, T, 512);
        CHECK(run_linear(be, scaled.slice(1, 69), x) == times(run_linear(be, w.view.slice(1, 69), x), 0.375f));
        ReferenceBackend reference;
        CHECK(nmse(run_linear(reference, scaled, x), times(run_linear(reference, w.view, x), 0.375f)) < 1e-12);
      }
      const std::vector<std::int32_t> tokens{69, 0};
      auto embed = [&](auto& b, const WeightView& view) {
        HostTensor out = b.tensor(2, 512);
        b.embed(out, tokens, view);
        return read(out);
      };
      CHECK(embed(be, scaled) == times(embed(be, w.view), 0.375f));
      Matrix gate(random, type, 256, 512, 1, 0.1f, true), up(random, type, 256, 512, 1, 0.1f, true);
      ExpertView plain{gate.view, up.view, down}, with{gate.view, up.view, down};
      with.up.scale = 0.5f, with.down.scale = 3;
      for (int T : {1, 9}) {
        const Rows x = random_rows(random, T, 512);
        auto run = [&](const ExpertView& expert) {
          HostRouting routing = be.routing(T, 1);
          be.router(routing, make(be, Rows(static_cast<std::size_t>(T), {1.0f})), 1, true);
          HostTensor out = be.tensor(T, 512);
          be.experts(out, make(be, x), {expert}, routing);
          return read(out);
        };
        CHECK(nmse(run(with), times(run(plain), 1.5f)) < 1e-12);
        with.gate.scale = 0.25f;  // before silu
        ExpertViews both{with};
        ReferenceBackend reference;
        HostRouting routing = reference.routing(T, 1);
        reference.router(routing, make(reference, Rows(static_cast<std::size_t>(T), {1.0f})), 1, true);
        HostTensor out = reference.tensor(T, 512);
        reference.experts(out, make(reference, x), both, routing);
        CHECK(nmse(run(with), read(out)) < 5e-4);
        with.gate.scale = 1;
      }
    }
  });
}

TEST_CASE("linear: activations of zeros, and of very different sizes") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    for (DType type : {DType::q8_0, DType::q2_k, DType::q4_k, DType::q6_k, DType::iq4_nl, DType::nvfp4}) {
      Matrix w(random, type, 5, 512);
      Rows x = random_rows(random, 6, 512);
      std::fill(x[0].begin(), x[0].end(), 0.0f);
      for (float& v : x[1]) v *= 1e20f;
      for (float& v : x[2]) v *= 1e-20f;
      const Rows y = run_linear(be, w.view, x), expected = exact_product(w.view, x, true);
      for (std::size_t t = 0; t < x.size(); ++t) CHECK(nmse({y[t]}, {expected[t]}) < 1e-11);
    }
  });
}

TEST_CASE("embed: rows of every type") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      Matrix w(random, type, 9, info(type).quantised ? 512 : 77);
      const std::vector<std::int32_t> tokens{8, 0, 3, 3};
      auto run = [&](auto& b) {
        HostTensor out = b.tensor(4, w.view.cols);
        b.embed(out, tokens, w.view);
        return read(out);
      };
      CHECK(nmse(run(be), run(reference)) < 1e-13);
    }
  });
}

TEST_CASE("norms, gates and other elementwise operations") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (int T : {1, 5}) {
      for (int width : {1, 7, 16, 45, 128}) {
        CAPTURE(T);
        CAPTURE(width);
        const Rows x = random_rows(random, T, 3 * width, 4), y = random_rows(random, T, 3 * width, 4);
        const Rows one = random_rows(random, T, 1);
        const auto w = random.normals(static_cast<std::size_t>(width)),
                   b = random.normals(static_cast<std::size_t>(3 * width), 10);
        const VectorView weight{w.data(), width, 1}, bias{b.data(), 3 * width, 1};
        auto both = [&](auto op) {
          auto run = [&](auto& backend) {
            HostTensor a = make(backend, x), c = make(backend, y);
            op(backend, a, c);
            return read(a);
          };
          return nmse(run(be), run(reference));
        };
        CHECK(both([&](auto& k, HostTensor a, HostTensor) { k.rms_norm(a, a, weight, 1e-6f); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.gated_rms_norm(a, a, z, weight, 1e-6f); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.swiglu(a, a, z); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.sigmoid_gate(a, z); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.add(a, z); }) < 1e-13);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.add_gated(a, z, make(k, one)); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) {
                HostTensor g = k.tensor(T, 3 * width);
                k.delta_gates(a, g, z, a, bias, bias);
              }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) {
                HostTensor beta = k.tensor(T, 3 * width);
                k.delta_gates(beta, a, z, a, bias, bias);
              }) < 1e-12);
      }
    }
  });
}

TEST_CASE("rope: far positions, partial heads") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (int n : {1, 3, 16, 32}) {
      const int head_dim = 2 * n + 5, T = 7;
      std::vector<double> frequency;
      for (int i = 0; i < n; ++i) frequency.push_back(std::pow(1e7, -static_cast<double>(i) / n));
      const Rows x = random_rows(random, T, 3 * head_dim);
      auto run = [&](auto& b) {
        using Cache = typename std::remove_reference_t<decltype(b)>::KvCache;
        const std::vector<Segment<Cache>> segments{{0, 4, 1000000, nullptr}, {4, 3, 17, nullptr}};
        HostTensor angles = b.tensor(T, 2 * n), heads = make(b, x);
        b.rope_angles(angles, frequency, 1.25f, segments);
        b.rope(heads, angles, head_dim);
        return read(heads);
      };
      CHECK(nmse(run(be), run(reference)) < 1e-13);
    }
  });
}

TEST_CASE("router: probabilities, ties, normalisation") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (int E : {1, 5, 16, 33, 512}) {
      for (bool normalise : {false, true}) {
        const int k = std::min(E, 10), T = 6;
        Rows logits = random_rows(random, T, E, 3);
        for (float& x : logits[1]) x = 0.5f;                                 // all equal
        for (float& x : logits[2]) x = static_cast<float>(random.below(3));  // many equal
        auto run = [&](auto& b) {
          HostRouting routing = b.routing(T, k);
          b.router(routing, make(b, logits), k, normalise);
          return routing;
        };
        const HostRouting found = run(be), expected = run(reference);
        CHECK(found.rows == T);
        CHECK(found.ids == expected.ids);
        CHECK(nmse({found.weights}, {expected.weights}) < 1e-12);
      }
    }
  });
}

TEST_CASE("experts: all, few or one expert per token, every type") {
  on_every_isa([](std::string_view isa) {
    Random random;
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      const bool quantised = info(type).quantised;
      const int D = quantised ? 256 : 70, width = quantised ? 512 : 37, E = 6;
      std::vector<Matrix> memory;
      ExpertViews experts;
      for (int e = 0; e < E; ++e) {
        memory.emplace_back(random, type, width, D, 1, 0.1f, true);
        memory.emplace_back(random, type, width, D, 2, 0.1f, true);
        memory.emplace_back(random, e % 2 ? type : DType::f32, D, width, 3, 0.1f, true);
      }
      for (std::size_t e = 0; e < E; ++e)
        experts.push_back({memory[3 * e].view, memory[3 * e + 1].view, memory[3 * e + 2].view});
      for (int T : {1, 3, 40}) {
        for (int k : {1, 3, 6}) {
          CAPTURE(T);
          CAPTURE(k);
          const Rows x = random_rows(random, T, D), logits = random_rows(random, T, E, 2);
          auto run = [&](auto& b) {
            HostRouting routing = b.routing(T, k);
            b.router(routing, make(b, logits), k, true);
            HostTensor out = b.tensor(T, D);
            b.experts(out, make(b, x), experts, routing);
            return read(out);
          };
          CpuBackend be = cpu_backend(isa), single = cpu_backend(isa, 1), three = cpu_backend(isa, 3);
          ReferenceBackend reference;
          const Rows found = run(be);
          CHECK(nmse(found, run(reference)) < (quantised ? 5e-4 : 1e-11));
          CHECK(found == run(single));
          CHECK(found == run(three));
        }
      }
    }
  });
}

namespace {

// The sequences of a batch: tokens per call of each.
struct Batch {
  std::vector<int> counts;
  int total() const {
    int n = 0;
    for (int c : counts) n += c;
    return n;
  }
  template <class State>
  std::vector<Segment<State>> segments(std::vector<State>& states, std::int64_t position = 0) const {
    std::vector<Segment<State>> out;
    int begin = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      out.push_back({begin, counts[i], position, &states[i]});
      begin += counts[i];
    }
    return out;
  }
};

Rows slice(const Rows& rows, int begin, int count) { return Rows(rows.begin() + begin, rows.begin() + begin + count); }

struct Delta {
  DeltaShape shape;
  Rows qkv, beta, g, taps;

  Delta(Random& random, DeltaShape s, int T, float g_scale = 1) : shape(s) {
    qkv = random_rows(random, T, s.conv_dim());
    beta = random_rows(random, T, s.value_heads);
    g = random_rows(random, T, s.value_heads, g_scale);
    taps = random_rows(random, s.conv_dim(), s.conv_kernel);
    for (auto& row : beta)
      for (float& x : row) x = 1 / (1 + std::exp(-x));
    for (auto& row : g)
      for (float& x : row) x = -std::abs(x);
  }

  // conv, then delta rule, over rows [begin, begin + batch.total()) on the given states.
  template <class B>
  Rows run(B& b, const Batch& batch, std::vector<HostDeltaState>& states, int begin = 0) const {
    const int T = batch.total();
    std::vector<float> flat;
    for (const auto& row : taps) flat.insert(flat.end(), row.begin(), row.end());
    const auto segments = batch.segments(states);
    HostTensor in = make(b, slice(qkv, begin, T)), conv = b.tensor(T, shape.conv_dim()),
               out = b.tensor(T, shape.value_heads * shape.value_dim);
    b.causal_conv1d(conv, in, VectorView{flat.data(), static_cast<int>(flat.size()), shape.conv_kernel}, segments);
    b.gated_delta_rule(out, conv, make(b, slice(beta, begin, T)), make(b, slice(g, begin, T)), shape, segments);
    Rows result = read(out);
    for (const auto& s : states) {  // the states count as results
      result.emplace_back(s.S.floats(), s.S.floats() + s.S.size() / sizeof(float));
      result.emplace_back(s.conv.floats(), s.conv.floats() + s.conv.size() / sizeof(float));
    }
    return result;
  }
};

std::vector<HostDeltaState> delta_states(DeltaShape s, std::size_t n) {
  return std::vector<HostDeltaState>(n, HostDeltaState(s));
}

}  // namespace

TEST_CASE("convolution and delta rule: against the reference") {
  on_every_isa([](std::string_view isa) {
    Random random;
    for (DeltaShape shape : {DeltaShape{1, 1, 1, 1, 1}, DeltaShape{1, 3, 5, 7, 2}, DeltaShape{2, 2, 16, 16, 4},
                             DeltaShape{2, 4, 33, 70, 3}, DeltaShape{1, 2, 128, 128, 4}}) {
      for (const Batch& batch :
           {Batch{{1}}, Batch{{2, 1}}, Batch{{15}}, Batch{{16}}, Batch{{64, 3}}, Batch{{65}}, Batch{{150, 20, 1}}}) {
        for (float g_scale : {0.01f, 1.0f, 60.0f}) {
          const int T = batch.total();
          CAPTURE(shape.key_dim);
          CAPTURE(T);
          CAPTURE(g_scale);
          const Delta d(random, shape, T, g_scale);
          CpuBackend be = cpu_backend(isa), three = cpu_backend(isa, 3);
          ReferenceBackend reference;
          auto a = delta_states(shape, batch.counts.size()), b = a, c = a;
          const Rows found = d.run(be, batch, a);
          CHECK(nmse(found, d.run(reference, batch, b)) < 1e-10);
          CHECK(found == d.run(three, batch, c));
        }
      }
    }
  });
}

TEST_CASE("delta rule: all at once, in pieces and one by one are the same; neighbours don't matter") {
  on_every_isa([](std::string_view isa) {
    Random random;
    const DeltaShape shape{2, 4, 24, 40, 4};
    const int T = 100;
    const Delta d(random, shape, T, 0.1f);
    CpuBackend be = cpu_backend(isa);
    auto whole = delta_states(shape, 1), steps = whole, pieces = whole;
    const Rows at_once = d.run(be, {{T}}, whole);
    Rows one_by_one, in_pieces;
    for (int t = 0; t < T; ++t) one_by_one.push_back(d.run(be, {{1}}, steps, t)[0]);
    for (int t = 0; t < T; t += 25) {
      const Rows r = d.run(be, {{25}}, pieces, t);
      in_pieces.insert(in_pieces.end(), r.begin(), r.begin() + 25);
    }
    CHECK(nmse(one_by_one, slice(at_once, 0, T)) < 1e-11);
    CHECK(nmse(in_pieces, slice(at_once, 0, T)) < 1e-11);

    auto two = delta_states(shape, 2), first = delta_states(shape, 1), second = first;
    const Rows together = d.run(be, {{30, 70}}, two);
    CHECK(slice(together, 0, 30) == slice(d.run(be, {{30}}, first), 0, 30));
    CHECK(slice(together, 30, 70) == slice(d.run(be, {{70}}, second, 30), 0, 70));
  });
}

namespace {

struct Attend {
  AttentionShape shape;
  Rows q, k, v;
  Attend(Random& random, AttentionShape s, int T)
      : shape(s),
        q(random_rows(random, T, s.heads * s.head_dim)),
        k(random_rows(random, T, s.kv_heads * s.head_dim)),
        v(random_rows(random, T, s.kv_heads * s.head_dim)) {}

  template <class B>
  Rows run(B& b, const Batch& batch, std::vector<HostKvCache>& caches, int begin = 0) const {
    const int T = batch.total();
    HostTensor out = b.tensor(T, shape.heads * shape.head_dim);
    b.attention(out, make(b, slice(q, begin, T)), make(b, slice(k, begin, T)), make(b, slice(v, begin, T)), shape,
                batch.segments(caches));
    return read(out);
  }
  template <class B>
  std::vector<HostKvCache> caches(B& b, std::size_t n) const {
    return std::vector<HostKvCache>(n, b.kv_cache(shape));
  }
};

double kv_bound(KvType kv) { return kv == KvType::f32 ? 1e-11 : kv == KvType::f16 ? 1e-6 : 1e-3; }

}  // namespace

TEST_CASE("attention: against the reference, every kind of cache") {
  on_every_isa([](std::string_view isa) {
    Random random;
    for (KvType kv : {KvType::f32, KvType::f16, KvType::q8_0}) {
      for (AttentionShape shape :
           {AttentionShape{1, 1, 32}, AttentionShape{6, 2, 64}, AttentionShape{3, 3, 7}, AttentionShape{16, 1, 33}}) {
        if (kv == KvType::q8_0 && shape.head_dim % 32 != 0) continue;
        for (const Batch& batch : {Batch{{1}}, Batch{{1, 5}}, Batch{{70}}, Batch{{300, 9, 1}}}) {
          const int T = batch.total();
          CAPTURE(static_cast<int>(kv));
          CAPTURE(shape.head_dim);
          CAPTURE(T);
          const Attend a(random, shape, 2 * T);
          CpuBackend be = cpu_backend(isa, 2, kv), three = cpu_backend(isa, 3, kv);
          ReferenceBackend reference;
          auto mine = a.caches(be, batch.counts.size()), theirs = a.caches(reference, batch.counts.size()),
               other = mine;
          for (int call = 0; call < 2; ++call) {  // the second call meets a past
            const Rows found = a.run(be, batch, mine, call * T);
            CHECK(nmse(found, a.run(reference, batch, theirs, call * T)) < kv_bound(kv));
            CHECK(found == a.run(three, batch, other, call * T));
          }
        }
      }
    }
  });
}

TEST_CASE("attention: a long context, split in decode") {
  on_every_isa([](std::string_view isa) {
    Random random;
    const AttentionShape shape{4, 2, 32};
    const int past = 5000;
    const Attend a(random, shape, past + 6);
    CpuBackend be = cpu_backend(isa, 2, KvType::f32);
    ReferenceBackend reference;
    auto mine = a.caches(be, 1), theirs = a.caches(reference, 1);
    CHECK(nmse(a.run(be, {{past}}, mine), a.run(reference, {{past}}, theirs)) < 1e-11);
    auto one_by_one = mine, copy = mine;
    const Rows together = a.run(be, {{6}}, mine, past);
    CHECK(nmse(together, a.run(reference, {{6}}, theirs, past)) < 1e-11);
    Rows single;
    for (int t = 0; t < 6; ++t) single.push_back(a.run(be, {{1}}, one_by_one, past + t)[0]);
    CHECK(nmse(single, together) < 1e-12);
    CHECK(copy[0].length() == past);                  // copies are snapshots:
    CHECK(a.run(be, {{6}}, copy, past) == together);  // what others appended is not in them
  });
}

TEST_CASE("attention: peaked and flat scores") {
  on_every_isa([](std::string_view isa) {
    Random random;
    const AttentionShape shape{2, 1, 32};
    Attend a(random, shape, 600);
    for (std::size_t t = 0; t < 600; ++t) {
      for (float& x : a.q[t]) x *= t % 2 ? 100.0f : 0.0f;
    }
    CpuBackend be = cpu_backend(isa, 2, KvType::f32);
    ReferenceBackend reference;
    auto mine = a.caches(be, 1), theirs = a.caches(reference, 1);
    CHECK(nmse(a.run(be, {{600}}, mine), a.run(reference, {{600}}, theirs)) < 1e-9);
  });
}

TEST_CASE("a q8_0 cache refuses heads that are not whole blocks") {
  CpuBackend be = cpu_backend("", 1, KvType::q8_0);
  CHECK_THROWS_AS(be.kv_cache({4, 2, 40}), Error);
}

TEST_CASE("linear: the thread count changes nothing; a row's result hardly depends on its batch") {
  on_every_isa([](std::string_view isa) {
    Random random;
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      Matrix w(random, type, 203, 512);
      const Rows x = random_rows(random, 14, 512);
      CpuBackend one = cpu_backend(isa, 1), two = cpu_backend(isa, 2), three = cpu_backend(isa, 3);
      const Rows y = run_linear(one, w.view, x);
      CHECK(y == run_linear(two, w.view, x));
      CHECK(y == run_linear(three, w.view, x));
      Rows steps;
      for (const auto& row : x) steps.push_back(run_linear(one, w.view, {row})[0]);
      CHECK(steps == [&] {
        Rows again;
        for (const auto& row : x) again.push_back(run_linear(three, w.view, {row})[0]);
        return again;
      }());
      if (info(type).quantised)
        CHECK(nmse(steps, y) < 1e-12);
      else
        CHECK(steps == y);
    }
  });
}
