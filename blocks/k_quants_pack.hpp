#pragma once
// Packing of the K family: weighted least-squares search for the scales.
//
// A sub-block is stored as x ~ scale q + offset, q a small integer (offset = 0 for Q3_K and Q6_K).  For given levels q
// the best scale and offset are a 2 x 2 linear system; for a given scale and offset the best levels are a rounding.
//
//   1. fit       for each sub-block: round to several grids, solve for each; alternate from the best
//   2. quantise  d and dmin from the largest scale and offset of the super-block; integer scales near the fitted ones
//                are tried with their levels rounded anew and the min that suits them
//   3. refine    all integers fixed, d and dmin are a 2 x 2 system again; then 2 once more
//
// An error weighs sqrt(mean square + x^2): plain squared error with some extra care for large weights; or, if given,
// the importance of its column, which is what the error costs in the output when inputs are uncorrelated.

#include <cmath>
#include <cstdint>
#include <limits>

#include "blocks/half.hpp"
#include "blocks/k_quants.hpp"
#include "blocks/scale_search.hpp"

namespace qwen3next {

namespace detail {

// What a format can store, and the grids that are tried: `steps` grids of from, from + step, .. more levels than there
// are over the range of a sub-block.  Fewer levels waste some of them, more clip the extremes; either may happen to
// suit the values.  Measured on Gaussian and Laplace data.
struct Q2_KSpec {
  using Levels = IntegerLevels<0, 3>;
  static constexpr int sub_blocks = 16, depth = 16, scale_low = 0, scale_high = 15, min_high = 15;
  static constexpr int steps = 14;
  static constexpr float from = -0.5f, step = 0.14f;
};
struct Q3_KSpec {
  using Levels = IntegerLevels<-4, 3>;
  static constexpr int sub_blocks = 16, depth = 16, scale_low = -32, scale_high = 31, min_high = 0;
  static constexpr int steps = 12;
  static constexpr float from = -1.0f, step = 0.3f;
};
struct Q4_KSpec {
  using Levels = IntegerLevels<0, 15>;
  static constexpr int sub_blocks = 8, depth = 32, scale_low = 0, scale_high = 63, min_high = 63;
  static constexpr int steps = 20;
  static constexpr float from = -2.0f, step = 0.3f;
};
struct Q5_KSpec {
  using Levels = IntegerLevels<0, 31>;
  static constexpr int sub_blocks = 8, depth = 32, scale_low = 0, scale_high = 63, min_high = 63;
  static constexpr int steps = 20;
  static constexpr float from = -3.0f, step = 0.4f;
};
struct Q6_KSpec {
  using Levels = IntegerLevels<-32, 31>;
  static constexpr int sub_blocks = 16, depth = 16, scale_low = -128, scale_high = 127, min_high = 0;
  static constexpr int steps = 14;
  static constexpr float from = -4.0f, step = 0.6f;
};

inline float ratio(float a, float b) noexcept { return b != 0 ? a / b : 0; }

// Neighbouring sub-blocks of one super-block, one in each lane.
template <class Spec>
struct SubBlocks {
  using V = PackVector;
  using Levels = typename Spec::Levels;
  static constexpr int depth = Spec::depth;
  static constexpr bool has_min = Spec::min_high > 0;

  // Weighted sums over each sub-block, of levels q and residuals e = x - scale q - offset.
  struct Sums {
    V q{}, qq{}, e{}, qe{}, ee{};
  };

  V x[depth], w[depth];
  V sum_w{}, lowest{}, highest{};
  V scale{}, offset{};         // the fit, real numbers
  V int_scale{}, int_min{};    // as stored: scale = d int_scale, offset = -dmin int_min
  Sums sums;                   // under the integers
  V kept_scale{}, kept_min{};  // integers of the best d and dmin so far

  void transpose(const float* values, const float* importance, float mean_square) noexcept {
    for (int j = 0; j < depth; ++j) {
      for (int k = 0; k < pack_lanes; ++k) {
        const int i = depth * k + j;
        x[j][k] = values[i];
        w[j][k] = error_weight(importance, i, values[i], mean_square);
      }
      lowest = x[j] < lowest ? x[j] : lowest;  // at most 0: an offset can only be negative
      highest = j == 0 || x[j] > highest ? x[j] : highest;
      sum_w += w[j];
    }
  }

  void levels(int j, const V& inverse, const V& from, V& q) const noexcept {
    q = (x[j] - from) * inverse;
    Levels::round(q);
  }

  void measure(const V& grid, const V& from, Sums& out) const noexcept {
    const V inverse = grid != V{} ? 1 / grid : V{};
    Sums s;
    for (int j = 0; j < depth; ++j) {
      V q;
      levels(j, inverse, from, q);
      const V e = x[j] - from - grid * q;
      const V wq = w[j] * q, we = w[j] * e;
      if constexpr (has_min) s.q += wq, s.e += we;
      s.qq += wq * q;
      s.qe += wq * e;
      s.ee += we * e;
    }
    out = s;
  }

