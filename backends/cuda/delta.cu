// DeltaNet for few rows, and for shapes that nothing here is made for.  Many rows: delta_chunks.cu.

#include <algorithm>

#include "backends/cuda/delta.cuh"

namespace qwen3next::cuda {

namespace {

constexpr int most_few_rows = 8;
constexpr int batch_segments = 64;

// --- Functions of the gates and the convolution ---
// To some 3e-7 relative, in a few instructions without branches: between two uses of a kernel a token's weights pass
// through the caches, so each 128 bytes of code cost their way through memory.

__device__ inline float quick_exp(float x) { return exp2_fast(__fmul_rn(x, log2_e)); }
__device__ inline float quick_divide(float x, float y) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  return __fmul_rn(x, inverse);
}
__device__ inline float conv_silu(float x) { return quick_divide(x, __fadd_rn(1.0f, quick_exp(-x))); }
__device__ inline float gate_beta(float b) { return quick_divide(1.0f, __fadd_rn(1.0f, quick_exp(-b))); }
// A softplus(x), softplus(x) = max(x, 0) + log(1 + e), e = exp(-|x|);  log(1 + e) = 2 atanh(e / (2 + e)).
__device__ inline float gate_g(float x, float A) {
  const float e = quick_exp(-fabsf(x)), s = quick_divide(e, __fadd_rn(2.0f, e)), s2 = __fmul_rn(s, s);
  float sum = 2.0f / 13;
#pragma unroll
  for (int n = 11; n > 0; n -= 2) sum = __fmaf_rn(sum, s2, 2.0f / static_cast<float>(n));
  return __fmul_rn(A, __fmaf_rn(sum, s, fmaxf(x, 0.0f)));
}

// --- One launch for few rows ---

constexpr int few_columns = 32, few_taps = 4;

struct FewRows {
  const float* x;      // [T, channels] input of the convolution; its output if taps is null
  const float *b, *a;  // [T, Hv]; beta and g if taps is null
  float* out;          // [T, Hv Dv]
  std::ptrdiff_t x_stride, b_stride, a_stride, out_stride;
  const float *taps, *A, *dt_bias;
  int key_heads, value_heads, value_dim, channels;
  bool wait_first;  // a kernel shortly before may have written the state
};

template <int bytes>  // 4 or 16
__device__ inline void copy_async(float* to, const float* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}
__device__ inline void await_own_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A thread block owns `few_columns` rows of the transposed state of a head, in shared memory: Dk / 16 lanes a row, 16
// floats a lane, which no other reads.  What its head needs of the convolution it computes itself, a thread for each
// channel, as the other blocks of the head do; one of them keeps it.  One more warp has the gates.
//
// Every sum has an order of its own, whatever the number of rows, and each product is rounded as written here: rows
// that come together are bit for bit rows that come one by one.  All loops are short and stay loops.  `decodes`: one
// row of one segment, nothing pending, not tentative; the same in fewer instructions.
template <int Dk>
constexpr int few_width = 2 * Dk + few_columns;
template <int Dk>
constexpr int few_threads = few_width<Dk> + 32;

// Grid: key heads of all segments, value heads of a key head, columns of a value head.
template <int Dk, int N, bool decodes>
__global__ void __launch_bounds__(few_threads<Dk>, 4)
    few_rows(const FewRows p, const __grid_constant__ DeltaBatch<N> batch) {
  constexpr int lanes = Dk / 16, width = few_width<Dk>, window = few_taps - 1;
  __shared__ __align__(16) float S[few_columns * Dk];
  __shared__ __align__(16) float outputs[most_few_rows][width];  // of the convolution
  __shared__ float inputs[window + most_few_rows][width];
  __shared__ float2 gates[most_few_rows];  // beta, exp(g)
  let_successor_start();

  const int segment = N == 1 ? 0 : static_cast<int>(blockIdx.x) / p.key_heads;
  const DeltaRows& d = batch.rows[segment];
  const int key_head = static_cast<int>(blockIdx.x) - segment * p.key_heads;
  const int head = key_head * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y);
  const int column = head * p.value_dim + static_cast<int>(blockIdx.z) * few_columns;
  const int pending = decodes ? 0 : d.pending, count = decodes ? 1 : d.count;
  const bool tentative = !decodes && d.next_journal, convolve = decodes || p.taps;
  const bool wait_first = !decodes && p.wait_first;
  const bool first_of_head = blockIdx.z == 0, first_of_key_head = first_of_head && blockIdx.y == 0;
  const int tid = static_cast<int>(threadIdx.x), C = p.channels;
  const bool has_state = tid < few_columns * lanes, has_channel = tid < width;
  const int v = tid / lanes, own = v * Dk + tid % lanes * 4;
  const int channel = tid < Dk       ? key_head * Dk + tid
                      : tid < 2 * Dk ? (p.key_heads + key_head - 1) * Dk + tid
                                     : 2 * p.key_heads * Dk + column + tid - 2 * Dk;
  const bool keeper = tid >= 2 * Dk || first_of_key_head;  // of this channel's window and journal

