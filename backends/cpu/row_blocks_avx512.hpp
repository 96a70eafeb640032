#pragma once
// The quantised types for row_product_avx512.hpp, one struct each: 256 columns of a row to unsigned bytes and scales.
//
//   weight of column c = scale (q - zero) - min      q[v] byte 4 l + j: column 32 (l % 8) + 16 (l / 8) + 4 v + j
//
// In this order a dword of every group of 16 columns makes a vector: four dot instructions leave one sum per group, the
// first halves of the eight 32s in lanes 0..7, their second halves in lanes 8..15.  In files the bits lie in such
// dwords, too, whatever the type: a permutation puts dwords in order (`spread`), a shift for each lane puts bits in
// place.

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

// A float for each scale: 8, or 16 in the order of lanes.
template <int group>
struct ScaleVector {
  using Type = __m256;
};
template <>
struct ScaleVector<16> {
  using Type = __m512;
};
template <class Type>
struct Unpacked {
  __m512i q[4];
  typename ScaleVector<Type::group>::Type scale, min;
};

// An integer for each lane.
struct Lanes {
  alignas(64) std::int32_t at[16];
  // f(32 columns, half of them)
  template <class F>
  explicit constexpr Lanes(F f) : at{} {
    for (int l = 0; l < 16; ++l) at[l] = f(l % 8, l / 8);
  }
  QWEN3NEXT_FORCE_INLINE operator __m512i() const noexcept { return _mm512_load_si512(at); }
  QWEN3NEXT_FORCE_INLINE __m256i first() const noexcept {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
  }
};

// q[v] lane l = dword dwords[l] + v of the 128 bytes a, b, or of the 64 bytes a.
QWEN3NEXT_FORCE_INLINE void spread(__m512i a, __m512i b, const Lanes& dwords, __m512i* q) noexcept {
  asm("" : "+v"(b));  // or it is loaded from across two cache lines four times
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
// Nibbles where they lie: those from bit 4 on are 16 times too large, and so are their sums.
QWEN3NEXT_FORCE_INLINE void keep_in_place(__m512i* q, const Lanes& shifts) noexcept {
  const __m512i nibble = _mm512_sllv_epi32(_mm512_set1_epi8(15), shifts);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) q[v] = _mm512_and_si512(q[v], nibble);
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
QWEN3NEXT_FORCE_INLINE __m512i pieces(const std::byte* p, int second, int third, int fourth) noexcept {
  auto piece = [&](int at) QWEN3NEXT_FORCE_INLINE_LAMBDA { return peek<__m128i>(p + at); };
  const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(piece(0)), piece(second), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(low, piece(third), 2), piece(fourth), 3);
}
QWEN3NEXT_FORCE_INLINE __m512i pieces(const std::byte* p, int stride) noexcept {
  return pieces(p, stride, 2 * stride, 3 * stride);
}

// Words 8 (l % 8) + first, `step` more for the second halves.
struct Words {
  alignas(32) std::int16_t at[16];
  constexpr Words(int first, int step) : at{} {
    for (int l = 0; l < 16; ++l) at[l] = static_cast<std::int16_t>(l % 8 * 8 + first + l / 8 * step);
  }
};
template <int at, int step>
inline constexpr Words words_at{at / 2, step};

// The heads of eight blocks, 16 bytes of each.
struct Heads {
  __m512i a, b;
  QWEN3NEXT_FORCE_INLINE Heads(const std::byte* p, int stride) noexcept
      : a(pieces(p, stride)), b(pieces(p + 4 * stride, stride)) {}
  // The 16-bit words at byte `at` of each, and those `step` words on.
  template <int at, int step = 0>
  QWEN3NEXT_FORCE_INLINE __m256i words() const noexcept {
    const __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(words_at<at, step>.at));
    return _mm512_castsi512_si256(_mm512_permutex2var_epi16(a, _mm512_castsi256_si512(index), b));
  }
  template <int at>
  QWEN3NEXT_FORCE_INLINE __m256 halves() const noexcept {
    return _mm256_cvtph_ps(_mm256_castsi256_si128(words<at>()));
  }
};

