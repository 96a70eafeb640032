#pragma once
// The gated delta rule for value heads of one sequence that share a key head, in its two equal forms.
//   S = exp(g) S;   S += k (beta (v - S^T k))^T;   o = S^T q          arXiv:2412.06464
// q, k (Dk), normed and scaled  v, o (Dv)  S (Dk, Dv) f32, stored transposed [Dv, Dk] so that both products read rows.
// g <= 0, 0 < beta < 1.

#include <cmath>
#include <cstring>

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
  F acc[2 * R];  // s . k, s . q
#pragma GCC unroll 8
  for (int r = 0; r < 2 * R; ++r) acc[r] = F(0.0f);
  for_lanes(Dk, [&](int i, int m) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    const F ki = load_some(k + i, m), qi = load_some(q + i, m);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F s = load_some(S + r * Dk + i, m);
      acc[r] = mul_add(s, ki, acc[r]);
      acc[R + r] = mul_add(s, qi, acc[R + r]);
    }
  });
  float dots[2 * R];
  store_sums<2 * R>(acc, dots);
  F delta[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const float d = beta * (v[r] - decay * dots[r]);
    out[r] = decay * dots[R + r] + d * kq;
    delta[r] = F(d);
  }
  const F a(decay);
  for_lanes(Dk, [&](int i, int m) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    const F ki = load_some(k + i, m);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store_some(S + r * Dk + i, mul_add(delta[r], ki, a * load_some(S + r * Dk + i, m)), m);
  });
}

// q and k of token t, normed; q scaled.
inline void delta_norms(const Kernels::DeltaHeads& h, int t, float* q, float* k) noexcept {
  const std::ptrdiff_t at = t * h.qk_stride;
  l2_norm(q, h.q + at, h.Dk, 1 / ::sqrtf(static_cast<float>(h.Dk)));
  l2_norm(k, h.k + at, h.Dk, 1);
}

constexpr int chunk = 64;

// Token by token, at most `chunk`: four rows of the state at a time see them all.  Scratch: q and k, k of the past,
// four rows of the state.
inline void delta_recurrent(const Kernels::DeltaHeads& h, float* scratch) noexcept {
  const int Dk = h.Dk;
  const Kernels::DeltaPast& past = h.past;
  float *q = scratch, *k = q + h.T * Dk, *past_k = k + h.T * Dk, *copy = past_k + past.T * Dk;
  float kq[chunk];
  for (int t = 0; t < h.T; ++t) {
    float *qt = q + t * Dk, *kt = k + t * Dk;
    delta_norms(h, t, qt, kt);
    F total(0.0f);
    for_lanes(Dk, [&](int i, int m) { total = mul_add(load_some(kt + i, m), load_some(qt + i, m), total); });
    kq[t] = sum(total);
  }
  for (int t = 0; t < past.T; ++t) l2_norm(past_k + t * Dk, past.k + t * past.stride, Dk, 1);
  for (int head = 0; head < h.heads; ++head) {
    const float *g = h.g + head, *beta = h.beta + head, *v = h.v + head * h.Dv;
    float *out = h.out + head * h.Dv, *S = h.S + static_cast<std::ptrdiff_t>(head) * h.Dv * Dk;
    float decay[chunk], past_decay[chunk];
    for (int t = 0; t < h.T; ++t) decay[t] = ::expf(g[t * h.gate_stride]);
    for (int t = 0; t < past.T; ++t) past_decay[t] = ::expf(past.g[t * past.gate_stride + head]);
    auto rows = [&](auto update, int r, int n) QWEN3NEXT_FORCE_INLINE_LAMBDA {
      float* s = S + r * Dk;
      for (int t = 0; t < past.T; ++t) {  // as below, since its rounding must be the same; its output is known
        const float* kt = past_k + t * Dk;
        float known[4];
        update(s, Dk, kt, kt, past.v + t * past.stride + head * h.Dv + r, 0, past_decay[t],
               past.beta[t * past.gate_stride + head], known);
      }
      if (h.tentative) s = static_cast<float*>(std::memcpy(copy, s, sizeof(float) * static_cast<std::size_t>(n * Dk)));
      for (int t = 0; t < h.T; ++t) {
        update(s, Dk, q + t * Dk, k + t * Dk, v + t * h.v_stride + r, kq[t], decay[t], beta[t * h.gate_stride],
               out + t * h.out_stride + r);
      }
    };
    int r = 0;
    for (; r + 4 <= h.Dv; r += 4) rows(delta_rows<4>, r, 4);
    for (; r < h.Dv; ++r) rows(delta_rows<1>, r, 1);
  }
}

