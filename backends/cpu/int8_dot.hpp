#pragma once
// The instruction that quantised weights live on: sums of four int8 products in every 32-bit lane.
//
//   AVX-512 VNNI, AVX-VNNI  vpdpbusd                       one instruction, unsigned times signed
//   AVX2, SSSE3             vpmaddubsw, vpmaddwd, vpaddd   16-bit partial sums: |w| <= 64 keeps them from saturating
//   SSE2                    pmaddwd                        widened to 16 bits before
//   NEON with dot product   sdot                           signed times signed
//   NEON                    smull, saddlp
//   elsewhere               plain loops

#include "backends/cpu/simd.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// AMX: strips are multiplied by tiles, which takes signed operands.  See strip_product_amx.hpp.
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#define QWEN3NEXT_TILES 1
#else
#define QWEN3NEXT_TILES 0
#endif

// x86 vectors want one operand unsigned: panels hold activations + 128 there, and strips the sums to take off again.
#if QWEN3NEXT_X86 && defined(__SSSE3__) && !QWEN3NEXT_TILES
constexpr int panel_bias = 128;
#else
constexpr int panel_bias = 0;
#endif

// The widest integer vector, and its intrinsics by the part of their names that they share.
#if defined(__AVX512BW__)
using Bytes = __m512i;
#define QWEN3NEXT_MM(name) _mm512_##name
#elif defined(__AVX2__)
using Bytes = __m256i;
#define QWEN3NEXT_MM(name) _mm256_##name
#elif QWEN3NEXT_X86
using Bytes = __m128i;
#define QWEN3NEXT_MM(name) _mm_##name
#endif

// acc + sum of 4 x w in every lane.  x: four activations (+ panel_bias), the same for all lanes; w: four int8 weights
// for each lane.  `wide`: weights of all 8 bits.
template <bool wide>
QWEN3NEXT_FORCE_INLINE I dot4(I acc, std::int32_t x, const std::int8_t* w) noexcept {
#if QWEN3NEXT_X86
  const Bytes weights = peek<Bytes>(w), xs = QWEN3NEXT_MM(set1_epi32)(x);
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return I(_mm512_dpbusd_epi32(acc, xs, weights));
#elif defined(__AVXVNNI__) && !defined(__AVX512BW__)
  return I(_mm256_dpbusd_avx_epi32(acc, xs, weights));
#else
#if defined(__SSSE3__)
  if constexpr (!wide)
    return acc + I(QWEN3NEXT_MM(madd_epi16)(QWEN3NEXT_MM(maddubs_epi16)(xs, weights), QWEN3NEXT_MM(set1_epi16)(1)));
#endif
  // In two halves of 16-bit factors: 16 bits have no room for a sum of two products.
  auto even = [](Bytes v) QWEN3NEXT_FORCE_INLINE_LAMBDA { return QWEN3NEXT_MM(slli_epi16)(v, 8); };
  const Bytes even_w = QWEN3NEXT_MM(srai_epi16)(even(weights), 8), odd_w = QWEN3NEXT_MM(srai_epi16)(weights, 8);
  const Bytes even_x = panel_bias ? QWEN3NEXT_MM(srli_epi16)(even(xs), 8) : QWEN3NEXT_MM(srai_epi16)(even(xs), 8);
  const Bytes odd_x = panel_bias ? QWEN3NEXT_MM(srli_epi16)(xs, 8) : QWEN3NEXT_MM(srai_epi16)(xs, 8);
  return acc + I(QWEN3NEXT_MM(madd_epi16)(even_w, even_x)) + I(QWEN3NEXT_MM(madd_epi16)(odd_w, odd_x));
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
  return I(vdotq_s32(acc, vld1q_s8(w), vreinterpretq_s8_s32(vdupq_n_s32(x))));
#elif defined(__aarch64__)
  const int8x8_t xs = vreinterpret_s8_s32(vdup_n_s32(x));
  const int32x4_t low = vpaddlq_s16(vmull_s8(vld1_s8(w), xs)), high = vpaddlq_s16(vmull_s8(vld1_s8(w + 8), xs));
  return acc + I(vpaddq_s32(low, high));
#else
  std::int8_t xs[4];
  std::memcpy(xs, &x, 4);
  std::int32_t out[lanes];
  for (int i = 0; i < lanes; ++i)
    out[i] = w[4 * i] * xs[0] + w[4 * i + 1] * xs[1] + w[4 * i + 2] * xs[2] + w[4 * i + 3] * xs[3];
  return acc + load(out);
#endif
}
#undef QWEN3NEXT_MM

