#pragma once
// Products of quantised weights with many rows of activations: prefill.
//
// A strip is `lanes` rows of weights, unpacked once for all tokens and interleaved so that a vector holds four
// neighbouring weights of every row; an activation is then broadcast, four values at a time, to all lanes:
//
//   strip, for each group of 16 or 32 columns:    i8 w[group/deep][lanes][deep]  f32 scale[lanes]  i32 start[lanes]
//                                                 (f32 -min[lanes] if the type has minima)
//   panel, for each block of 32 columns:          u8 x[32/deep][padded T][deep]  f32 d[T]  f32 s[T]
//
// deep = 4, but for AArch64's int8 matrix product (smmla), which multiplies 8 columns of 2 rows and of 2 tokens.
// Lanes are rows, so no sum runs across lanes, and T may be any number.  A group of 32 costs a token 8 dot
// instructions, one conversion, one product and one or two multiply-adds.  `start` takes off the panel_bias that
// x86 adds to activations.

#include "backends/cpu/int8_dot.hpp"
#include "backends/cpu/row_product.hpp"
#include "backends/cpu/unpack.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// Tokens of a panel: an int and a float accumulator each, of 32 or 16 registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int max_panel = 12;
#else
constexpr int max_panel = 4;
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int deep = 8;
#else
constexpr int deep = 4;
#endif
constexpr int padded(int T) noexcept { return deep == 8 ? (T + 1) / 2 * 2 : T; }  // its products are not used
constexpr int panel_block(int T) noexcept { return 32 * padded(T) + 8 * T; }

// Of the largest strip: groups of 16 with minima.
inline std::size_t strip_bytes(int n) noexcept { return static_cast<std::size_t>(n / 4 * 7 * lanes); }
inline std::size_t panel_bytes(int n, int T) noexcept { return static_cast<std::size_t>(n / 32 * panel_block(T)); }

inline void pack_panel(const std::byte* const* rows, int T, int n, std::byte* panel) noexcept {
  for (int t = 0; t < T; ++t) {
    const RowParts x = row_parts(rows[t], n);
    std::byte* block = panel;
    for (int b = 0; b < n / 32; ++b, block += panel_block(T)) {
      for (int k = 0; k < 32; k += 4) {
        const std::uint32_t four = peek<std::uint32_t>(x.q + 32 * b + k) ^ (panel_bias ? 0x80808080u : 0u);
        std::memcpy(block + deep * (k / deep * padded(T) + t) + k % deep, &four, 4);
      }
      const float s = x.s[2 * b] + x.s[2 * b + 1];
      std::byte* tail = block + 32 * padded(T) + 4 * t;
      std::memcpy(tail, x.d + b, 4);
      std::memcpy(tail + 4 * T, &s, 4);
    }
  }
}

// Rows [rows, lanes) of a strip that has fewer are copies of the first; their results are not stored.
template <class Type>
void pack_strip(const std::byte* const* w, int rows, int n, std::byte* strip) noexcept {
  constexpr int groups = Type::elements / Type::group, vector = 4 * lanes;
  constexpr int group_bytes = Type::group * lanes + (Type::has_min ? 3 : 2) * vector;
  for (int i = 0, block = 0; i < n; i += Type::elements, ++block) {
    for (int r = 0; r < lanes; ++r) {
      alignas(64) std::int8_t q[Type::elements];
      float scale[16], min[16];
      Type::unpack(w[r < rows ? r : 0] + block * Type::bytes, q, scale, min);
      std::byte* out = strip + deep * r;
      for (int g = 0; g < groups; ++g, out += group_bytes) {
        std::int32_t start = 0;
        for (int k = 0; k < Type::group; ++k) start -= panel_bias * q[g * Type::group + k];
        for (int k = 0; k < Type::group; k += deep) std::memcpy(out + k * lanes, q + g * Type::group + k, deep);
        std::byte* tail = out + Type::group * lanes - (deep - 4) * r;
        std::memcpy(tail, scale + g, 4);
        std::memcpy(tail + vector, &start, 4);
        if constexpr (Type::has_min) {
          const float negative = -min[g];
          std::memcpy(tail + 2 * vector, &negative, 4);
        }
      }
    }
    strip += groups * group_bytes;
  }
}

struct Ones {
  alignas(64) std::int8_t w[4 * lanes];
  constexpr Ones() noexcept : w{} {
    for (std::int8_t& one : w) one = 1;
  }
};
inline constexpr Ones ones{};

