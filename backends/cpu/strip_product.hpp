#pragma once
// Products of quantised weights with many rows of activations: prefill.
//
// A strip is `lanes` rows of weights, unpacked once for all tokens and interleaved so that a vector holds four
// neighbouring weights of every row; an activation is then broadcast, four values at a time, to all lanes:
//
//   strip, for each group of 16 or 32 columns:    i8 w[group/deep][lanes][deep]  f32 scale[lanes]  i32 start[lanes]
//                                                 (f32 -min[lanes] if the type has minima)
//   panel, for each block of 32 columns:          u8 x[32/deep][padded T][deep]  f32 d[T]  f32 s[T]  f32 s16[T]
//
// deep = 4, but for AArch64's int8 matrix product (smmla), which multiplies 8 columns of 2 rows and of 2 tokens; AMX
// has panels of its own (strip_product_amx.hpp).  Lanes are rows, so no sum runs across lanes, and T may be any number.
// A group of 32 costs a token 8 dot instructions, one conversion, one product and one or two multiply-adds: 11 cycles
// on Zen 4 (all but the conversion on two half-wide units) for 512 products.  `start` takes off the panel_bias that x86
// adds to activations.  s is d times the sum of 32 activations, s16 of the first 16: minima are multiplied with them.

#include "backends/cpu/int8_dot.hpp"
#include "backends/cpu/row_product.hpp"
#include "backends/cpu/unpack.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// Tokens of a panel: an int and a float accumulator each, of 32 or 16 registers; the rows of a tile.
#if QWEN3NEXT_TILES
constexpr int max_panel = 16;
#elif defined(__AVX512F__) || defined(__aarch64__)
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
constexpr int panel_block(int T) noexcept { return 32 * padded(T) + 12 * T; }

// Where the parts of a group lie in a strip, in bytes.  Without panel_bias nothing is to be taken off: no `start`.
template <class Form>
struct StripGroup {
  static constexpr int vector = 4 * lanes, scale = Form::group * lanes, start = scale + vector;
  static constexpr int min = start + (panel_bias ? vector : 0), bytes = min + (Form::has_min ? vector : 0);
};

// Of the largest strip: groups of 16 with minima.
inline std::size_t strip_bytes(int n) noexcept { return static_cast<std::size_t>(n / 4 * 7 * lanes); }
inline std::size_t panel_bytes(int n, int T) noexcept { return static_cast<std::size_t>(n / 32 * panel_block(T)); }

// d, s and s16 of block b of one token.
QWEN3NEXT_FORCE_INLINE void pack_panel_tail(const RowParts& x, int b, std::byte* tail, int T) noexcept {
  const float s = x.s[2 * b] + x.s[2 * b + 1];
  std::memcpy(tail, x.d + b, 4);
  std::memcpy(tail + 4 * T, &s, 4);
  std::memcpy(tail + 8 * T, x.s + 2 * b, 4);
}

#if !QWEN3NEXT_TILES
inline void pack_panel(const std::byte* const* rows, int T, int n, std::byte* panel) noexcept {
  for (int t = 0; t < T; ++t) {
    const RowParts x = row_parts(rows[t], n);
    std::byte* block = panel;
    for (int b = 0; b < n / 32; ++b, block += panel_block(T)) {
      for (int k = 0; k < 32; k += 4) {
        const std::uint32_t four = peek<std::uint32_t>(x.q + 32 * b + k) ^ (panel_bias ? 0x80808080u : 0u);
        std::memcpy(block + deep * (k / deep * padded(T) + t) + k % deep, &four, 4);
      }
      pack_panel_tail(x, b, block + 32 * padded(T) + 4 * t, T);
    }
  }
}

#endif

// Rows [rows, lanes) of a strip that has fewer are copies of the first; their results are not stored.
template <class Type>
void pack_strip(const std::byte* const* w, int rows, int n, std::byte* strip) noexcept {
  using Group = StripGroup<Type>;
  constexpr int groups = Type::elements / Type::group;
  for (int i = 0, block = 0; i < n; i += Type::elements, ++block) {
    for (int r = 0; r < lanes; ++r) {
      alignas(64) std::int8_t q[Type::elements];
      float scale[16], min[16];
      unpack<Type>(w[r < rows ? r : 0] + block * Type::bytes, q, scale, min);
      if constexpr (Type::zero != 0) {
        for (auto& level : q) level = static_cast<std::int8_t>(level - Type::zero);
      }
      std::byte* out = strip;
      for (int g = 0; g < groups; ++g, out += Group::bytes) {
        for (int k = 0; k < Type::group; k += deep)
          std::memcpy(out + k * lanes + deep * r, q + g * Type::group + k, deep);
        std::memcpy(out + Group::scale + 4 * r, scale + g, 4);
        if constexpr (panel_bias != 0) {
          std::int32_t start = 0;
          for (int k = 0; k < Type::group; ++k) start -= panel_bias * q[g * Type::group + k];
          std::memcpy(out + Group::start + 4 * r, &start, 4);
        }
        if constexpr (Type::has_min) {
          const float negative = -min[g];
          std::memcpy(out + Group::min + 4 * r, &negative, 4);
        }
      }
    }
    strip += groups * Group::bytes;
  }
}

