#pragma once
// Decode with AVX-512 VNNI: products of quantised rows of any type with few rows of activations, at memory speed.
//
// 256 columns of a row are unpacked to four vectors and a vector of scales (row_blocks_avx512.hpp), all in the order
// that leaves one sum per group of 16 columns; then a token costs
//     4 vpdpbusd   1 conversion   1 product of scales   1 or 2 multiply-adds
// and unpacking, once for all tokens, 12 (Q4_K) to 30 operations and about 12 for scales: 144 bytes of Q4_K take about
// 16 cycles on Zen 4, against 18 to 30 to read them from memory.

#include "backends/cpu/row_blocks_avx512.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

#if QWEN3NEXT_FUSED_ROWS

// 256 activations of a token, in the order of Unpacked.
struct Operand256 {
  alignas(64) std::int8_t x[4][64];
  float d[8], s[8];               // of 32: scale; scale * sum, which multiplies minima
  std::int32_t negative_sum[16];  // of 16, by lane
};
static_assert(sizeof(Operand256) == 384);

inline std::size_t operand_bytes(int n) noexcept {
  return static_cast<std::size_t>((n + 255) / 256) * sizeof(Operand256);
}

// Columns beyond n are zeros.
inline void make_operand(const std::byte* row, int n, std::byte* operand) noexcept {
  const RowParts x = row_parts(row, n);
  auto* out = reinterpret_cast<Operand256*>(operand);
  // The dwords v of the first halves of two 32s, then those of the second halves, v = 0..3.
  const __m512i by_dword = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  for (int begin = 0; begin < n; begin += 256, ++out) {
    const int count = n - begin < 256 ? n - begin : 256;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int left = count - 64 * i;
      const __mmask16 dwords = left >= 64 ? 0xffff : left > 0 ? 0xff : 0;
      const __m512i two = _mm512_permutexvar_epi32(by_dword, _mm512_maskz_loadu_epi32(dwords, x.q + begin + 64 * i));
      auto put = [&](int v, __m128i four) QWEN3NEXT_FORCE_INLINE_LAMBDA {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out->x[v] + 8 * i), four);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out->x[v] + 32 + 8 * i), _mm_unpackhi_epi64(four, four));
      };
      put(0, _mm512_castsi512_si128(two));
      put(1, _mm512_extracti32x4_epi32(two, 1));
      put(2, _mm512_extracti32x4_epi32(two, 2));
      put(3, _mm512_extracti32x4_epi32(two, 3));
    }
    __m512i sums = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_load_si512(out->x[v]));
    _mm512_store_si512(out->negative_sum, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
    const __m256 d = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << count / 32) - 1), x.d + begin / 32);
    const __m256i of_32 = _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    _mm256_store_ps(out->d, d);
    _mm256_store_ps(out->s, _mm256_mul_ps(d, _mm256_cvtepi32_ps(of_32)));
  }
}

// The lanes of four vectors summed: the result's lane r is the sum of v[r].
QWEN3NEXT_FORCE_INLINE __m128 sum_lanes(const __m256* v) noexcept {
  const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));  // 0 1 0 1
  const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
  const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));  // 0 1 2 3
  return _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
}
QWEN3NEXT_FORCE_INLINE __m256 fold(__m512 v) noexcept {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
QWEN3NEXT_FORCE_INLINE __m256 fold(__m256 v) noexcept { return v; }

template <class Type>
inline constexpr Lanes zero_shifts{Columns256<Type>::zero_bits};

template <class Type, int T>
QWEN3NEXT_FORCE_INLINE void add_256(const std::byte* p, const std::byte* const* x, std::ptrdiff_t at,
                                    typename ScaleVector<Type::group>::Type* acc) noexcept {
  using Columns = Columns256<Type>;
  Unpacked<Type> w;
  Columns::unpack(p, w);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const auto& in = *reinterpret_cast<const Operand256*>(x[t] + at);
    __m512i sums = _mm512_setzero_si512();
    if constexpr (Columns::zero_bits(0, 0) != none)
      sums = _mm512_sllv_epi32(_mm512_load_si512(in.negative_sum), zero_shifts<Type>);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums = _mm512_dpbusd_epi32(sums, w.q[v], _mm512_load_si512(in.x[v]));
    const __m256 d = _mm256_load_ps(in.d);
    if constexpr (Type::group == 32) {
      __m256i high = _mm512_extracti64x4_epi64(sums, 1);
      if constexpr (Columns::high_bits != 0) high = _mm256_srai_epi32(high, Columns::high_bits);
      const __m256 of_32 = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm512_castsi512_si256(sums), high));
      acc[t] = _mm256_fmadd_ps(of_32, _mm256_mul_ps(w.scale, d), acc[t]);
      if constexpr (Type::has_min) acc[t] = _mm256_fnmadd_ps(w.min, _mm256_load_ps(in.s), acc[t]);
    } else {
      const __m512 both = _mm512_broadcast_f32x8(d);
      acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(w.scale, both), acc[t]);
      if constexpr (Type::has_min) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(in.negative_sum));
        acc[t] = _mm512_fmadd_ps(sum, _mm512_mul_ps(w.min, both), acc[t]);
      }
    }
  }
}

