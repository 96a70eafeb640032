#pragma once
// Decode with AVX-512 VNNI: products of Q4_K, Q5_K, Q6_K and Q8_0 rows with one row of activations.
//
// The plain way (row_product.hpp) converts to float once per 32 weights.  Here the 256 weights of a block are put in an
// order in which four dot instructions leave two vectors of int sums, a (low nibbles) and b (high nibbles), each lane
// within one scale's group; so a block of Q4_K costs
//     2 loads  2 shuffles  6 nibble operations  4 vpdpbusd  2 vpmulld (6-bit scales)  2 conversions  3 float operations
// and its scales and minima about 16 more on short vectors: 144 bytes in about 16 cycles on Zen 4, against 30 to
// read them from memory.  The activations come in the same order (`operand`), made once per token.

#include "backends/cpu/row_product.hpp"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__F16C__)
#define QWEN3NEXT_FUSED_ROWS 1
#else
#define QWEN3NEXT_FUSED_ROWS 0
#endif

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

enum OperandKind : int { operand_natural, operand_k4, operand_k6, operand_q8 };

#if QWEN3NEXT_FUSED_ROWS

// A block of 256 activations.  Dwords 4 l + {0, 1} and 4 l + {2, 3} of the vectors come from columns 128 apart:
//   x[v], v = 0..3: low nibbles of the two shuffled vectors, then high nibbles
//   lane 4 l + j of the sums a and b belongs to columns from 16 (first(l)) + 128 (j / 2) on.
struct OperandK4 {  // Q4_K, Q5_K
  alignas(64) std::int8_t x[4][64];
  float da[16], db[16];  // scales of the activations, per lane
  float s[8];            // d * sum of each 32: multiplies the minima
  float padding[8];
};
struct OperandK6 {  // Q6_K
  alignas(64) std::int8_t x[4][64];
  float da[16], db[16];
  std::int32_t start_a[16], start_b[16];  // -16 * sum of each 16: the two lanes of a group take off -32
};
static_assert(sizeof(OperandK4) == 448 && sizeof(OperandK6) == 512);

// The 16-column group whose first 8 (x[0], x[2]) or last 8 (x[1], x[3]) columns are in lanes 4 l + {0, 1}; those 8
// groups further are in lanes 4 l + {2, 3}.
QWEN3NEXT_FORCE_INLINE int first_group_k4(int l, bool high) noexcept { return (l / 2) * 4 + (l % 2) + (high ? 2 : 0); }
QWEN3NEXT_FORCE_INLINE int first_group_k6(int l, bool high) noexcept { return l + (high ? 4 : 0); }

template <class Operand, class FirstGroup>
QWEN3NEXT_FORCE_INLINE void arrange(const RowParts& x, int block, Operand& out, FirstGroup first_group) noexcept {
  const std::int8_t* q = x.q + 256 * block;
  const float* d = x.d + 8 * block;
  for (int v = 0; v < 4; ++v) {
    for (int l = 0; l < 4; ++l) {
      for (int part = 0; part < 2; ++part) {
        const int group = first_group(l, v >= 2) + 8 * part;
        std::memcpy(out.x[v] + 16 * l + 8 * part, q + 16 * group + 8 * (v % 2), 8);
        float* scales = (v < 2 ? out.da : out.db) + 4 * l + 2 * part;
        scales[0] = scales[1] = d[group / 2];
      }
    }
  }
}