// What a chunk works on, C = `chunk` rows each; S of each head, [Dk, Dv] here: all products are then weighted sums of
// rows.
struct DeltaScratch {
  DeltaScratch(float* space, int Dk, int Dv) noexcept {
    q = space;                  // [C, Dk]
    k = q + chunk * Dk;         // [C, Dk]
    kT = k + chunk * Dk;        // [Dk, C]
    decayed = kT + chunk * Dk;  // [C, Dk]
    KK = decayed + chunk * Dk;  // [C, C]
    QK = KK + chunk * chunk;
    A = QK + chunk * chunk;
    P = A + chunk * chunk;
    V = P + chunk * chunk;  // [C, Dv]
    S = V + chunk * Dv;     // [heads, Dk, Dv]
  }
  float *q, *k, *kT, *decayed, *KK, *QK, *A, *P, *V, *S;
};
inline std::size_t delta_scratch(int heads, int Dk, int Dv) noexcept {
  return static_cast<std::size_t>(chunk * (4 * Dk + 4 * chunk + Dv) + heads * Dk * Dv);
}

QWEN3NEXT_FORCE_INLINE const std::byte* bytes_of(const float* p) noexcept {
  return reinterpret_cast<const std::byte*>(p);
}
constexpr std::ptrdiff_t float_bytes = sizeof(float);

// V[m] += sum_{j < i + m} A[m, j] V[j] for M rows from row i on, in this order: eliminates what rows before have, then
// what the M rows have of each other, in registers.
template <int M, int W>
void solve_tile(const float* A, float* V, int Dv, int i) noexcept {
  F acc[M][W];
  float* own = V + i * Dv;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) acc[m][w] = load(own + m * Dv + w * lanes);
  }
  for (int j = 0; j < i; ++j) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const F factor(A[m * chunk + j]);
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) acc[m][w] = mul_add(factor, load(V + j * Dv + w * lanes), acc[m][w]);
    }
  }
#pragma GCC unroll 16
  for (int m = 1; m < M; ++m) {
#pragma GCC unroll 16
    for (int j = 0; j < m; ++j) {
      const F factor(A[m * chunk + i + j]);
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) acc[m][w] = mul_add(factor, acc[j][w], acc[m][w]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) store(own + m * Dv + w * lanes, acc[m][w]);
  }
}

// V = (I - A)^-1 V for a strictly lower triangular A [C, chunk].
inline void solve_unit_lower(const float* A, float* V, int Dv, int C) noexcept {
  for (int i = 0; i < C; i += sum_rows) {
    int column = 0;
    if (i + sum_rows <= C) {
      for (; column + 2 * lanes <= Dv; column += 2 * lanes) solve_tile<sum_rows, 2>(A + i * chunk, V + column, Dv, i);
    }
    if (column == Dv) continue;
    for (int r = i; r < C && r < i + sum_rows; ++r) {
      weighted_sum<DType::f32>(1, V + r * Dv + column, Dv, 1, Dv - column, A + r * chunk, chunk, 1,
                               bytes_of(V + column), float_bytes * Dv, r);
    }
  }
}

