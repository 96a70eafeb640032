#pragma once
// What the tests of the CPU backend's operations share: backends on every ISA of this machine, random rows and
// matrices.

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/reference/reference_backend.hpp"
#include "blocks/codec.hpp"
#include "tests/ops/levels.hpp"

namespace qwen3next::test {

inline CpuBackend cpu_backend(std::string_view isa, int threads = 2, KvType kv = KvType::f16) {
  return CpuBackend({&cpu::choose_kernels(isa, test::tested_levels()), threads, kv});
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

// What is to be expected does not depend on the ISA, and takes most of the time: computed for the first one, in the
// order of asking, and remembered for the others.
class Expected {
 public:
  void rewind() noexcept { next_ = 0; }
  template <class F>
  const Rows& operator()(F compute) {
    if (next_ == known_.size()) known_.push_back(compute());
    return known_[next_++];
  }

 private:
  std::deque<Rows> known_;
  std::size_t next_ = 0;
};

// f(isa) or f(isa, expected).
template <class F>
void on_every_isa(F f) {
  [[maybe_unused]] Expected expected;
  for (const cpu::Level& level : test::tested_levels()) {
    const std::string_view isa = level.name;
    CAPTURE(isa);
    if constexpr (std::is_invocable_v<F, std::string_view>) {
      f(isa);
    } else {
      expected.rewind();
      f(isa, expected);
    }
  }
}

template <class B>
HostTensor make(B& be, const Rows& rows) {
  HostTensor t = be.tensor(static_cast<int>(rows.size()), static_cast<int>(rows[0].size()));
  for (int r = 0; r < t.n_rows; ++r)
    std::copy(rows[static_cast<std::size_t>(r)].begin(), rows[static_cast<std::size_t>(r)].end(), t.row(r));
  return t;
}
inline Rows random_rows(Random& random, int rows, int cols, float scale = 1) {
  Rows out(static_cast<std::size_t>(rows));
  for (auto& row : out) row = random.normals(static_cast<std::size_t>(cols), scale);
  return out;
}
inline Rows slice(const Rows& rows, int begin, int count) {
  return Rows(rows.begin() + begin, rows.begin() + begin + count);
}
inline Rows read(const HostTensor& t) {
  Rows out;
  for (int r = 0; r < t.n_rows; ++r) out.emplace_back(t.row(r), t.row(r) + t.n_cols);
  return out;
}

inline double nmse(const Rows& found, const Rows& expected) {
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
inline Rows exact_product(const WeightView& w, const Rows& x, bool int8) {
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
inline Rows run_linear(B& be, const WeightView& w, const Rows& x) {
  HostTensor y = be.tensor(static_cast<int>(x.size()), w.rows);
  be.linear(make(be, x), {{w, y}});
  return read(y);
}

// Whole blocks of every quantised type.
inline std::vector<int> column_counts(DType type) {
  const int block = info(type).elements;
  if (!info(type).quantised) return {1, 7, 16, 33, 130};
  if (block == 256) return {256, 768};
  return {block, 3 * block, 288 / block * block};
}

}  // namespace qwen3next::test
