#pragma once
// FP4, E2M1: sign, two bits of exponent, one of fraction: 0 .5 1 1.5 2 3 4 6.
//
//   MXFP4   32 elements       value = 2^(e - 127) E[q]    4.25 bits per weight    OCP Microscaling Formats 1.0
//   NVFP4   4 x 16 elements   value = u E[q]              4.5
//
// e is a byte; u is an E4M3 number without sign.  Tensors of NVFP4 may come with a factor for the whole in a second
// tensor, which is not part of the blocks.  The table is doubled and the scales halved, so that levels are integers.
// Element j of the first half of a block or sub-block is a low nibble, of the second half the high nibble of the same
// byte.  Packing: fp4_pack.hpp.

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "blocks/floats.hpp"
#include "blocks/half.hpp"

namespace qwen3next {

// 2 E[q].  Index 8 is -0 in E2M1; ggml reads 0.
inline constexpr std::array<std::int8_t, 16> fp4_levels{0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct BlockMXFP4 {
  static constexpr int elements = 32;
  std::uint8_t e;       // @0
  std::uint8_t qs[16];  // @1
};
static_assert(sizeof(BlockMXFP4) == 17);

struct BlockNVFP4 {
  static constexpr int elements = 64;
  std::uint8_t scales[4];  // @0
  std::uint8_t qs[32];     // @4   eight bytes for each sub-block
};
static_assert(sizeof(BlockNVFP4) == 36);

// 2^(e - 128), half of what the byte stands for: subnormal for 0 and 1.  255, NaN in the specification, is 2^127 as in
// ggml.
constexpr float half_e8m0_to_f32(std::uint8_t e) noexcept {
  return std::bit_cast<float>(e < 2 ? 0x00200000u << e : static_cast<std::uint32_t>(e - 1) << 23);
}

// Half of an E4M3 number whose sign bit does not count.  0x7f, its NaN, is 0; as in ggml, 0xff is 480.
constexpr float half_ue4m3_to_f32(std::uint8_t u) noexcept {
  if (u == 0x7f) return 0;
  const int exponent = u >> 3 & 15, fraction = u & 7;
  const auto bits = static_cast<std::uint32_t>((exponent + 127 - 8) << 23 | fraction << 20);
  return exponent == 0 ? static_cast<float>(fraction) * 0x1p-10f : std::bit_cast<float>(bits);
}

inline void unpack(const BlockMXFP4& b, float* y) noexcept {
  const float scale = half_e8m0_to_f32(b.e);
  for (int j = 0; j < 16; ++j) {
    y[j] = scale * fp4_levels[b.qs[j] & 15];
    y[j + 16] = scale * fp4_levels[b.qs[j] >> 4];
  }
}

inline void unpack(const BlockNVFP4& b, float* y) noexcept {
  for (int k = 0; k < 4; ++k) {
    const float scale = half_ue4m3_to_f32(b.scales[k]);
    for (int j = 0; j < 8; ++j) {
      y[16 * k + j] = scale * fp4_levels[b.qs[8 * k + j] & 15];
      y[16 * k + 8 + j] = scale * fp4_levels[b.qs[8 * k + j] >> 4];
    }
  }
}

}  // namespace qwen3next
