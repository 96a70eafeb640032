#pragma once
// One block of positions of a KV head against the queries that share it, with the softmax built up on the way:
//   m' = max(m, max s)   l' = l 2^(m - m') + sum 2^(s - m')   o' = o 2^(m - m') + 2^(s - m') V       s = K q
// q comes multiplied with log2(e) / sqrt(D), so that powers of 2 serve.  Scalar twin: attention in
// reference_backend.hpp.
//
// Scores lie as [position, query]: the softmax of as many queries as a vector has lanes takes no horizontal steps.
// Few queries (decode): K is read once, straight from the cache, by dot products of 3 rows with 8 queries.  Many
// (prefill): K and V are expanded to f32 once, and both products are weighted sums of vectors (of queries, of dims).

#include <cmath>

#include "backends/cpu/elementwise.hpp"
#include "backends/cpu/float_product.hpp"
#include "backends/cpu/kernel_table.hpp"
#include "backends/cpu/unpack.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

constexpr int expanded_queries = 32;  // from so many on, expanding K and V pays

// A power of 2 that divides a vector, or whole vectors.
inline int attention_columns(int queries) noexcept {
  int columns = 1;
  while (columns < queries && columns < lanes) columns *= 2;
  return queries <= columns ? columns : (queries + lanes - 1) / lanes * lanes;
}

// Floats of AttentionRows: query and sum [queries, D], scores [block, columns], 3 rows of columns, perhaps K or V.
inline std::size_t attention_space(int queries, int D, int block, DType type) noexcept {
  const int columns = attention_columns(queries);
  const bool expand = type != DType::f32 && queries >= expanded_queries;
  return static_cast<std::size_t>(2 * columns * D + (block + 3) * columns + lanes + (expand ? block * D : 0));
}

// 2^x for x <= 0 to about 1 ulp; 0 below -126.  n = round(x) falls out of the low bits of x + 1.5 * 2^23; 2^(x - n) by
// a polynomial of least relative error (2e-9), times 2^n by adding n to the exponent.
QWEN3NEXT_FORCE_INLINE F exp2_negative(F x) noexcept {
  const F magic(12582912.0f), low(-126.0f);
  const F clamped = xsimd::max(x, low);
  const F shifted = clamped + magic;
  const F r = clamped - (shifted - magic);
  F p(0.00015353359f);
  p = mul_add(p, r, F(0.0013398874f));
  p = mul_add(p, r, F(0.009618437f));
  p = mul_add(p, r, F(0.055503324f));
  p = mul_add(p, r, F(0.24022648f));
  p = mul_add(p, r, F(0.6931472f));
  p = mul_add(p, r, F(1.0f));
  return xsimd::select(x < low, F(0.0f), as_floats(as_ints(p) + (as_ints(shifted) << 23)));
}

// GCC would load an operand of several instructions again for each.
QWEN3NEXT_FORCE_INLINE F in_register(F v) noexcept {
#if defined(__AVX512F__) && defined(__GNUC__)
  __m512 x = v;
  __asm__("" : "+v"(x));
  return F(x);
#else
  return v;
#endif
}

// Once for every 64 bytes of a row, or nearly.
template <DType type>
QWEN3NEXT_FORCE_INLINE bool line_starts(int column) noexcept {
  return type == DType::q8_0 ? column % 64 == 0 : column * stored_bytes<type> % 64 == 0;
}

