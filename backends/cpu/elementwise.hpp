#pragma once
// Norms, gates and other operations that read a row and write a row.  Scalar twins: reference_backend.hpp.

#include <cmath>

#include "backends/cpu/kernel_table.hpp"
#include "backends/cpu/simd.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

QWEN3NEXT_FORCE_INLINE float sum_of_squares(const float* x, int n) noexcept {
  F total(0.0f);
  for_lanes(n, [&](int i, int m) {
    const F v = load_some(x + i, m);
    total = mul_add(v, v, total);
  });
  return sum(total);
}

// out = x / sqrt(mean(x^2) + eps) * weight
inline void rms_norm(float* out, const float* x, const float* weight, int n, float eps) noexcept {
  const F scale(1 / ::sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps));
  for_lanes(n, [&](int i, int m) { store_some(out + i, load_some(x + i, m) * scale * load_some(weight + i, m), m); });
}

// out = scale x / sqrt(sum(x^2) + 1e-6)
inline void l2_norm(float* out, const float* x, int n, float scale) noexcept {
  const F factor(scale / ::sqrtf(sum_of_squares(x, n) + 1e-6f));
  for_lanes(n, [&](int i, int m) { store_some(out + i, load_some(x + i, m) * factor, m); });
}

// out = rms_norm(o) * silu(z)
inline void gated_rms_norm(float* out, const float* o, const float* z, const float* weight, int n, float eps) noexcept {
  const F scale(1 / ::sqrtf(sum_of_squares(o, n) / static_cast<float>(n) + eps));
  for_lanes(n, [&](int i, int m) {
    const F gate = load_some(z + i, m);
    store_some(out + i, load_some(o + i, m) * scale * load_some(weight + i, m) * gate * sigmoid(gate), m);
  });
}

inline void swiglu(float* out, const float* gate, const float* up, int n) noexcept {
  for_lanes(n, [&](int i, int m) {
    const F x = load_some(gate + i, m);
    store_some(out + i, x * sigmoid(x) * load_some(up + i, m), m);
  });
}

inline void sigmoid_gate(float* x, const float* gate, int n) noexcept {
  for_lanes(n, [&](int i, int m) { store_some(x + i, load_some(x + i, m) * sigmoid(load_some(gate + i, m)), m); });
}

// x += scale y
inline void add(float* x, const float* y, float scale, int n) noexcept {
  const F factor(scale);
  for_lanes(n, [&](int i, int m) { store_some(x + i, mul_add(factor, load_some(y + i, m), load_some(x + i, m)), m); });
}

inline void scale_row(float* x, float scale, int n) noexcept {
  const F factor(scale);
  for_lanes(n, [&](int i, int m) { store_some(x + i, load_some(x + i, m) * factor, m); });
}

// A few values per token: not worth vectors.
inline void delta_gates(float* beta, float* g, const float* b, const float* a, const float* A, const float* dt_bias,
                        int n) noexcept {
  for (int h = 0; h < n; ++h) {
    const float x = a[h] + dt_bias[h];
    const float softplus = x > 20 ? x : ::log1pf(::expf(x));
    beta[h] = 1 / (1 + ::expf(-b[h]));
    g[h] = A[h] * softplus;
  }
}

inline float sigmoid_scalar(float x) noexcept { return 1 / (1 + ::expf(-x)); }

// The pairs (i, i + n) of a head turn by their angles.
inline void rope(float* head, const float* cos, const float* sin, int n) noexcept {
  for_lanes(n, [&](int i, int m) {
    const F a = load_some(head + i, m), b = load_some(head + n + i, m);
    const F c = load_some(cos + i, m), s = load_some(sin + i, m);
    store_some(head + i, a * c - b * s, m);
    store_some(head + n + i, b * c + a * s, m);
  });
}

