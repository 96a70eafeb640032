#pragma once
// The quantised types for row_product_avx512.hpp, one struct each: 256 columns of a row to unsigned bytes and scales.
//
//   weight of column c = scale[c / 16] (q - zero) - min[c / 16]       q[v] byte 4 l + j: column 16 l + 4 v + j
//
// In this order a dword of every group of 16 columns makes a vector, so four dot instructions leave one sum per group,
// in the lane of the group's scale.  In files the bits lie in such dwords, too, whatever the type: a permutation puts
// dwords in order (`spread`), a shift for each lane puts bits in place.

#include "backends/cpu/row_product.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__F16C__)
#define QWEN3NEXT_FUSED_ROWS 1
#else
#define QWEN3NEXT_FUSED_ROWS 0
#endif

#if QWEN3NEXT_FUSED_ROWS

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

struct Unpacked {
  __m512i q[4];
  __m512 scale, min;
};

// An integer for each of the 16 groups.
struct Lanes {
  alignas(64) std::int32_t at[16];
  template <class F>
  explicit constexpr Lanes(F f) : at{} {
    for (int l = 0; l < 16; ++l) at[l] = f(l);
  }
  QWEN3NEXT_FORCE_INLINE operator __m512i() const noexcept { return _mm512_load_si512(at); }
};

// q[v] lane l = dword dwords[l] + v of the 128 bytes a, b, or of the 64 bytes a.
QWEN3NEXT_FORCE_INLINE void spread(__m512i a, __m512i b, const Lanes& dwords, __m512i* q) noexcept {
  asm("" : "+v"(b));  // or it would be loaded from across two cache lines four times
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) q[v] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(dwords, _mm512_set1_epi32(v)), b);
}
QWEN3NEXT_FORCE_INLINE void spread(__m512i a, const Lanes& dwords, __m512i* q) noexcept {
  asm("" : "+v"(a));
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) q[v] = _mm512_permutexvar_epi32(_mm512_add_epi32(dwords, _mm512_set1_epi32(v)), a);
}
// The bits from shifts[l] on.
QWEN3NEXT_FORCE_INLINE void keep(__m512i* q, const Lanes& shifts, int bits) noexcept {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v)
    q[v] = _mm512_and_si512(_mm512_srlv_epi32(q[v], shifts), _mm512_set1_epi8(static_cast<char>(bits)));
}
// Nibbles where they lie: those from bit 4 on are 16 times too large, which their scales make good.
QWEN3NEXT_FORCE_INLINE void keep_nibbles(__m512i* q, const Lanes& shifts) noexcept {
  const __m512i nibble = _mm512_sllv_epi32(_mm512_set1_epi8(15), shifts);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) q[v] = _mm512_and_si512(q[v], nibble);
}
QWEN3NEXT_FORCE_INLINE __m512 lowered(__m512 scale, const Lanes& shifts) noexcept {  // scale / 2^shifts
  const __m512i power = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), shifts), 23);
  return _mm512_mul_ps(scale, _mm512_castsi512_ps(power));
}
// q |= (h rotated left by turns) & bits
QWEN3NEXT_FORCE_INLINE void join(__m512i* q, const __m512i* h, const Lanes& turns, int bits) noexcept {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    q[v] = _mm512_ternarylogic_epi32(q[v], _mm512_rolv_epi32(h[v], turns), _mm512_set1_epi8(static_cast<char>(bits)),
                                     0xf8);
  }
}
QWEN3NEXT_FORCE_INLINE void look_up(__m512i* q, const std::int8_t* table, int zero) noexcept {
  const __m128i levels = _mm_add_epi8(peek<__m128i>(table), _mm_set1_epi8(static_cast<char>(zero)));
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) q[v] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), q[v]);
}

// 16 bytes from each of four addresses.
QWEN3NEXT_FORCE_INLINE __m512i pieces(const std::byte* p, int stride) noexcept {
  auto piece = [&](int i) QWEN3NEXT_FORCE_INLINE_LAMBDA { return peek<__m128i>(p + i * stride); };
  const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(piece(0)), piece(1), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(low, piece(2), 2), piece(3), 3);
}
// Words 8 (l / 2) + first, and for odd l step more.
struct Words {
  alignas(32) std::int16_t at[16];
  constexpr Words(int first, int step) : at{} {
    for (int l = 0; l < 16; ++l) at[l] = static_cast<std::int16_t>(l / 2 * 8 + first + l % 2 * step);
  }
};
template <int at, int step>
inline constexpr Words words_at{at / 2, step};

