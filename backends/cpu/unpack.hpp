#pragma once
// The quantised types, one struct each: blocks to bytes and scales.  Layouts: FORMATS.md 5; scalar twins: blocks/.
//
//   weight i of a block = scale[i / group] (q[i] - zero) - min[i / group]
//
// q is at most 63 and not negative, or `wide`: any int8, zero = 0.  A new type is one such struct: levels() of a block,
// scales() and minima of some; everything else (products, strips, rows of embeddings) is written over them.  Loops have
// constant counts and bits move 32 bytes at a time, so that compilers make vector code of them for any ISA.

#include "backends/cpu/f8_product.hpp"
#include "backends/cpu/simd.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

QWEN3NEXT_FORCE_INLINE int byte_at(const std::byte* p, int i) noexcept { return static_cast<int>(p[i]); }
QWEN3NEXT_FORCE_INLINE float half_at(const std::byte* p) noexcept { return half_to_float(peek<std::uint16_t>(p)); }

// out = `bits` bits of 32 bytes, those from bit `from` on moved to bit `to`.  Not returned: on an ISA with narrower
// vectors than these that would be a question of ABI.
using Bytes32 = std::uint16_t __attribute__((vector_size(32)));
QWEN3NEXT_FORCE_INLINE void move_bits(const std::byte* p, int from, int bits, int to, Bytes32& out) noexcept {
  std::memcpy(&out, p, 32);
  if (from >= to)
    out >>= static_cast<std::uint16_t>(from - to);
  else
    out <<= static_cast<std::uint16_t>(to - from);
  out &= static_cast<std::uint16_t>(0x0101 * (((1 << bits) - 1) << to));
}
// 32 levels from `bits` bits of 32 bytes; and from `high_bits` of 32 others above them.
QWEN3NEXT_FORCE_INLINE void levels_of(const std::byte* p, int from, int bits, std::int8_t* q) noexcept {
  Bytes32 low;
  move_bits(p, from, bits, 0, low);
  std::memcpy(q, &low, 32);
}
QWEN3NEXT_FORCE_INLINE void levels_of(const std::byte* p, int from, int bits, const std::byte* high_p, int high_from,
                                      int high_bits, std::int8_t* q) noexcept {
  Bytes32 low, high;
  move_bits(p, from, bits, 0, low);
  move_bits(high_p, high_from, high_bits, bits, high);
  low |= high;
  std::memcpy(q, &low, 32);
}

// scale[i] = d (byte i of eight - zero)
QWEN3NEXT_FORCE_INLINE void scales_of(std::uint64_t eight, float d, int zero, float* scale) noexcept {
#if defined(__AVX2__)
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(eight)));
  const __m256 levels = _mm256_cvtepi32_ps(_mm256_sub_epi32(bytes, _mm256_set1_epi32(zero)));
  _mm256_storeu_ps(scale, _mm256_mul_ps(levels, _mm256_set1_ps(d)));
#elif QWEN3NEXT_X86
  const __m128i none = _mm_setzero_si128();
  const __m128i words = _mm_unpacklo_epi8(_mm_cvtsi64_si128(static_cast<long long>(eight)), none);
  auto put = [&](__m128i four, float* out) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    const __m128 levels = _mm_cvtepi32_ps(_mm_sub_epi32(four, _mm_set1_epi32(zero)));
    _mm_storeu_ps(out, _mm_mul_ps(levels, _mm_set1_ps(d)));
  };
  put(_mm_unpacklo_epi16(words, none), scale);
  put(_mm_unpackhi_epi16(words, none), scale + 4);
#elif defined(__aarch64__)
  const uint16x8_t words = vmovl_u8(vcreate_u8(eight));
  auto put = [&](uint16x4_t four, float* out) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    const int32x4_t levels = vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(four)), vdupq_n_s32(zero));
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(levels), d));
  };
  put(vget_low_u16(words), scale);
  put(vget_high_u16(words), scale + 4);
