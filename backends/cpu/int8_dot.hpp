#pragma once
// The instruction that quantised weights live on: sums of four int8 products in every 32-bit lane.
//
//   AVX-512 VNNI  vpdpbusd                       one instruction, unsigned times signed
//   AVX-512, AVX2 vpmaddubsw, vpmaddwd, vpaddd   16-bit partial sums: |w| <= 64 keeps them from saturating
//   NEON          sdot                           signed times signed
//   elsewhere     plain loops

#include "backends/cpu/simd.hpp"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// x86 wants one operand unsigned: panels hold activations + 128 there, and strips the sums to take off again.
#if defined(__AVX2__)
constexpr int panel_bias = 128;
#else
constexpr int panel_bias = 0;
#endif

// acc + sum of 4 x w in every lane.  x: four activations (+ panel_bias), the same for all lanes; w: four int8 weights
// for each lane.  `wide`: weights of all 8 bits.
template <bool wide>
QWEN3NEXT_FORCE_INLINE I dot4(I acc, std::int32_t x, const std::int8_t* w) noexcept {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return I(_mm512_dpbusd_epi32(acc, _mm512_set1_epi32(x), _mm512_loadu_si512(w)));
#elif defined(__AVX512BW__)
  const __m512i weights = _mm512_loadu_si512(w), xs = _mm512_set1_epi32(x), ones = _mm512_set1_epi16(1);
  if constexpr (wide) {  // in two halves of 16-bit products: no room for a sum of two
    const __m512i even_w = _mm512_srai_epi16(_mm512_slli_epi16(weights, 8), 8), odd_w = _mm512_srai_epi16(weights, 8);
    const __m512i even_x = _mm512_and_si512(xs, _mm512_set1_epi16(255)), odd_x = _mm512_srli_epi16(xs, 8);
    return I(
        _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(even_w, even_x), _mm512_madd_epi16(odd_w, odd_x))));
  }
  return I(_mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(xs, weights), ones)));
#elif defined(__AVX2__)
  const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)), xs = _mm256_set1_epi32(x);
  if constexpr (wide) {
    const __m256i even_w = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8), odd_w = _mm256_srai_epi16(weights, 8);
    const __m256i even_x = _mm256_and_si256(xs, _mm256_set1_epi16(255)), odd_x = _mm256_srli_epi16(xs, 8);
    return I(
        _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(even_w, even_x), _mm256_madd_epi16(odd_w, odd_x))));
  }
  return I(_mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(xs, weights), _mm256_set1_epi16(1))));
#elif defined(__ARM_FEATURE_DOTPROD)
  return I(vdotq_s32(acc, vld1q_s8(w), vreinterpretq_s8_s32(vdupq_n_s32(x))));
#else
  std::int8_t xs[4];
  std::memcpy(xs, &x, 4);
  std::int32_t out[lanes];
  for (int i = 0; i < lanes; ++i)
    out[i] = w[4 * i] * xs[0] + w[4 * i + 1] * xs[1] + w[4 * i + 2] * xs[2] + w[4 * i + 3] * xs[3];
  return acc + load(out);
#endif
}

// Sums 32 products of int8 weights and int8 activations, the first 16 times `low`, the others times `high`, into
// some lanes of an accumulator.
struct Dot32 {
#if defined(__AVX2__)
  __m256 acc = _mm256_setzero_ps();

  QWEN3NEXT_FORCE_INLINE void add(const std::int8_t* w, const std::int8_t* x, float low, float high) noexcept {
    const __m256i wv = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i xv = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i absolute = _mm256_abs_epi8(wv), signed_x = _mm256_sign_epi8(xv, wv);  // w x = |w| (sign(w) x)
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), absolute, signed_x);
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
#elif defined(__ARM_FEATURE_DOTPROD)
  float32x4_t first = vdupq_n_f32(0), second = vdupq_n_f32(0);

  QWEN3NEXT_FORCE_INLINE void add(const std::int8_t* w, const std::int8_t* x, float low, float high) noexcept {
    const int32x4_t a = vdotq_s32(vdupq_n_s32(0), vld1q_s8(w), vld1q_s8(x));
    const int32x4_t b = vdotq_s32(vdupq_n_s32(0), vld1q_s8(w + 16), vld1q_s8(x + 16));
    first = vfmaq_n_f32(first, vcvtq_f32_s32(a), low);
    second = vfmaq_n_f32(second, vcvtq_f32_s32(b), high);
  }
  QWEN3NEXT_FORCE_INLINE float total() const noexcept { return vaddvq_f32(vaddq_f32(first, second)); }
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
