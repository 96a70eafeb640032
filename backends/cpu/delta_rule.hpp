#pragma once
// The gated delta rule for one value head of one sequence, in its two equal forms.
//   S = exp(g) S;   S += k (beta (v - S^T k))^T;   o = S^T q          arXiv:2412.06464
// q, k (Dk), normed and scaled  v, o (Dv)  S (Dk, Dv) f32, stored transposed [Dv, Dk] so that both products read rows.
// g <= 0, 0 < beta < 1.

#include <cmath>

#include "backends/cpu/elementwise.hpp"
#include "backends/cpu/float_product.hpp"
#include "backends/cpu/kernel_table.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// R rows of the transposed state for one token.  A row s is read twice from L1 and written once: since S^T q after the
// update is a s.q + delta k.q with a = exp(g), both dot products are taken in one pass, before the update.
template <int R>
QWEN3NEXT_FORCE_INLINE void delta_rows(float* S, int Dk, const float* q, const float* k, const float* v, float kq,
                                       float decay, float beta, float* out) noexcept {
  F sk[R], sq[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) sk[r] = sq[r] = F(0.0f);
  for_lanes(Dk, [&](int i, int m) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    const F ki = load_some(k + i, m), qi = load_some(q + i, m);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F s = load_some(S + r * Dk + i, m);
      sk[r] = mul_add(s, ki, sk[r]);
      sq[r] = mul_add(s, qi, sq[r]);
    }
  });
  F delta[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const float d = beta * (v[r] - decay * sum(sk[r]));
    out[r] = decay * sum(sq[r]) + d * kq;
    delta[r] = F(d);
  }
  const F a(decay);
  for_lanes(Dk, [&](int i, int m) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    const F ki = load_some(k + i, m);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      store_some(S + r * Dk + i, mul_add(delta[r], ki, a * load_some(S + r * Dk + i, m)), m);
  });
}

// Token by token.
inline void delta_recurrent(const Kernels::DeltaHead& h) noexcept {
  for (int t = 0; t < h.T; ++t) {
    const float *q = h.q + t * h.Dk, *k = h.k + t * h.Dk, *v = h.v + t * h.v_stride;
    const float decay = ::expf(h.g[t * h.gate_stride]), beta = h.beta[t * h.gate_stride];
    float* out = h.out + t * h.out_stride;
    F kq_sum(0.0f);
    for_lanes(h.Dk, [&](int i, int m) { kq_sum = mul_add(load_some(k + i, m), load_some(q + i, m), kq_sum); });
    const float kq = sum(kq_sum);
    int r = 0;
    for (; r + 4 <= h.Dv; r += 4)
      delta_rows<4>(h.S + static_cast<std::ptrdiff_t>(r) * h.Dk, h.Dk, q, k, v + r, kq, decay, beta, out + r);
    for (; r < h.Dv; ++r)
      delta_rows<1>(h.S + static_cast<std::ptrdiff_t>(r) * h.Dk, h.Dk, q, k, v + r, kq, decay, beta, out + r);
  }
}

constexpr int chunk = 64;

// Chunk scratch: decayed K [C, Dk], scores [C, C], A [C, C], V' [C, Dv], K S [C, Dv], pointers' room.
inline std::size_t delta_scratch(int Dk, int Dv) noexcept {
  return static_cast<std::size_t>(chunk) * static_cast<std::size_t>(Dk + 2 * chunk + 2 * Dv);
}

