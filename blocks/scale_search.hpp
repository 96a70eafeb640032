#pragma once
// What the packing of all types shares: levels, the weight of an error, and the search for the scale of one block.
//
// A block is stored as x ~ scale q + offset, q one of the type's levels.  For given levels the best scale and offset
// are a linear system; for a given scale and offset the best levels are a rounding.  ScaleSearch starts from many
// scales, alternates, and keeps the best that an F16 can hold.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "blocks/half.hpp"

namespace qwen3next::detail {

// GCC and Clang's vector extension, in the width that the target has (wider ones compile, but badly).  Results do not
// depend on the width.
#if defined(__AVX__)
inline constexpr int pack_lanes = 8;
#else
inline constexpr int pack_lanes = 4;
#endif
typedef float PackVector __attribute__((vector_size(4 * pack_lanes)));

inline PackVector spread(float v) noexcept { return PackVector{} + v; }

// v to the nearest integer in [low, high], ties to even; NaN to low.  (The addition leaves no bits for a fraction.)
inline void to_integers(PackVector& v, int low, int high) noexcept {
  using V = PackVector;
  const V lower = spread(static_cast<float>(low)), upper = spread(static_cast<float>(high)), magic = spread(0x1.8p23f);
  v = v > lower ? v : lower;
  v = v < upper ? v : upper;
  v = (v + magic) - magic;
}

// Levels low, low + 1 .. high.  Every kind of levels has: its extremes, rounding to the nearest, and the code that the
// block stores for one.
template <int low_, int high_>
struct IntegerLevels {
  static constexpr int low = low_, high = high_;
  static void round(PackVector& v) noexcept { to_integers(v, low, high); }
  static std::uint8_t code(float level) noexcept { return static_cast<std::uint8_t>(static_cast<int>(level) - low); }
};

// An error weighs the importance of its column, which is what it costs in the output when inputs are uncorrelated; or
// else sqrt(mean square + x^2): plain squared error with some extra care for large weights.
inline float error_weight(const float* importance, int i, float x, float mean_square) noexcept {
  return importance ? importance[i] : std::sqrt(mean_square + x * x);
}

// To F16 and back; not to zero unless it is, nor to infinity.
inline float storable(float v) noexcept {
  const float rounded = f16_to_f32(f32_to_f16(std::clamp(v, -65504.0f, 65504.0f)));
  return rounded != 0 || v == 0 ? rounded : std::copysign(0x1p-24f, v);
}

// A block of n values, measured under several scales and offsets at a time, one in each lane.
template <class Levels, int n>
struct MeasuredBlock {
  using V = PackVector;

  // Weighted sums, of levels q and residuals e = x - scale q - offset.
  struct Sums {
    V q{}, qq{}, e{}, qe{}, ee{};
  };

  const float* x;
  float w[n];
  float sum_w = 0, sum_wxx = 0, lowest, highest;

  MeasuredBlock(const float* values, const float* importance) noexcept
      : x(values), lowest(values[0]), highest(values[0]) {
    float square = 0;
    for (int j = 0; j < n; ++j) square += x[j] * x[j];
    for (int j = 0; j < n; ++j) {
      w[j] = error_weight(importance, j, x[j], square / n);
      sum_w += w[j];
      sum_wxx += w[j] * x[j] * x[j];
      lowest = std::min(lowest, x[j]);
      highest = std::max(highest, x[j]);
    }
  }

  static V inverse(const V& scale) noexcept { return scale != V{} ? 1 / scale : V{}; }

  template <bool has_offset>
  void measure(const V& scale, const V& offset, Sums& out) const noexcept {
    const V inv = inverse(scale);
    Sums s;
    for (int j = 0; j < n; ++j) {
      const V shifted = has_offset ? x[j] - offset : spread(x[j]);
      V q = shifted * inv;
      Levels::round(q);
      const V e = shifted - scale * q;
      const V wq = w[j] * q, we = w[j] * e;
      if constexpr (has_offset) s.q += wq, s.e += we;
      s.qq += wq * q;
      s.qe += wq * e;
      s.ee += we * e;
    }
    out = s;
  }