  if (wait_first) wait_for_predecessor();
  float* const S_own = d.S + static_cast<std::size_t>(column) * Dk + own;
  if (has_state) {
#pragma unroll
    for (int i = 0; i < Dk; i += 4 * lanes) copy_async<16>(S + own + i, S_own + i);
  }
  float4 taps{};  // of the gates: A, dt_bias
  if (has_channel) {
#pragma unroll 1
    for (int j = 0; j < window; ++j) {
      const int row = pending + j;
      copy_async<4>(inputs[j] + tid, (row < window ? d.window + row * C : d.journal + (row - window) * C) + channel);
    }
    if (convolve) taps = reinterpret_cast<const float4*>(p.taps)[channel];
  } else if (convolve) {
    taps.x = p.A[head], taps.y = p.dt_bias[head];
  }

  // First what is pending, then the rows of this pass.  Who decodes rehearses instead, on whatever there is, and keeps
  // nothing of it: then the code has come through memory when what it waits for is there.
#pragma unroll 1
  for (bool now = !decodes && pending == 0;; now = true) {
    const int rows = now || decodes ? count : pending;
    if (now && !wait_first) wait_for_predecessor();
    if (has_channel) {
      const float* from = (now       ? p.x + d.begin * p.x_stride
                           : decodes ? d.window
                                     : Journal::outputs(d.journal, 0, C)) +
                          channel;
      const std::ptrdiff_t stride = now ? p.x_stride : C;
      float* const to = (now || decodes ? inputs[window] : outputs[0]) + tid;
#pragma unroll 1
      for (int row = 0; row < rows; ++row, from += stride) copy_async<4>(to + row * width, from);
      await_own_copies();
#pragma unroll 1
      for (int row = 0; (now || decodes) && row < rows; ++row) {
        const float* const x = inputs[row] + tid;
        const float last = x[window * width];
        float y = last;
        if (convolve) {
          y = __fmaf_rn(taps.x, x[0], 0.0f);
          y = __fmaf_rn(taps.z, x[2 * width], __fmaf_rn(taps.y, x[width], y));
          y = conv_silu(__fmaf_rn(taps.w, last, y));
        }
        outputs[row][tid] = y;
        if (tentative && keeper) {
          if (convolve) Journal::inputs(d.next_journal, row, C)[channel] = last;
          Journal::outputs(d.next_journal, row, C)[channel] = y;
        }
      }
    } else if (const int row = tid - width; row < rows) {
      float beta, g;
      if (now || decodes) {
        const auto input = [&](const float* of, std::ptrdiff_t stride) {
          return (now ? of + (d.begin + row) * stride : p.A)[head];
        };
        beta = input(p.b, p.b_stride), g = input(p.a, p.a_stride);
        if (convolve) beta = gate_beta(beta), g = gate_g(__fadd_rn(g, taps.y), taps.x);
        if (tentative && first_of_head) {
          Journal::beta(d.next_journal, row, C, p.value_heads)[head] = beta;
          Journal::g(d.next_journal, row, C, p.value_heads)[head] = g;
        }
      } else {
        beta = Journal::beta(d.journal, row, C, p.value_heads)[head];
        g = Journal::g(d.journal, row, C, p.value_heads)[head];
      }
      gates[row] = {beta, quick_exp(g)};
    }
    __syncthreads();

    // With r = 1 / |k|, a = exp(g):  d = beta (v - a r S k),  S' = a S + d r k,  S' q = a S q + d r (k . q).
    // So one pass over S gives all that the update and the output need.
    if (has_state) {
      if (now && pending > 0 && (tentative || rows == 0)) {
#pragma unroll 1
        for (int i = 0; i < Dk; i += 4 * lanes)
          *reinterpret_cast<float4*>(S_own + i) = *reinterpret_cast<const float4*>(S + own + i);
      }
#pragma unroll 1
      for (int row = 0; row < rows; ++row) {
        const float* const query = outputs[row] + tid % lanes * 4;
        float sk = 0, sq = 0, kq = 0, kk = 0, qq = 0;
        const auto add = [&](float s, float k, float q) {
          sk = __fmaf_rn(s, k, sk), sq = __fmaf_rn(s, q, sq), kq = __fmaf_rn(k, q, kq);
          kk = __fmaf_rn(k, k, kk), qq = __fmaf_rn(q, q, qq);
        };
#pragma unroll 1
        for (int i = 0; i < Dk; i += 4 * lanes) {
          const float4 s = *reinterpret_cast<const float4*>(S + own + i);
          const float4 q = *reinterpret_cast<const float4*>(query + i);
          const float4 k = *reinterpret_cast<const float4*>(query + Dk + i);
          add(s.x, k.x, q.x), add(s.y, k.y, q.y), add(s.z, k.z, q.z), add(s.w, k.w, q.w);
        }
        const auto sum_lanes = [](float& sum, int offset) {
          sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffff, sum, offset));
        };
#pragma unroll 1
        for (int offset = lanes / 2; offset > 0; offset /= 2)
          sum_lanes(sk, offset), sum_lanes(sq, offset), sum_lanes(kq, offset), sum_lanes(kk, offset),
              sum_lanes(qq, offset);
        const float rk = rsqrt_fast(__fadd_rn(kk, 1e-6f));
        const float rq = rsqrt_fast(__fmul_rn(__fadd_rn(qq, 1e-6f), static_cast<float>(Dk)));
        const auto [beta, decay] = gates[row];
        const float known = __fmul_rn(__fmul_rn(decay, rk), sk);
        const float delta = __fmul_rn(__fmul_rn(beta, __fsub_rn(outputs[row][2 * Dk + v], known)), rk);
        if (now && tid % lanes == 0)
          p.out[(d.begin + row) * p.out_stride + column + v] =
              __fmul_rn(rq, __fmaf_rn(delta, kq, __fmul_rn(decay, sq)));
        const bool keep = now && !tentative && row + 1 == rows;
        const auto update = [&](float& s, float k) { s = __fmaf_rn(delta, k, __fmul_rn(decay, s)); };
#pragma unroll 1
        for (int i = 0; i < Dk; i += 4 * lanes) {
          float4& state = *reinterpret_cast<float4*>(S + own + i);
          const float4 k = *reinterpret_cast<const float4*>(query + Dk + i);
          float4 s = state;
          update(s.x, k.x), update(s.y, k.y), update(s.z, k.z), update(s.w, k.w);
          if (now || !decodes) state = s;
          if (keep) *reinterpret_cast<float4*>(S_own + i) = s;
        }
      }
    }
    if (now) break;
    __syncthreads();  // outputs and gates are read
  }
  if (!has_channel || !keeper || (!decodes && !d.next_window)) return;
