#pragma once
// The vector vocabulary of the kernels: xsimd's float and int batches of the widest register, with loads of partial
// and of 16-bit vectors, bit casts and sums, which xsimd lacks or spells differently from version to version.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12: false alarms inside avx512fintrin.h
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <xsimd/xsimd.hpp>

// x86 with integer vectors as wide as the float ones.  AVX alone has them half as wide: portable code serves it.
#if defined(__AVX2__) || (defined(__SSE2__) && !defined(__AVX__))
#define QWEN3NEXT_X86 1
#include <immintrin.h>
#else
#define QWEN3NEXT_X86 0
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "blocks/dtype.hpp"

#ifndef QWEN3NEXT_ISA
#define QWEN3NEXT_ISA native
#define QWEN3NEXT_KERNEL_UNIT kernel_unit  // ordinary inline functions
#define QWEN3NEXT_HEADER_ONLY_KERNELS 1
#else
#define QWEN3NEXT_KERNEL_UNIT  // an unnamed namespace: no symbol leaves the object
#define QWEN3NEXT_HEADER_ONLY_KERNELS 0
#endif

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

using F = xsimd::batch<float>;
using I = xsimd::batch<std::int32_t>;
constexpr int lanes = static_cast<int>(F::size);
static_assert(static_cast<int>(I::size) == lanes);

#define QWEN3NEXT_FORCE_INLINE inline __attribute__((always_inline))
#define QWEN3NEXT_FORCE_INLINE_LAMBDA __attribute__((always_inline))

QWEN3NEXT_FORCE_INLINE F load(const float* p) noexcept { return F::load_unaligned(p); }
QWEN3NEXT_FORCE_INLINE void store(float* p, F v) noexcept { v.store_unaligned(p); }
QWEN3NEXT_FORCE_INLINE I load(const std::int32_t* p) noexcept { return I::load_unaligned(p); }

// The first n < lanes values, the others 0.
QWEN3NEXT_FORCE_INLINE F load_part(const float* p, int n) noexcept {
  alignas(64) float buffer[lanes] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(float));
  return F::load_aligned(buffer);
}
QWEN3NEXT_FORCE_INLINE void store_part(float* p, F v, int n) noexcept {
  alignas(64) float buffer[lanes];
  v.store_aligned(buffer);
  std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(float));
}

QWEN3NEXT_FORCE_INLINE I as_ints(F v) noexcept { return __builtin_bit_cast(I, v); }
QWEN3NEXT_FORCE_INLINE F as_floats(I v) noexcept { return __builtin_bit_cast(F, v); }
QWEN3NEXT_FORCE_INLINE F to_floats(I v) noexcept { return xsimd::to_float(v); }