// The heads of eight blocks, 16 bytes of each.
struct Heads {
  __m512i a, b;
  QWEN3NEXT_FORCE_INLINE Heads(const std::byte* p, int stride) noexcept
      : a(pieces(p, stride)), b(pieces(p + 4 * stride, stride)) {}
  // The 16-bit word at byte `at` for both groups of a block, or (step = 1) it and the next.
  template <int at, int step = 0>
  QWEN3NEXT_FORCE_INLINE __m256i words() const noexcept {
    const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(words_at<at, step>.at));
    return _mm512_castsi512_si256(_mm512_permutex2var_epi16(a, _mm512_castsi256_si512(index), b));
  }
  template <int at>
  QWEN3NEXT_FORCE_INLINE __m512 halves() const noexcept {
    return _mm512_cvtph_ps(words<at>());
  }
};
QWEN3NEXT_FORCE_INLINE __m512 floats_of(__m128i bytes) noexcept {  // unsigned
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

inline constexpr Lanes nibble_dwords([](int l) { return l / 2 * 4; }), nibble_shifts([](int l) { return l % 2 * 4; });
inline constexpr Lanes k4_dwords([](int l) { return l / 4 * 8 + l % 2 * 4; });
inline constexpr Lanes k4_shifts([](int l) { return l / 2 % 2 * 4; });
inline constexpr Lanes k5_turns([](int l) { return (4 - l / 2) & 31; });
inline constexpr Lanes odd_dwords([](int l) { return l % 2 * 4; });
inline constexpr Lanes k6_dwords([](int l) { return l / 8 * 16 + l / 2 % 2 * 8 + l % 2 * 4; });
inline constexpr Lanes k6_shifts([](int l) { return l / 4 % 2 * 4; });
inline constexpr Lanes k2_dwords([](int l) { return l / 8 * 8 + l % 2 * 4; });
inline constexpr Lanes k2_shifts([](int l) { return l / 2 % 4 * 2; });
inline constexpr Lanes k3_turns([](int l) { return (2 - l / 2) & 31; });
inline constexpr Lanes k6_turns([](int l) { return (4 - l / 2 % 4 * 2) & 31; });
inline constexpr Lanes xs_low_shifts([](int l) { return l / 2 * 4; }),
    xs_high_turns([](int l) { return (4 - l / 2 * 2) & 31; });

// zero_bits: the binary logarithm of `zero`, for bits where unpack() leaves them; `none` if zero is 0.
constexpr int none = -1;
template <class Type>
struct Columns256;

// --- blocks of 32: bytes [0, 16) of a block hold two groups of nibbles.

template <bool five_bits, bool offset>
struct Columns256<Legacy<five_bits, offset>> {
  using Type = Legacy<five_bits, offset>;
  static constexpr int zero_bits(int l) { return offset ? none : five_bits ? 4 : 3 + nibble_shifts.at[l]; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    const Heads heads(p, Type::bytes);
    const std::byte* qs = p + Type::qs_at;
    spread(pieces(qs, Type::bytes), pieces(qs + 4 * Type::bytes, Type::bytes), nibble_dwords, w.q);
    if constexpr (five_bits)
      keep(w.q, nibble_shifts, 15);
    else
      keep_nibbles(w.q, nibble_shifts);
    if constexpr (five_bits) {
      // A word of bits for each group: its low byte serves q[0] and q[1], its high byte q[2] and q[3].
      const __m512i bits = _mm512_cvtepu16_epi32(heads.template words<Type::qh_at, 1>());
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512i copies = _mm512_shuffle_epi8(
            bits,
            _mm512_broadcast_i32x4(_mm_add_epi8(_mm_set1_epi8(static_cast<char>(v / 2)),
                                                _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12))));
        const __mmask64 set =
            _mm512_test_epi8_mask(copies, _mm512_set1_epi32(v % 2 ? static_cast<int>(0x80402010u) : 0x08040201));
        w.q[v] = _mm512_mask_add_epi8(w.q[v], set, w.q[v], _mm512_set1_epi8(16));
      }
    }
    w.scale = heads.template halves<0>();
    if constexpr (!five_bits) w.scale = lowered(w.scale, nibble_shifts);
    if constexpr (offset) w.min = _mm512_sub_ps(_mm512_setzero_ps(), heads.template halves<2>());
  }
};