inline void make_operand(int kind, const std::byte* row, int n, std::byte* operand) noexcept {
  const RowParts x = row_parts(row, n);
  if (kind == operand_k4) {
    auto* out = reinterpret_cast<OperandK4*>(operand);
    for (int b = 0; b < n / 256; ++b) {
      arrange(x, b, out[b], first_group_k4);
      for (int k = 0; k < 8; ++k) out[b].s[k] = x.s[16 * b + 2 * k] + x.s[16 * b + 2 * k + 1];
    }
  } else if (kind == operand_k6) {
    auto* out = reinterpret_cast<OperandK6*>(operand);
    for (int b = 0; b < n / 256; ++b) {
      arrange(x, b, out[b], first_group_k6);
      for (int l = 0; l < 4; ++l) {
        for (int j = 0; j < 4; ++j) {
          std::int32_t a = 0, c = 0;
          const std::int8_t* low = x.q + 256 * b + 16 * (first_group_k6(l, false) + 8 * (j / 2));
          const std::int8_t* high = x.q + 256 * b + 16 * (first_group_k6(l, true) + 8 * (j / 2));
          for (int i = 0; i < 16; ++i) a += low[i], c += high[i];
          out[b].start_a[4 * l + j] = -16 * a;
          out[b].start_b[4 * l + j] = -16 * c;
        }
      }
    }
  } else if (kind == operand_q8) {  // i8 q[n], f32 d[n/32], i32 start[n/32] = -16 * sum of 32, for each of 8 lanes
    std::memcpy(operand, row, static_cast<std::size_t>(n + n / 8));
    for (int b = 0; b < n / 32; ++b) {
      std::int32_t sum = 0;
      for (int i = 0; i < 32; ++i) sum += x.q[32 * b + i];
      sum *= -16;
      std::memcpy(operand + n + n / 8 + 4 * b, &sum, 4);
    }
  } else {
    std::memcpy(operand, row, quantized_row_bytes(n));
  }
}

// Lanes of four vectors summed: the result's lane r is the sum of v[r].
QWEN3NEXT_FORCE_INLINE __m128 sum_lanes(__m512 v0, __m512 v1, __m512 v2, __m512 v3) noexcept {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));  // 0 1 0 1 per 128 bits
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));  // 0 1 2 3
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

// y[r] for rows of blocks; Block::product(p, operand block, accumulator) adds one block.  One row after the other, as
// they lie in the file: several at once saved operand loads, but read memory at half the speed.
struct FusedSum {
  __m512 products = _mm512_setzero_ps();
  __m256 minima = _mm256_setzero_ps();
};
template <class Block>
QWEN3NEXT_FORCE_INLINE __m512 fused_row(const std::byte* p, int blocks, const std::byte* operand) noexcept {
  constexpr int ahead = 2048;  // bytes; past the row lies the next
  const auto* x = reinterpret_cast<const typename Block::Operand*>(operand);
  FusedSum acc;
  for (int b = 0; b < blocks; ++b, p += Block::bytes) {
#pragma GCC unroll 4
    for (int line = 0; line < Block::bytes; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(p) + ahead + line, _MM_HINT_T0);
    Block::product(p, x[b], acc);
  }
  return _mm512_sub_ps(acc.products, _mm512_zextps256_ps512(acc.minima));
}

template <class Block>
void fused_row_product(const std::byte* const* w, int rows, int n, const std::byte* operand, float* y) noexcept {
  const int blocks = n / Block::elements;
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    __m512 acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = fused_row<Block>(w[r + i], blocks, operand);
    _mm_storeu_ps(y + r, sum_lanes(acc[0], acc[1], acc[2], acc[3]));
  }
  for (; r < rows; ++r) {
    const __m512 zero = _mm512_setzero_ps();
    y[r] = _mm_cvtss_f32(sum_lanes(fused_row<Block>(w[r], blocks, operand), zero, zero, zero));
  }
}

template <bool five_bits>
struct FusedQ45_K {
  using Operand = OperandK4;
  static constexpr int elements = 256, bytes = five_bits ? 176 : 144;

