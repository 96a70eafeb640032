#pragma once
// The quantised types, one struct each: blocks to int8 and scales.  Layouts: FORMATS.md 5; scalar twins: blocks/.
//
//   weight i of a block = scale[i / group] q[i] - min[i / group]
//
// A new type is one such struct; everything else (products, strips, rows of embeddings) is written over them.  The
// loops have constant counts, so that compilers turn them into vector code for any ISA.

#include "backends/cpu/f8_product.hpp"
#include "backends/cpu/simd.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

QWEN3NEXT_FORCE_INLINE int byte_at(const std::byte* p, int i) noexcept { return static_cast<int>(p[i]); }
QWEN3NEXT_FORCE_INLINE float half_at(const std::byte* p) noexcept { return half_to_float(peek<std::uint16_t>(p)); }

#if defined(__AVX2__)
// 16 bytes of nibbles: the low ones, then the high ones.  All 32 are stored at once, since a load of 32 bytes that two
// stores wrote waits for both to reach the cache: ten times as long as all the rest.
QWEN3NEXT_FORCE_INLINE __m256i nibbles_of(const std::byte* qs) noexcept {
  const __m128i both = peek<__m128i>(qs);
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15));
}
#endif

// Q4_0, Q4_1, Q5_0, Q5_1: an F16 scale, perhaps an F16 offset, perhaps fifth bits, nibbles.
template <bool five_bits, bool offset>
struct Legacy {
  static constexpr int elements = 32, qh_at = offset ? 4 : 2, qs_at = qh_at + (five_bits ? 4 : 0);
  static constexpr int bytes = qs_at + 16, group = 32;
  static constexpr bool has_min = offset, wide = false;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float* min) noexcept {
    constexpr int zero = offset ? 0 : five_bits ? 16 : 8;
    scale[0] = half_at(p);
    if constexpr (offset) min[0] = -half_at(p + 2);
    std::uint32_t fifth = 0;
    if constexpr (five_bits) fifth = peek<std::uint32_t>(p + qh_at);
#if defined(__AVX2__)
    __m256i levels = nibbles_of(p + qs_at);
    if constexpr (five_bits) {
      const __m256i copied =
          _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(fifth)),
                              _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
      const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(copied, bit), bit);
      levels = _mm256_or_si256(levels, _mm256_and_si256(set, _mm256_set1_epi8(16)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_sub_epi8(levels, _mm256_set1_epi8(zero)));
#else
    for (int l = 0; l < 16; ++l) {
      int low = byte_at(p + qs_at, l) & 15, high = byte_at(p + qs_at, l) >> 4;
      if constexpr (five_bits) {
        low |= static_cast<int>(fifth >> l & 1) << 4;
        high |= static_cast<int>(fifth >> (16 + l) & 1) << 4;
      }
      q[l] = static_cast<std::int8_t>(low - zero);
      q[16 + l] = static_cast<std::int8_t>(high - zero);
    }
#endif
  }
};
using Q4_0 = Legacy<false, false>;
using Q4_1 = Legacy<false, true>;
using Q5_0 = Legacy<true, false>;
using Q5_1 = Legacy<true, true>;

// 16 bytes of nibbles that index a table of levels.  `pairs`: low nibbles of all to q[0..16), high ones to q[16..32);
// else those of the first 8 bytes to q[0..8) and q[8..16), of the others to q[16..24) and q[24..32).
template <bool pairs = true>
QWEN3NEXT_FORCE_INLINE void look_up(const std::byte* qs, const std::int8_t* table, std::int8_t* q) noexcept {
#if defined(__SSSE3__)
  const __m128i levels = peek<__m128i>(table), nibble = _mm_set1_epi8(15), both = peek<__m128i>(qs);
  __m128i low = _mm_and_si128(both, nibble), high = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
  if constexpr (!pairs) {
    const __m128i first = _mm_unpacklo_epi64(low, high);
    high = _mm_unpackhi_epi64(low, high);
    low = first;
  }
#if defined(__AVX2__)
  const __m256i all = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), _mm256_set_m128i(high, low));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), all);