#pragma unroll 1
  for (int j = 0; j < window; ++j) d.next_window[j * C + channel] = inputs[(tentative ? 0 : count) + j][tid];
}

bool few_fit(DeltaShape s) noexcept {
  return (s.key_dim == 64 || s.key_dim == 128) && s.value_dim % few_columns == 0 && s.conv_kernel == few_taps;
}

template <bool decodes, int N>
void launch_few(const Device& device, const FewRows& p, const DeltaBatch<N>& batch, int segments, int key_dim) {
  const dim3 grid(static_cast<unsigned>(p.key_heads * segments), static_cast<unsigned>(p.value_heads / p.key_heads),
                  static_cast<unsigned>(p.value_dim / few_columns));
  if (key_dim == 128)
    launch(device, few_rows<128, N, decodes>, grid, few_threads<128>, 0, p, batch);
  else
    launch(device, few_rows<64, N, decodes>, grid, few_threads<64>, 0, p, batch);
}

// --- Any shape ---

constexpr int any_threads = 128, any_rows = any_threads / 32;

struct AnyRows {
  const float *qkv, *beta, *g;
  float* out;
  std::ptrdiff_t qkv_stride, beta_stride, g_stride, out_stride;
  int key_heads, value_heads, key_dim, value_dim, channels;
};

