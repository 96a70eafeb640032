#pragma once
// Matrix products in fp32 with matrices stored as f32, f16 or bf16.
//
// Two shapes serve everything: rows times rows (y = x W^T: linear layers, q k^T, products with the delta state) and
// weighted sums of rows (c += a b: softmax times values, updates of the delta state).  Each output element is summed
// in one accumulator in ascending order, so it does not depend on the tile that it falls into.

#include "backends/cpu/simd.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// AVX-512 and NEON have 32 registers, the others 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int product_rows = 4, product_tokens = 6, sum_rows = 8;
#else
constexpr int product_rows = 3, product_tokens = 4, sum_rows = 4;
#endif

// y[t, r] = w[r] . x[t] for R rows and T tokens: R T accumulators, R + 1 loads for R T multiply-adds.
template <DType type, int R, int T>
void product_tile(const std::byte* const* w, const float* x, std::ptrdiff_t x_stride, int n, float* y,
                  std::ptrdiff_t y_stride) noexcept {
  F acc[T][R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[t][r] = F(0.0f);
  }
  auto step = [&](auto load_w, auto load_x) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    F row[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) row[r] = load_w(r);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const F xt = load_x(t);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[t][r] = mul_add(row[r], xt, acc[t][r]);
    }
  };
  int i = 0;
  for (; i + lanes <= n; i += lanes) {
    step([&](int r) QWEN3NEXT_FORCE_INLINE_LAMBDA { return load_stored<type>(w[r] + i * stored_bytes<type>); },
         [&](int t) QWEN3NEXT_FORCE_INLINE_LAMBDA { return load(x + t * x_stride + i); });
  }
  if (i < n) {
    step([&](int r) { return load_stored_part<type>(w[r] + i * stored_bytes<type>, n - i); },
         [&](int t) { return load_part(x + t * x_stride + i, n - i); });
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) y[t * y_stride + r] = sum(acc[t][r]);
  }
}

// The tokens that are left after whole tiles: 1 <= T < product_tokens.
template <DType type, int R, int T>
void product_rest(const std::byte* const* w, const float* x, std::ptrdiff_t x_stride, int tokens, int n, float* y,
                  std::ptrdiff_t y_stride) noexcept {
  if constexpr (T > 0) {
    if (tokens == T)
      product_tile<type, R, T>(w, x, x_stride, n, y, y_stride);
    else
      product_rest<type, R, T - 1>(w, x, x_stride, tokens, n, y, y_stride);
  }
}

template <DType type, int R>
void product_rows_of(const std::byte* const* w, const float* x, std::ptrdiff_t x_stride, int T, int n, float* y,
                     std::ptrdiff_t y_stride) noexcept {
  int t = 0;
  for (; t + product_tokens <= T; t += product_tokens)
    product_tile<type, R, product_tokens>(w, x + t * x_stride, x_stride, n, y + t * y_stride, y_stride);
  product_rest<type, R, product_tokens - 1>(w, x + t * x_stride, x_stride, T - t, n, y + t * y_stride, y_stride);
}

// y[t, r] = w[r] . x[t];  w: `rows` pointers to rows of n stored values at any address.
template <DType type>
void float_product(const std::byte* const* w, int rows, const float* x, std::ptrdiff_t x_stride, int T, int n, float* y,
                   std::ptrdiff_t y_stride) noexcept {
  int r = 0;
  if (T == 1) {  // eight rows hide the latency of the multiply-add
    for (; r + 8 <= rows; r += 8) product_tile<type, 8, 1>(w + r, x, x_stride, n, y + r, y_stride);
  }
  for (; r + product_rows <= rows; r += product_rows)
    product_rows_of<type, product_rows>(w + r, x, x_stride, T, n, y + r, y_stride);
  for (; r < rows; ++r) product_rows_of<type, 1>(w + r, x, x_stride, T, n, y + r, y_stride);
}

// Columns [j, j + n) of a stored row, n <= lanes; n == lanes is the fast case.  q8_0: n == lanes, of one block.
template <DType type>
QWEN3NEXT_FORCE_INLINE F load_columns(const std::byte* row, int j, int n) noexcept {
  if constexpr (type == DType::q8_0) {
    const std::byte* block = row + j / 32 * 34;
    return F(half_to_float(peek<std::uint16_t>(block))) * load_int8(block + 2 + j % 32);
  } else {
    const std::byte* p = row + j * stored_bytes<type>;
    return n == lanes ? load_stored<type>(p) : load_stored_part<type>(p, n);
  }
}
template <DType type>
QWEN3NEXT_FORCE_INLINE std::ptrdiff_t column_bytes(int j) noexcept {
  return type == DType::q8_0 ? j / 32 * 34 + j % 32 : static_cast<std::ptrdiff_t>(j) * stored_bytes<type>;
}

