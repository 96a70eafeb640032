#pragma once
// What a set of kernels offers: plain functions on raw memory, one table per instruction set.
//
// This header is seen by code compiled for different instruction sets, so it must stay free of inline functions.

#include <cstddef>
#include <cstdint>

#include "blocks/dtype.hpp"

namespace qwen3next::cpu {

inline constexpr std::size_t dtype_count = dtype_table.size();

// A row of n activations as int8, in blocks of 32 (n is a multiple of 32), lies in one piece of 1.375 n bytes:
//   i8 q[n]     -127..127;  x[i] = d[i / 32] q[i]
//   f32 d[n/32]  amax / 127 of each block
//   f32 s[n/16]  d * the sum of 16 q: what the minimum of a block of weights is multiplied with
constexpr std::size_t quantized_row_bytes(int n) noexcept { return static_cast<std::size_t>(n / 8 * 11); }

// Memory that will be read next, if any.
struct Soon {
  const std::byte* data;
  std::size_t bytes;
};

inline constexpr int max_row_tokens = 8;  // of Kernels::row_tokens

// A strip of weights for prefill holds `lanes` rows of one matrix, unpacked and interleaved; a panel holds up to
// `max_panel` rows of activations, interleaved likewise.  See strip_product.hpp.
struct Kernels {
  const char* name;
  int lanes;
  int max_panel;

  // Multiply-adds at the processor's limit, out of registers, for a few microseconds; returns how many they were.  The
  // sum of the results goes to `sink`.  See peak.hpp.
  std::int64_t (*integer_peak)(float* sink) noexcept;
  std::int64_t (*floating_peak)(float* sink) noexcept;

  // --- products with float weights: y[t, r] = w[r] . x[t], for rows at any address.  See float_product.hpp.
  using FloatProduct = void (*)(const std::byte* const* w, int rows, const float* x, std::ptrdiff_t x_stride, int T,
                                int n, float* y, std::ptrdiff_t y_stride) noexcept;
  FloatProduct float_product[3];  // by DType: f32, f16, bf16

  // --- F8_E4M3 weights: `factors` is one for every 128 columns, f32 or bf16 at any address, or null: all 1.
  void (*f8_product)(const std::byte* const* w, const std::byte* const* factors, DType factor_type, int rows, int n,
                     const float* x, std::ptrdiff_t x_stride, int T, float* y,
                     std::ptrdiff_t y_stride) noexcept;  // y[t, r] = w[r] . x[t]
  void (*dequantize_f8)(const std::byte* row, const std::byte* factors, DType factor_type, int n, float* out) noexcept;

  // --- products with quantised weights.
  void (*quantize)(const float* x, int n, std::byte* row) noexcept;
  // Decode: y[t, r] = w[r] . x[t] for up to `row_tokens` tokens; with more, strips are faster.  An operand x[t] is a
  // quantised row in the order in which the kernels want it.
  int row_tokens;
  std::size_t (*operand_bytes)(int n) noexcept;
  void (*make_operand)(const std::byte* row, int n, std::byte* operand) noexcept;  // 128-aligned
  using RowProduct = void (*)(const std::byte* const* w, int rows, int n, const std::byte* const* x, int T, float* y,
                              std::ptrdiff_t y_stride) noexcept;
  RowProduct row_product[dtype_count];  // null for float types
  std::uint32_t quantised_types;        // bit i: DType i has products (pointers can't be asked under sanitizers)
  // Prefill.
  std::size_t (*strip_bytes)(int n) noexcept;
  std::size_t (*panel_bytes)(int n, int T) noexcept;
  void (*pack_panel)(const std::byte* const* rows, int T, int n, std::byte* panel) noexcept;
  using PackStrip = void (*)(const std::byte* const* w, int rows, int n, std::byte* strip) noexcept;
  PackStrip pack_strip[dtype_count];
  // Meanwhile fetches `soon` to the second cache.
  using StripProduct = void (*)(const std::byte* strip, int rows, int n, const std::byte* panel, int T, float* y,
                                std::ptrdiff_t y_stride, const Soon& soon) noexcept;
  StripProduct strip_product[dtype_count];