// A warp owns a row of the transposed state of a head, in shared memory, and takes token after token.
__global__ void __launch_bounds__(any_threads) any_delta_rule(const AnyRows p, const DeltaRows d) {
  extern __shared__ float shared[];
  let_successor_start();
  wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int head = static_cast<int>(blockIdx.y), v = static_cast<int>(blockIdx.x) * any_rows + warp;
  if (v >= p.value_dim) return;
  const int ratio = p.value_heads / p.key_heads, key_head = head / ratio, Dk = p.key_dim, C = p.channels;
  const int v_channel = 2 * p.key_heads * Dk + head * p.value_dim + v;
  float* S = shared + warp * Dk;
  float* const S_row =
      d.S + (static_cast<std::size_t>(head) * static_cast<std::size_t>(p.value_dim) + static_cast<std::size_t>(v)) *
                static_cast<std::size_t>(Dk);
  for (int i = lane; i < Dk; i += 32) S[i] = S_row[i];

  const auto step = [&](const float* x, float beta, float g) {  // a row of the convolution's output
    const float *q = x + key_head * Dk, *k = x + (p.key_heads + key_head) * Dk;
    float sk = 0, sq = 0, kq = 0, kk = 0, qq = 0;
    for (int i = lane; i < Dk; i += 32) {
      const float key = k[i], query = q[i], s = S[i];
      sk = __fmaf_rn(s, key, sk), sq = __fmaf_rn(s, query, sq), kq = __fmaf_rn(key, query, kq);
      kk = __fmaf_rn(key, key, kk), qq = __fmaf_rn(query, query, qq);
    }
    sk = warp_sum(sk), sq = warp_sum(sq), kq = warp_sum(kq), kk = warp_sum(kk), qq = warp_sum(qq);
    const float rk = rsqrt_fast(__fadd_rn(kk, 1e-6f));
    const float rq = rsqrt_fast(__fmul_rn(__fadd_rn(qq, 1e-6f), static_cast<float>(Dk)));
    const float decay = quick_exp(g), known = __fmul_rn(__fmul_rn(decay, rk), sk);
    const float delta = __fmul_rn(__fmul_rn(beta, __fsub_rn(x[v_channel], known)), rk);
    for (int i = lane; i < Dk; i += 32) S[i] = __fmaf_rn(delta, k[i], __fmul_rn(decay, S[i]));
    return __fmul_rn(rq, __fmaf_rn(delta, kq, __fmul_rn(decay, sq)));
  };
  const auto store = [&] {
    for (int i = lane; i < Dk; i += 32) S_row[i] = S[i];
  };

  for (int row = 0; row < d.pending; ++row) {
    step(Journal::outputs(d.journal, row, C), Journal::beta(d.journal, row, C, p.value_heads)[head],
         Journal::g(d.journal, row, C, p.value_heads)[head]);
  }
  if (d.pending > 0 && (d.next_journal || d.count == 0)) store();
  for (int row = 0; row < d.count; ++row) {
    const std::ptrdiff_t t = d.begin + row;
    const float *x = p.qkv + t * p.qkv_stride, beta = p.beta[t * p.beta_stride + head], g = p.g[t * p.g_stride + head];
    const float o = step(x, beta, g);
    if (lane == 0) p.out[t * p.out_stride + head * p.value_dim + v] = o;
    if (!d.next_journal) continue;
    float* y = Journal::outputs(d.next_journal, row, C);
    if (lane == 0) y[v_channel] = x[v_channel];
    if (v != 0) continue;
    if (lane == 0) {
      Journal::beta(d.next_journal, row, C, p.value_heads)[head] = beta;
      Journal::g(d.next_journal, row, C, p.value_heads)[head] = g;
    }
    for (int i = lane; i < Dk && head % ratio == 0; i += 32) {
      y[key_head * Dk + i] = x[key_head * Dk + i];
      y[(p.key_heads + key_head) * Dk + i] = x[(p.key_heads + key_head) * Dk + i];
    }
  }
  if (!d.next_journal && d.count > 0) store();
}