// One row after the other, as they lie in the file: several at once save loads of activations, but read memory at half
// the speed.
template <class Type, int T>
QWEN3NEXT_FORCE_INLINE void fused_row(const std::byte* p, int n, const std::byte* const* x, __m256* out) noexcept {
  constexpr int bytes = 256 / Type::elements * Type::bytes;
  constexpr int ahead = 8192;  // bytes; past the row lies the next
  typename ScaleVector<Type::group>::Type acc[T] = {};
  std::ptrdiff_t at = 0;
  for (int i = 256; i <= n; i += 256, p += bytes, at += sizeof(Operand256)) {
#pragma GCC unroll 8
    for (int line = 0; line < bytes; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(p) + ahead + line, _MM_HINT_T1);
    add_256<Type, T>(p, x, at, acc);
  }
  if constexpr (Type::elements < 256) {
    if (n % 256) {
      alignas(64) std::byte rest[bytes] = {};
      std::memcpy(rest, p, static_cast<std::size_t>(n % 256 / Type::elements * Type::bytes));
      add_256<Type, T>(rest, x, at, acc);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) out[4 * t] = fold(acc[t]);
}

// y[t, r] = w[r] . x[t] for T tokens.
template <class Type, int T>
void fused_rows(const std::byte* const* w, int rows, int n, const std::byte* const* x, float* y,
                std::ptrdiff_t y_stride) noexcept {
  for (int r = 0; r < rows; r += 4) {
    const int count = rows - r < 4 ? rows - r : 4;
    __m256 sums[T][4] = {};
    for (int i = 0; i < count; ++i) fused_row<Type, T>(w[r + i], n, x, sums[0] + i);
    const auto some = static_cast<__mmask8>((1u << count) - 1);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) _mm_mask_storeu_ps(y + t * y_stride + r, some, sum_lanes(sums[t]));
  }
}

template <class Type>
void row_product(const std::byte* const* w, int rows, int n, const std::byte* const* x, int T, float* y,
                 std::ptrdiff_t y_stride) noexcept {
  in_pieces<8>(T, [&](auto count, int t) {
    fused_rows<Type, decltype(count)::value>(w, rows, n, x + t, y + t * y_stride, y_stride);
  });
}
constexpr int row_tokens = 8;

#else

template <class Type>
void row_product(const std::byte* const* w, int rows, int n, const std::byte* const* x, int T, float* y,
                 std::ptrdiff_t y_stride) noexcept {
  in_pieces<4>(T, [&](auto count, int t) {
    plain_rows<Type, decltype(count)::value>(w, rows, n, x + t, y + t * y_stride, y_stride);
  });
}
// Strips are faster from 5 tokens on (AVX2), or from 3; but then a token would not be as it is alone.
constexpr int row_tokens = 5;

inline void make_operand(const std::byte* row, int n, std::byte* operand) noexcept {
  make_plain_operand(row, n, operand);
}
inline std::size_t operand_bytes(int n) noexcept {
  return static_cast<std::size_t>((n + 255) / 256) * sizeof(PlainOperand);
}

#endif

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