template <>
struct Columns256<IQ4_NL> {
  static constexpr int zero_bits(int) { return 7; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    spread(pieces(p + 2, 18), pieces(p + 74, 18), nibble_dwords, w.q);
    keep(w.q, nibble_shifts, 15);
    look_up(w.q, iq4_table, 128);
    w.scale = Heads(p, 18).halves<0>();
  }
};

template <>
struct Columns256<MXFP4> {
  static constexpr int zero_bits(int) { return 4; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    spread(pieces(p + 1, 17), pieces(p + 69, 17), nibble_dwords, w.q);
    keep(w.q, nibble_shifts, 15);
    look_up(w.q, fp4_table, 16);
    std::uint64_t exponents = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) exponents |= static_cast<std::uint64_t>(p[17 * i]) << (8 * i);
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(exponents));
    const __m512i e = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    // 2^(e - 128); subnormal for 0 and 1
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __mmask16 small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    w.scale = _mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, small, _mm512_set1_epi32(0x00200000), e));
  }
};

template <>
struct Columns256<NVFP4> {
  static constexpr int zero_bits(int) { return 4; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    // Groups of 8 bytes: low nibbles are columns 0..7.
    auto two = [&](int at) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      return _mm512_inserti64x4(_mm512_castsi256_si512(peek<__m256i>(p + at)), peek<__m256i>(p + at + 36), 1);
    };
    const __m512i a = two(4), b = two(76);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    w.q[0] = _mm512_permutex2var_epi32(a, even, b);
    w.q[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    w.q[2] = _mm512_srli_epi32(w.q[0], 4);
    w.q[3] = _mm512_srli_epi32(w.q[1], 4);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w.q[v] = _mm512_and_si512(w.q[v], _mm512_set1_epi8(15));
    look_up(w.q, fp4_table, 16);
    const __m128i codes = _mm_and_si128(_mm_setr_epi32(peek<std::int32_t>(p), peek<std::int32_t>(p + 36),
                                                       peek<std::int32_t>(p + 72), peek<std::int32_t>(p + 108)),
                                        _mm_set1_epi8(0x7f));
    // As halves they are 2^-8 times as large; the table holds twice the numbers.  0x7f reads as 0.
    const __m512 scale = _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 7));
    const __mmask16 number = _mm_cmpneq_epi8_mask(codes, _mm_set1_epi8(0x7f));
    w.scale = _mm512_maskz_mul_ps(number, scale, _mm512_set1_ps(128));
  }
};

template <>
struct Columns256<Q8_0> {
  static constexpr int zero_bits(int) { return 7; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    // Groups i, 4 + i, 8 + i, 12 + i, then 4 x 4 dwords transposed.
    const __m512i a = pieces(p + 2, 68), b = pieces(p + 18, 68), c = pieces(p + 36, 68), d = pieces(p + 52, 68);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), ab2 = _mm512_unpackhi_epi32(a, b);
    const __m512i cd = _mm512_unpacklo_epi32(c, d), cd2 = _mm512_unpackhi_epi32(c, d);
    const __m512i flip = _mm512_set1_epi8(-128);
    w.q[0] = _mm512_xor_si512(_mm512_unpacklo_epi64(ab, cd), flip);
    w.q[1] = _mm512_xor_si512(_mm512_unpackhi_epi64(ab, cd), flip);
    w.q[2] = _mm512_xor_si512(_mm512_unpacklo_epi64(ab2, cd2), flip);
    w.q[3] = _mm512_xor_si512(_mm512_unpackhi_epi64(ab2, cd2), flip);
    w.scale = Heads(p, 34).halves<0>();
  }
};

// --- blocks of 256.

