#pragma once
// Quantised activations, and their product with few rows of quantised weights: decode, straight from mapped pages.

#include "backends/cpu/int8_dot.hpp"
#include "backends/cpu/kernel_table.hpp"
#include "backends/cpu/unpack.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// Parts of a quantised row of n values; see kernel_table.hpp.
struct RowParts {
  const std::int8_t* q;
  const float* d;
  const float* s;
};
QWEN3NEXT_FORCE_INLINE RowParts row_parts(const std::byte* row, int n) noexcept {
  return {reinterpret_cast<const std::int8_t*>(row), reinterpret_cast<const float*>(row + n),
          reinterpret_cast<const float*>(row + n + n / 8)};
}

// q = round(x 127 / amax), ties to even, for every 32 values.
inline void quantize(const float* x, int n, std::byte* row) noexcept {
  auto* q = reinterpret_cast<std::int8_t*>(row);
  auto* d = reinterpret_cast<float*>(row + n);
  auto* s = reinterpret_cast<float*>(row + n + n / 8);
  for (int b = 0; b < n / 32; ++b, x += 32, q += 32) {
    F tops(0.0f);
    for (int i = 0; i < 32; i += lanes) tops = xsimd::max(tops, xsimd::abs(load(x + i)));
    const float amax = maximum(tops);
    d[b] = amax / 127;
    const F inverse(amax > 0 ? 127 / amax : 0);
    for (int part = 0; part < 2; ++part) {
      std::uint32_t total = 0;
      for (int i = 16 * part; i < 16 * part + 16; i += lanes) {
        const I rounded = round_to_ints(load(x + i) * inverse);
        total += sum(rounded);
        store_bytes(q + i, rounded);
      }
      s[2 * b + part] = d[b] * static_cast<float>(static_cast<std::int32_t>(total));
    }
  }
}

// y[t, r] = w[r] . x[t] for any type and ISA: a block is unpacked to int8 in L1, then multiplied 32 weights at a time.
template <class Type, int T>
void plain_rows(const std::byte* const* w, int rows, int n, const std::byte* const* operands, float* y,
                std::ptrdiff_t y_stride) noexcept {
  RowParts x[T];
  for (int t = 0; t < T; ++t) x[t] = row_parts(operands[t], n);
  for (int r = 0; r < rows; ++r) {
    const std::byte* p = w[r];
    Dot32 dot[T];
    float minima[T] = {};
    for (int i = 0; i < n; i += Type::elements, p += Type::bytes) {
      alignas(64) std::int8_t q[Type::elements];
      float scale[16], min[16];
      Type::unpack(p, q, scale, min);
      for (int j = 0; j < Type::elements; j += 32) {
        const int g = j / Type::group;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const float d = x[t].d[(i + j) / 32], *s = x[t].s + (i + j) / 16;
          dot[t].add(q + j, x[t].q + i + j, scale[g] * d, scale[g + (32 / Type::group - 1)] * d);
          if constexpr (Type::has_min && Type::group == 32) minima[t] += min[g] * (s[0] + s[1]);
          if constexpr (Type::has_min && Type::group == 16) minima[t] += min[g] * s[0] + min[g + 1] * s[1];
        }
      }
    }
    for (int t = 0; t < T; ++t) y[t * y_stride + r] = dot[t].total() - minima[t];
  }
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
