#pragma once
// Strips of 16 rows with AVX-512: a block's bits are transposed as they lie in the file (16 rows of 16 dwords at a
// time) and unpacked after that, when a vector holds the same columns of all rows and scales need no spreading.
// A block of Q4_K costs a row 8 shuffles, 6 nibble operations and 4 dot instructions (sums for panel_bias).  Q4_K to
// Q6_K and Q8_0 go this way; rows of other types are unpacked to int8 first, which takes about twice as long.

#include "backends/cpu/row_product_avx512.hpp"
#include "backends/cpu/strip_product.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

#if QWEN3NEXT_FUSED_ROWS

// v[i] lane j <-> v[j] lane i.
QWEN3NEXT_FORCE_INLINE void transpose16(__m512i* v) noexcept {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  // b[4 g + j]: rows 4 g .. 4 g + 3 of columns j, 4 + j, 8 + j, 12 + j, one in each 128-bit lane
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    b[4 * g] = _mm512_unpacklo_epi64(a[4 * g], a[4 * g + 2]);
    b[4 * g + 1] = _mm512_unpackhi_epi64(a[4 * g], a[4 * g + 2]);
    b[4 * g + 2] = _mm512_unpacklo_epi64(a[4 * g + 1], a[4 * g + 3]);
    b[4 * g + 3] = _mm512_unpackhi_epi64(a[4 * g + 1], a[4 * g + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low02 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88),
                  low13 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i high02 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i high13 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    v[j] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
    v[4 + j] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    v[12 + j] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
}

// Sixteen rows of blocks, read at the same place.
struct RowBlocks {
  const std::byte* row[16];
  std::ptrdiff_t at;

  QWEN3NEXT_FORCE_INLINE void transposed(int offset, __m512i* v) const noexcept {  // 64 bytes of each
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_si512(row[r] + at + offset);
    transpose16(v);
  }
  QWEN3NEXT_FORCE_INLINE void transposed4(int offset, __m512i* v) const noexcept {  // 16 bytes of each
    __m512i a[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {  // rows r, 4 + r, 8 + r, 12 + r
      auto load = [&](int i) QWEN3NEXT_FORCE_INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[4 * i + r] + at + offset));
      };
      a[r] = _mm512_castsi128_si512(load(0));
      a[r] = _mm512_inserti32x4(a[r], load(1), 1);
      a[r] = _mm512_inserti32x4(a[r], load(2), 2);
      a[r] = _mm512_inserti32x4(a[r], load(3), 3);
    }
    const __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]), b1 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i c0 = _mm512_unpacklo_epi32(a[2], a[3]), c1 = _mm512_unpackhi_epi32(a[2], a[3]);
    v[0] = _mm512_unpacklo_epi64(b0, c0);
    v[1] = _mm512_unpackhi_epi64(b0, c0);
    v[2] = _mm512_unpacklo_epi64(b1, c1);
    v[3] = _mm512_unpackhi_epi64(b1, c1);
  }
  QWEN3NEXT_FORCE_INLINE __m512 halves(int offset) const noexcept {
    alignas(32) std::uint16_t h[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) h[r] = peek<std::uint16_t>(row[r] + at + offset);
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(h)));
  }
};

// Writes groups of a strip: weights, then scale and start.
template <class Type>
struct StripWriter {
  using Group = StripGroup<Type>;
  std::byte* out;
  __m512i sum[Type::elements / Type::group];