#else
  auto* out = reinterpret_cast<__m128i*>(q);
  _mm_storeu_si128(out, _mm_shuffle_epi8(levels, low));
  _mm_storeu_si128(out + 1, _mm_shuffle_epi8(levels, high));
#endif
#elif defined(__aarch64__)
  const int8x16_t levels = vld1q_s8(table);
  const uint8x16_t both = vld1q_u8(reinterpret_cast<const std::uint8_t*>(qs));
  uint8x16_t low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
  if constexpr (!pairs) {
    const uint8x16_t first = vcombine_u8(vget_low_u8(low), vget_low_u8(high));
    high = vcombine_u8(vget_high_u8(low), vget_high_u8(high));
    low = first;
  }
  vst1q_s8(q, vqtbl1q_s8(levels, low));
  vst1q_s8(q + 16, vqtbl1q_s8(levels, high));
#else
  for (int l = 0; l < 16; ++l) {
    const int low = pairs ? l : l / 8 * 16 + l % 8;
    q[low] = table[byte_at(qs, l) & 15];
    q[low + (pairs ? 16 : 8)] = table[byte_at(qs, l) >> 4];
  }
#endif
}

inline constexpr std::int8_t iq4_table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4_NL {
  static constexpr int elements = 32, bytes = 18, group = 32;
  static constexpr bool has_min = false, wide = true;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float*) noexcept {
    scale[0] = half_at(p);
    look_up(p + 2, iq4_table, q);
  }
};

struct IQ4_XS {
  static constexpr int elements = 256, bytes = 136, group = 32;
  static constexpr bool has_min = false, wide = true;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float*) noexcept {
    const float d = half_at(p);
    const int high = peek<std::uint16_t>(p + 2);
    for (int k = 0; k < 8; ++k) {
      const int sc = (byte_at(p, 4 + k / 2) >> (4 * (k % 2)) & 15) | (high >> (2 * k) & 3) << 4;
      scale[k] = d * static_cast<float>(sc - 32);
      look_up(p + 8 + 16 * k, iq4_table, q + 32 * k);
    }
  }
};

// FP4: twice the numbers, under half the scales.
inline constexpr std::int8_t fp4_table[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct MXFP4 {
  static constexpr int elements = 32, bytes = 17, group = 32;
  static constexpr bool has_min = false, wide = false;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float*) noexcept {
    const auto e = static_cast<std::uint32_t>(p[0]);
    scale[0] = __builtin_bit_cast(float, e < 2 ? 0x00200000u << e : (e - 1) << 23);  // 2^(e - 128)
    look_up(p + 1, fp4_table, q);
  }
};

struct NVFP4 {
  static constexpr int elements = 64, bytes = 36, group = 16;
  static constexpr bool has_min = false, wide = false;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float*) noexcept {
    for (int k = 0; k < 4; ++k) {  // half of E4M3 without sign: bias 7 + 1
      const auto u = static_cast<std::uint32_t>(p[k]), magnitude = u & 0x7fu;
      const float subnormal = static_cast<float>(magnitude) * 0x1p-10f;
      const float normal = __builtin_bit_cast(float, (magnitude << 20) + ((127u - 8u) << 23));
      scale[k] = u == 0x7fu ? 0.0f : magnitude < 8 ? subnormal : normal;
    }
    look_up<false>(p + 4, fp4_table, q);
    look_up<false>(p + 20, fp4_table, q + 32);
  }
};

struct Q8_0 {
  static constexpr int elements = 32, bytes = 34, group = 32;
  static constexpr bool has_min = false, wide = true;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float*) noexcept {
    scale[0] = half_at(p);
    std::memcpy(q, p + 2, 32);
  }
};

