#pragma once
// Q8_0: 32 elements, value = d q.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "blocks/half.hpp"
#include "blocks/scale_search.hpp"

namespace qwen3next {

struct BlockQ8_0 {
  static constexpr int elements = 32;
  std::uint16_t d;     // @0   F16
  std::int8_t qs[32];  // @2   -127..127
};
static_assert(sizeof(BlockQ8_0) == 34);

inline void unpack(const BlockQ8_0& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 32; ++j) y[j] = d * static_cast<float>(b.qs[j]);
}

// The largest magnitude becomes 127.  The levels are rounded with the scale as it is stored, not as it was computed:
// 8 bits are fine enough for the rounding of an F16 scale to show.  `importance` makes no difference at 8 bits.
inline void pack(const float* x, const float* /*importance*/, BlockQ8_0& b) noexcept {
  float largest = 0;
  for (int j = 0; j < 32; ++j) largest = std::fabs(x[j]) > largest ? std::fabs(x[j]) : largest;
  b.d = f32_to_f16(detail::storable(largest / 127));
  const float d = f16_to_f32(b.d);
  const float inverse = d > 0 ? 1 / d : 0;
  for (int j = 0; j < 32; ++j) {
    float q = x[j] * inverse;
    q = q > 127 ? 127 : q < -127 ? -127 : q;
    b.qs[j] = static_cast<std::int8_t>(static_cast<int>(q + (q < 0 ? -0.5f : 0.5f)));
  }
}

}  // namespace qwen3next