template <bool five_bits>
struct Columns256<Q45_K<five_bits>> {
  using Type = Q45_K<five_bits>;
  static constexpr int zero_bits(int) { return none; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    spread(_mm512_loadu_si512(p + Type::qs_at), _mm512_loadu_si512(p + Type::qs_at + 64), k4_dwords, w.q);
    if constexpr (five_bits)
      keep(w.q, k4_shifts, 15);
    else
      keep_nibbles(w.q, k4_shifts);
    if constexpr (five_bits) {  // bit k of qh[l] is the fifth of sub-block k
      __m512i h[4];
      spread(_mm512_castsi256_si512(peek<__m256i>(p + Type::qh_at)), odd_dwords, h);
      join(w.q, h, k5_turns, 16);
    }
    // Scales and minima, six bits each in three words a b c (FORMATS.md 5):
    //   sc = a & 63 | c & 15 + (a >> 2 & 48)      m = b & 63 | (c >> 4 & 15) + (b >> 2 & 48)
    const __m128i packed = peek<__m128i>(p);
    const __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(packed, 0b11'10'11'01), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i top = _mm_srli_epi32(_mm_shuffle_epi32(packed, 0b10'10'01'01), 2);
    const __m128i sc_m =
        _mm_ternarylogic_epi32(_mm_and_si128(low, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)), top,
                               _mm_setr_epi32(0, 0x30303030, 0, 0x30303030), 0xf8);  // first | (second & third)
    const __m128 d_dmin = _mm_cvtph_ps(packed);
    w.scale = _mm512_mul_ps(floats_of(_mm_unpacklo_epi8(sc_m, sc_m)), _mm512_broadcastss_ps(d_dmin));
    if constexpr (!five_bits) w.scale = lowered(w.scale, k4_shifts);
    w.min = _mm512_mul_ps(floats_of(_mm_unpackhi_epi8(sc_m, sc_m)), _mm512_broadcastss_ps(_mm_movehdup_ps(d_dmin)));
  }
};

template <>
struct Columns256<Q6_K> {
  static constexpr int zero_bits(int) { return 5; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    spread(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), k6_dwords, w.q);
    keep(w.q, k6_shifts, 15);
    __m512i h[4];
    spread(_mm512_loadu_si512(p + 128), k2_dwords, h);
    join(w.q, h, k6_turns, 48);
    w.scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(peek<__m128i>(p + 192))),
                            _mm512_set1_ps(half_at(p + 208)));
  }
};

template <>
struct Columns256<Q2_K> {
  static constexpr int zero_bits(int) { return none; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    spread(_mm512_loadu_si512(p + 16), k2_dwords, w.q);
    keep(w.q, k2_shifts, 3);
    const __m128i nibble = _mm_set1_epi8(15), scales = peek<__m128i>(p);
    w.scale = _mm512_mul_ps(floats_of(_mm_and_si128(scales, nibble)), _mm512_set1_ps(half_at(p + 80)));
    w.min = _mm512_mul_ps(floats_of(_mm_and_si128(_mm_srli_epi16(scales, 4), nibble)), _mm512_set1_ps(half_at(p + 82)));
  }
};

template <>
struct Columns256<Q3_K> {
  static constexpr int zero_bits(int) { return 2; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    spread(_mm512_loadu_si512(p + 32), k2_dwords, w.q);
    keep(w.q, k2_shifts, 3);
    __m512i h[4];
    spread(_mm512_castsi256_si512(peek<__m256i>(p)), odd_dwords, h);
    join(w.q, h, k3_turns, 4);
    std::uint8_t sc[16];
    unpack_scales_k3(p + 96, sc);
    w.scale = _mm512_mul_ps(
        _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(peek<__m128i>(sc)), _mm512_set1_epi32(32))),
        _mm512_set1_ps(half_at(p + 108)));
  }
};

template <>
struct Columns256<IQ4_XS> {
  static constexpr int zero_bits(int) { return 7; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked& w) noexcept {
    spread(_mm512_loadu_si512(p + 8), _mm512_loadu_si512(p + 72), nibble_dwords, w.q);
    keep(w.q, nibble_shifts, 15);
    look_up(w.q, iq4_table, 128);
    const __m512i low = _mm512_srlv_epi32(_mm512_set1_epi32(peek<std::int32_t>(p + 4)), xs_low_shifts);
    const __m512i top = _mm512_rolv_epi32(_mm512_set1_epi32(peek<std::uint16_t>(p + 2)), xs_high_turns);
    const __m512i sc =
        _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(15)), _mm512_and_si512(top, _mm512_set1_epi32(48)));
    w.scale =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sc, _mm512_set1_epi32(32))), _mm512_set1_ps(half_at(p)));
  }
};

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA

#endif