#else
  for (int i = 0; i < 8; ++i) scale[i] = d * static_cast<float>(static_cast<int>(eight >> (8 * i) & 255) - zero);
#endif
}
// What each byte of eight is made of: its low four bits, two more above them.
constexpr std::uint64_t low_four = 0x0f0f0f0f0f0f0f0fu, next_two = 0x3030303030303030u;

// The halves at p, p + stride, ...
template <int n, int stride>
QWEN3NEXT_FORCE_INLINE void halves_of(const std::byte* p, float* out) noexcept {
#if defined(__F16C__)
  if constexpr (n == 8) {  // stored at once, see below
    auto word = [&](int i) QWEN3NEXT_FORCE_INLINE_LAMBDA { return peek<std::int16_t>(p + i * stride); };
    const __m128i words = _mm_setr_epi16(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7));
    _mm256_storeu_ps(out, _mm256_cvtph_ps(words));
    return;
  }
#endif
  for (int i = 0; i < n; ++i) out[i] = half_at(p + i * stride);
}

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
  static constexpr int zero = offset ? 0 : five_bits ? 16 : 8;
  static constexpr bool has_min = offset, wide = false;
  static constexpr int stored_at = 0;

  template <int blocks>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float* min) noexcept {
    halves_of<blocks, bytes>(p, scale);
    if constexpr (offset) {
      halves_of<blocks, bytes>(p + 2, min);
      for (int i = 0; i < blocks; ++i) min[i] = -min[i];
    }
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
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
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), levels);
#else
    for (int l = 0; l < 16; ++l) {
      int low = byte_at(p + qs_at, l) & 15, high = byte_at(p + qs_at, l) >> 4;
      if constexpr (five_bits) {
        low |= static_cast<int>(fifth >> l & 1) << 4;
        high |= static_cast<int>(fifth >> (16 + l) & 1) << 4;
      }
      q[l] = static_cast<std::int8_t>(low);
      q[16 + l] = static_cast<std::int8_t>(high);
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
  static constexpr int elements = 32, bytes = 18, group = 32, zero = 0;
  static constexpr bool has_min = false, wide = true;
  static constexpr int stored_at = 0;

  template <int blocks>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float*) noexcept {
    halves_of<blocks, bytes>(p, scale);
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
    look_up(p + 2, iq4_table, q);
  }
};

struct IQ4_XS {
  static constexpr int elements = 256, bytes = 136, group = 32, zero = 0;
  static constexpr bool has_min = false, wide = true;
  static constexpr int stored_at = 0;

  template <int>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float*) noexcept {
    // Eight nibbles and eight bit pairs, moved apart.
    std::uint64_t low = peek<std::uint32_t>(p + 4), high = peek<std::uint16_t>(p + 2);
    low = (low | low << 16) & 0x0000ffff0000ffffu, high = (high | high << 24) & 0x000000ff000000ffu;
    low = (low | low << 8) & 0x00ff00ff00ff00ffu, high = (high | high << 12) & 0x000f000f000f000fu;
    low = (low | low << 4) & low_four, high = (high << 4 | high << 10) & next_two;
    scales_of(low | high, half_at(p), 32, scale);
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) look_up(p + 8 + 16 * k, iq4_table, q + 32 * k);
  }
};

// FP4: 16 more than twice the numbers, under half the scales.
inline constexpr int fp4_zero = 16;
inline constexpr std::int8_t fp4_table[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

struct MXFP4 {
  static constexpr int elements = 32, bytes = 17, group = 32, zero = fp4_zero;
  static constexpr bool has_min = false, wide = false;
  static constexpr int stored_at = 0;

  template <int blocks>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float*) noexcept {
#if defined(__AVX2__)
    if constexpr (blocks == 8) {
      std::uint64_t exponents = 0;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) exponents |= static_cast<std::uint64_t>(p[i * bytes]) << (8 * i);
      const __m256i e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(exponents)));
      const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
      const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
      const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(scale), _mm256_blendv_epi8(normal, subnormal, small));
      return;
    }