#if QWEN3NEXT_X86 && !defined(__AVX2__)
// Sums of 16 products of int8 in four lanes.  No saturation: at most 2 * 128 * 127 = 32512 before they are widened.
QWEN3NEXT_FORCE_INLINE __m128i dot16(const std::int8_t* w, const std::int8_t* x) noexcept {
  const __m128i wv = peek<__m128i>(w), xv = peek<__m128i>(x);
#if defined(__SSSE3__)
  return _mm_madd_epi16(_mm_maddubs_epi16(_mm_abs_epi8(wv), _mm_sign_epi8(xv, wv)), _mm_set1_epi16(1));
#else
  auto low = [](__m128i v) { return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8); };
  auto high = [](__m128i v) { return _mm_srai_epi16(_mm_unpackhi_epi8(v, v), 8); };
  return _mm_add_epi32(_mm_madd_epi16(low(wv), low(xv)), _mm_madd_epi16(high(wv), high(xv)));
#endif
}
#elif defined(__aarch64__)
QWEN3NEXT_FORCE_INLINE int32x4_t dot16(const std::int8_t* w, const std::int8_t* x) noexcept {
  const int8x16_t wv = vld1q_s8(w), xv = vld1q_s8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(vdupq_n_s32(0), wv, xv);
#else
  return vpaddlq_s16(vmlal_high_s8(vmull_s8(vget_low_s8(wv), vget_low_s8(xv)), wv, xv));
#endif
}
#endif

// Sums 32 products of int8 weights and int8 activations (-127..127), the first 16 times `low`, the others times `high`,
// into some lanes of an accumulator.
struct Dot32 {
#if defined(__AVX2__)
  __m256 acc = _mm256_setzero_ps();

  QWEN3NEXT_FORCE_INLINE void add(const std::int8_t* w, const std::int8_t* x, float low, float high) noexcept {
    const __m256i wv = peek<__m256i>(w), xv = peek<__m256i>(x);
    const __m256i absolute = _mm256_abs_epi8(wv), signed_x = _mm256_sign_epi8(xv, wv);  // w x = |w| (sign(w) x)
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), absolute, signed_x);
#elif defined(__AVXVNNI__)
    const __m256i sums = _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), absolute, signed_x);
#else
    // At most 2 * 128 * 127 = 32512: no saturation, even for 8-bit weights.
    const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(absolute, signed_x), _mm256_set1_epi16(1));
#endif
    const __m256 scale = _mm256_insertf128_ps(_mm256_set1_ps(low), _mm_set1_ps(high), 1);
    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, acc);
  }
  QWEN3NEXT_FORCE_INLINE float total() const noexcept {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
#elif QWEN3NEXT_X86 || defined(__aarch64__)
  F first = F(0.0f), second = F(0.0f);  // braces would be a list of lanes

  QWEN3NEXT_FORCE_INLINE void add(const std::int8_t* w, const std::int8_t* x, float low, float high) noexcept {
    first = mul_add(to_floats(I(dot16(w, x))), F(low), first);
    second = mul_add(to_floats(I(dot16(w + 16, x + 16))), F(high), second);
  }
  QWEN3NEXT_FORCE_INLINE float total() const noexcept { return sum(first + second); }
#else
  float acc = 0;

  QWEN3NEXT_FORCE_INLINE void add(const std::int8_t* w, const std::int8_t* x, float low, float high) noexcept {
    std::int32_t a = 0, b = 0;
    for (int i = 0; i < 16; ++i) a += w[i] * x[i];
    for (int i = 16; i < 32; ++i) b += w[i] * x[i];
    acc += low * static_cast<float>(a) + high * static_cast<float>(b);
  }
  QWEN3NEXT_FORCE_INLINE float total() const noexcept { return acc; }
#endif
};

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
