#pragma once
// Packing of the FP4 types.  Their scales have so few values that those near the largest magnitude are simply tried.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "blocks/fp4.hpp"
#include "blocks/scale_search.hpp"

namespace qwen3next {

namespace detail {

struct FP4Levels {  // doubled
  static constexpr int low = -12, high = 12;
  static constexpr std::array<std::uint8_t, 13> codes{0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7};

  // Multiples of 1 up to 4, of 2 up to 8, of 4 up to 12.
  static void round(PackVector& v) noexcept {
    using V = PackVector;
    const V ones = spread(0x1.8p23f), twos = spread(0x1.8p24f), fours = spread(0x1.8p25f), most = spread(12);
    V a = v < V{} ? -v : v;
    a = a < most ? a : most;
    const V by_one = (a + ones) - ones, by_two = (a + twos) - twos, by_four = (a + fours) - fours;
    a = a < spread(4) ? by_one : a < spread(8) ? by_two : by_four;
    v = v < V{} ? -a : a;
  }
  static std::uint8_t code(float level) noexcept {
    const int integer = static_cast<int>(level);
    const std::uint8_t magnitude = codes[static_cast<std::size_t>(std::abs(integer))];
    return integer < 0 ? static_cast<std::uint8_t>(magnitude | 8) : magnitude;
  }
};

// The best of `count` neighbouring codes of scales, whose halves are decode(first), decode(first + 1) ..; and the
// levels that go with it.
template <int n, int count, class Decode>
std::uint8_t best_fp4_scale(const MeasuredBlock<FP4Levels, n>& block, int first, const Decode& decode,
                            std::uint8_t* levels) noexcept {
  float least = INFINITY;
  int best = first;
  for (int i = 0; i < count; i += pack_lanes) {
    PackVector scale;
    for (int k = 0; k < pack_lanes; ++k) scale[k] = decode(static_cast<std::uint8_t>(first + i + k));
    typename MeasuredBlock<FP4Levels, n>::Sums sums;
    block.template measure<false>(scale, PackVector{}, sums);
    for (int k = 0; k < pack_lanes; ++k) {
      if (sums.ee[k] < least) least = sums.ee[k], best = first + i + k;
    }
  }
  block.codes(decode(static_cast<std::uint8_t>(best)), 0, levels);
  return static_cast<std::uint8_t>(best);
}

}  // namespace detail

// With 2^(exponent - 2) for a scale, the largest magnitude is 4 to 8.
inline void pack(const float* x, const float* importance, BlockMXFP4& b) noexcept {
  const detail::MeasuredBlock<detail::FP4Levels, 32> block(x, importance);
  const float largest = std::max(-block.lowest, block.highest);
  const int e = largest > 0 ? std::ilogb(largest) - 2 + 127 : 0;
  std::uint8_t q[32];
  // From 2: below, the inverse of a scale would overflow.
  b.e = detail::best_fp4_scale<32, 8>(block, std::clamp(e - 3, 2, 247), half_e8m0_to_f32, q);
  for (int j = 0; j < 16; ++j) b.qs[j] = static_cast<std::uint8_t>(q[j] | q[j + 16] << 4);
}

inline void pack(const float* x, const float* importance, BlockNVFP4& b) noexcept {
  for (int k = 0; k < 4; ++k) {
    const detail::MeasuredBlock<detail::FP4Levels, 16> block(x + 16 * k, importance ? importance + 16 * k : nullptr);
    const float largest = std::max(-block.lowest, block.highest);
    int nearest = 0;  // codes are in the order of what they stand for
    while (nearest < 0x7e && 12 * half_ue4m3_to_f32(static_cast<std::uint8_t>(nearest)) < largest) ++nearest;
    std::uint8_t q[16];
    b.scales[k] = detail::best_fp4_scale<16, 16>(block, std::clamp(nearest - 8, 0, 0x7e - 15), half_ue4m3_to_f32, q);
    for (int j = 0; j < 8; ++j) b.qs[8 * k + j] = static_cast<std::uint8_t>(q[j] | q[j + 8] << 4);
  }
}

}  // namespace qwen3next