// --- Convolution and gates of many rows ---

constexpr int conv_threads = 256, conv_rows = 16;

struct ConvRows {
  const float* x;
  float* out;
  std::ptrdiff_t x_stride, out_stride;
  const float* taps;
  int K, channels;
};

// Row `t` of the segment's inputs; negative ones are of the past.
__device__ inline float conv_input(const ConvRows& p, const DeltaRows& d, int t, int channel) {
  return t < 0 ? past_input(d, p.K, p.channels, p.K - 1 + t, channel) : p.x[(d.begin + t) * p.x_stride + channel];
}

// What the convolution leaves to the next pass.
__device__ inline void keep_inputs(const ConvRows& p, const DeltaRows& d, int channel) {
  for (int row = 0; d.next_journal && row < d.count; ++row)
    Journal::inputs(d.next_journal, row, p.channels)[channel] = conv_input(p, d, row, channel);
  const int last = d.next_journal ? 0 : d.count;
  for (int j = 0; d.next_window && j < p.K - 1; ++j)
    d.next_window[j * p.channels + channel] = conv_input(p, d, last - (p.K - 1) + j, channel);
}

__global__ void __launch_bounds__(conv_threads) any_conv(const ConvRows p, const DeltaRows d) {
  let_successor_start();
  wait_for_predecessor();
  const int channel = static_cast<int>(blockIdx.x) * conv_threads + static_cast<int>(threadIdx.x);
  if (channel >= p.channels) return;
  const int begin = static_cast<int>(blockIdx.y) * conv_rows, end = min(begin + conv_rows, d.count);
  for (int t = begin; t < end; ++t) {
    float sum = 0;
    for (int j = 0; j < p.K; ++j)
      sum = __fmaf_rn(p.taps[channel * p.K + j], conv_input(p, d, t - (p.K - 1) + j, channel), sum);
    p.out[(d.begin + t) * p.out_stride + channel] = conv_silu(sum);
  }
  if (blockIdx.y + 1 == gridDim.y) keep_inputs(p, d, channel);
}