// scores[p, t] = keys[p] . query[t] for R positions and T queries: R T accumulators, R conversions and T loads for R T
// multiply-adds.  The values of these positions, wanted next, are fetched meanwhile.
template <DType type, int R, int T, bool whole>
void score_tile(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b, int position, int first) noexcept {
  const std::byte *keys = b.keys + position * b.row_bytes, *values = b.values + position * b.row_bytes;
  const float* query = a.query + first * a.D;
  F acc[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[r][t] = F(0.0f);
  }
  for (int i = 0; i < a.D; i += lanes) {
    F key[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const std::ptrdiff_t row = r * b.row_bytes, line = row + column_bytes<type>(i);
      if (line_starts<type>(i)) __builtin_prefetch(values + line, 0, 2);
      key[r] = load_columns<type>(keys + row, i, whole || i + lanes <= a.D ? lanes : a.D - i);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const float* x = query + t * a.D + i;
      const F q = in_register(whole || i + lanes <= a.D ? load(x) : load_part(x, a.D - i));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][t] = mul_add(key[r], q, acc[r][t]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store_sums<T>(acc[r], a.scores + (position + r) * a.columns + first);
}

template <DType type, int R, int T, bool whole>
void score_all(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b, int first) noexcept {
  int p = 0;
  for (; p + R <= b.n; p += R) score_tile<type, R, T, whole>(a, b, p, first);
  for (; p < b.n; ++p) score_tile<type, 1, T, whole>(a, b, p, first);
}

template <DType type, int R, int T>
void score_queries(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b, int first) noexcept {
  if (a.D % lanes == 0)
    score_all<type, R, T, true>(a, b, first);
  else
    for (int t = first; t < first + T; ++t) score_all<type, 1, 1, false>(a, b, t);
}

#if defined(__AVX512VNNI__)
// Eight queries against q8_0 keys in integers, 64 columns (two blocks) at a time.  Queries are rounded to 15 bits of
// the largest of each, 128 high + low: one int8 is not enough beside outliers.  One operand of vpdpbusd is unsigned:
// low is, high enters as high + 128, and 128 times the sum of the keys, the same for all queries, is where the
// accumulators begin.  Two multiply-adds of 64, a shift, a conversion and a scaled sum for every pair of blocks and
// query.
constexpr int most_pairs = 16;
inline void score_q8_0(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b, int first) noexcept {
  const int pairs = a.D / 64;
  alignas(64) std::uint8_t high[most_pairs][8][64], low[most_pairs][8][64];
  alignas(32) float unit[8];  // of each query's levels
  for (int t = 0; t < 8; ++t) {
    const float* q = a.query + (first + t) * a.D;
    F top(0.0f);
    for (int i = 0; i < a.D; i += lanes) top = xsimd::max(top, xsimd::abs(load(q + i)));
    constexpr float levels = 127 * 128;
    const float amax = maximum(top), inverse = amax > 0 ? levels / amax : 0;
    unit[t] = amax / levels;
    for (int i = 0; i < a.D; i += lanes) {
      const __m512i level = _mm512_cvtps_epi32(load(q + i) * F(inverse));
      _mm_store_si128(reinterpret_cast<__m128i*>(&high[i / 64][t][i % 64]),
                      _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_srai_epi32(level, 7), _mm512_set1_epi32(128))));
      _mm_store_si128(reinterpret_cast<__m128i*>(&low[i / 64][t][i % 64]),
                      _mm512_cvtepi32_epi8(_mm512_and_si512(level, _mm512_set1_epi32(127))));
    }
  }
  const __m512i middle = _mm512_set1_epi8(-128), zero = _mm512_setzero_si512();
  for (int p = 0; p < b.n; ++p) {
    const std::byte *key = b.keys + p * b.row_bytes, *value = b.values + p * b.row_bytes;
    F acc[8];
    for (int t = 0; t < 8; ++t) acc[t] = F(0.0f);
    for (int i = 0; i < pairs; ++i) {
      const std::byte* block = key + i * 68;
      __builtin_prefetch(value + i * 68, 0, 2);
      const __m512i k =
          _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 2))),
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 36)), 1);
      const F scale(_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(half_at(block)), _mm512_set1_ps(half_at(block + 34))));
      const __m512i start = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, middle, k));
#pragma GCC unroll 8
      for (int t = 0; t < 8; ++t) {
        const __m512i upper = _mm512_dpbusd_epi32(start, _mm512_load_si512(high[i][t]), k);
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 7), _mm512_load_si512(low[i][t]), k);
        acc[t] = mul_add(scale, F(_mm512_cvtepi32_ps(dot)), acc[t]);
      }
    }
    float* out = a.scores + p * a.columns + first;
    store_sums<8>(acc, out);
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_loadu_ps(out), _mm256_load_ps(unit)));
  }
}
#endif