  QWEN3NEXT_FORCE_INLINE void weights(int group, int four, __m512i w) noexcept {
    _mm512_storeu_si512(out + group * Group::bytes + four * Group::vector, w);
    if constexpr (panel_bias != 0)
      sum[group] = _mm512_dpbusd_epi32(four == 0 ? _mm512_setzero_si512() : sum[group], _mm512_set1_epi8(1), w);
  }
  QWEN3NEXT_FORCE_INLINE void scale(int group, __m512 scale) noexcept {
    std::byte* p = out + group * Group::bytes;
    _mm512_storeu_ps(p + Group::scale, scale);
    if constexpr (panel_bias != 0) {
      static_assert(panel_bias == 128 || panel_bias == 0);
      _mm512_storeu_si512(p + Group::start, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum[group], 7)));
    }
  }
  QWEN3NEXT_FORCE_INLINE void negative_min(int group, __m512 min) noexcept {
    _mm512_storeu_ps(out + group * Group::bytes + Group::min, min);
  }
};

template <bool five_bits>
QWEN3NEXT_FORCE_INLINE void pack_block(const RowBlocks& rows, StripWriter<Q45_K<five_bits>>& strip) noexcept {
  using Type = Q45_K<five_bits>;
  const __m512i nibble = _mm512_set1_epi8(15);
  [[maybe_unused]] __m512i high[16];
  if constexpr (five_bits) rows.transposed(Type::qh_at, high);  // 8 dwords of fifth bits; the rest is unused
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m512i q[16];
    rows.transposed(Type::qs_at + 64 * half, q);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const int k = 4 * half + 2 * (j / 8);  // sub-block of the low nibbles
      __m512i low = _mm512_and_si512(q[j], nibble), top = _mm512_and_si512(_mm512_srli_epi16(q[j], 4), nibble);
      if constexpr (five_bits) {
        const __m512i bit = _mm512_set1_epi8(16), h = high[j % 8];
        const __m512i fifth = k <= 4 ? _mm512_slli_epi32(h, static_cast<unsigned>(4 - k))
                                     : _mm512_srli_epi32(h, static_cast<unsigned>(k - 4));
        const __m512i next = k < 4 ? _mm512_slli_epi32(h, static_cast<unsigned>(3 - k))
                                   : _mm512_srli_epi32(h, static_cast<unsigned>(k - 3));
        low = _mm512_or_si512(low, _mm512_and_si512(fifth, bit));
        top = _mm512_or_si512(top, _mm512_and_si512(next, bit));
      }
      strip.weights(k, j % 8, low);
      strip.weights(k + 1, j % 8, top);
    }
  }
  // The header is four dwords: d and dmin, then the words of unpack_scales_k4.
  __m512i head[4];
  rows.transposed4(0, head);
  const __m512 d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(head[0]));
  const __m512 dmin =
      _mm512_sub_ps(_mm512_setzero_ps(), _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(head[0], 16))));
  const __m512i six = _mm512_set1_epi8(63), two = _mm512_set1_epi8(48);
  auto join = [&](__m512i low, __m512i top) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    return _mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(_mm512_srli_epi32(top, 2), two));
  };
  const __m512i sc[2] = {_mm512_and_si512(head[1], six), join(head[3], head[1])};
  const __m512i m[2] = {_mm512_and_si512(head[2], six), join(_mm512_srli_epi32(head[3], 4), head[2])};
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    auto byte = [&](__m512i words) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      return _mm512_cvtepi32_ps(
          _mm512_and_si512(_mm512_srli_epi32(words, static_cast<unsigned>(8 * (k % 4))), _mm512_set1_epi32(255)));
    };
    strip.scale(k, _mm512_mul_ps(d, byte(sc[k / 4])));
    strip.negative_min(k, _mm512_mul_ps(dmin, byte(m[k / 4])));
  }
}

