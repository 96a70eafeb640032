#pragma once
// The types that came before the K family, and are still what phones and old GPUs are fed: 32 elements under one scale.
//
//   Q4_0, Q5_0   value = d (q - 8), d (q - 16)    4.5, 5.5 bits per weight
//   Q4_1, Q5_1   value = d q + m                  5,   6
//
// d and m are F16.  Element j < 16 has its four low bits in the low nibble of qs[j], element j + 16 in the high one;
// bit j of qh is the fifth bit of element j.  Q8_0: q8_0.hpp.  Packing: legacy_quants_pack.hpp.

#include <cstddef>
#include <cstdint>

#include "blocks/half.hpp"

namespace qwen3next {

struct BlockQ4_0 {
  static constexpr int elements = 32;
  std::uint16_t d;      // @0
  std::uint8_t qs[16];  // @2
};
static_assert(sizeof(BlockQ4_0) == 18);

struct BlockQ4_1 {
  static constexpr int elements = 32;
  std::uint16_t d;      // @0
  std::uint16_t m;      // @2
  std::uint8_t qs[16];  // @4
};
static_assert(sizeof(BlockQ4_1) == 20);

struct BlockQ5_0 {
  static constexpr int elements = 32;
  std::uint16_t d;      // @0
  std::uint8_t qh[4];   // @2   one u32, at an odd multiple of 2
  std::uint8_t qs[16];  // @6
};
static_assert(sizeof(BlockQ5_0) == 22);

struct BlockQ5_1 {
  static constexpr int elements = 32;
  std::uint16_t d;      // @0
  std::uint16_t m;      // @2
  std::uint8_t qh[4];   // @4
  std::uint8_t qs[16];  // @8
};
static_assert(sizeof(BlockQ5_1) == 24);

// Level of element j = 0..31.
template <class Block>
constexpr int get_level(const Block& b, int j) noexcept {
  const int low = b.qs[j % 16] >> (j < 16 ? 0 : 4) & 15;
  if constexpr (requires { b.qh; })
    return low | (b.qh[j / 8] >> (j % 8) & 1) << 4;
  else
    return low;
}

template <class Block>
constexpr void set_levels_32(Block& b, const std::uint8_t* q) noexcept {
  for (int j = 0; j < 16; ++j) b.qs[j] = static_cast<std::uint8_t>((q[j] & 15) | (q[j + 16] & 15) << 4);
  if constexpr (requires { b.qh; }) {
    for (int i = 0; i < 4; ++i) {
      int bits = 0;
      for (int j = 0; j < 8; ++j) bits |= (q[8 * i + j] >> 4) << j;
      b.qh[i] = static_cast<std::uint8_t>(bits);
    }
  }
}

namespace detail {

template <int zero, class Block>
void unpack_symmetric(const Block& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (int j = 0; j < 32; ++j) y[j] = d * static_cast<float>(get_level(b, j) - zero);
}

// The product is exact in a float.
template <class Block>
void unpack_affine(const Block& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
  for (int j = 0; j < 32; ++j) y[j] = d * static_cast<float>(get_level(b, j)) + m;
}

}  // namespace detail

inline void unpack(const BlockQ4_0& b, float* y) noexcept { detail::unpack_symmetric<8>(b, y); }
inline void unpack(const BlockQ4_1& b, float* y) noexcept { detail::unpack_affine(b, y); }
inline void unpack(const BlockQ5_0& b, float* y) noexcept { detail::unpack_symmetric<16>(b, y); }
inline void unpack(const BlockQ5_1& b, float* y) noexcept { detail::unpack_affine(b, y); }

}  // namespace qwen3next