// The sum of 16 activations of a token, in all lanes: a panel has only those of 32.
template <int T>
QWEN3NEXT_FORCE_INLINE F sum16(const std::byte* x) noexcept {
  I sum(-16 * panel_bias);
#pragma GCC unroll 4
  for (int k = 0; k < 16; k += 4)
    sum = dot4<false>(sum, peek<std::int32_t>(x + k / deep * deep * padded(T) + k % deep), ones.w);
  return to_floats(sum);
}

// All that a product needs to know of a type once its blocks are unpacked; types of one form share its code.
template <int group_size, bool minima, bool wide_weights>
struct StripForm {
  static constexpr int group = group_size;
  static constexpr bool has_min = minima, wide = wide_weights;
};
template <class Type>
using FormOf = StripForm<Type::group, Type::has_min, Type::wide>;

// sums[t] lane r = start + the products of one group of columns of row r and token t.
template <class Form, int T>
QWEN3NEXT_FORCE_INLINE void multiply_group(const std::byte* strip, const std::byte* x, I start, I* sums) noexcept {
  const auto* w = reinterpret_cast<const std::int8_t*>(strip);
#if defined(__ARM_FEATURE_MATMUL_INT8)
  static_assert(lanes == 4 && panel_bias == 0);
  constexpr int pairs = padded(T) / 2;
  int32x4_t low[pairs], high[pairs];  // rows 0, 0, 1, 1 and 2, 2, 3, 3 of tokens 0, 1, 0, 1
#pragma GCC unroll 8
  for (int p = 0; p < pairs; ++p) low[p] = high[p] = vdupq_n_s32(0);
#pragma GCC unroll 4
  for (int k = 0; k < Form::group; k += deep) {
    const int8x16_t w01 = vld1q_s8(w + k * lanes), w23 = vld1q_s8(w + k * lanes + 16);
#pragma GCC unroll 8
    for (int p = 0; p < pairs; ++p) {
      const int8x16_t two = vld1q_s8(reinterpret_cast<const std::int8_t*>(x + k * padded(T) + 16 * p));
      low[p] = vmmlaq_s32(low[p], w01, two);
      high[p] = vmmlaq_s32(high[p], w23, two);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
    sums[t] = start + I(t % 2 ? vuzp2q_s32(low[t / 2], high[t / 2]) : vuzp1q_s32(low[t / 2], high[t / 2]));
#else
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sums[t] = start;
#pragma GCC unroll 8
  for (int k = 0; k < Form::group; k += deep) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      sums[t] = dot4<Form::wide>(sums[t], peek<std::int32_t>(x + k * T + 4 * t), w + k * lanes);
  }
#endif
}

template <class Form, int T>
void strip_tile(const std::byte* strip, int rows, int n, const std::byte* panel, float* y,
                std::ptrdiff_t y_stride) noexcept {
  constexpr int vector = 4 * lanes;
  F acc[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = F(0.0f);
  for (int b = 0; b < n / 32; ++b, panel += panel_block(T)) {
    const std::byte *d = panel + 32 * padded(T), *s = d + 4 * T;
    for (int half = 0; half < 32 / Form::group; ++half) {
      const std::byte* x = panel + half * Form::group * padded(T);
      I sums[T];
      multiply_group<Form, T>(strip, x,
                              load(reinterpret_cast<const std::int32_t*>(strip + Form::group * lanes + vector)), sums);
      const F scale = load(reinterpret_cast<const float*>(strip + Form::group * lanes));
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) acc[t] = mul_add(to_floats(sums[t]), scale * F(peek<float>(d + 4 * t)), acc[t]);
      if constexpr (Form::has_min) {
        const F min = load(reinterpret_cast<const float*>(strip + Form::group * lanes + 2 * vector));
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          if constexpr (Form::group == 32)
            acc[t] = mul_add(min, F(peek<float>(s + 4 * t)), acc[t]);
          else
            acc[t] = mul_add(min, F(peek<float>(d + 4 * t)) * sum16<T>(x + deep * t), acc[t]);
        }
      }
      strip += Form::group * lanes + (Form::has_min ? 3 : 2) * vector;
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store_some(y + t * y_stride, acc[t], rows);
}

// y[t, r] for one strip and one panel of 1 <= T <= max_panel tokens.
template <class Form, int T = max_panel>
void strip_product(const std::byte* strip, int rows, int n, const std::byte* panel, int tokens, float* y,
                   std::ptrdiff_t y_stride) noexcept {
  if constexpr (T > 0) {
    if (tokens == T)
      strip_tile<Form, T>(strip, rows, n, panel, y, y_stride);
    else
      strip_product<Form, T - 1>(strip, rows, n, panel, tokens, y, y_stride);
  }
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