// C tokens at once (FORMATS.md 3; HF torch_chunk_gated_delta_rule).  G = running sum of g in the chunk:
//   A_ij = beta_i (k_i . k_j) exp(G_i - G_j), j < i        P_ij = (q_i . k_j) exp(G_i - G_j), j <= i
//   V' = (I + A)^-1 diag(beta) (V - diag(exp G) K S)       O = diag(exp G) Q S + P V'
//   S = exp(G_C) S + (diag(exp(G_C - G)) K)^T V'
// Every exponent is <= 0.  The products are those of float_product.hpp.
inline void delta_chunk(const Kernels::DeltaHead& h, int t0, int C, float* scratch) noexcept {
  const int Dk = h.Dk, Dv = h.Dv;
  float* decayed = scratch;         // [C, Dk]
  float* A = decayed + chunk * Dk;  // [C, C]
  float* P = A + chunk * chunk;     // [C, C]
  float* V = P + chunk * chunk;     // [C, Dv]  V'
  float* KS = V + chunk * Dv;       // [C, Dv]
  const float *q = h.q + t0 * Dk, *k = h.k + t0 * Dk;
  auto at = [](const float* base, std::ptrdiff_t i) { return reinterpret_cast<const std::byte*>(base + i); };

  float G[chunk], beta[chunk], from_start[chunk];
  float total = 0;
  for (int i = 0; i < C; ++i) {
    total += h.g[(t0 + i) * h.gate_stride];
    G[i] = total;
    beta[i] = h.beta[(t0 + i) * h.gate_stride];
    from_start[i] = ::expf(total);
  }

  const std::byte* rows[chunk];
  for (int i = 0; i < C; ++i) rows[i] = at(k, static_cast<std::ptrdiff_t>(i) * Dk);
  // Row i needs columns j <= i only: bands of rows keep most of the upper triangle out.
  constexpr int band = 12;
  for (int i = 0; i < C; i += band) {
    const int n = C - i < band ? C - i : band;
    float_product<DType::f32>(rows, i + n, k + i * Dk, Dk, n, Dk, A + i * chunk, chunk);
    float_product<DType::f32>(rows, i + n, q + i * Dk, Dk, n, Dk, P + i * chunk, chunk);
  }
  for (int i = 0; i < C; ++i) {
    float decay[chunk];
    for_lanes(i + 1, [&](int j, int m) { store_some(decay + j, exp(F(G[i]) - load_some(G + j, m)), m); });
    for (int j = 0; j < i; ++j) A[i * chunk + j] *= -beta[i] * decay[j];
    for (int j = 0; j <= i; ++j) P[i * chunk + j] *= decay[j];
  }

  // K S and Q S: rows of the transposed state are the "weights".
  for (int r = 0; r < Dv; r += chunk) {
    const int n = Dv - r < chunk ? Dv - r : chunk;
    for (int i = 0; i < n; ++i) rows[i] = at(h.S, static_cast<std::ptrdiff_t>(r + i) * Dk);
    float_product<DType::f32>(rows, n, k, Dk, C, Dk, KS + r, Dv);
    float_product<DType::f32>(rows, n, q, Dk, C, Dk, h.out + t0 * h.out_stride + r, h.out_stride);
  }
  for (int i = 0; i < C; ++i) {
    const float* v = h.v + (t0 + i) * h.v_stride;
    const F b(beta[i]), a(-from_start[i]);
    for_lanes(Dv, [&](int j, int m) {
      store_some(V + i * Dv + j, b * mul_add(a, load_some(KS + i * Dv + j, m), load_some(v + j, m)), m);
    });
  }

  // Forward substitution V'_i -= sum_{j<i} A_ij V'_j (A holds -A): eight rows at a time from all before, then inside.
  constexpr int step = 8;
  for (int i = 0; i < C; i += step) {
    const int n = C - i < step ? C - i : step;
    weighted_sum<DType::f32>(1, V + i * Dv, Dv, n, Dv, A + i * chunk, chunk, 1, at(V, 0),
                             static_cast<std::ptrdiff_t>(sizeof(float)) * Dv, i);
    for (int r = i + 1; r < i + n; ++r) {
      weighted_sum<DType::f32>(1, V + r * Dv, Dv, 1, Dv, A + r * chunk + i, chunk, 1, at(V, i * Dv),
                               static_cast<std::ptrdiff_t>(sizeof(float)) * Dv, r - i);
    }
  }

  // O = diag(exp G) Q S + P V'.
  for (int i = 0; i < C; i += step) {
    const int n = C - i < step ? C - i : step;
    float* out = h.out + (t0 + i) * h.out_stride;
    for (int r = 0; r < n; ++r) {
      scale_row(out + r * h.out_stride, from_start[i + r], Dv);
      for (int j = i + r + 1; j < i + n; ++j) P[(i + r) * chunk + j] = 0;
    }
    weighted_sum<DType::f32>(1, out, h.out_stride, n, Dv, P + i * chunk, chunk, 1, at(V, 0),
                             static_cast<std::ptrdiff_t>(sizeof(float)) * Dv, i + n);
  }

  // S = exp(G_C) S + V'^T (diag(exp(G_C - G)) K), in the transposed layout.
  for (int i = 0; i < C; ++i) {
    const F to_end(::expf(G[C - 1] - G[i]));
    for_lanes(Dk, [&](int j, int m) { store_some(decayed + i * Dk + j, to_end * load_some(k + i * Dk + j, m), m); });
  }
  // from_start of the last token may underflow to 0: then `weighted_sum` drops S, as it should.
  weighted_sum<DType::f32>(from_start[C - 1], h.S, Dk, Dv, Dk, V, 1, Dv, at(decayed, 0),
                           static_cast<std::ptrdiff_t>(sizeof(float)) * Dk, C);
}

inline void delta_chunked(const Kernels::DeltaHead& h, float* scratch) noexcept {
  for (int t = 0; t < h.T; t += chunk) delta_chunk(h, t, h.T - t < chunk ? h.T - t : chunk, scratch);
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
