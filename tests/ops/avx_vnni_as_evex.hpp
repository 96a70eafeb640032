#pragma once
// Included before the kernels of avx2_vnni to test them on processors with AVX-512 VNNI but without AVX-VNNI: the same
// source and the same instruction, which such processors have in another encoding.

#include <immintrin.h>

static inline __m256i vpdpbusd_evex(__m256i sums, __m256i a, __m256i b) noexcept {
  __asm__("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(a), "x"(b));
  return sums;
}
#define _mm256_dpbusd_avx_epi32 vpdpbusd_evex