  static QWEN3NEXT_FORCE_INLINE void product(const std::byte* p, const Operand& x, FusedSum& acc) noexcept {
    // Scales and minima, six bits each in three words a b c (FORMATS.md 5):
    //   sc = a & 63 | c & 15 + (a >> 2 & 48)      m = b & 63 | (c >> 4 & 15) + (b >> 2 & 48)
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4));
    const __m128i low = _mm_srlv_epi32(_mm_shuffle_epi32(packed, 0b10'01'10'00), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i top = _mm_srli_epi32(_mm_shuffle_epi32(packed, 0b01'01'00'00), 2);
    const __m128i sc_m =
        _mm_ternarylogic_epi32(_mm_and_si128(low, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)), top,
                               _mm_setr_epi32(0, 0x30303030, 0, 0x30303030), 0xf8);  // first | (second & third)
    const __m512i scale_a =
        _mm512_cvtepu8_epi32(_mm_shuffle_epi8(sc_m, _mm_setr_epi8(0, 0, 4, 4, 0, 0, 4, 4, 2, 2, 6, 6, 2, 2, 6, 6)));
    const __m512i scale_b =
        _mm512_cvtepu8_epi32(_mm_shuffle_epi8(sc_m, _mm_setr_epi8(1, 1, 5, 5, 1, 1, 5, 5, 3, 3, 7, 7, 3, 3, 7, 7)));

    const std::byte* qs = p + (five_bits ? 48 : 16);
    const __m512i first = _mm512_loadu_si512(qs), second = _mm512_loadu_si512(qs + 64);
    const __m512i q0 = _mm512_unpacklo_epi64(first, second), q1 = _mm512_unpackhi_epi64(first, second);
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i a0, a1, b0, b1;
    if constexpr (five_bits) {
      // Bit k of qh[l] is the fifth of sub-block k: turned to bit 4, where the mask keeps it.
      const __m512i qh = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
      const __m512i h0 = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 2, 2, 0, 0, 2, 2), qh);
      const __m512i h1 = _mm512_permutexvar_epi64(_mm512_setr_epi64(1, 1, 3, 3, 1, 1, 3, 3), qh);
      const __m512i turn_a = _mm512_setr_epi64(4, 0, 4, 0, 2, 62, 2, 62);
      const __m512i turn_b = _mm512_setr_epi64(3, 63, 3, 63, 1, 61, 1, 61);
      const __m512i five = _mm512_set1_epi8(31);
      auto join = [&](__m512i q, __m512i h) QWEN3NEXT_FORCE_INLINE_LAMBDA {
        return _mm512_and_si512(_mm512_ternarylogic_epi32(nibble, q, h, 0xca), five);  // nibble ? q : h
      };
      a0 = join(q0, _mm512_rolv_epi64(h0, turn_a));
      a1 = join(q1, _mm512_rolv_epi64(h1, turn_a));
      b0 = join(_mm512_srli_epi16(q0, 4), _mm512_rolv_epi64(h0, turn_b));
      b1 = join(_mm512_srli_epi16(q1, 4), _mm512_rolv_epi64(h1, turn_b));
    } else {
      a0 = _mm512_and_si512(q0, nibble);
      a1 = _mm512_and_si512(q1, nibble);
      b0 = _mm512_andnot_si512(nibble, q0);  // 16 times too large
      b1 = _mm512_andnot_si512(nibble, q1);
    }
    const __m512i zero = _mm512_setzero_si512();
    const __m512i a =
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, a0, _mm512_load_si512(x.x[0])), a1, _mm512_load_si512(x.x[1]));
    __m512i b =
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, b0, _mm512_load_si512(x.x[2])), b1, _mm512_load_si512(x.x[3]));
    if constexpr (!five_bits) b = _mm512_srai_epi32(b, 4);
    __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_mullo_epi32(a, scale_a)), _mm512_load_ps(x.da));
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_mullo_epi32(b, scale_b)), _mm512_load_ps(x.db), sum);
    const __m128 d_dmin = _mm_cvtph_ps(_mm_cvtsi32_si128(peek<std::int32_t>(p)));
    acc.products = _mm512_fmadd_ps(sum, _mm512_broadcastss_ps(d_dmin), acc.products);

    const __m256 min = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(sc_m, sc_m)));
    acc.minima = _mm256_fmadd_ps(_mm256_mul_ps(min, _mm256_load_ps(x.s)),
                                 _mm256_broadcastss_ps(_mm_movehdup_ps(d_dmin)), acc.minima);
  }
};

struct FusedQ6_K {
  using Operand = OperandK6;
  static constexpr int elements = 256, bytes = 210;