template <DType type>
void score_few(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b) noexcept {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int wide = 8;
#else
  constexpr int wide = 4;
#endif
  int t = 0;
#if defined(__AVX512VNNI__)
  if constexpr (type == DType::q8_0) {
    if (a.D % 64 == 0 && a.D <= 64 * most_pairs) {
      for (; t + 8 <= a.queries; t += 8) score_q8_0(a, b, t);
    }
  }
#endif
  for (; t + wide <= a.queries; t += wide) score_queries<type, 3, wide>(a, b, t);
  for (; t + 2 <= a.queries; t += 2) score_queries<type, 4, 2>(a, b, t);
  for (; t < a.queries; ++t) score_queries<type, 4, 1>(a, b, t);
}

// The softmax of `lanes` queries, or of lanes / columns positions of `columns` queries at a time.  Leaves 2^(s - m') in
// place of the scores, and multiplies older sums with 2^(m - m').
inline void online_softmax(const Kernels::AttentionRows& a, int n, bool masked) noexcept {
  const int together = a.columns < lanes ? lanes / a.columns : 1, stride = a.columns < lanes ? lanes : a.columns;
  const int steps = (n + together - 1) / together;
  const F nothing(-__builtin_inff());
  for (int i = n * a.columns; i < steps * stride; ++i) a.scores[i] = -__builtin_inff();
  for (int c = 0; c < a.columns; c += lanes) {
    float* x = a.scores + c;
    if (masked) {
      alignas(64) float limit[lanes], position[lanes];
      for (int i = 0; i < lanes; ++i) {
        limit[i] = static_cast<float>(a.visible[c + i % a.columns]);
        position[i] = static_cast<float>(i / a.columns);
      }
      const F limits = load(limit), offsets = load(position);
      for (int s = 0; s < steps; ++s) {
        const F p = offsets + F(static_cast<float>(s * together));
        store(x + s * stride, xsimd::select(p < limits, load(x + s * stride), nothing));
      }
    }
    F top[4] = {nothing, nothing, nothing, nothing};
    int s = 0;
    for (; s + 4 <= steps; s += 4) {
      for (int j = 0; j < 4; ++j) top[j] = xsimd::max(top[j], load(x + (s + j) * stride));
    }
    for (; s < steps; ++s) top[0] = xsimd::max(top[0], load(x + s * stride));
    alignas(64) float most[lanes], part[lanes];
    store(part, xsimd::max(xsimd::max(top[0], top[1]), xsimd::max(top[2], top[3])));
    for (int i = 0; i < lanes; ++i) {  // over the positions that lie together, and those before
      float m = a.top[c + i % a.columns];
      for (int j = i % a.columns; j < lanes; j += a.columns) m = part[j] > m ? part[j] : m;
      most[i] = m;
    }
    const F shift = load(most);
    F sums[2] = {F(0.0f), F(0.0f)};
    auto power = [&](int at, F& total) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      const F e = exp2_negative(load(x + at * stride) - shift);
      store(x + at * stride, e);
      total += e;
    };
    for (s = 0; s + 2 <= steps; s += 2) power(s, sums[0]), power(s + 1, sums[1]);
    if (s < steps) power(s, sums[0]);
    store(part, sums[0] + sums[1]);
    alignas(64) float before[lanes];
    for (int i = 0; i < lanes; ++i) before[i] = a.top[c + i % a.columns];
    alignas(64) float shrink[lanes];
    store(shrink, exp2_negative(load(before) - shift));
    for (int i = 0; i < lanes && i < a.columns; ++i) {
      float total = 0;
      for (int j = i; j < lanes; j += a.columns) total += part[j];
      a.total[c + i] = a.total[c + i] * shrink[i] + total;
      a.top[c + i] = most[i];
      if (c + i < a.queries && shrink[i] != 1) scale_row(a.sum + (c + i) * a.D, shrink[i], a.D);
    }
  }
}

