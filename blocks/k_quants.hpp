#pragma once
// The K family: super-blocks of 256 elements whose sub-blocks of 16 or 32 have quantised scales.
//
//   Q2_K         16 x 16   value = d sc q - dmin m        2.625 bits per weight
//   Q3_K, Q6_K   16 x 16   value = d sc q                 3.44, 6.56
//   Q4_K, Q5_K    8 x 32   value = d sc q - dmin m        4.5,  5.5  bits per weight
//
// d and dmin are F16.  Offsets are in bytes.  All products of unpack() but the last are exact in a float, so fused
// multiply-add gives the same values.  Packing: k_quants_pack.hpp.

#include <cstddef>
#include <cstdint>

#include "blocks/half.hpp"

namespace qwen3next {

struct BlockQ2_K {
  static constexpr int elements = 256;
  std::uint8_t scales[16];  // @0    scale in the low nibble, min in the high one
  std::uint8_t qs[64];      // @16   two bits, four elements a byte
  std::uint16_t d;          // @80
  std::uint16_t dmin;       // @82
};
static_assert(sizeof(BlockQ2_K) == 84);

struct BlockQ3_K {
  static constexpr int elements = 256;
  std::uint8_t hmask[32];   // @0    bit h of hmask[l]: not minus 4, for element 32 h + l
  std::uint8_t qs[64];      // @32   two low bits, four elements a byte
  std::uint8_t scales[12];  // @96   16 of 6 bits, offset 32
  std::uint16_t d;          // @108
};
static_assert(sizeof(BlockQ3_K) == 110);

struct BlockQ4_K {
  static constexpr int elements = 256;
  std::uint16_t d;          // @0
  std::uint16_t dmin;       // @2
  std::uint8_t scales[12];  // @4    8 pairs of 6 bits
  std::uint8_t qs[128];     // @16   nibbles: sub-blocks 2c (low) and 2c + 1 (high) share qs[32 c ..]
};
static_assert(sizeof(BlockQ4_K) == 144);

struct BlockQ5_K {
  static constexpr int elements = 256;
  std::uint16_t d;          // @0
  std::uint16_t dmin;       // @2
  std::uint8_t scales[12];  // @4
  std::uint8_t qh[32];      // @16   bit k of qh[l]: fifth bit of element l of sub-block k
  std::uint8_t qs[128];     // @48   nibbles as in Q4_K
};
static_assert(sizeof(BlockQ5_K) == 176);

struct BlockQ6_K {
  static constexpr int elements = 256;
  std::uint8_t ql[128];    // @0    four low bits: elements l, l + 64 (then l + 32, l + 96) of each half share a byte
  std::uint8_t qh[64];     // @128  two high bits, four elements a byte
  std::int8_t scales[16];  // @192
  std::uint16_t d;         // @208
};
static_assert(sizeof(BlockQ6_K) == 210);

// Scale and min of sub-block k = 0..7 of Q4_K, Q5_K.  The first four pairs lie in the low six bits of bytes 0-3 and
// 4-7; the others have their low nibbles in bytes 8-11 and their top two bits above the first four.
struct ScaleMin {
  int scale, min;  // 0..63
};
constexpr ScaleMin get_scale_min(const std::uint8_t* s, int k) noexcept {
  if (k < 4) return {s[k] & 63, s[k + 4] & 63};
  return {(s[k + 4] & 15) | (s[k - 4] >> 6) << 4, (s[k + 4] >> 4) | (s[k] >> 6) << 4};
}
constexpr void set_scale_min(std::uint8_t* s, const ScaleMin (&pairs)[8]) noexcept {
  for (int k = 0; k < 4; ++k) {
    s[k] = static_cast<std::uint8_t>(pairs[k].scale | (pairs[k + 4].scale >> 4) << 6);
    s[k + 4] = static_cast<std::uint8_t>(pairs[k].min | (pairs[k + 4].min >> 4) << 6);
    s[k + 8] = static_cast<std::uint8_t>((pairs[k + 4].scale & 15) | (pairs[k + 4].min & 15) << 4);
  }
}

// Scale of sub-block k = 0..15 of Q3_K, -32..31: low nibbles in bytes 0-7, top two bits in bytes 8-11.
constexpr int get_scale_q3(const std::uint8_t* s, int k) noexcept {
  const int low = k < 8 ? s[k] & 15 : s[k - 8] >> 4;
  const int high = (s[8 + k % 4] >> (2 * (k / 4))) & 3;
  return (low | high << 4) - 32;
}
constexpr void set_scales_q3(std::uint8_t* s, const int (&scales)[16]) noexcept {
  for (int k = 0; k < 12; ++k) s[k] = 0;
  for (int k = 0; k < 16; ++k) {
    const int u = scales[k] + 32;
    s[k % 8] = static_cast<std::uint8_t>(s[k % 8] | (u & 15) << (k < 8 ? 0 : 4));
    s[8 + k % 4] = static_cast<std::uint8_t>(s[8 + k % 4] | (u >> 4) << (2 * (k / 4)));
  }
}

inline void unpack(const BlockQ2_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int k = 0; k < 16; ++k) {  // in the order of Q3_K
    const float scale = d * static_cast<float>(b.scales[k] & 15), min = dmin * static_cast<float>(b.scales[k] >> 4);
    const std::uint8_t* q = b.qs + 32 * (k / 8) + 16 * (k % 2);
    for (int l = 0; l < 16; ++l) y[16 * k + l] = scale * static_cast<float>(q[l] >> (2 * (k / 2 % 4)) & 3) - min;
  }
}

