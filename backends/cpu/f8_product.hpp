#pragma once
// F8_E4M3 weights, whose rows have a factor for every 128 columns: few rows of activations times rows of weights, and
// rows of weights as floats.  Many rows of activations go through the latter and float_product.hpp.
//
// A code becomes a half by moving its bits: the same fraction, an exponent that is smaller by 8, subnormals included.
// The vectors here are thus 256 times too small, which the factor makes good.

#include "backends/cpu/simd.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

constexpr int f8_block = 128;
constexpr int f8_ahead = 8192;  // bytes: four rows of 2048 on, while four are read
static_assert(f8_block % lanes == 0);

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define QWEN3NEXT_F8_BITS 512
#elif defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__)
#define QWEN3NEXT_F8_BITS 256
#else  // one by one, from a table
#define QWEN3NEXT_F8_BITS 0
struct F8Table {
  float value[256];  // / 256
};
constexpr F8Table make_f8_table() {
  F8Table table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, fraction = code & 7;
    float value = exponent ? static_cast<float>(8 + fraction) : static_cast<float>(2 * fraction);
    for (int e = exponent ? exponent : 0; e > 0; --e) value *= 2;
    value *= 0x1p-18f;  // 2^(e - 7) / 8 / 256; subnormals count in steps of 2^-9 / 256
    if ((code & 0x7f) == 0x7f) value = __builtin_nanf("");
    table.value[code] = code & 0x80 ? -value : value;
  }
  return table;
}
inline constexpr F8Table f8_table = make_f8_table();
#endif

// `lanes` codes as floats / 256.
QWEN3NEXT_FORCE_INLINE F load_f8(const std::byte* p) noexcept {
#if QWEN3NEXT_F8_BITS == 512
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
  const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xbfff)));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(wide, _mm256_set1_epi16(0x3f80)),  //
                                                _mm256_set1_epi16(0x3f80));
  return F(_mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7fff))));
#elif QWEN3NEXT_F8_BITS == 256
  const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
  const __m128i half = _mm_and_si128(wide, _mm_set1_epi16(static_cast<short>(0xbfff)));
  const __m128i top = _mm_set1_epi16(0x3f80), nan = _mm_cmpeq_epi16(_mm_and_si128(wide, top), top);
  return F(_mm256_cvtph_ps(_mm_or_si128(half, nan)));
#else
  alignas(64) float out[lanes];
  for (int i = 0; i < lanes; ++i) out[i] = f8_table.value[static_cast<unsigned char>(p[i])];
  return F::load_aligned(out);
#endif
}
QWEN3NEXT_FORCE_INLINE F load_f8_part(const std::byte* p, int n) noexcept {
  alignas(64) std::byte buffer[lanes] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n));
  return load_f8(buffer);
}

// 256 times the factor of block b; null stands for ones.
QWEN3NEXT_FORCE_INLINE float f8_factor(const std::byte* factors, DType type, int b) noexcept {
  if (!factors) return 256;
  if (type == DType::f32) return 256 * peek<float>(factors + 4 * static_cast<std::ptrdiff_t>(b));
  const auto bits = static_cast<std::uint32_t>(peek<std::uint16_t>(factors + 2 * static_cast<std::ptrdiff_t>(b)));
  return 256 * __builtin_bit_cast(float, bits << 16);
}

// 4 `lanes` codes as floats, times their factor / 256.
QWEN3NEXT_FORCE_INLINE void load_f8_four(const std::byte* p, float factor, F* out) noexcept {
#if QWEN3NEXT_F8_BITS == 512
  // Shifted into a float's place their exponents are smaller by 120: two operations, where halves take three and a slow
  // conversion.  Not for NaN, nor where the factor would overflow.
  const __m512i codes = _mm512_loadu_si512(p), top = _mm512_set1_epi8(0x7f);
  const bool nan = _mm512_cmpeq_epi8_mask(_mm512_and_si512(codes, top), top) != 0;
  if (__builtin_expect(!nan && factor < 0x1p15f && factor > -0x1p15f, 1)) {
    const __m512 scale = _mm512_set1_ps(factor * 0x1p112f);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i bits = _mm512_slli_epi32(_mm512_cvtepi8_epi32(peek<__m128i>(p + 16 * j)), 20);
      const __m512i value = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
      out[j] = F(_mm512_mul_ps(_mm512_castsi512_ps(value), scale));
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) out[j] = load_f8(p + j * lanes) * F(factor);
}

// y[t, r] = w[r] . x[t] for R rows, T tokens.  The order of the sums is that of product_tile over rows of floats.
template <int R, int T>
void f8_product_rows(const std::byte* const* w, const std::byte* const* factors, DType factor_type, const float* x,
                     std::ptrdiff_t x_stride, int n, float* y, std::ptrdiff_t y_stride) noexcept {
  F acc[R][T];
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) acc[i / T][i % T] = F(0.0f);
  for (int begin = 0; begin < n; begin += f8_block) {
    const int end = n - begin < f8_block ? n : begin + f8_block;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float factor = f8_factor(factors[r], factor_type, begin / f8_block);
      int i = begin;
      for (; i + 4 * lanes <= end; i += 4 * lanes) {
        __builtin_prefetch(w[r] + i + f8_ahead, 0, 2);
        F weight[4];
        load_f8_four(w[r] + i, factor, weight);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) acc[r][t] = mul_add(weight[j], load(x + t * x_stride + i + j * lanes), acc[r][t]);
        }
      }
      for (; i < end; i += lanes) {
        const int some = end - i < lanes ? end - i : lanes;
        const F weight = (some == lanes ? load_f8(w[r] + i) : load_f8_part(w[r] + i, some)) * F(factor);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) acc[r][t] = mul_add(weight, load_some(x + t * x_stride + i, some), acc[r][t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * T; ++i) y[i % T * y_stride + i / T] = sum(acc[i / T][i % T]);
}

inline void f8_product(const std::byte* const* w, const std::byte* const* factors, DType factor_type, int rows, int n,
                       const float* x, std::ptrdiff_t x_stride, int T, float* y, std::ptrdiff_t y_stride) noexcept {
  in_pieces<4>(T, [&](auto count, int t) {
    constexpr int tokens = decltype(count)::value, R = tokens == 1 ? 4 : 2;
    const float* in = x + t * x_stride;
    float* out = y + t * y_stride;
    int r = 0;
    for (; r + R <= rows; r += R)
      f8_product_rows<R, tokens>(w + r, factors + r, factor_type, in, x_stride, n, out + r, y_stride);
    for (; r < rows; ++r)
      f8_product_rows<1, tokens>(w + r, factors + r, factor_type, in, x_stride, n, out + r, y_stride);
  });
}

// A row of n weights as floats.
inline void dequantize_f8(const std::byte* row, const std::byte* factors, DType factor_type, int n,
                          float* out) noexcept {
  for_lanes(n, [&](int i, int m) {
    const F factor(f8_factor(factors, factor_type, i / f8_block));
    store_some(out + i, (m == lanes ? load_f8(row + i) : load_f8_part(row + i, m)) * factor, m);
  });
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA

#undef QWEN3NEXT_F8_BITS