// All that a product needs to know of a type once its blocks are unpacked; types of one form share its code.
template <int group_size, bool minima, bool wide_weights>
struct StripForm {
  static constexpr int group = group_size;
  static constexpr bool has_min = minima, wide = wide_weights;
};
template <class Type>
using FormOf = StripForm<Type::group, Type::has_min, Type::wide>;

// The sum of token t's activations that a group's minimum is multiplied with, in all lanes.
template <class Form>
QWEN3NEXT_FORCE_INLINE F panel_sum(const std::byte* s, int T, int t, int half) noexcept {
  const F all(peek<float>(s + 4 * t));
  if constexpr (Form::group == 32) return all;
  const F first(peek<float>(s + 4 * T + 4 * t));
  return half == 0 ? first : all - first;
}

// acc[t] += scale d[t] sum(t) - min s[t]: one group of columns, `tail` the d of its panel block.
template <class Form, int T, class Sum>
QWEN3NEXT_FORCE_INLINE void add_group(const std::byte* strip, const std::byte* tail, int half, Sum sum,
                                      F* acc) noexcept {
  using Group = StripGroup<Form>;
  const F scale = load(reinterpret_cast<const float*>(strip + Group::scale));
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = mul_add(to_floats(sum(t)), scale * F(peek<float>(tail + 4 * t)), acc[t]);
  if constexpr (Form::has_min) {
    const F min = load(reinterpret_cast<const float*>(strip + Group::min));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] = mul_add(min, panel_sum<Form>(tail + 4 * T, T, t, half), acc[t]);
  }
}

// Fetches memory to the second cache in equal steps, while computing leaves the bus idle.
class Prefetch {
 public:
  QWEN3NEXT_FORCE_INLINE Prefetch(const Soon& soon, int steps) noexcept
      : at_(reinterpret_cast<const char*>(soon.data)), end_(at_ + soon.bytes) {
    step_ = (static_cast<std::ptrdiff_t>(soon.bytes) / steps + 63) / 64 * 64;
  }
  QWEN3NEXT_FORCE_INLINE void step() noexcept {
    for (const char* stop = at_ + step_; at_ < stop && at_ < end_; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  std::ptrdiff_t step_;
};

#if !QWEN3NEXT_TILES
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
void strip_tile(const std::byte* strip, int rows, int n, const std::byte* panel, float* y, std::ptrdiff_t y_stride,
                const Soon& soon) noexcept {
  using Group = StripGroup<Form>;
  Prefetch prefetch(soon, n / 32);
  F acc[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = F(0.0f);
  for (int b = 0; b < n / 32; ++b, panel += panel_block(T)) {
    prefetch.step();
    for (int half = 0; half < 32 / Form::group; ++half, strip += Group::bytes) {
      const I start = panel_bias ? load(reinterpret_cast<const std::int32_t*>(strip + Group::start)) : I(0);
      I sums[T];
      multiply_group<Form, T>(strip, panel + half * Form::group * padded(T), start, sums);
      add_group<Form, T>(
          strip, panel + 32 * padded(T), half, [&](int t) QWEN3NEXT_FORCE_INLINE_LAMBDA { return sums[t]; }, acc);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store_some(y + t * y_stride, acc[t], rows);
}
#else
template <class Form, int T>
void strip_tile(const std::byte* strip, int rows, int n, const std::byte* panel, float* y, std::ptrdiff_t y_stride,
                const Soon& soon) noexcept;  // strip_product_amx.hpp
#endif

// y[t, r] for one strip and one panel of 1 <= T <= max_panel tokens.
template <class Form, int T = max_panel>
void strip_product(const std::byte* strip, int rows, int n, const std::byte* panel, int tokens, float* y,
                   std::ptrdiff_t y_stride, const Soon& soon) noexcept {
  if constexpr (T > 0) {
    if (tokens == T)
      strip_tile<Form, T>(strip, rows, n, panel, y, y_stride, soon);
    else
      strip_product<Form, T - 1>(strip, rows, n, panel, tokens, y, y_stride, soon);
  }
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