// a b + c.  xsimd has fused instructions for AVX2 alone; elsewhere version 8 multiplies, then adds.
QWEN3NEXT_FORCE_INLINE F mul_add(F a, F b, F c) noexcept {
#if defined(__AVX512F__)
  return F(_mm512_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
  return F(vfmaq_f32(c, a, b));
#else
  return xsimd::fma(a, b, c);
#endif
}

// To nearest, ties to even, for |v| < 2^22.
QWEN3NEXT_FORCE_INLINE I round_to_ints(F v) noexcept {
#if defined(__AVX512F__)
  return I(_mm512_cvtps_epi32(v));
#elif defined(__AVX2__)
  return I(_mm256_cvtps_epi32(v));
#elif QWEN3NEXT_X86
  return I(_mm_cvtps_epi32(v));
#elif defined(__aarch64__)
  return I(vcvtnq_s32_f32(v));
#else
  const F magic(12582912.0f);  // 1.5 * 2^23
  return as_ints(v + magic) - as_ints(magic);
#endif
}

// Sum and maximum of all lanes, as a balanced tree.
QWEN3NEXT_FORCE_INLINE float sum(F v) noexcept {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  alignas(64) float x[lanes];
  v.store_aligned(x);
  for (int n = lanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  }
  return x[0];
#endif
}
QWEN3NEXT_FORCE_INLINE float maximum(F v) noexcept {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  alignas(64) float x[lanes];
  v.store_aligned(x);
  for (int n = lanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  }
  return x[0];
#endif
}
// Bit i: a > b in lane i.
QWEN3NEXT_FORCE_INLINE unsigned lanes_above(F a, F b) noexcept {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
#elif QWEN3NEXT_X86
  return static_cast<unsigned>(_mm_movemask_ps(_mm_cmpgt_ps(a, b)));
#else
  if (!xsimd::any(a > b)) return 0;
  alignas(64) float x[lanes], y[lanes];
  a.store_aligned(x);
  b.store_aligned(y);
  unsigned bits = 0;
  for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(x[i] > y[i]) << i;
  return bits;
#endif
}
// out[t] = the sum of acc[t].  Four vectors at a time: two rounds of adding their interleaved halves.
template <int T>
QWEN3NEXT_FORCE_INLINE void store_sums(const F* acc, float* out) noexcept {
#if defined(__AVX512F__)
  if constexpr (T == 8) {
    __m512 four[2];  // per 128 bits: a part of each of four sums
    for (int i = 0; i < 2; ++i) {
      const __m512 a = acc[4 * i], b = acc[4 * i + 1], c = acc[4 * i + 2], d = acc[4 * i + 3];
      const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
      const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
      four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                              _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    }
    const __m512 eight =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    const __m512 both = _mm512_add_ps(eight, _mm512_shuffle_f32x4(eight, eight, 0xb1));
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_shuffle_f32x4(both, both, 0x08)));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (T % 4 == 0) {
    for (int i = 0; i < T; i += 4) {
      const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(acc[i], acc[i + 1]), _mm256_hadd_ps(acc[i + 2], acc[i + 3]));
      _mm_storeu_ps(out + i, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    }
    return;
  }
#elif defined(__aarch64__)
  if constexpr (T % 4 == 0) {
    for (int i = 0; i < T; i += 4)
      vst1q_f32(out + i, vpaddq_f32(vpaddq_f32(acc[i], acc[i + 1]), vpaddq_f32(acc[i + 2], acc[i + 3])));
    return;
  }
#endif
  for (int t = 0; t < T; ++t) out[t] = sum(acc[t]);
}
// Modulo 2^32: what is not a number became the lowest integer.
QWEN3NEXT_FORCE_INLINE std::uint32_t sum(I v) noexcept {
#if defined(__AVX512F__)
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1))));
#else
  alignas(64) std::int32_t x[lanes];
  v.store_aligned(x);
  std::uint32_t total = 0;
  for (int i = 0; i < lanes; ++i) total += static_cast<std::uint32_t>(x[i]);
  return total;
#endif
}
// The low bytes of all lanes.
QWEN3NEXT_FORCE_INLINE void store_bytes(std::int8_t* p, I v) noexcept {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
#else
  alignas(64) std::int32_t x[lanes];
  v.store_aligned(x);
  for (int i = 0; i < lanes; ++i) p[i] = static_cast<std::int8_t>(x[i]);
#endif
}

// A value of type T from any address.
template <class T>
QWEN3NEXT_FORCE_INLINE T peek(const void* p) noexcept {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// 16-bit floats.  Halves: shift exponent and fraction into place, then scale by 2^112, which also makes normal
// numbers of subnormal ones; exponent 31 (infinity, NaN) becomes 255.
QWEN3NEXT_FORCE_INLINE float half_to_float(std::uint16_t h) noexcept {
#if defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#elif defined(__aarch64__)
  return static_cast<float>(__builtin_bit_cast(__fp16, h));
#else
  const std::uint32_t magnitude = (h & 0x7fffu) << 13;
  float f = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  std::uint32_t bits = __builtin_bit_cast(std::uint32_t, f);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return __builtin_bit_cast(float, bits | (static_cast<std::uint32_t>(h & 0x8000u) << 16));
#endif
}
QWEN3NEXT_FORCE_INLINE std::uint16_t float_to_half(float f) noexcept {
#if defined(__F16C__)
  return static_cast<std::uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), _MM_FROUND_TO_NEAREST_INT)));
#elif defined(__aarch64__)
  return __builtin_bit_cast(std::uint16_t, static_cast<__fp16>(f));
#else
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, f), magnitude = bits & 0x7fffffffu;
  std::uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at 2^-24
    h = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(h | ((bits >> 16) & 0x8000u));
#endif
}

// A vector of n <= lanes stored values of a float type; n == lanes is the fast case.
template <DType type>
QWEN3NEXT_FORCE_INLINE F load_stored(const std::byte* p) noexcept {
  if constexpr (type == DType::f32) {
    return load(reinterpret_cast<const float*>(p));
  } else if constexpr (type == DType::bf16) {
#if defined(__AVX512F__)
    return as_floats(
        I(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16)));
#elif defined(__AVX2__)
    return as_floats(
        I(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16)));
