#pragma once
// Blocks of a file, byte by byte, and the elements of a strip, one by one: the slow, plain side of strip.hpp.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "backends/cuda/strip.hpp"

namespace qwen3next::cuda {

template <DType type>
inline constexpr DTypeInfo info_of = info(type);

__device__ inline std::uint16_t raw_u16(const std::uint8_t* p) {  // at any address
  return static_cast<std::uint16_t>(p[0] | p[1] << 8);
}

// The code of element j of a block.
template <DType type>
__device__ int raw_code(const std::uint8_t* b, int j) {
  if constexpr (type == DType::f8_e4m3) return b[0];
  if constexpr (type == DType::q8_0) return b[2 + j] ^ 0x80;
  if constexpr (type == DType::q4_0 || type == DType::q4_1 || type == DType::iq4_nl || type == DType::mxfp4) {
    constexpr int at = type == DType::mxfp4 ? 1 : type == DType::q4_1 ? 4 : 2;
    return b[at + j % 16] >> (j / 16 * 4) & 15;
  }
  if constexpr (type == DType::q5_0 || type == DType::q5_1) {
    constexpr int at = type == DType::q5_0 ? 2 : 4;
    return (b[at + 4 + j % 16] >> (j / 16 * 4) & 15) | (b[at + j / 8] >> (j % 8) & 1) << 4;
  }
  if constexpr (type == DType::q2_k) return b[16 + j / 128 * 32 + j % 32] >> (2 * (j / 32 % 4)) & 3;
  if constexpr (type == DType::q3_k) {
    return (b[32 + j / 128 * 32 + j % 32] >> (2 * (j / 32 % 4)) & 3) | (b[j % 32] >> (j / 32) & 1) << 2;
  }
  if constexpr (type == DType::q4_k) return b[16 + j / 64 * 32 + j % 32] >> (j / 32 % 2 * 4) & 15;
  if constexpr (type == DType::q5_k) {
    return (b[48 + j / 64 * 32 + j % 32] >> (j / 32 % 2 * 4) & 15) | (b[16 + j % 32] >> (j / 32) & 1) << 4;
  }
  if constexpr (type == DType::q6_k) {
    const int half = j / 128, quarter = j / 32 % 4;
    return (b[64 * half + quarter % 2 * 32 + j % 32] >> (quarter / 2 * 4) & 15) |
           (b[128 + 32 * half + j % 32] >> (2 * quarter) & 3) << 4;
  }
  if constexpr (type == DType::iq4_xs) return b[8 + j / 32 * 16 + j % 16] >> (j / 16 % 2 * 4) & 15;
  if constexpr (type == DType::nvfp4) return b[4 + j / 16 * 8 + j % 8] >> (j / 8 % 2 * 4) & 15;
  return 0;
}

// Scale byte (of groups of `group` elements) k of a block, and the minimum beside it.
template <DType type>
__device__ int raw_scale(const std::uint8_t* b, int k) {
  if constexpr (type == DType::q2_k) return b[k] & 15;
  if constexpr (type == DType::q3_k) {
    const std::uint8_t* s = b + 96;
    const int low = k < 8 ? s[k] & 15 : s[k - 8] >> 4;
    return (low | (s[8 + k % 4] >> (k / 4 * 2) & 3) << 4) - 32 + 128;
  }
  if constexpr (type == DType::q4_k || type == DType::q5_k) {
    const std::uint8_t* s = b + 4;
    return k < 4 ? s[k] & 63 : (s[k + 4] & 15) | (s[k - 4] >> 6) << 4;
  }
  if constexpr (type == DType::q6_k) return b[192 + k] ^ 0x80;
  if constexpr (type == DType::iq4_xs) {
    return ((b[4 + k / 2] >> (k % 2 * 4) & 15) | (raw_u16(b + 2) >> (2 * k) & 3) << 4) - 32 + 128;
  }
  if constexpr (type == DType::mxfp4) return b[0];
  if constexpr (type == DType::nvfp4) return b[k] == 0x7f ? 0 : b[k] & 0x7f;  // as fp4.hpp reads them
  return 0;
}
template <DType type>
__device__ int raw_minimum(const std::uint8_t* b, int k) {
  if constexpr (type == DType::q2_k) return b[k] >> 4;
  if constexpr (type == DType::q4_k || type == DType::q5_k) {
    const std::uint8_t* s = b + 4;
    return k < 4 ? s[k + 4] & 63 : (s[k + 4] >> 4) | (s[k] >> 6) << 4;
  }
  return 0;
}

// Offset of d (and 2 bytes after it dmin, m) in a block.
__host__ __device__ constexpr int raw_factor(DType type) {
  return type == DType::q2_k ? 80 : type == DType::q3_k ? 108 : type == DType::q6_k ? 208 : 0;
}

__device__ inline float half_bits_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

__device__ inline float e4m3_to_float(int code) {
  const int magnitude = code & 0x7f;
  if (magnitude == 0x7f) return __int_as_float(0x7fc00000);
  const float value =
      magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f : __int_as_float((magnitude << 20) + (120 << 23));
  return code & 0x80 ? -value : value;
}

// Factor of an FP4 block's doubled levels.
__device__ inline float half_e8m0(int e) { return __int_as_float(e < 2 ? 0x00200000 << e : (e - 1) << 23); }
__device__ inline float half_ue4m3(int u) {
  const int exponent = u >> 3 & 15, fraction = u & 7;
  return exponent == 0 ? static_cast<float>(fraction) * 0x1p-10f
                       : __int_as_float((exponent + 127 - 8) << 23 | fraction << 20);
}

__device__ inline float iq4_level(int code) {
  constexpr std::uint64_t low = 0xf6eaddcfbfad9881, high = 0x7159453526190d01;  // iq4_levels as bytes
  return static_cast<float>(static_cast<std::int8_t>((code < 8 ? low : high) >> (code % 8 * 8)));
}
__device__ inline float fp4_level(int code) {  // doubled
  constexpr std::uint64_t levels = 0xc864'3210;
  const float level = static_cast<float>(levels >> (code % 8 * 4) & 15);
  return code > 8 ? -level : level;  // 8 is 0, not -0
}

// Element (row, col) of a strip, as the file means it but for the factor of the whole matrix.
template <DType type>
__device__ float strip_value(const std::byte* strip, int row, int col) {
  constexpr StripFormat f = strip_format(type);
  constexpr StripLayout at = strip_layout(type);
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(strip);
  const int r = row / 8, tile = col / tile_cols, u = col / 32 % 2, c = col % 8;
  const int lane = row % 8 * 4 + col % 32 / 8;
  if constexpr (f.bits == 16) {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(bytes + (4 * tile + 2 * r + u) * 512 + lane * 16);
    return type == DType::bf16 ? __int_as_float(halves[c] << 16) : half_bits_to_float(halves[c]);
  } else {
    int code;
    if constexpr (f.bits == 8) {
      code = bytes[(2 * tile + r) * 512 + lane * 16 + u * 8 + c];
    } else {
      const int w = 2 * r + u;
      const auto* words = reinterpret_cast<const std::uint32_t*>(bytes);
      code = static_cast<int>(words[(tile * 32 + lane) * 4 + w] >> nibble_bit(c) & 15);
      const auto* high = reinterpret_cast<const std::uint32_t*>(bytes + at.high);
      if constexpr (f.bits == 5) code |= static_cast<int>(high[lane * 4 + tile] >> high_bit(5, w, c) & 1) << 4;
      if constexpr (f.bits == 6) {
        code |= static_cast<int>(high[(tile / 2 * 32 + lane) * 4 + tile % 2 * 2 + r] >> high_bit(6, u, c) & 3) << 4;
      }
    }
    const int k = scale_index(type, row, col);
    if constexpr (type == DType::f8_e4m3) {
      return __fmul_rn(e4m3_to_float(code), reinterpret_cast<const float*>(bytes + at.scales)[k]);
    } else if constexpr (f.kind == ScaleKind::halves) {
      const float d = half_bits_to_float(reinterpret_cast<const std::uint16_t*>(bytes + at.scales)[k]);
      if constexpr (type == DType::iq4_nl) return d * iq4_level(code);
      const float product = d * static_cast<float>(code - f.zero);
      if constexpr (!f.minimum) return product;
      return __fadd_rn(product, half_bits_to_float(reinterpret_cast<const std::uint16_t*>(bytes + at.minima)[k]));
    } else if constexpr (type == DType::mxfp4 || type == DType::nvfp4) {
      const int scale = bytes[at.scales + k];
      return (type == DType::mxfp4 ? half_e8m0(scale) : half_ue4m3(scale)) * fp4_level(code);
    } else {
      const auto* factors = reinterpret_cast<const std::uint16_t*>(bytes + at.factors);
      const int i = (row % 8 * 2 + r) * (f.minimum ? 2 : 1);
      const float scale = half_bits_to_float(factors[i]) * static_cast<float>(bytes[at.scales + k] - f.scale_offset);
      if constexpr (type == DType::iq4_xs) return scale * iq4_level(code);
      const float product = scale * static_cast<float>(code - f.zero);
      if constexpr (!f.minimum) return product;
      return __fsub_rn(product, half_bits_to_float(factors[i + 1]) * static_cast<float>(bytes[at.minima + k]));
    }
  }
}

}  // namespace qwen3next::cuda