  // --- rows of any type as floats.
  void (*dequantize)(DType type, const std::byte* row, int n, float* out) noexcept;

  // --- elementwise; see elementwise.hpp.
  void (*rms_norm)(float* out, const float* x, const float* weight, int n, float eps) noexcept;
  void (*l2_norm)(float* out, const float* x, int n, float scale) noexcept;
  void (*gated_rms_norm)(float* out, const float* o, const float* z, const float* weight, int n, float eps) noexcept;
  void (*swiglu)(float* out, const float* gate, const float* up, int n) noexcept;
  void (*sigmoid_gate)(float* x, const float* gate, int n) noexcept;
  void (*delta_gates)(float* beta, float* g, const float* b, const float* a, const float* A, const float* dt_bias,
                      int n) noexcept;
  void (*add)(float* x, const float* y, float scale, int n) noexcept;  // x += scale y
  void (*rope)(float* head, const float* cos, const float* sin, int n) noexcept;
  float (*sigmoid)(float x) noexcept;
  void (*softmax)(float* x, int n) noexcept;
  void (*top_k)(const float* p, int n, int k, std::int32_t* ids, float* values) noexcept;

  // --- the mixers.
  // Tokens [first, first + count) of x; `past` are the K - 1 rows before token 0.  All at the first of n channels.
  struct Conv {
    const float *x, *past, *taps;  // [T, x_stride], [K - 1, past_stride], [n, K]
    float* out;                    // [T, out_stride]
    std::ptrdiff_t x_stride, past_stride, out_stride;
    int first, count, n, K;
  };
  void (*causal_conv1d)(const Conv& conv) noexcept;

  // The value heads that share a key head, or some of them, T tokens.  S [heads, Dv, Dk].  See delta_rule.hpp.
  // delta_recurrent only: `past.T` tokens before them enter S first; T may be 0 then.  If `tentative`, the T tokens do
  // not enter S.
  struct DeltaPast {
    const float *k, *v, *beta, *g;
    std::ptrdiff_t stride, gate_stride;  // of k and v, as they come from the convolution; of the gates
    int T;
  };
  struct DeltaHeads {
    const float *q, *k;     // [T, qk_stride], as they come from the convolution
    const float* v;         // [T, v_stride], heads Dv apart
    const float *beta, *g;  // [T, gate_stride], heads side by side
    float* out;             // [T, out_stride], heads Dv apart
    std::ptrdiff_t qk_stride, v_stride, gate_stride, out_stride;
    float* S;
    int heads, T, Dk, Dv;
    DeltaPast past;
    bool tentative;
  };
  std::size_t (*delta_scratch)(int heads, int Dk, int Dv) noexcept;  // floats
  void (*delta_recurrent)(const DeltaHeads& heads, float* scratch) noexcept;
  void (*delta_chunked)(const DeltaHeads& heads, float* scratch) noexcept;

  void (*store_kv)(DType type, const float* row, int n, std::byte* out) noexcept;
  // Queries of one KV head that see the same blocks of positions, and what is known of their softmax so far; laid out
  // by attention_start in attention_space() floats.  See attention_block.hpp.
  struct AttentionRows {
    int queries, D;
    int columns;            // queries and padding
    float* query;           // multiplied with log2(e) / sqrt(D)
    float* sum;             // [queries, D]  of 2^(score - top) value
    float *total, *top;     // [columns]     of 2^(score - top); the largest score
    std::int32_t* visible;  // [columns]     positions of the next block that the query sees
    float* scores;          // [block, columns]
    float* expanded;        // [block, D]    keys or values
  };
  struct AttentionBlock {
    DType type;
    int n;
    const std::byte *keys, *values;  // n rows, row_bytes apart
    std::ptrdiff_t row_bytes;
    const std::byte* next;  // keys of the next block, to be fetched meanwhile, or null
  };
  std::size_t (*attention_space)(int queries, int D, int block, DType type) noexcept;
  void (*attention_start)(AttentionRows& a, float* space, int block, const float* const* q) noexcept;
  void (*attention_block)(const AttentionRows& a, const AttentionBlock& b) noexcept;
  void (*scale_row)(float* x, float scale, int n) noexcept;
};

}  // namespace qwen3next::cpu