// K = 4, four channels a thread.
__global__ void __launch_bounds__(conv_threads) wide_conv(const ConvRows p, const DeltaRows d) {
  let_successor_start();
  wait_for_predecessor();
  const int channel = 4 * (static_cast<int>(blockIdx.x) * conv_threads + static_cast<int>(threadIdx.x));
  if (channel >= p.channels) return;
  const int begin = static_cast<int>(blockIdx.y) * conv_rows, rows = min(conv_rows, d.count - begin);
  const float* x = p.x + (d.begin + begin) * p.x_stride + channel;
  float* out = p.out + (d.begin + begin) * p.out_stride + channel;
  float4 taps[4], in[3], before[3];
#pragma unroll
  for (int c = 0; c < 4; ++c) taps[c] = reinterpret_cast<const float4*>(p.taps)[channel + c];
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    if (begin > 0) {  // and so no less than 3
      in[j] = *reinterpret_cast<const float4*>(x - (3 - j) * p.x_stride);
    } else {
      in[j] = {past_input(d, 4, p.channels, j, channel), past_input(d, 4, p.channels, j, channel + 1),
               past_input(d, 4, p.channels, j, channel + 2), past_input(d, 4, p.channels, j, channel + 3)};
    }
    before[j] = in[j];
  }
  const auto one = [](float4 tap, float x0, float x1, float x2, float x3) {
    return conv_silu(__fmaf_rn(tap.w, x3, __fmaf_rn(tap.z, x2, __fmaf_rn(tap.y, x1, __fmaf_rn(tap.x, x0, 0.0f)))));
  };
#pragma unroll 4
  for (int t = 0; t < rows; ++t) {
    const float4 last = *reinterpret_cast<const float4*>(x + t * p.x_stride);
    *reinterpret_cast<float4*>(out + t * p.out_stride) = {
        one(taps[0], in[0].x, in[1].x, in[2].x, last.x), one(taps[1], in[0].y, in[1].y, in[2].y, last.y),
        one(taps[2], in[0].z, in[1].z, in[2].z, last.z), one(taps[3], in[0].w, in[1].w, in[2].w, last.w)};
    if (d.next_journal)
      *reinterpret_cast<float4*>(Journal::inputs(d.next_journal, begin + t, p.channels) + channel) = last;
    in[0] = in[1], in[1] = in[2], in[2] = last;
  }
  if (blockIdx.y + 1 != gridDim.y || !d.next_window) return;
#pragma unroll
  for (int j = 0; j < 3; ++j)
    *reinterpret_cast<float4*>(d.next_window + j * p.channels + channel) = d.next_journal ? before[j] : in[j];
}

struct GateRows {
  const float *b, *a, *A, *dt_bias;
  float *beta, *g;
  std::ptrdiff_t b_stride, a_stride, beta_stride, g_stride;
  int rows, heads;
};

__global__ void __launch_bounds__(256) gates_of_rows(const GateRows p) {
  let_successor_start();
  wait_for_predecessor();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= static_cast<std::int64_t>(p.rows) * p.heads) return;
  const std::ptrdiff_t t = i / p.heads;
  const int head = static_cast<int>(i % p.heads);
  p.beta[t * p.beta_stride + head] = gate_beta(p.b[t * p.b_stride + head]);
  p.g[t * p.g_stride + head] = gate_g(__fadd_rn(p.a[t * p.a_stride + head], p.dt_bias[head]), p.A[head]);
}

// --- Host ---

using Deltas = std::span<const Segment<CudaDeltaState>>;

DeltaRows describe(const Segment<CudaDeltaState>& s) {
  CudaDeltaState& state = *s.state;
  const bool moves = state.accepted() > 0 || (!s.tentative && s.count > 0);
  return {state.S(),
          state.window(),
          moves ? state.next_window() : nullptr,
          state.accepted() > 0 ? state.journal() : nullptr,
          s.tentative ? state.next_journal() : nullptr,
          s.begin,
          s.count,
          state.accepted()};
}