#endif
    for (int i = 0; i < blocks; ++i) {
      const auto e = static_cast<std::uint32_t>(p[i * bytes]);
      scale[i] = __builtin_bit_cast(float, e < 2 ? 0x00200000u << e : (e - 1) << 23);  // 2^(e - 128)
    }
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
    look_up(p + 1, fp4_table, q);
  }
};

struct NVFP4 {
  static constexpr int elements = 64, bytes = 36, group = 16, zero = fp4_zero;
  static constexpr bool has_min = false, wide = false;
  static constexpr int stored_at = 0;

  template <int blocks>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float*) noexcept {
#if defined(__AVX2__)
    if constexpr (blocks == 4) {  // as halves they are 2^-8 times as large; the table holds twice the numbers
      const __m128i codes = _mm_setr_epi32(peek<std::int32_t>(p), peek<std::int32_t>(p + bytes),
                                           peek<std::int32_t>(p + 2 * bytes), peek<std::int32_t>(p + 3 * bytes));
      const __m128i magnitudes = _mm_and_si128(codes, _mm_set1_epi8(0x7f));
      const __m128i nan = _mm_cmpeq_epi8(codes, _mm_set1_epi8(0x7f));
      const __m256i halves = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_andnot_si128(nan, magnitudes)), 7);
      const __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
      const __m256 second = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
      _mm256_storeu_ps(scale, _mm256_mul_ps(first, _mm256_set1_ps(128)));
      _mm256_storeu_ps(scale + 8, _mm256_mul_ps(second, _mm256_set1_ps(128)));
      return;
    }
#endif
    for (int b = 0; b < blocks; ++b) {
      for (int k = 0; k < 4; ++k) {  // half of E4M3 without sign: bias 7 + 1
        const auto u = static_cast<std::uint32_t>(p[b * bytes + k]), magnitude = u & 0x7fu;
        const float subnormal = static_cast<float>(magnitude) * 0x1p-10f;
        const float normal = __builtin_bit_cast(float, (magnitude << 20) + ((127u - 8u) << 23));
        scale[4 * b + k] = u == 0x7fu ? 0.0f : magnitude < 8 ? subnormal : normal;
      }
    }
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
    look_up<false>(p + 4, fp4_table, q);
    look_up<false>(p + 20, fp4_table, q + 32);
  }
};

struct Q8_0 {
  static constexpr int elements = 32, bytes = 34, group = 32, zero = 0;
  static constexpr bool has_min = false, wide = true;
  static constexpr int stored_at = 2;

  template <int blocks>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float*) noexcept {
    halves_of<blocks, bytes>(p, scale);
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept { std::memcpy(q, p + 2, 32); }
};

// The 6-bit scales and minima of Q4_K and Q5_K, eight of each, from three words.
QWEN3NEXT_FORCE_INLINE void unpack_scales_k4(const std::byte* p, std::uint64_t& sc, std::uint64_t& m) noexcept {
  const std::uint64_t a = peek<std::uint32_t>(p), b = peek<std::uint32_t>(p + 4), c = peek<std::uint32_t>(p + 8);
  const std::uint64_t sc_top = (c & low_four) | (a >> 2 & next_two), m_top = (c >> 4 & low_four) | (b >> 2 & next_two);
  sc = (a & 0x3f3f3f3fu) | sc_top << 32;
  m = (b & 0x3f3f3f3fu) | m_top << 32;
}

template <bool five_bits>
struct Q45_K {
  static constexpr int elements = 256, bytes = five_bits ? 176 : 144, group = 32, zero = 0;
  static constexpr bool has_min = true, wide = false;
  static constexpr int stored_at = 0;
  static constexpr int qh_at = 16, qs_at = five_bits ? 48 : 16;