// C tokens at once (FORMATS.md 3; HF torch_chunk_gated_delta_rule), of the value heads that share a key head.
// G = running sum of g in the chunk:
//   A_ij = beta_i (k_i . k_j) exp(G_i - G_j), j < i        P_ij = (q_i . k_j) exp(G_i - G_j), j <= i
//   V' = (I + A)^-1 diag(beta) (V - diag(exp G) K S)       O = diag(exp G) Q S + P V'
//   S = exp(G_C) S + (diag(exp(G_C - G)) K)^T V'
// Every exponent is <= 0.
inline void delta_chunk(const Kernels::DeltaHeads& h, int t0, int C, const DeltaScratch& x) noexcept {
  const int Dk = h.Dk, Dv = h.Dv;
  for (int i = 0; i < C; ++i) delta_norms(h, t0 + i, x.q + i * Dk, x.k + i * Dk);
  // Whole vectors of columns: those of no token are 0.
  const int columns = (C + lanes - 1) / lanes * lanes;
  for (int i = C; i < columns; ++i) {
    for (int d = 0; d < Dk; ++d) x.k[i * Dk + d] = 0;
  }
  transpose(x.k, Dk, columns, Dk, x.kT, chunk);
  // Row i needs columns j <= i only: bands of rows keep most of the upper triangle out.
  constexpr int band = 16;
  auto products = [&](const float* rows, float* out) {
    for (int i = 0; i < C; i += band) {
      const int n = C - i < band ? C - i : band, wide = (i + n + lanes - 1) / lanes * lanes;
      weighted_sum<DType::f32>(0, out + i * chunk, chunk, n, wide, rows + i * Dk, Dk, 1, bytes_of(x.kT),
                               float_bytes * chunk, Dk);
    }
  };
  products(x.k, x.KK);
  products(x.q, x.QK);

  for (int head = 0; head < h.heads; ++head) {
    float *S = x.S + static_cast<std::ptrdiff_t>(head) * Dk * Dv, *out = h.out + t0 * h.out_stride + head * Dv;
    alignas(64) float G[chunk], beta[chunk], from_start[chunk];
    float total = 0;
    for (int i = 0; i < C; ++i) {
      const std::ptrdiff_t at = (t0 + i) * h.gate_stride + head;
      total += h.g[at];
      G[i] = total;
      beta[i] = h.beta[at];
    }
    for_lanes(C, [&](int i, int m) { store_some(from_start + i, exp(load_some(G + i, m)), m); });

    // A with its sign turned: what is added in the substitution.  Beyond the diagonal of the last columns that a
    // product below takes along, 0.
    for (int i = 0; i < C; ++i) {
      float *a = x.A + i * chunk, *p = x.P + i * chunk;
      for_lanes(i + 1, [&](int j, int m) QWEN3NEXT_FORCE_INLINE_LAMBDA {
        const F decay = exp(F(G[i]) - load_some(G + j, m));
        store_some(a + j, F(-beta[i]) * decay * load_some(x.KK + i * chunk + j, m), m);
        store_some(p + j, decay * load_some(x.QK + i * chunk + j, m), m);
      });
      for (int j = i + 1; j < C && j < i / sum_rows * sum_rows + sum_rows; ++j) p[j] = 0;
    }

    weighted_sum<DType::f32>(0, x.V, Dv, C, Dv, x.k, Dk, 1, bytes_of(S), float_bytes * Dv, Dk);
    weighted_sum<DType::f32>(0, out, h.out_stride, C, Dv, x.q, Dk, 1, bytes_of(S), float_bytes * Dv, Dk);
    for (int i = 0; i < C; ++i) {
      const float* v = h.v + (t0 + i) * h.v_stride + head * Dv;
      float *target = x.V + i * Dv, *o = out + i * h.out_stride;
      const F b(beta[i]), a(from_start[i]), minus(-from_start[i]);
      for_lanes(Dv, [&](int j, int m) QWEN3NEXT_FORCE_INLINE_LAMBDA {
        store_some(target + j, b * mul_add(minus, load_some(target + j, m), load_some(v + j, m)), m);
        store_some(o + j, a * load_some(o + j, m), m);
      });
    }
    solve_unit_lower(x.A, x.V, Dv, C);
    for (int i = 0; i < C; i += sum_rows) {
      const int n = C - i < sum_rows ? C - i : sum_rows;
      weighted_sum<DType::f32>(1, out + i * h.out_stride, h.out_stride, n, Dv, x.P + i * chunk, chunk, 1, bytes_of(x.V),
                               float_bytes * Dv, i + n);
    }
    for (int i = 0; i < C; ++i) {
      const F to_end(::expf(G[C - 1] - G[i]));
      for_lanes(Dk,
                [&](int j, int m) { store_some(x.decayed + i * Dk + j, to_end * load_some(x.k + i * Dk + j, m), m); });
    }
    // from_start of the last token may underflow to 0: then `weighted_sum` drops S, as it should.
    weighted_sum<DType::f32>(from_start[C - 1], S, Dv, Dk, Dv, x.decayed, 1, Dk, bytes_of(x.V), float_bytes * Dv, C);
  }
}

inline void delta_chunked(const Kernels::DeltaHeads& h, float* scratch) noexcept {
  const DeltaScratch x(scratch, h.Dk, h.Dv);
  const std::ptrdiff_t size = static_cast<std::ptrdiff_t>(h.Dk) * h.Dv;
  for (int i = 0; i < h.heads; ++i) transpose(h.S + i * size, h.Dk, h.Dv, h.Dk, x.S + i * size, h.Dv);
  for (int t = 0; t < h.T; t += chunk) delta_chunk(h, t, h.T - t < chunk ? h.T - t : chunk, x);
  for (int i = 0; i < h.heads; ++i) transpose(x.S + i * size, h.Dv, h.Dk, h.Dv, h.S + i * size, h.Dk);
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