inline void unpack(const BlockQ3_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (int k = 0; k < 16; ++k) {  // k = 8 half + 2 j + part, as FORMATS.md 5 counts
    const int plane = k / 2;      // of 32 elements: bit of hmask
    const float scale = d * static_cast<float>(get_scale_q3(b.scales, k));
    const std::uint8_t* low = b.qs + 32 * (k / 8) + 16 * (k % 2);
    const std::uint8_t* high = b.hmask + 16 * (k % 2);
    for (int l = 0; l < 16; ++l) {
      const int q = ((low[l] >> (2 * (plane % 4))) & 3) + ((high[l] >> plane) & 1) * 4 - 4;
      y[16 * k + l] = scale * static_cast<float>(q);
    }
  }
}

inline void unpack(const BlockQ4_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int k = 0; k < 8; ++k) {
    const auto [sc, m] = get_scale_min(b.scales, k);
    const float scale = d * static_cast<float>(sc), min = dmin * static_cast<float>(m);
    const std::uint8_t* q = b.qs + 32 * (k / 2);
    for (int l = 0; l < 32; ++l) {
      y[32 * k + l] = scale * static_cast<float>((q[l] >> (4 * (k % 2))) & 15) - min;
    }
  }
}

inline void unpack(const BlockQ5_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int k = 0; k < 8; ++k) {
    const auto [sc, m] = get_scale_min(b.scales, k);
    const float scale = d * static_cast<float>(sc), min = dmin * static_cast<float>(m);
    const std::uint8_t* q = b.qs + 32 * (k / 2);
    for (int l = 0; l < 32; ++l) {
      const int level = ((q[l] >> (4 * (k % 2))) & 15) | ((b.qh[l] >> k) & 1) << 4;
      y[32 * k + l] = scale * static_cast<float>(level) - min;
    }
  }
}

inline void unpack(const BlockQ6_K& b, float* y) noexcept {
  const float d = f16_to_f32(b.d);
  for (int k = 0; k < 16; ++k) {
    const int half = k / 8, quarter = k % 8 / 2;  // 32 elements of 128
    const float scale = d * static_cast<float>(b.scales[k]);
    const std::uint8_t* low = b.ql + 64 * half + 32 * (quarter % 2) + 16 * (k % 2);
    const std::uint8_t* high = b.qh + 32 * half + 16 * (k % 2);
    for (int l = 0; l < 16; ++l) {
      const int q = ((low[l] >> (4 * (quarter / 2))) & 15) | ((high[l] >> (2 * quarter)) & 3) << 4;
      y[16 * k + l] = scale * static_cast<float>(q - 32);
    }
  }
}

// The inverse of unpack's bit shuffling: levels by element.
inline void set_levels(BlockQ2_K& b, const std::uint8_t* q) noexcept {  // 0..3
  for (int half = 0; half < 2; ++half) {
    for (int l = 0; l < 32; ++l) {
      const std::uint8_t* e = q + 128 * half + l;
      b.qs[32 * half + l] = static_cast<std::uint8_t>(e[0] | e[32] << 2 | e[64] << 4 | e[96] << 6);
    }
  }
}
inline void set_levels(BlockQ3_K& b, const std::uint8_t* q) noexcept {  // 0..7, standing for -4..3
  for (int l = 0; l < 32; ++l) {
    int high = 0;
    for (int h = 0; h < 8; ++h) high |= (q[32 * h + l] >> 2) << h;
    b.hmask[l] = static_cast<std::uint8_t>(high);
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* e = q + 128 * half + l;
      b.qs[32 * half + l] =
          static_cast<std::uint8_t>((e[0] & 3) | (e[32] & 3) << 2 | (e[64] & 3) << 4 | (e[96] & 3) << 6);
    }
  }
}
inline void set_levels(BlockQ4_K& b, const std::uint8_t* q) noexcept {  // 0..15
  for (int c = 0; c < 4; ++c) {
    for (int l = 0; l < 32; ++l) b.qs[32 * c + l] = static_cast<std::uint8_t>(q[64 * c + l] | q[64 * c + 32 + l] << 4);
  }
}
inline void set_levels(BlockQ5_K& b, const std::uint8_t* q) noexcept {  // 0..31
  for (int l = 0; l < 32; ++l) {
    int high = 0;
    for (int k = 0; k < 8; ++k) high |= (q[32 * k + l] >> 4) << k;
    b.qh[l] = static_cast<std::uint8_t>(high);
    for (int c = 0; c < 4; ++c) {
      b.qs[32 * c + l] = static_cast<std::uint8_t>((q[64 * c + l] & 15) | (q[64 * c + 32 + l] & 15) << 4);
    }
  }
}
inline void set_levels(BlockQ6_K& b, const std::uint8_t* q) noexcept {  // 0..63, standing for -32..31
  for (int half = 0; half < 2; ++half) {
    for (int l = 0; l < 32; ++l) {
      const std::uint8_t* e = q + 128 * half + l;
      b.ql[64 * half + l] = static_cast<std::uint8_t>((e[0] & 15) | (e[64] & 15) << 4);
      b.ql[64 * half + 32 + l] = static_cast<std::uint8_t>((e[32] & 15) | (e[96] & 15) << 4);
      b.qh[32 * half + l] = static_cast<std::uint8_t>(e[0] >> 4 | e[32] >> 4 << 2 | e[64] >> 4 << 4 | e[96] >> 4 << 6);
    }
  }
}

}  // namespace qwen3next