  // 1. The best scale and offset for the levels of a grid, kept where they beat what was found so far.
  void improve(const V& grid, const V& from, V& least) noexcept {
    const V zero{}, one = zero + 1;
    Sums s;
    measure(grid, from, s);
    V a{}, c{};  // corrections of scale and offset
    if constexpr (has_min) {
      const V det = sum_w * s.qq - s.q * s.q;
      const V divisor = det > zero ? det : one;
      a = det > zero ? (sum_w * s.qe - s.q * s.e) / divisor : zero;
      c = det > zero ? (s.qq * s.e - s.q * s.qe) / divisor : zero;
      const auto positive = from + c > zero;  // cannot be stored: the best with offset 0
      c = positive ? -from : c;
      const V alone = (s.qe - c * s.q) / (s.qq > zero ? s.qq : one);
      a = positive ? alone : a;
    } else {
      a = s.qe / (s.qq > zero ? s.qq : one);
    }
    const V error = s.ee - 2 * (a * s.qe + c * s.e) + a * a * s.qq + 2 * a * c * s.q + c * c * sum_w;
    const auto better = error < least;
    scale = better ? grid + a : scale;
    offset = better ? from + c : offset;
    least = better ? error : least;
  }

  void fit() noexcept {
    V least = V{} + std::numeric_limits<float>::infinity();
    for (int i = 0; i < Spec::steps; ++i) {
      const float more = Spec::from + Spec::step * static_cast<float>(i);
      if constexpr (has_min) {
        improve((highest - lowest) / (static_cast<float>(Levels::high) + more), lowest, least);
      } else {  // the extreme may be of either sign, and the levels have one more below zero
        const V extreme = -lowest > highest ? lowest : highest;
        const V grid = extreme / (static_cast<float>(Levels::low) - more);
        improve(grid, V{}, least);
        improve(-grid, V{}, least);
      }
    }
    for (int i = 0; i < 2; ++i) {
      const V grid = scale, from = offset;
      improve(grid, from, least);
    }
  }

  // 2. The best integers near the fit.
  void choose_integers(float d, float dmin) noexcept {
    const V zero{}, weight = sum_w > zero ? sum_w : zero + 1;
    V least = zero + std::numeric_limits<float>::infinity();
    for (const float delta : {0.0f, -1.0f, 1.0f, -2.0f, 2.0f}) {
      V integer = scale * ratio(1, d) + delta, min{};
      to_integers(integer, Spec::scale_low, Spec::scale_high);
      Sums s;
      if constexpr (has_min) {
        measure(d * integer, offset, s);
        min = (offset + s.e / weight) * -ratio(1, dmin);
        to_integers(min, 0, Spec::min_high);
      }
      measure(d * integer, -dmin * min, s);
      const auto better = s.ee < least;
      least = better ? s.ee : least;
      int_scale = better ? integer : int_scale;
      int_min = better ? min : int_min;
      sums.q = better ? s.q : sums.q;
      sums.qq = better ? s.qq : sums.qq;
      sums.e = better ? s.e : sums.e;
      sums.qe = better ? s.qe : sums.qe;
      sums.ee = better ? s.ee : sums.ee;
    }
  }

  // The fit that the integers stand for, and its sums.
  void take_integers(float d, float dmin) noexcept {
    scale = d * int_scale, offset = -dmin * int_min;
    measure(scale, offset, sums);
  }
};

template <class Spec>
class KSearch {
 public:
  static constexpr int sub_blocks = Spec::sub_blocks, depth = Spec::depth;

  // The result: value = d scale[k] (level + Levels::low) - dmin min[k] for the elements of sub-block k.
  float d = 0, dmin = 0;
  int scale[sub_blocks], min[sub_blocks];
  std::uint8_t level[sub_blocks * depth];

  KSearch(const float* values, const float* importance) noexcept {
    float square = 0;
    for (int i = 0; i < sub_blocks * depth; ++i) square += values[i] * values[i];
    for (int g = 0; g < groups; ++g) {
      const int begin = g * pack_lanes * depth;
      group_[g].transpose(values + begin, importance ? importance + begin : nullptr, square / (sub_blocks * depth));
      group_[g].fit();
    }
    search();
    for (int g = 0; g < groups; ++g) emit(g);
  }

 private:
  using V = PackVector;
  using Levels = typename Spec::Levels;
  static constexpr int groups = sub_blocks / pack_lanes;
  static_assert(sub_blocks % pack_lanes == 0);
  static constexpr bool has_min = Spec::min_high > 0;

  SubBlocks<Spec> group_[groups];
  float least_ = std::numeric_limits<float>::infinity(), kept_d_ = 0, kept_dmin_ = 0;

