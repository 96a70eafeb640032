#pragma once
// Strips of 8 rows with AVX2: rows are unpacked to bytes, then 32 columns of all of them transposed at a time, 24
// shuffles.

#include "backends/cpu/strip_product.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

#if defined(__AVX2__) && !defined(__AVX512F__)
#define QWEN3NEXT_TRANSPOSED_BY_8 1

// v[i] dword j <-> v[j] dword i.
QWEN3NEXT_FORCE_INLINE void transpose8(__m256i* v) noexcept {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  // b[4 g + j]: rows 4 g .. 4 g + 3 of columns j and 4 + j, one in each half
#pragma GCC unroll 2
  for (int g = 0; g < 8; g += 4) {
    b[g] = _mm256_unpacklo_epi64(a[g], a[g + 2]);
    b[g + 1] = _mm256_unpackhi_epi64(a[g], a[g + 2]);
    b[g + 2] = _mm256_unpacklo_epi64(a[g + 1], a[g + 3]);
    b[g + 3] = _mm256_unpackhi_epi64(a[g + 1], a[g + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x20);
    v[4 + j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x31);
  }
}

// One block of 8 rows, `block` bytes into each.
template <class Type>
QWEN3NEXT_FORCE_INLINE void pack_block(const std::byte* const* row, std::ptrdiff_t block, std::byte* out) noexcept {
  using Group = StripGroup<Type>;
  constexpr int columns = Type::elements, groups = columns / Type::group, padded_groups = (groups + 7) / 8 * 8;
  alignas(64) std::int8_t q[8][columns];
  alignas(32) float scale[8][padded_groups], min[8][padded_groups];
  for (int r = 0; r < 8; ++r) unpack<Type>(row[r] + block, q[r], scale[r], min[r]);

  const __m256i zero = _mm256_set1_epi8(Type::zero);
#pragma GCC unroll 2
  for (int c = 0; c < columns; c += 32) {
    __m256i v[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) v[r] = _mm256_sub_epi8(peek<__m256i>(q[r] + c), zero);
    transpose8(v);
    constexpr int each = Type::group / 4;  // vectors of a group
#pragma GCC unroll 2
    for (int k = 0; k < 8; k += each) {
      std::byte* group = out + (c + 4 * k) / Type::group * Group::bytes;
      __m256i sums = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int i = k; i < k + each; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(group + (i - k) * Group::vector), v[i]);
        const __m256i twos = _mm256_maddubs_epi16(_mm256_set1_epi8(1), v[i]);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(twos, _mm256_set1_epi16(-panel_bias)));
      }
      if constexpr (panel_bias != 0) _mm256_storeu_si256(reinterpret_cast<__m256i*>(group + Group::start), sums);
    }
  }
  // values[row][group] to the groups of the strip, at `offset`
  auto put = [&](const float(*values)[padded_groups], std::ptrdiff_t offset, __m256 sign)
                 QWEN3NEXT_FORCE_INLINE_LAMBDA {
                   for (int g = 0; g < groups; g += 8) {
                     __m256i v[8];
#pragma GCC unroll 8
                     for (int r = 0; r < 8; ++r) v[r] = peek<__m256i>(values[r] + g);
                     transpose8(v);
                     constexpr int count = groups < 8 ? groups : 8;
#pragma GCC unroll 8
                     for (int i = 0; i < count; ++i) {
                       _mm256_storeu_ps(reinterpret_cast<float*>(out + (g + i) * Group::bytes + offset),
                                        _mm256_xor_ps(_mm256_castsi256_ps(v[i]), sign));
                     }
                   }
                 };
  put(scale, Group::scale, _mm256_setzero_ps());
  if constexpr (Type::has_min) put(min, Group::min, _mm256_set1_ps(-0.0f));
}

template <class Type>
void pack_strip_by_8(const std::byte* const* w, int rows, int n, std::byte* strip) noexcept {
  const std::byte* row[8];
  for (int r = 0; r < 8; ++r) row[r] = w[r < rows ? r : 0];
  const std::ptrdiff_t row_bytes = n / Type::elements * Type::bytes;
  for (std::ptrdiff_t block = 0; block < row_bytes; block += Type::bytes) {
    pack_block<Type>(row, block, strip);
    strip += Type::elements / Type::group * StripGroup<Type>::bytes;
  }
}

#else
#define QWEN3NEXT_TRANSPOSED_BY_8 0
#endif

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