inline constexpr Lanes nibble_dwords([](int i, int) { return 4 * i; }), nibble_shifts([](int, int h) { return 4 * h; });
inline constexpr Lanes half_dwords([](int, int h) { return 4 * h; });
inline constexpr Lanes k4_dwords([](int i, int h) { return i / 2 * 8 + 4 * h; });
inline constexpr Lanes k4_shifts([](int i, int) { return i % 2 * 4; });
inline constexpr Lanes k5_turns([](int i, int) { return (4 - i) & 31; });
inline constexpr Lanes k6_dwords([](int i, int h) { return i / 4 * 16 + i % 2 * 8 + 4 * h; });
inline constexpr Lanes k6_shifts([](int i, int) { return i / 2 % 2 * 4; });
inline constexpr Lanes k6_turns([](int i, int) { return (4 - i % 4 * 2) & 31; });
inline constexpr Lanes k2_dwords([](int i, int h) { return i / 4 * 8 + 4 * h; });
inline constexpr Lanes k2_shifts([](int i, int) { return i % 4 * 2; });
inline constexpr Lanes k3_turns([](int i, int) { return (2 - i) & 31; });
inline constexpr Lanes xs_shifts([](int i, int) { return 4 * i; }),
    xs_turns([](int i, int) { return (4 - 2 * i) & 31; });

// Bytes of 16 groups, in the order of lanes.
QWEN3NEXT_FORCE_INLINE __m128i by_lane(__m128i bytes) noexcept {
  return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
}
QWEN3NEXT_FORCE_INLINE __m512 floats_of(__m128i bytes) noexcept {  // unsigned
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// zero_bits(32 columns, half): the binary logarithm of `zero`, for bits where unpack() leaves them; `none` if it is 0.
// high_bits: by how many bits the sums of second halves are too large.
constexpr int none = -1;
template <class Type>
struct Columns256;

// --- blocks of 32: low nibbles are the first half, high ones the second.

template <bool five_bits, bool offset>
struct Columns256<Legacy<five_bits, offset>> {
  using Type = Legacy<five_bits, offset>;
  static constexpr int high_bits = five_bits ? 0 : 4;
  static constexpr int zero_bits(int, int h) { return offset ? none : five_bits ? 4 : 3 + 4 * h; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<Type>& w) noexcept {
    const Heads heads(p, Type::bytes);
    const std::byte* qs = p + Type::qs_at;
    spread(pieces(qs, Type::bytes), pieces(qs + 4 * Type::bytes, Type::bytes), nibble_dwords, w.q);
    if constexpr (five_bits) {
      keep(w.q, nibble_shifts, 15);
      // 16 bits for each half: the low byte serves q[0] and q[1], the high one q[2] and q[3].
      const __m512i bits = _mm512_cvtepu16_epi32(heads.template words<Type::qh_at, 1>());
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m128i bytes = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
        const __m128i copied = _mm_add_epi8(bytes, _mm_set1_epi8(static_cast<char>(v / 2)));
        const __m512i bit = _mm512_set1_epi32(v % 2 ? static_cast<int>(0x80402010u) : 0x08040201);
        const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(bits, _mm512_broadcast_i32x4(copied)), bit);
        w.q[v] = _mm512_mask_add_epi8(w.q[v], set, w.q[v], _mm512_set1_epi8(16));
      }
    } else {
      keep_in_place(w.q, nibble_shifts);
    }
    w.scale = heads.template halves<0>();
    if constexpr (offset) w.min = _mm256_sub_ps(_mm256_setzero_ps(), heads.template halves<2>());
  }
};

template <>
struct Columns256<IQ4_NL> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return 7; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<IQ4_NL>& w) noexcept {
    spread(pieces(p + 2, 18), pieces(p + 74, 18), nibble_dwords, w.q);
    keep(w.q, nibble_shifts, 15);
    look_up(w.q, iq4_table, 128);
    w.scale = Heads(p, 18).halves<0>();
  }
};