// The 6-bit scales and minima of Q4_K and Q5_K: bytes sc[0..8) m[0..8), four at a time in a word.
QWEN3NEXT_FORCE_INLINE void unpack_scales_k4(const std::byte* p, std::uint8_t* sc_m) noexcept {
  const std::uint32_t a = peek<std::uint32_t>(p), b = peek<std::uint32_t>(p + 4), c = peek<std::uint32_t>(p + 8);
  const std::uint32_t words[4] = {a & 0x3f3f3f3fu, (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u), b & 0x3f3f3f3fu,
                                  ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u)};
  std::memcpy(sc_m, words, 16);
}

template <bool five_bits>
struct Q45_K {
  static constexpr int elements = 256, bytes = five_bits ? 176 : 144, group = 32;
  static constexpr bool has_min = true, wide = false;
  static constexpr int qh_at = 16, qs_at = five_bits ? 48 : 16;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float* min) noexcept {
    const float d = half_at(p), dmin = half_at(p + 2);
    std::uint8_t sc_m[16];
    unpack_scales_k4(p + 4, sc_m);
    for (int k = 0; k < 8; ++k) {
      scale[k] = d * static_cast<float>(sc_m[k]);
      min[k] = dmin * static_cast<float>(sc_m[8 + k]);
    }
    for (int c = 0; c < 4; ++c) {
      const std::byte* qs = p + qs_at + 32 * c;
      for (int l = 0; l < 32; ++l) {
        int low = byte_at(qs, l) & 15, high = byte_at(qs, l) >> 4;
        if constexpr (five_bits) {
          low |= (byte_at(p + qh_at, l) >> (2 * c) & 1) << 4;
          high |= (byte_at(p + qh_at, l) >> (2 * c + 1) & 1) << 4;
        }
        q[64 * c + l] = static_cast<std::int8_t>(low);
        q[64 * c + 32 + l] = static_cast<std::int8_t>(high);
      }
    }
  }
};
using Q4_K = Q45_K<false>;
using Q5_K = Q45_K<true>;

struct Q6_K {
  static constexpr int elements = 256, bytes = 210, group = 16;
  static constexpr bool has_min = false, wide = false;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float*) noexcept {
    const float d = half_at(p + 208);
    std::int8_t sc[16];
    std::memcpy(sc, p + 192, 16);
    for (int g = 0; g < 16; ++g) scale[g] = d * static_cast<float>(sc[g]);
    for (int n = 0; n < 2; ++n, q += 128) {
      const std::byte *ql = p + 64 * n, *qh = p + 128 + 32 * n;
      for (int l = 0; l < 32; ++l) {
        const int a = byte_at(ql, l), b = byte_at(ql, l + 32), h = byte_at(qh, l);
        q[l] = static_cast<std::int8_t>(((a & 15) | (h & 3) << 4) - 32);
        q[l + 32] = static_cast<std::int8_t>(((b & 15) | (h >> 2 & 3) << 4) - 32);
        q[l + 64] = static_cast<std::int8_t>((a >> 4 | (h >> 4 & 3) << 4) - 32);
        q[l + 96] = static_cast<std::int8_t>((b >> 4 | (h >> 6) << 4) - 32);
      }
    }
  }
};

struct Q2_K {
  static constexpr int elements = 256, bytes = 84, group = 16;
  static constexpr bool has_min = true, wide = false;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float* min) noexcept {
    const float d = half_at(p + 80), dmin = half_at(p + 82);
    for (int g = 0; g < 16; ++g) {
      scale[g] = d * static_cast<float>(byte_at(p, g) & 15);
      min[g] = dmin * static_cast<float>(byte_at(p, g) >> 4);
    }
    for (int n = 0; n < 2; ++n) {
      for (int j = 0; j < 4; ++j) {
        for (int l = 0; l < 32; ++l)
          q[128 * n + 32 * j + l] = static_cast<std::int8_t>(byte_at(p + 16 + 32 * n, l) >> (2 * j) & 3);
      }
    }
  }
};

