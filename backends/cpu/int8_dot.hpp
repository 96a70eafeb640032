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

// Sums of products of weights and activations (-127..127), four in every lane.  `wide`: weights of all 8 bits, else
// they are 0..63.  x86 multiplies signed bytes with unsigned ones: w x = |w| (sign(w) x).  No sum of two saturates: at
// most 2 * 128 * 127 = 32512.
#if defined(__AVX2__)
template <bool wide>
QWEN3NEXT_FORCE_INLINE __m256i dot32(const std::int8_t* w, const std::int8_t* x) noexcept {
  __m256i wv = peek<__m256i>(w), xv = peek<__m256i>(x);
  if constexpr (wide) xv = _mm256_sign_epi8(xv, wv), wv = _mm256_abs_epi8(wv);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), wv, xv);
#elif defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), wv, xv);
#else
  return _mm256_madd_epi16(_mm256_maddubs_epi16(wv, xv), _mm256_set1_epi16(1));
#endif
}
#elif QWEN3NEXT_X86
template <bool wide>
QWEN3NEXT_FORCE_INLINE __m128i dot16(const std::int8_t* w, const std::int8_t* x) noexcept {
  __m128i wv = peek<__m128i>(w), xv = peek<__m128i>(x);
#if defined(__SSSE3__)
  if constexpr (wide) xv = _mm_sign_epi8(xv, wv), wv = _mm_abs_epi8(wv);
  return _mm_madd_epi16(_mm_maddubs_epi16(wv, xv), _mm_set1_epi16(1));
#else
  auto low = [](__m128i v) { return _mm_srai_epi16(_mm_unpacklo_epi8(v, v), 8); };
  auto high = [](__m128i v) { return _mm_srai_epi16(_mm_unpackhi_epi8(v, v), 8); };
  return _mm_add_epi32(_mm_madd_epi16(low(wv), low(xv)), _mm_madd_epi16(high(wv), high(xv)));
#endif
}
#elif defined(__aarch64__)
template <bool wide>
QWEN3NEXT_FORCE_INLINE int32x4_t dot16(const std::int8_t* w, const std::int8_t* x) noexcept {
  const int8x16_t wv = vld1q_s8(w), xv = vld1q_s8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(vdupq_n_s32(0), wv, xv);
#else
  return vpaddlq_s16(vmlal_high_s8(vmull_s8(vget_low_s8(wv), vget_low_s8(xv)), wv, xv));
#endif
}
#else
template <bool wide>
inline I dot16(const std::int8_t* w, const std::int8_t* x) noexcept {
  std::int32_t sums[lanes] = {};
  for (int i = 0; i < 16; ++i) sums[i % lanes] += w[i] * x[i];
  return load(sums);
}
#endif

// The product of a row and a token, 256 columns at a time, in the lanes of two accumulators: with one, the latency of
// its additions would be what counts.
#if defined(__AVX2__)
// Scales of 256 columns: vector i has those of columns [128 i, 128 i + 128), for the first and the second 16 of each 32
// in its halves, so that a shuffle within halves makes the factors of 32 columns.
template <int group>
struct RowScales {
  __m256 v[2];

  QWEN3NEXT_FORCE_INLINE explicit RowScales(const float* scale) noexcept {
    const __m256i halves = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if constexpr (group == 32)
        v[i] = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(scale + 4 * i));
      else
        v[i] = _mm256_permutevar8x32_ps(peek<__m256>(scale + 8 * i), halves);
    }
  }
};

struct RowSum {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};

  // += sum of scale d q x; d: of 32 columns; q: 32 of them every `stride` bytes
  template <int group, bool wide, int stride>
  QWEN3NEXT_FORCE_INLINE void add(const RowScales<group>& scale, const float* d, const std::int8_t* q,
                                  const std::int8_t* x) noexcept {
    auto four = [&](auto i) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      constexpr int b = 4 * decltype(i)::value;
      const __m256 f = _mm256_mul_ps(scale.v[b / 4], _mm256_broadcast_ps(reinterpret_cast<const __m128*>(d + b)));
      auto one = [&](int j, __m256 factors) QWEN3NEXT_FORCE_INLINE_LAMBDA {
        const __m256i products = dot32<wide>(q + stride * (b + j), x + 32 * (b + j));
        acc[j % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factors, acc[j % 2]);
      };
      one(0, _mm256_permute_ps(f, 0x00));
      one(1, _mm256_permute_ps(f, 0x55));
      one(2, _mm256_permute_ps(f, 0xaa));
      one(3, _mm256_permute_ps(f, 0xff));
    };
    four(Count<0>{});
    four(Count<1>{});
  }
  // -= the sum of a[i] b[i]
  template <int n>
  QWEN3NEXT_FORCE_INLINE void subtract(const float* a, const float* b) noexcept {
#pragma GCC unroll 2
    for (int i = 0; i < n; i += 8) acc[1] = _mm256_fnmadd_ps(peek<__m256>(a + i), peek<__m256>(b + i), acc[1]);
  }
  QWEN3NEXT_FORCE_INLINE float total() const noexcept {
    const __m256 both = _mm256_add_ps(acc[0], acc[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};
#else
template <int group>
struct RowScales {
  const float* scale;
  QWEN3NEXT_FORCE_INLINE explicit RowScales(const float* s) noexcept : scale(s) {}
};

struct RowSum {
  F acc[2] = {F(0.0f), F(0.0f)};  // braces would be a list of lanes

  template <int group, bool wide, int stride>
  QWEN3NEXT_FORCE_INLINE void add(const RowScales<group>& scale, const float* d, const std::int8_t* q,
                                  const std::int8_t* x) noexcept {
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b, q += stride, x += 32) {
      const I low(dot16<wide>(q, x)), high(dot16<wide>(q + 16, x + 16));
      if constexpr (group == 32) {
        acc[b % 2] = mul_add(to_floats(low + high), F(scale.scale[b] * d[b]), acc[b % 2]);
      } else {
        acc[0] = mul_add(to_floats(low), F(scale.scale[2 * b] * d[b]), acc[0]);
        acc[1] = mul_add(to_floats(high), F(scale.scale[2 * b + 1] * d[b]), acc[1]);
      }
    }
  }
  template <int n>
  QWEN3NEXT_FORCE_INLINE void subtract(const float* a, const float* b) noexcept {
    for (int i = 0; i < n; i += lanes) acc[1] -= load(a + i) * load(b + i);
  }
  QWEN3NEXT_FORCE_INLINE float total() const noexcept { return sum(acc[0] + acc[1]); }
};
#endif

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