// Lays out `space`, takes the queries and starts with nothing seen.
inline void attention_start(Kernels::AttentionRows& a, float* space, int block, const float* const* q) noexcept {
  const bool many = a.queries >= expanded_queries;
  a.columns = attention_columns(a.queries);
  a.query = space;
  a.sum = a.query + a.columns * a.D;
  a.total = a.sum + a.columns * a.D;
  a.top = a.total + a.columns;
  a.visible = reinterpret_cast<std::int32_t*>(a.top + a.columns);
  a.scores = a.top + 2 * a.columns;
  a.expanded = a.scores + block * a.columns + lanes;
  const float scale = 1.44269504f / ::sqrtf(static_cast<float>(a.D));
  for (int c = 0; c < a.columns; ++c) {
    a.total[c] = 0;
    a.top[c] = -1e30f;
    a.visible[c] = 0;
  }
  for (int r = 0; r < a.queries; ++r) {
    if (many) {
      for (int d = 0; d < a.D; ++d) a.query[d * a.columns + r] = scale * q[r][d];
    } else {
      for (int d = 0; d < a.D; ++d) a.query[r * a.D + d] = scale * q[r][d];
    }
  }
  for (int i = 0; i < a.queries * a.D; ++i) a.sum[i] = 0;
  if (many) {
    for (int r = a.queries; r < a.columns; ++r) {
      for (int d = 0; d < a.D; ++d) a.query[d * a.columns + r] = 0;
    }
  } else {  // columns of no query are never written, and must be numbers
    for (int i = 0; i < block * a.columns; ++i) a.scores[i] = 0;
  }
}

// n rows of the cache as f32.
inline const std::byte* expanded_rows(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b,
                                      const std::byte* rows, std::ptrdiff_t* stride) noexcept {
  *stride = b.row_bytes;
  if (b.type == DType::f32) return rows;
  for (int p = 0; p < b.n; ++p) dequantize(b.type, rows + p * b.row_bytes, a.D, a.expanded + p * a.D);
  *stride = a.D * static_cast<std::ptrdiff_t>(sizeof(float));
  return reinterpret_cast<const std::byte*>(a.expanded);
}

// Few queries: straight from the cache.
template <DType type>
void attend_few(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b, bool masked) noexcept {
  score_few<type>(a, b);
  online_softmax(a, b.n, masked);
  weighted_sum<type, true>(1, a.sum, a.D, a.queries, a.D, a.scores, 1, a.columns, b.values, b.row_bytes, b.n,
                           b.next ? b.next : b.values);
}

inline void attend_many(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b, bool masked) noexcept {
  std::ptrdiff_t stride;
  const std::byte* keys = expanded_rows(a, b, b.keys, &stride);
  weighted_sum<DType::f32>(0, a.scores, a.columns, b.n, a.columns, reinterpret_cast<const float*>(keys),
                           stride / static_cast<std::ptrdiff_t>(sizeof(float)), 1,
                           reinterpret_cast<const std::byte*>(a.query),
                           a.columns * static_cast<std::ptrdiff_t>(sizeof(float)), a.D);
  online_softmax(a, b.n, masked);
  const std::byte* values = expanded_rows(a, b, b.values, &stride);
  weighted_sum<DType::f32>(1, a.sum, a.D, a.queries, a.D, a.scores, 1, a.columns, values, stride, b.n);
}

inline void attention_block(const Kernels::AttentionRows& a, const Kernels::AttentionBlock& b) noexcept {
  bool masked = false;
  for (int r = 0; r < a.queries; ++r) masked |= a.visible[r] < b.n;
  if (a.queries >= expanded_queries)
    attend_many(a, b, masked);
  else if (b.type == DType::f16)
    attend_few<DType::f16>(a, b, masked);
  else if (b.type == DType::q8_0)
    attend_few<DType::q8_0>(a, b, masked);
  else
    attend_few<DType::f32>(a, b, masked);
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