// c[m, j..] = scale c[m, j..] + sum_k a[m, k] b[k, j..] for M rows and V vectors of columns: V loads and M broadcasts
// for M V multiply-adds.  scale == 0 ignores what c was.  `ahead`: fetches a line of each row of `next`, which lie as
// b's.
template <DType type, int M, int V, bool whole, bool ahead>
void sum_tile(float scale, float* c, std::ptrdiff_t c_stride, const float* a, std::ptrdiff_t am, std::ptrdiff_t ak,
              const std::byte* b, std::ptrdiff_t b_bytes, int K, int j, int part, const std::byte* next) noexcept {
  if (whole) part = lanes;
  c += j;
  F acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      acc[m][v] = scale == 0 ? F(0.0f) : F(scale) * load_some(c + m * c_stride + v * lanes, part);
  }
  next += column_bytes<type>(j);
  for (int k = 0; k < K; ++k, b += b_bytes, a += ak) {
    if constexpr (ahead) {
      __builtin_prefetch(next, 0, 2);
      next += b_bytes;
    }
    F row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) row[v] = load_columns<type>(b, j + v * lanes, part);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const F factor(a[m * am]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = mul_add(factor, row[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store_some(c + m * c_stride + v * lanes, acc[m][v], part);
  }
}

template <DType type, int M, bool ahead>
void sum_rows_of(float scale, float* c, std::ptrdiff_t c_stride, int N, const float* a, std::ptrdiff_t am,
                 std::ptrdiff_t ak, const std::byte* b, std::ptrdiff_t b_bytes, int K, const std::byte* next) noexcept {
  int j = 0;
  auto columns = [&](auto tile) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    tile(scale, c, c_stride, a, am, ak, b, b_bytes, K, j, N - j, next);
  };
  for (; j + 2 * lanes <= N; j += 2 * lanes) columns(sum_tile<type, M, 2, true, ahead>);
  for (; j + lanes <= N; j += lanes) columns(sum_tile<type, M, 1, true, ahead>);
  if (j < N) columns(sum_tile<type, M, 1, false, ahead>);
}

template <DType type, bool ahead = false>
void weighted_sum(float scale, float* c, std::ptrdiff_t c_stride, int M, int N, const float* a, std::ptrdiff_t am,
                  std::ptrdiff_t ak, const std::byte* b, std::ptrdiff_t b_bytes, int K,
                  const std::byte* next = nullptr) noexcept {
  if (!ahead) next = b;
  int m = 0;
  for (; m + sum_rows <= M; m += sum_rows)
    sum_rows_of<type, sum_rows, ahead>(scale, c + m * c_stride, c_stride, N, a + m * am, am, ak, b, b_bytes, K, next);
  for (; m < M; ++m)
    sum_rows_of<type, 1, ahead>(scale, c + m * c_stride, c_stride, N, a + m * am, am, ak, b, b_bytes, K, next);
}

// out[c, r] = in[r, c], in squares of 4.
inline void transpose(const float* in, std::ptrdiff_t in_stride, int rows, int cols, float* out,
                      std::ptrdiff_t out_stride) noexcept {
  auto plain = [&](int r0, int r1, int c0, int c1) {
    for (int r = r0; r < r1; ++r) {
      for (int c = c0; c < c1; ++c) out[c * out_stride + r] = in[r * in_stride + c];
    }
  };
  const int whole_rows = rows / 4 * 4, whole_cols = cols / 4 * 4;
  for (int r = 0; r < whole_rows; r += 4) {
    for (int c = 0; c < whole_cols; c += 4) {
#if QWEN3NEXT_X86
      const float* p = in + r * in_stride + c;
      __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + in_stride), d = _mm_loadu_ps(p + 2 * in_stride),
             e = _mm_loadu_ps(p + 3 * in_stride);
      _MM_TRANSPOSE4_PS(a, b, d, e);
      float* o = out + c * out_stride + r;
      _mm_storeu_ps(o, a);
      _mm_storeu_ps(o + out_stride, b);
      _mm_storeu_ps(o + 2 * out_stride, d);
      _mm_storeu_ps(o + 3 * out_stride, e);
#else
      plain(r, r + 4, c, c + 4);
#endif
    }
  }
  plain(0, whole_rows, whole_cols, cols);
  plain(whole_rows, rows, 0, cols);
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