QWEN3NEXT_FORCE_INLINE void pack_block(const RowBlocks& rows, StripWriter<Q6_K>& strip) noexcept {
  const __m512i nibble = _mm512_set1_epi8(15), two = _mm512_set1_epi8(48), offset = _mm512_set1_epi8(32);
  __m512i h[16];
  rows.transposed(128, h);
#pragma GCC unroll 2
  for (int n = 0; n < 2; ++n) {
    __m512i q[16];
    rows.transposed(64 * n, q);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i a = q[j], b = q[8 + j], top = h[8 * n + j];
      auto write = [&](int group, __m512i low, __m512i high) QWEN3NEXT_FORCE_INLINE_LAMBDA {
        const __m512i six = _mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(high, two));
        strip.weights(8 * n + group + j / 4, j % 4, _mm512_sub_epi8(six, offset));
      };
      write(0, a, _mm512_slli_epi32(top, 4));
      write(2, b, _mm512_slli_epi32(top, 2));
      write(4, _mm512_srli_epi32(a, 4), top);
      write(6, _mm512_srli_epi32(b, 4), _mm512_srli_epi32(top, 2));
    }
  }
  __m512i sc[4];
  rows.transposed4(192, sc);
  const __m512 d = rows.halves(208);
#pragma GCC unroll 16
  for (int g = 0; g < 16; ++g) {
    const __m512i byte = _mm512_srai_epi32(_mm512_slli_epi32(sc[g / 4], static_cast<unsigned>(24 - 8 * (g % 4))), 24);
    strip.scale(g, _mm512_mul_ps(d, _mm512_cvtepi32_ps(byte)));
  }
}

QWEN3NEXT_FORCE_INLINE void pack_block(const RowBlocks& rows, StripWriter<Q8_0>& strip) noexcept {
  // 8 dwords of each row: two rows to a vector, then a transposition of 8 x 16.
  __m512i v[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r)
    v[r] = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.row[r] + rows.at + 2)));
  transpose16(v);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) strip.weights(0, j, v[j]);
  strip.scale(0, rows.halves(0));
}

// Any other type: rows are unpacked to int8 one by one, then transposed.
template <class Type>
QWEN3NEXT_FORCE_INLINE void pack_block(const RowBlocks& rows, StripWriter<Type>& strip) noexcept {
  constexpr int columns = Type::elements, groups = columns / Type::group;
  alignas(64) std::int8_t q[16][columns];
  alignas(64) float scale[groups][16];
  [[maybe_unused]] alignas(64) float negative_min[groups][16];
  for (int r = 0; r < 16; ++r) {
    float row_scale[16], row_min[16];
    unpack<Type>(rows.row[r] + rows.at, q[r], row_scale, row_min);
    for (int g = 0; g < groups; ++g) {
      scale[g][r] = row_scale[g];
      if constexpr (Type::has_min) negative_min[g][r] = -row_min[g];
    }
  }
  for (int c = 0; c < columns; c += 64) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      if constexpr (columns < 64)
        v[r] = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(q[r])));
      else
        v[r] = _mm512_load_si512(q[r] + c);
      if constexpr (Type::zero != 0) v[r] = _mm512_sub_epi8(v[r], _mm512_set1_epi8(Type::zero));
    }
    transpose16(v);
    constexpr int vectors = (columns < 64 ? columns : 64) / 4, group_vectors = Type::group / 4;
#pragma GCC unroll 16
    for (int j = 0; j < vectors; ++j) strip.weights(c / Type::group + j / group_vectors, j % group_vectors, v[j]);
  }
  for (int g = 0; g < groups; ++g) {
    strip.scale(g, _mm512_load_ps(scale[g]));
    if constexpr (Type::has_min) strip.negative_min(g, _mm512_load_ps(negative_min[g]));
  }
}

template <class Type>
void pack_strip_transposed(const std::byte* const* w, int n_rows, int n, std::byte* out) noexcept {
  RowBlocks rows;
  for (int r = 0; r < 16; ++r) rows.row[r] = w[r < n_rows ? r : 0];
  StripWriter<Type> strip;
  strip.out = out;
  const std::ptrdiff_t row_bytes = n / Type::elements * Type::bytes;
  for (rows.at = 0; rows.at < row_bytes; rows.at += Type::bytes) {
    pack_block(rows, strip);
    strip.out += Type::elements / Type::group * StripGroup<Type>::bytes;
  }
}

#endif

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