struct Q3_K {
  static constexpr int elements = 256, bytes = 110, group = 16;
  static constexpr bool has_min = false, wide = false;

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float*) noexcept {
    const float d = half_at(p + 108);
    // Low nibbles from bytes 0..7 (low, then high nibbles), top bit pairs from bytes 8..11.
    const std::uint32_t a = peek<std::uint32_t>(p + 96), b = peek<std::uint32_t>(p + 100),
                        c = peek<std::uint32_t>(p + 104);
    const std::uint32_t words[4] = {
        (a & 0x0f0f0f0fu) | (c << 4 & 0x30303030u), (b & 0x0f0f0f0fu) | (c << 2 & 0x30303030u),
        (a >> 4 & 0x0f0f0f0fu) | (c & 0x30303030u), (b >> 4 & 0x0f0f0f0fu) | (c >> 2 & 0x30303030u)};
    std::uint8_t sc[16];
    std::memcpy(sc, words, 16);
    for (int g = 0; g < 16; ++g) scale[g] = d * static_cast<float>(sc[g] - 32);
    for (int n = 0; n < 2; ++n) {
      for (int j = 0; j < 4; ++j) {
        for (int l = 0; l < 32; ++l) {
          const int low = byte_at(p + 32 + 32 * n, l) >> (2 * j) & 3, bit = byte_at(p, l) >> (4 * n + j) & 1;
          q[128 * n + 32 * j + l] = static_cast<std::int8_t>(low + 4 * bit - 4);
        }
      }
    }
  }
};

// A row of n weights as floats.
template <class Type>
void dequantize_blocks(const std::byte* row, int n, float* out) noexcept {
  for (int i = 0; i < n; i += Type::elements, row += Type::bytes) {
    std::int8_t q[Type::elements];
    float scale[16], min[16] = {};
    Type::unpack(row, q, scale, min);
    for (int g = 0; g < Type::elements / Type::group; ++g) {
      for (int j = g * Type::group; j < (g + 1) * Type::group; ++j)
        out[i + j] = scale[g] * static_cast<float>(q[j]) - min[g];
    }
  }
}

template <DType type>
void dequantize_floats(const std::byte* row, int n, float* out) noexcept {
  for_lanes(n, [&](int i, int m) {
    const std::byte* p = row + i * stored_bytes<type>;
    store_some(out + i, m == lanes ? load_stored<type>(p) : load_stored_part<type>(p, m), m);
  });
}

inline void dequantize(DType type, const std::byte* row, int n, float* out) noexcept {
  switch (type) {
    case DType::f32:
      return dequantize_floats<DType::f32>(row, n, out);
    case DType::f16:
      return dequantize_floats<DType::f16>(row, n, out);
    case DType::bf16:
      return dequantize_floats<DType::bf16>(row, n, out);
    case DType::f8_e4m3:
      return dequantize_f8(row, nullptr, DType::f32, n, out);
    case DType::q4_0:
      return dequantize_blocks<Q4_0>(row, n, out);
    case DType::q4_1:
      return dequantize_blocks<Q4_1>(row, n, out);
    case DType::q5_0:
      return dequantize_blocks<Q5_0>(row, n, out);
    case DType::q5_1:
      return dequantize_blocks<Q5_1>(row, n, out);
    case DType::q8_0:
      return dequantize_blocks<Q8_0>(row, n, out);
    case DType::q2_k:
      return dequantize_blocks<Q2_K>(row, n, out);
    case DType::q3_k:
      return dequantize_blocks<Q3_K>(row, n, out);
    case DType::q4_k:
      return dequantize_blocks<Q4_K>(row, n, out);
    case DType::q5_k:
      return dequantize_blocks<Q5_K>(row, n, out);
    case DType::q6_k:
      return dequantize_blocks<Q6_K>(row, n, out);
    case DType::iq4_nl:
      return dequantize_blocks<IQ4_NL>(row, n, out);
    case DType::iq4_xs:
      return dequantize_blocks<IQ4_XS>(row, n, out);
    case DType::mxfp4:
      return dequantize_blocks<MXFP4>(row, n, out);
    case DType::nvfp4:
      return dequantize_blocks<NVFP4>(row, n, out);
  }
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