  void codes(float scale, float offset, std::uint8_t* out) const noexcept {
    const V inv = inverse(spread(scale));
    for (int j = 0; j < n; j += pack_lanes) {
      V q;
      for (int k = 0; k < pack_lanes; ++k) q[k] = x[j + k] - offset;
      q *= inv;
      Levels::round(q);
      for (int k = 0; k < pack_lanes; ++k) out[j + k] = Levels::code(q[k]);
    }
  }
};

// The F16 scale and, if the Spec has one, offset of a block.  The Spec: Levels, elements, has_offset, and `starts`
// scales to start from, that map the range of the block to from, from + step, .. levels more than there are.  Fewer
// levels waste some of them, more clip the extremes; either may happen to suit the values.
template <class Spec>
class ScaleSearch {
  static constexpr int n = Spec::elements;
  static constexpr bool has_offset = Spec::has_offset;
  static constexpr int survivors = 4;
  using Levels = typename Spec::Levels;
  using Block = MeasuredBlock<Levels, n>;
  using V = PackVector;

 public:
  float scale = 0, offset = 0;
  std::uint8_t code[n];

  ScaleSearch(const float* x, const float* importance) noexcept : block_(x, importance), least_(block_.sum_wxx) {
    // Each start's solution, and the error that it would have if levels stayed and F16 were exact.
    float scales[Spec::starts], offsets[Spec::starts], errors[Spec::starts];
    for (int first = 0; first < Spec::starts; first += pack_lanes) {
      V s, o{};
      for (int k = 0; k < pack_lanes; ++k) start(first + k, k, s, o);
      typename Block::Sums sums;
      block_.template measure<has_offset>(s, o, sums);
      const V error = solve(sums, s, o);
      for (int k = 0; k < pack_lanes; ++k)
        scales[first + k] = s[k], offsets[first + k] = o[k], errors[first + k] = error[k];
    }
    V s, o{};
    for (int k = 0; k < survivors; ++k) {
      const auto best = std::min_element(errors, errors + Spec::starts) - errors;
      for (int lane = k; lane < pack_lanes; lane += survivors) s[lane] = scales[best], o[lane] = offsets[best];
      errors[best] = std::numeric_limits<float>::infinity();
    }
    for (int round = 0; round < 2; ++round) {
      for (int k = 0; k < pack_lanes; ++k) {
        s[k] = storable(s[k]);
        if constexpr (has_offset) o[k] = storable(o[k]);
      }
      typename Block::Sums sums;
      block_.template measure<has_offset>(s, o, sums);
      for (int k = 0; k < survivors; ++k) {
        if (!(sums.ee[k] < least_)) continue;
        least_ = sums.ee[k], scale = s[k], offset = o[k];
      }
      solve(sums, s, o);
    }
    block_.codes(scale, offset, code);
  }

 private:
  // Start i of Spec::starts.  Without an offset the extreme may be of either sign, and levels need not be symmetric:
  // every other start has the opposite sign.
  void start(int i, int k, V& s, V& o) const noexcept {
    if constexpr (has_offset) {
      const float more = Spec::from + Spec::step * static_cast<float>(i);
      s[k] = (block_.highest - block_.lowest) / (static_cast<float>(Levels::high - Levels::low) + more);
      o[k] = block_.lowest;
    } else {
      const float more = Spec::from + Spec::step * static_cast<float>(i / 2);
      const float extreme = -block_.lowest > block_.highest ? block_.lowest : block_.highest;
      s[k] = extreme / (i % 2 == 0 ? static_cast<float>(Levels::low) - more : more - static_cast<float>(Levels::low));
    }
  }

  // The best scale and offset for the levels that were measured; the error that they leave.
  V solve(const typename Block::Sums& m, V& s, V& o) const noexcept {
    const V zero{}, one = spread(1);
    if constexpr (has_offset) {
      const V det = block_.sum_w * m.qq - m.q * m.q;
      const V divisor = det > zero ? det : one;
      const V more = det > zero ? (block_.sum_w * m.qe - m.q * m.e) / divisor : zero;
      const V higher = det > zero ? (m.qq * m.e - m.q * m.qe) / divisor : zero;
      s += more;
      o += higher;
      return m.ee - more * m.qe - higher * m.e;
    } else {
      const V more = m.qe / (m.qq > zero ? m.qq : one);
      s += more;
      return m.ee - more * m.qe;
    }
  }

  Block block_;
  float least_;
};

}  // namespace qwen3next::detail