void conv_segment(const Device& device, CudaTensor out, CudaTensor x, const float* taps, int K, const DeltaRows& d) {
  const ConvRows p{x.data, out.data, x.stride, out.stride, taps, K, x.n_cols};
  const bool wide = K == 4 && taps && x.n_cols % 4 == 0 && x.stride % 4 == 0 && out.stride % 4 == 0 &&
                    aligned_to_16(x.data) && aligned_to_16(out.data) && aligned_to_16(taps);
  const int lanes = wide ? x.n_cols / 4 : x.n_cols;
  const dim3 grid(static_cast<unsigned>((lanes + conv_threads - 1) / conv_threads),
                  static_cast<unsigned>(std::max(1, (d.count + conv_rows - 1) / conv_rows)));
  launch(device, wide ? wide_conv : any_conv, grid, conv_threads, 0, p, d);
}

void any_segment(const Device& device, CudaTensor out, CudaTensor qkv, CudaTensor beta, CudaTensor g, DeltaShape s,
                 const DeltaRows& d) {
  const AnyRows p{qkv.data,   beta.data,   g.data,        out.data,  qkv.stride,  beta.stride, g.stride,
                  out.stride, s.key_heads, s.value_heads, s.key_dim, s.value_dim, s.conv_dim()};
  const dim3 grid(static_cast<unsigned>((s.value_dim + any_rows - 1) / any_rows), static_cast<unsigned>(s.value_heads));
  launch(device, any_delta_rule, grid, any_threads, sizeof(float) * any_rows * static_cast<std::size_t>(s.key_dim), p,
         d);
}

// Many rows in chunks if the shape allows it, else one by one.
void many_segment(const Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor qkv, CudaTensor beta,
                  CudaTensor g, DeltaShape shape, const DeltaRows& d) {
  if (!chunks_fit(shape)) return any_segment(device, out, qkv, beta, g, shape, d);
  delta_chunks(device, scratch, out.rows(d.begin, d.count), qkv.rows(d.begin, d.count), beta.rows(d.begin, d.count),
               g.rows(d.begin, d.count), shape, d.S);
}

void few_segments(const Device& device, const FewRows& p, DeltaShape shape, std::span<const DeltaRows> rows) {
  for (std::size_t i = 0; i < rows.size(); i += batch_segments) {
    const auto part = rows.subspan(i, std::min<std::size_t>(batch_segments, rows.size() - i));
    if (part.size() == 1) {
      const DeltaRows& d = part[0];
      const bool decodes =
          d.count == 1 && d.pending == 0 && !d.next_journal && d.next_window && p.taps && !p.wait_first;
      (decodes ? launch_few<true, 1> : launch_few<false, 1>)(device, p, {d}, 1, shape.key_dim);
    } else {
      DeltaBatch<batch_segments> batch{};
      std::copy(part.begin(), part.end(), batch.rows);
      launch_few<false>(device, p, batch, static_cast<int>(part.size()), shape.key_dim);
    }
  }
}

FewRows few_parameters(CudaTensor out, CudaTensor x, CudaTensor b, CudaTensor a, DeltaShape s) {
  return {x.data,  b.data,  a.data,  out.data,    x.stride,      b.stride,    a.stride,     out.stride,
          nullptr, nullptr, nullptr, s.key_heads, s.value_heads, s.value_dim, s.conv_dim(), false};
}

// What was accepted enters S and the window.
void fold(const Device& device, CudaDeltaState& state, DeltaShape shape) {
  if (state.accepted() == 0) return;
  const DeltaRows d = describe({0, 0, 0, &state});
  if (few_fit(shape)) {
    FewRows p = few_parameters({}, {}, {}, {}, shape);
    p.wait_first = true;
    few_segments(device, p, shape, {&d, 1});
  } else {
    CudaTensor nothing;
    nothing.n_cols = shape.conv_dim();
    conv_segment(device, nothing, nothing, nullptr, shape.conv_kernel, d);
    any_segment(device, {}, {}, {}, {}, shape, d);
  }
  state.passed(0, false);
}

}  // namespace