  template <int>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float* min) noexcept {
    std::uint64_t sc, m;
    unpack_scales_k4(p + 4, sc, m);
    scales_of(sc, half_at(p), 0, scale);
    scales_of(m, half_at(p + 2), 0, min);
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const std::byte* qs = p + qs_at + 32 * (k / 2);
      if constexpr (five_bits)
        levels_of(qs, 4 * (k % 2), 4, p + qh_at, k, 1, q + 32 * k);
      else
        levels_of(qs, 4 * (k % 2), 4, q + 32 * k);
    }
  }
};
using Q4_K = Q45_K<false>;
using Q5_K = Q45_K<true>;

struct Q6_K {
  static constexpr int elements = 256, bytes = 210, group = 16, zero = 32;
  static constexpr bool has_min = false, wide = false;
  static constexpr int stored_at = 0;

  template <int>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float*) noexcept {
    for (int half = 0; half < 2; ++half) {  // signed: their top bit flipped, they are 128 more
      const std::uint64_t sc = peek<std::uint64_t>(p + 192 + 8 * half) ^ 0x8080808080808080u;
      scales_of(sc, half_at(p + 208), 128, scale + 8 * half);
    }
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const int half = k / 4, j = k % 4;
      levels_of(p + 64 * half + 32 * (j % 2), 4 * (j / 2), 4, p + 128 + 32 * half, 2 * j, 2, q + 32 * k);
    }
  }
};

struct Q2_K {
  static constexpr int elements = 256, bytes = 84, group = 16, zero = 0;
  static constexpr bool has_min = true, wide = false;
  static constexpr int stored_at = 0;

  template <int>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float* min) noexcept {
    for (int half = 0; half < 2; ++half) {
      const std::uint64_t sc_m = peek<std::uint64_t>(p + 8 * half);
      scales_of(sc_m & low_four, half_at(p + 80), 0, scale + 8 * half);
      scales_of(sc_m >> 4 & low_four, half_at(p + 82), 0, min + 8 * half);
    }
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) levels_of(p + 16 + 32 * (k / 4), 2 * (k % 4), 2, q + 32 * k);
  }
};

struct Q3_K {
  static constexpr int elements = 256, bytes = 110, group = 16, zero = 4;
  static constexpr bool has_min = false, wide = false;
  static constexpr int stored_at = 0;

  template <int>
  static QWEN3NEXT_FORCE_INLINE void scales(const std::byte* p, float* scale, float*) noexcept {
    // Low nibbles from bytes 0..7 (low, then high nibbles), top bit pairs from bytes 8..11.
    const std::uint64_t ab = peek<std::uint64_t>(p + 96), c = peek<std::uint32_t>(p + 104);
    scales_of((ab & low_four) | ((c << 4 | c << 34) & next_two), half_at(p + 108), 32, scale);
    scales_of((ab >> 4 & low_four) | ((c | c << 30) & next_two), half_at(p + 108), 32, scale + 8);
  }
  static QWEN3NEXT_FORCE_INLINE void levels(const std::byte* p, std::int8_t* q) noexcept {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) levels_of(p + 32 + 32 * (k / 4), 2 * (k % 4), 2, p, k, 1, q + 32 * k);
  }
};

// Blocks that lie one after the other.
template <class Type, int blocks>
QWEN3NEXT_FORCE_INLINE void unpack_levels(const std::byte* p, std::int8_t* q) noexcept {
#pragma GCC unroll 8
  for (int b = 0; b < blocks; ++b) Type::levels(p + b * Type::bytes, q + b * Type::elements);
}
template <class Type>
QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, std::int8_t* q, float* scale, float* min) noexcept {
  Type::levels(p, q);
  Type::template scales<1>(p, scale, min);
}

// A row of n weights as floats.
template <class Type>
void dequantize_blocks(const std::byte* row, int n, float* out) noexcept {
  for (int i = 0; i < n; i += Type::elements, row += Type::bytes) {
    std::int8_t q[Type::elements];
    float scale[16], min[16] = {};
    unpack<Type>(row, q, scale, min);
    for (int g = 0; g < Type::elements / Type::group; ++g) {
      for (int j = g * Type::group; j < (g + 1) * Type::group; ++j)
        out[i + j] = scale[g] * static_cast<float>(q[j] - Type::zero) - min[g];
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
