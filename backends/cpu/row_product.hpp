#pragma once
// Quantised activations, and their product with few rows of quantised weights: decode, straight from mapped pages.
//
// 256 columns of a row are unpacked to bytes in L1 (unpack.hpp); then a token costs, with AVX2, for 32 of them
//     1 vpmaddubsw and vpmaddwd, or vpdpbusd   1 conversion   1 multiply-add with a factor read from memory
// and for all 256 a product of 8 or 16 scales, and as many multiply-adds with minima.  Two sums, or the latency of one
// (4 cycles) would be what counts.  AVX-512 has a way of its own: row_product_avx512.hpp.

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

// 256 activations of a token.  By columns of a group: s is the scale d times their sum.
struct PlainOperand {
  alignas(64) std::int8_t x[256];
  float d[8], s_32[8], s_16[16];

  template <int group>
  QWEN3NEXT_FORCE_INLINE const float* s() const noexcept {
    return group == 32 ? s_32 : s_16;
  }
};
static_assert(sizeof(PlainOperand) == 384);

// Columns beyond n are zeros.
inline void make_plain_operand(const std::byte* row, int n, std::byte* operand) noexcept {
  const RowParts x = row_parts(row, n);
  auto* out = reinterpret_cast<PlainOperand*>(operand);
  for (int begin = 0; begin < n; begin += 256, ++out) {
    const int count = n - begin < 256 ? n - begin : 256;
    if (count < 256) *out = PlainOperand{};
    std::memcpy(out->x, x.q + begin, static_cast<std::size_t>(count));
    for (int b = 0; b < count / 32; ++b) {
      const int i = begin / 32 + b;
      out->d[b] = x.d[i];
      out->s_16[2 * b] = x.s[2 * i], out->s_16[2 * b + 1] = x.s[2 * i + 1];
      out->s_32[b] = x.s[2 * i] + x.s[2 * i + 1];
    }
  }
}

template <class Type, int T>
QWEN3NEXT_FORCE_INLINE void add_columns(const std::byte* p, const std::byte* const* x, std::ptrdiff_t at,
                                        RowSum* sum) noexcept {
  constexpr int groups = 256 / Type::group, blocks = 256 / Type::elements;
  alignas(64) std::int8_t unpacked[256];
  alignas(64) float scale[groups], min[groups];
  const std::int8_t* q = unpacked;
  if constexpr (Type::stored_at > 0)
    q = reinterpret_cast<const std::int8_t*>(p) + Type::stored_at;
  else
    unpack_levels<Type, blocks>(p, unpacked);
  Type::template scales<blocks>(p, scale, min);
  if constexpr (Type::zero != 0) {
    for (int g = 0; g < groups; ++g) min[g] = static_cast<float>(Type::zero) * scale[g];
  }
  const RowScales<Type::group> scales(scale);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const auto& in = *reinterpret_cast<const PlainOperand*>(x[t] + at);
    if constexpr (Type::has_min || Type::zero != 0) sum[t].template subtract<groups>(min, in.template s<Type::group>());
    sum[t].template add<Type::group, Type::wide, (Type::stored_at > 0 ? Type::bytes : 32)>(scales, in.d, q, in.x);
  }
}

// y[t, r] = w[r] . x[t] for any type and ISA.
template <class Type, int T>
void plain_rows(const std::byte* const* w, int rows, int n, const std::byte* const* x, float* y,
                std::ptrdiff_t y_stride) noexcept {
  constexpr int bytes = 256 / Type::elements * Type::bytes;
  for (int r = 0; r < rows; ++r) {
    const std::byte* p = w[r];
    RowSum sum[T];
    std::ptrdiff_t at = 0;
    for (int i = 256; i <= n; i += 256, p += bytes, at += sizeof(PlainOperand)) add_columns<Type, T>(p, x, at, sum);
    if constexpr (Type::elements < 256) {
      if (n % 256) {
        std::byte rest[bytes] = {};
        std::memcpy(rest, p, static_cast<std::size_t>(n % 256 / Type::elements * Type::bytes));
        add_columns<Type, T>(rest, x, at, sum);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) y[t * y_stride + r] = sum[t].total();
  }
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