template <>
struct Columns256<MXFP4> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return 4; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<MXFP4>& w) noexcept {
    spread(pieces(p + 1, 17), pieces(p + 69, 17), nibble_dwords, w.q);
    keep(w.q, nibble_shifts, 15);
    look_up(w.q, fp4_table, 0);
    std::uint64_t exponents = 0;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) exponents |= static_cast<std::uint64_t>(p[17 * i]) << (8 * i);
    const __m256i e = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(exponents)));
    // 2^(e - 128); subnormal for 0 and 1
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __mmask8 small = _mm256_cmplt_epi32_mask(e, _mm256_set1_epi32(2));
    w.scale = _mm256_castsi256_ps(_mm256_mask_sllv_epi32(normal, small, _mm256_set1_epi32(0x00200000), e));
  }
};

template <>
struct Columns256<Q8_0> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return 7; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<Q8_0>& w) noexcept {
    // Four groups of lanes i, 4 + i, 8 + i, 12 + i; then 4 x 4 dwords are transposed.
    auto groups = [&](int i) QWEN3NEXT_FORCE_INLINE_LAMBDA { return pieces(p + 34 * i + 2, 136, 16, 152); };
    const __m512i a = groups(0), b = groups(1), c = groups(2), d = groups(3);
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

template <>
struct Columns256<NVFP4> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return 4; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<NVFP4>& w) noexcept {
    // 16 columns in 8 bytes: low nibbles are the first 8.
    auto two = [&](int at) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      return _mm512_inserti64x4(_mm512_castsi256_si512(peek<__m256i>(p + at)), peek<__m256i>(p + at + 36), 1);
    };
    const __m512i a = two(4), b = two(76), nibble = _mm512_set1_epi8(15);
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26, 30);
    const __m512i first = _mm512_permutex2var_epi32(a, even, b);
    const __m512i second = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    w.q[0] = _mm512_and_si512(first, nibble);
    w.q[1] = _mm512_and_si512(second, nibble);
    w.q[2] = _mm512_and_si512(_mm512_srli_epi32(first, 4), nibble);
    w.q[3] = _mm512_and_si512(_mm512_srli_epi32(second, 4), nibble);
    look_up(w.q, fp4_table, 0);
    const __m128i four = _mm_setr_epi32(peek<std::int32_t>(p), peek<std::int32_t>(p + 36), peek<std::int32_t>(p + 72),
                                        peek<std::int32_t>(p + 108));
    // E4M3 without sign.  As halves they are 2^-8 times as large; the table holds twice the numbers.  0x7f reads as 0.
    const __m128i codes = by_lane(_mm_and_si128(four, _mm_set1_epi8(0x7f)));
    const __m512 scale = _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 7));
    const __mmask16 number = _mm_cmpneq_epi8_mask(codes, _mm_set1_epi8(0x7f));
    w.scale = _mm512_maskz_mul_ps(number, scale, _mm512_set1_ps(128));
  }
};

// --- blocks of 256.

template <bool five_bits>
struct Columns256<Q45_K<five_bits>> {
  using Type = Q45_K<five_bits>;
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return none; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<Type>& w) noexcept {
    spread(_mm512_loadu_si512(p + Type::qs_at), _mm512_loadu_si512(p + Type::qs_at + 64), k4_dwords, w.q);
    if constexpr (five_bits) {  // bit k of qh[l] is the fifth of sub-block k
      keep(w.q, k4_shifts, 15);
      __m512i h[4];
      spread(_mm512_castsi256_si512(peek<__m256i>(p + Type::qh_at)), half_dwords, h);
      join(w.q, h, k5_turns, 16);
    } else {
      keep_in_place(w.q, k4_shifts);
    }
    // Scales and minima, six bits each in three words a b c (FORMATS.md 5):
    //   sc = a & 63 | c & 15 + (a >> 2 & 48)      m = b & 63 | (c >> 4 & 15) + (b >> 2 & 48)
    const __m128i head = peek<__m128i>(p);
    const __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(head, 0b11'10'11'01), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i top = _mm_srli_epi32(_mm_shuffle_epi32(head, 0b10'10'01'01), 2);
    const __m128i sc_m =
        _mm_ternarylogic_epi32(_mm_and_si128(low, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)), top,
                               _mm_setr_epi32(0, 0x30303030, 0, 0x30303030), 0xf8);  // first | (second & third)
    const __m128 d_dmin = _mm_cvtph_ps(head);
    w.scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(sc_m)), _mm256_broadcastss_ps(d_dmin));
    if constexpr (!five_bits)
      w.scale = _mm256_mul_ps(w.scale, _mm256_setr_ps(1, 0.0625f, 1, 0.0625f, 1, 0.0625f, 1, 0.0625f));
    w.min = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(sc_m, sc_m))),
                          _mm256_broadcastss_ps(_mm_movehdup_ps(d_dmin)));
  }
};