// x = softmax(x), in place.
inline void softmax(float* x, int n) noexcept {
  F tops(x[0]);
  int whole = 0;
  for (; whole + lanes <= n; whole += lanes) tops = xsimd::max(tops, load(x + whole));
  float top = maximum(tops);
  for (int i = whole; i < n; ++i) top = x[i] > top ? x[i] : top;
  F total(0.0f);
  const F shift(top);
  for_lanes(n, [&](int i, int m) {
    F e = exp(load_some(x + i, m) - shift);
    store_some(x + i, e, m);
    total += m == lanes ? e : load_part(x + i, m);
  });
  const F scale(1 / sum(total));
  for_lanes(n, [&](int i, int m) { store_some(x + i, load_some(x + i, m) * scale, m); });
}

// The k <= n largest of p[0..n), largest first, of equal ones the lower index: insertion into a sorted list.  Few get
// into it, so that all of a vector are asked at once whether they are larger than its last.
inline void top_k(const float* p, int n, int k, std::int32_t* ids, float* values) noexcept {
  auto insert = [&](int e, int last) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    int i = last;
    for (; i > 0 && p[e] > values[i - 1]; --i) values[i] = values[i - 1], ids[i] = ids[i - 1];
    values[i] = p[e];
    ids[i] = e;
  };
  for (int e = 0; e < k; ++e) insert(e, e);
  auto consider = [&](int e) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    if (p[e] > values[k - 1]) insert(e, k - 1);
  };
  int e = k;
  for (; e + lanes <= n; e += lanes) {
    unsigned larger = lanes_above(load(p + e), F(values[k - 1]));
    for (; larger != 0; larger &= larger - 1) consider(e + __builtin_ctz(larger));
  }
  for (; e < n; ++e) consider(e);
}

// columns[j] = tap j of `lanes` channels; taps [channels, K], of which the last lanes - m are not there.
QWEN3NEXT_FORCE_INLINE void load_taps(const float* taps, int K, int m, float (*columns)[lanes]) noexcept {
#if defined(__AVX512F__)
  if (K == 4 && m == lanes) {  // 4 channels to a vector, sorted by tap
    const __m512 a = _mm512_loadu_ps(taps), b = _mm512_loadu_ps(taps + 16);
    const __m512 c = _mm512_loadu_ps(taps + 32), d = _mm512_loadu_ps(taps + 48);
    for (int j = 0; j < 4; ++j) {
      const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
      const __m512i pick = _mm512_add_epi32(first, _mm512_set1_epi32(j));
      _mm512_store_ps(columns[j], _mm512_mask_blend_ps(0xff00, _mm512_permutex2var_ps(a, pick, b),
                                                       _mm512_permutex2var_ps(c, pick, d)));
    }
    return;
  }
#endif
  for (int j = 0; j < K; ++j) {
    if (m < lanes) store(columns[j], F(0.0f));
    for (int i = 0; i < m; ++i) columns[j][i] = taps[i * K + j];
  }
}

// `lanes` channels, m of them there; K taps if not 0.
template <int fixed>
QWEN3NEXT_FORCE_INLINE void conv_lanes(const Kernels::Conv& v, int c, int m) noexcept {
  constexpr int max_taps = 64;  // Config::validate
  const int K = fixed > 0 ? fixed : v.K;
  alignas(64) float column[max_taps][lanes];
  load_taps(v.taps + static_cast<std::ptrdiff_t>(c) * K, K, m, column);
  for (int t = v.first; t < v.first + v.count; ++t) {
    F total(0.0f);
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) {
      const int row = t - K + 1 + j;
      const float* x = row >= 0 ? v.x + row * v.x_stride : v.past + (K - 1 + row) * v.past_stride;
      total = mul_add(load(column[j]), load_some(x + c, m), total);
    }
    store_some(v.out + t * v.out_stride + c, total * sigmoid(total), m);
  }
}

// Causal depthwise convolution of `count` tokens from `first` on, n channels, then silu; K taps per channel.
//   out[t] = silu(sum_j taps[j] x[t - K + 1 + j]),  x[-K + 1 .. -1] = past
inline void causal_conv1d(const Kernels::Conv& v) noexcept {
  for_lanes(v.n, [&](int c, int m) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    if (v.K == 4)
      conv_lanes<4>(v, c, m);
    else
      conv_lanes<0>(v, c, m);
  });
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