void settle(const Device& device, CudaDeltaState& state, DeltaShape shape) {
  fold(device, state, shape);
  const LaunchRecord* record = device.record();
  if (!record || !record->gathering()) state.settled();  // else the journal is yet to be read
}

void causal_conv1d(const Device& device, CudaTensor out, CudaTensor x, const float* taps, int conv_kernel,
                   Deltas segments) {
  for (const Segment<CudaDeltaState>& s : segments) {
    fold(device, *s.state, s.state->shape());
    const DeltaRows d = describe(s);
    conv_segment(device, out, x, taps, conv_kernel, d);
    if (d.next_window) s.state->window_passed();
  }
}

void delta_gates(const Device& device, CudaTensor beta, CudaTensor g, CudaTensor b, CudaTensor a, const float* A,
                 const float* dt_bias) {
  const GateRows p{b.data,   a.data,   A,           dt_bias,  beta.data, g.data,
                   b.stride, a.stride, beta.stride, g.stride, b.n_rows,  b.n_cols};
  const std::int64_t count = static_cast<std::int64_t>(b.n_rows) * b.n_cols;
  launch(device, gates_of_rows, static_cast<unsigned>((count + 255) / 256), 256, 0, p);
}

void gated_delta_rule(const Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor qkv, CudaTensor beta,
                      CudaTensor g, DeltaShape shape, Deltas segments) {
  for (const Segment<CudaDeltaState>& s : segments) {
    fold(device, *s.state, shape);
    DeltaRows d = describe(s);
    d.next_window = nullptr;  // causal_conv1d() was there before
    if (s.count > most_few_rows) {
      many_segment(device, scratch, out, qkv, beta, g, shape, d);
    } else if (few_fit(shape)) {
      FewRows p = few_parameters(out, qkv, beta, g, shape);
      p.wait_first = true;
      few_segments(device, p, shape, {&d, 1});
    } else {
      any_segment(device, out, qkv, beta, g, shape, d);
    }
    s.state->rule_passed(s.count, s.tentative);
  }
}

void delta_net(const Device& device, DeviceScratch& scratch, CudaTensor o, const DeltaNetInputs& in, DeltaShape shape,
               Deltas segments) {
  const bool fit = few_fit(shape) && aligned_to_16(in.taps);
  const auto is_few = [&](const Segment<CudaDeltaState>& s) { return fit && s.count <= most_few_rows; };
  FewRows p = few_parameters(o, in.qkv, in.b, in.a, shape);
  p.taps = in.taps, p.A = in.A, p.dt_bias = in.dt_bias;
  DeltaRows few[batch_segments];
  std::size_t waiting = 0, all_few = 0;
  const auto start = [&] {
    if (waiting > 0) few_segments(device, p, shape, std::span(few).first(waiting));
    waiting = 0;
  };
  for (const Segment<CudaDeltaState>& s : segments) {
    if (!is_few(s)) continue;
    if (waiting == batch_segments) start();
    few[waiting++] = describe(s), ++all_few;
  }
  start();
  if (all_few < segments.size()) delta_gates(device, in.beta, in.g, in.b, in.a, in.A, in.dt_bias);
  for (const Segment<CudaDeltaState>& s : segments) {
    if (!is_few(s)) {
      if (s.count > most_few_rows) fold(device, *s.state, shape);
      const DeltaRows d = describe(s);
      conv_segment(device, in.conv, in.qkv, in.taps, shape.conv_kernel, d);
      if (s.count > most_few_rows)
        many_segment(device, scratch, o, in.conv, in.beta, in.g, shape, d);
      else
        any_segment(device, o, in.conv, in.beta, in.g, shape, d);
    }
    s.state->passed(s.count, s.tentative);
  }
}

}  // namespace qwen3next::cuda