  void search() noexcept {
    float extreme = 0, deepest = 0;
    for (const auto& b : group_) {
      for (int k = 0; k < pack_lanes; ++k) {
        extreme = std::fabs(b.scale[k]) > std::fabs(extreme) ? b.scale[k] : extreme;
        deepest = -b.offset[k] > deepest ? -b.offset[k] : deepest;
      }
    }
    d = storable(extreme / static_cast<float>(Spec::scale_low < 0 ? Spec::scale_low : Spec::scale_high));
    if constexpr (has_min) dmin = storable(deepest / Spec::min_high);
    for (int round = 0; round < 2; ++round) {
      for (auto& b : group_) b.choose_integers(d, dmin);
      keep_if_better();
      solve();
      for (auto& b : group_) b.take_integers(d, dmin);
      keep_if_better();
    }
  }

  void keep_if_better() noexcept {
    float error = 0;
    for (const auto& b : group_) {
      for (int k = 0; k < pack_lanes; ++k) error += b.sums.ee[k];
    }
    if (!(error < least_)) return;
    least_ = error, kept_d_ = d, kept_dmin_ = dmin;
    for (auto& b : group_) b.kept_scale = b.int_scale, b.kept_min = b.int_min;
  }

  // 3. d and dmin that suit the integers and their levels best.
  void solve() noexcept {
    float aa = 0, ab = 0, bb = 0, ra = 0, rb = 0;  // columns: scale q, -min
    for (const auto& b : group_) {
      for (int k = 0; k < pack_lanes; ++k) {
        aa += b.int_scale[k] * b.int_scale[k] * b.sums.qq[k];
        ab -= b.int_scale[k] * b.int_min[k] * b.sums.q[k];
        bb += b.int_min[k] * b.int_min[k] * b.sum_w[k];
        ra += b.int_scale[k] * b.sums.qe[k];
        rb -= b.int_min[k] * b.sums.e[k];
      }
    }
    const float det = aa * bb - ab * ab;
    const bool both = has_min && det > 1e-5f * aa * bb;
    d += both ? (bb * ra - ab * rb) / det : ratio(ra, aa);
    dmin += both ? (aa * rb - ab * ra) / det : 0;
    d = storable(has_min && d < 0 ? 0 : d);
    dmin = storable(dmin < 0 ? 0 : dmin);
  }

  void emit(int g) noexcept {
    d = kept_d_, dmin = kept_dmin_;
    const SubBlocks<Spec>& b = group_[g];
    const V grid = d * b.kept_scale, from = -dmin * b.kept_min;
    const V inverse = grid != V{} ? 1 / grid : V{};
    for (int j = 0; j < depth; ++j) {
      V q;
      b.levels(j, inverse, from, q);
      for (int k = 0; k < pack_lanes; ++k) {
        level[(g * pack_lanes + k) * depth + j] = Levels::code(q[k]);
      }
    }
    for (int k = 0; k < pack_lanes; ++k) {
      scale[g * pack_lanes + k] = static_cast<int>(b.kept_scale[k]);
      min[g * pack_lanes + k] = static_cast<int>(b.kept_min[k]);
    }
  }
};

template <class Spec, class Block>
inline void pack_scale_min(const float* x, const float* importance, Block& b) noexcept {
  const KSearch<Spec> found(x, importance);
  b.d = f32_to_f16(found.d);
  b.dmin = f32_to_f16(found.dmin);
  ScaleMin pairs[8];
  for (int k = 0; k < 8; ++k) pairs[k] = {found.scale[k], found.min[k]};
  set_scale_min(b.scales, pairs);
  set_levels(b, found.level);
}

}  // namespace detail

inline void pack(const float* x, const float* importance, BlockQ2_K& b) noexcept {
  const detail::KSearch<detail::Q2_KSpec> found(x, importance);
  b.d = f32_to_f16(found.d);
  b.dmin = f32_to_f16(found.dmin);
  for (int k = 0; k < 16; ++k) b.scales[k] = static_cast<std::uint8_t>(found.scale[k] | found.min[k] << 4);
  set_levels(b, found.level);
}

inline void pack(const float* x, const float* importance, BlockQ3_K& b) noexcept {
  const detail::KSearch<detail::Q3_KSpec> found(x, importance);
  b.d = f32_to_f16(found.d);
  set_scales_q3(b.scales, found.scale);
  set_levels(b, found.level);
}

inline void pack(const float* x, const float* importance, BlockQ4_K& b) noexcept {
  detail::pack_scale_min<detail::Q4_KSpec>(x, importance, b);
}

inline void pack(const float* x, const float* importance, BlockQ5_K& b) noexcept {
  detail::pack_scale_min<detail::Q5_KSpec>(x, importance, b);
}

inline void pack(const float* x, const float* importance, BlockQ6_K& b) noexcept {
  const detail::KSearch<detail::Q6_KSpec> found(x, importance);
  b.d = f32_to_f16(found.d);
  for (int k = 0; k < 16; ++k) b.scales[k] = static_cast<std::int8_t>(found.scale[k]);
  set_levels(b, found.level);
}

}  // namespace qwen3next