  static QWEN3NEXT_FORCE_INLINE void product(const std::byte* p, const Operand& x, FusedSum& acc) noexcept {
    const __m128i scales = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 192));
    const __m512i scale_a = _mm512_cvtepi8_epi32(
        _mm_shuffle_epi8(scales, _mm_setr_epi8(0, 0, 8, 8, 1, 1, 9, 9, 2, 2, 10, 10, 3, 3, 11, 11)));
    const __m512i scale_b = _mm512_cvtepi8_epi32(
        _mm_shuffle_epi8(scales, _mm_setr_epi8(4, 4, 12, 12, 5, 5, 13, 13, 6, 6, 14, 14, 7, 7, 15, 15)));

    const __m512i first = _mm512_loadu_si512(p), second = _mm512_loadu_si512(p + 64);
    const __m512i q0 = _mm512_unpacklo_epi64(first, second), q1 = _mm512_unpackhi_epi64(first, second);
    const __m512i qh = _mm512_loadu_si512(p + 128);
    const __m512i h0 = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 2, 6, 0, 4, 2, 6), qh);
    const __m512i h1 = _mm512_permutexvar_epi64(_mm512_setr_epi64(1, 5, 3, 7, 1, 5, 3, 7), qh);
    // Two top bits, moved to bits 4 and 5: of low nibbles from 0 or 2, of high nibbles from 4 or 6.
    const __m512i up = _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2), down = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);
    const __m512i nibble = _mm512_set1_epi8(15), six = _mm512_set1_epi8(63);
    auto join = [&](__m512i q, __m512i h) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      return _mm512_and_si512(_mm512_ternarylogic_epi32(nibble, q, h, 0xca), six);  // nibble ? q : h
    };
    const __m512i a0 = join(q0, _mm512_sllv_epi64(h0, up)), a1 = join(q1, _mm512_sllv_epi64(h1, up));
    const __m512i b0 = join(_mm512_srli_epi16(q0, 4), _mm512_srlv_epi64(h0, down));
    const __m512i b1 = join(_mm512_srli_epi16(q1, 4), _mm512_srlv_epi64(h1, down));

    const __m512i a =
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_load_si512(x.start_a), a0, _mm512_load_si512(x.x[0])), a1,
                            _mm512_load_si512(x.x[1]));
    const __m512i b =
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_load_si512(x.start_b), b0, _mm512_load_si512(x.x[2])), b1,
                            _mm512_load_si512(x.x[3]));
    __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_mullo_epi32(a, scale_a)), _mm512_load_ps(x.da));
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_mullo_epi32(b, scale_b)), _mm512_load_ps(x.db), sum);
    acc.products = _mm512_fmadd_ps(sum, _mm512_set1_ps(half_at(p + 208)), acc.products);
  }
};

// Q8_0: a block is 8 lanes; weights + 128 are unsigned, and the sums start at -128 times the activations' sum.
inline void row_product_q8(const std::byte* const* w, int rows, int n, const std::byte* operand, float* y) noexcept {
  const std::byte *d = operand + n, *start = operand + n + n / 8;
  const __m256i flip = _mm256_set1_epi8(-128);
  for (int r = 0; r < rows; ++r) {
    const std::byte* p = w[r];
    auto block = [&](int b, __m256 acc) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      const std::byte* at = p + 34 * b;
      const __m256i q = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 2)), flip);
      const __m256i sums = _mm256_dpbusd_epi32(_mm256_set1_epi32(peek<std::int32_t>(start + 4 * b)), q,
                                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(operand + 32 * b)));
      const __m256 scale = _mm256_set1_ps(half_at(at) * peek<float>(d + 4 * b));
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, acc);
    };
    __m256 even = _mm256_setzero_ps(), odd = even;
    int b = 0;
    for (; b + 2 <= n / 32; b += 2) even = block(b, even), odd = block(b + 1, odd);
    if (b < n / 32) even = block(b, even);
    const __m256 eight = _mm256_add_ps(even, odd);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    y[r] = _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
}

inline std::size_t operand_bytes(int n) noexcept { return static_cast<std::size_t>(n / 256 + 1) * sizeof(OperandK6); }

#else

inline void make_operand(int, const std::byte* row, int n, std::byte* operand) noexcept {
  std::memcpy(operand, row, quantized_row_bytes(n));
}
inline std::size_t operand_bytes(int n) noexcept { return quantized_row_bytes(n); }

#endif

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