template <>
struct Columns256<Q6_K> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return 5; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<Q6_K>& w) noexcept {
    spread(_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), k6_dwords, w.q);
    keep(w.q, k6_shifts, 15);
    __m512i h[4];
    spread(_mm512_loadu_si512(p + 128), k2_dwords, h);
    join(w.q, h, k6_turns, 48);
    w.scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(by_lane(peek<__m128i>(p + 192)))),
                            _mm512_set1_ps(half_at(p + 208)));
  }
};

template <>
struct Columns256<Q2_K> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return none; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<Q2_K>& w) noexcept {
    spread(_mm512_loadu_si512(p + 16), k2_dwords, w.q);
    keep(w.q, k2_shifts, 3);
    const __m128i nibble = _mm_set1_epi8(15), scales = by_lane(peek<__m128i>(p));
    w.scale = _mm512_mul_ps(floats_of(_mm_and_si128(scales, nibble)), _mm512_set1_ps(half_at(p + 80)));
    w.min = _mm512_mul_ps(floats_of(_mm_and_si128(_mm_srli_epi16(scales, 4), nibble)), _mm512_set1_ps(half_at(p + 82)));
  }
};

template <>
struct Columns256<Q3_K> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return 2; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<Q3_K>& w) noexcept {
    spread(_mm512_loadu_si512(p + 32), k2_dwords, w.q);
    keep(w.q, k2_shifts, 3);
    __m512i h[4];
    spread(_mm512_castsi256_si512(peek<__m256i>(p)), half_dwords, h);
    join(w.q, h, k3_turns, 4);
    // Six bits each in three words a b c: a or b, low then high nibbles, | two of c's bits.
    const std::int32_t a = peek<std::int32_t>(p + 96), b = peek<std::int32_t>(p + 100), c = peek<std::int32_t>(p + 104);
    const __m128i low = _mm_srlv_epi32(_mm_setr_epi32(a, b, a, b), _mm_setr_epi32(0, 0, 4, 4));
    const __m128i top = _mm_rolv_epi32(_mm_set1_epi32(c), _mm_setr_epi32(4, 2, 0, 30));
    const __m128i sc = _mm_ternarylogic_epi32(_mm_and_si128(low, _mm_set1_epi8(15)), top, _mm_set1_epi8(48), 0xf8);
    w.scale =
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(by_lane(sc)), _mm512_set1_epi32(32))),
                      _mm512_set1_ps(half_at(p + 108)));
  }
};

template <>
struct Columns256<IQ4_XS> {
  static constexpr int high_bits = 0;
  static constexpr int zero_bits(int, int) { return 7; }

  static QWEN3NEXT_FORCE_INLINE void unpack(const std::byte* p, Unpacked<IQ4_XS>& w) noexcept {
    spread(_mm512_loadu_si512(p + 8), _mm512_loadu_si512(p + 72), nibble_dwords, w.q);
    keep(w.q, nibble_shifts, 15);
    look_up(w.q, iq4_table, 128);
    const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32(peek<std::int32_t>(p + 4)), xs_shifts.first());
    const __m256i top = _mm256_rolv_epi32(_mm256_set1_epi32(peek<std::uint16_t>(p + 2)), xs_turns.first());
    const __m256i sc =
        _mm256_ternarylogic_epi32(_mm256_and_si256(low, _mm256_set1_epi32(15)), top, _mm256_set1_epi32(48), 0xf8);
    w.scale =
        _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sc, _mm256_set1_epi32(32))), _mm256_set1_ps(half_at(p)));
  }
};

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA

#endif
