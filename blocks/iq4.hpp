#pragma once
// IQ4: four bits that index a table of levels, dense around zero and wide at the ends, as weights are.
//
//   IQ4_NL   32 elements       value = d T[q]       4.5  bits per weight
//   IQ4_XS   8 x 32 elements   value = d sc T[q]    4.25
//
// d is F16, sc 6 bits, -32..31.  Element j < 16 of 32 is the low nibble of qs[j], element j + 16 the high one.
// Packing: iq4_pack.hpp.

#include <array>
#include <cstddef>
#include <cstdint>

#include "blocks/half.hpp"

namespace qwen3next {

inline constexpr std::array<std::int8_t, 16> iq4_levels{-127, -104, -83, -65, -49, -35, -22, -10,
                                                        1,    13,   25,  38,  53,  69,  89,  113};

struct BlockIQ4_NL {
  static constexpr int elements = 32;
  std::uint16_t d;      // @0
  std::uint8_t qs[16];  // @2
};
static_assert(sizeof(BlockIQ4_NL) == 18);

struct BlockIQ4_XS {
  static constexpr int elements = 256;
  std::uint16_t d;           // @0
  std::uint16_t scales_h;    // @2   two high bits of each scale
  std::uint8_t scales_l[4];  // @4   four low bits, two scales a byte
  std::uint8_t qs[128];      // @8
};
static_assert(sizeof(BlockIQ4_XS) == 136);

// Scale of sub-block k = 0..7.
constexpr int get_scale(const BlockIQ4_XS& b, int k) noexcept {
  return ((b.scales_l[k / 2] >> (4 * (k % 2)) & 15) | (b.scales_h >> (2 * k) & 3) << 4) - 32;
}
constexpr void set_scales(BlockIQ4_XS& b, const int (&scales)[8]) noexcept {
  int high = 0;
  for (int k = 0; k < 8; ++k) high |= ((scales[k] + 32) >> 4) << (2 * k);
  b.scales_h = static_cast<std::uint16_t>(high);
  for (int i = 0; i < 4; ++i) {
    b.scales_l[i] = static_cast<std::uint8_t>(((scales[2 * i] + 32) & 15) | ((scales[2 * i + 1] + 32) & 15) << 4);
  }
}

inline void unpack(const BlockIQ4_NL& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 16; ++j) {
    y[j] = d * iq4_levels[b.qs[j] & 15];
    y[j + 16] = d * iq4_levels[b.qs[j] >> 4];
  }
}

inline void unpack(const BlockIQ4_XS& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (int k = 0; k < 8; ++k) {
    const float scale = d * static_cast<float>(get_scale(b, k));
    for (int j = 0; j < 16; ++j) {
      y[32 * k + j] = scale * iq4_levels[b.qs[16 * k + j] & 15];
      y[32 * k + 16 + j] = scale * iq4_levels[b.qs[16 * k + j] >> 4];
    }
  }
}

// Indices into the table, by element of 32.
constexpr void set_iq4_levels(std::uint8_t* qs, const std::uint8_t* q) noexcept {
  for (int j = 0; j < 16; ++j) qs[j] = static_cast<std::uint8_t>(q[j] | q[j + 16] << 4);
}

}  // namespace qwen3next