#elif QWEN3NEXT_X86
    return as_floats(I(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__aarch64__)
    return F(vreinterpretq_f32_u32(vshll_n_u16(peek<uint16x4_t>(p), 16)));
#else
    alignas(64) std::uint32_t bits[lanes];
    std::uint16_t in[lanes];
    std::memcpy(in, p, sizeof in);
    for (int i = 0; i < lanes; ++i) bits[i] = static_cast<std::uint32_t>(in[i]) << 16;
    F out;
    std::memcpy(&out, bits, sizeof out);
    return out;
#endif
  } else {
#if defined(__AVX512F__)
    return F(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return F(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
    return F(vcvt_f32_f16(peek<float16x4_t>(p)));
#else
    alignas(64) float out[lanes];
    std::uint16_t in[lanes];
    std::memcpy(in, p, sizeof in);
    for (int i = 0; i < lanes; ++i) out[i] = half_to_float(in[i]);
    return F::load_aligned(out);
#endif
  }
}
template <DType type>
QWEN3NEXT_FORCE_INLINE F load_stored_part(const std::byte* p, int n) noexcept {
  constexpr std::size_t size = type == DType::f32 ? 4 : 2;
  alignas(64) std::byte buffer[lanes * size] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * size);
  return load_stored<type>(buffer);
}
template <DType type>
constexpr int stored_bytes = type == DType::f32 ? 4 : 2;

// `lanes` signed bytes from any address.
QWEN3NEXT_FORCE_INLINE F load_int8(const std::byte* p) noexcept {
#if defined(__AVX512F__)
  return F(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return F(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__SSE4_1__)
  return F(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(peek<std::int32_t>(p)))));
#else
  alignas(64) float out[lanes];
  for (int i = 0; i < lanes; ++i) out[i] = static_cast<float>(static_cast<std::int8_t>(p[i]));
  return F::load_aligned(out);
#endif
}

// exp(x) to about 1 ulp; 0 below -87.3, and no overflow above 88.3.  n = round(x / ln 2) falls out of the low bits of
// x / ln 2 + 1.5 * 2^23, r = x - n ln 2 in two steps, exp(r) by its Taylor polynomial (|r| < 0.35), times 2^n by
// adding n to the exponent.
QWEN3NEXT_FORCE_INLINE F exp(F x) noexcept {
  const F low(-87.3f);
  const F clamped = xsimd::min(xsimd::max(x, low), F(88.3f));
  const F magic(12582912.0f);
  const F shifted = mul_add(clamped, F(1.44269504f), magic);
  const F n = shifted - magic;
  F r = mul_add(n, F(-0.693359375f), clamped);
  r = mul_add(n, F(2.12194440e-4f), r);
  F p(1.0f / 5040);
  p = mul_add(p, r, F(1.0f / 720));
  p = mul_add(p, r, F(1.0f / 120));
  p = mul_add(p, r, F(1.0f / 24));
  p = mul_add(p, r, F(1.0f / 6));
  p = mul_add(p, r, F(0.5f));
  p = mul_add(p, r, F(1.0f));
  p = mul_add(p, r, F(1.0f));
  const F scaled = as_floats(as_ints(p) + (as_ints(shifted) << 23));
  return xsimd::select(x < low, F(0.0f), scaled);
}
QWEN3NEXT_FORCE_INLINE F sigmoid(F x) noexcept { return F(1.0f) / (F(1.0f) + exp(F(0.0f) - x)); }

// Calls f(i, n) for n = lanes at a time, then once for what is left.
template <class Function>
QWEN3NEXT_FORCE_INLINE void for_lanes(int n, Function f) noexcept {
  int i = 0;
  for (; i + lanes <= n; i += lanes) f(i, lanes);
  if (i < n) f(i, n - i);
}
QWEN3NEXT_FORCE_INLINE F load_some(const float* p, int n) noexcept { return n == lanes ? load(p) : load_part(p, n); }
QWEN3NEXT_FORCE_INLINE void store_some(float* p, F v, int n) noexcept {
  if (n == lanes)
    store(p, v);
  else
    store_part(p, v, n);
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls f(Count<n>, first token) for pieces of n tokens, 1 to 4, 5 (what a pass of guesses has) or `most`: the sums of
// so many find registers.
template <int most, class F>
QWEN3NEXT_FORCE_INLINE void in_pieces(int T, F f) noexcept {
  int t = 0;
  for (; T - t >= most; t += most) f(Count<most>{}, t);
  if constexpr (most > 4) {
    if (T - t >= 5) f(Count<5>{}, t), t += 5;
    if (T - t >= 4) f(Count<4>{}, t), t += 4;
  }
  if (T - t == 3) f(Count<3>{}, t);
  if (T - t == 2) f(Count<2>{}, t);
  if (T - t == 1) f(Count<1>{}, t);
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
