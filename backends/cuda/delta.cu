// DeltaNet for few rows, and for shapes that nothing here is made for.  Many rows: delta_chunks.cu.

#include <algorithm>

#include "backends/cuda/delta.cuh"

namespace qwen3next::cuda {

namespace {

constexpr int most_few_rows = 8;
constexpr int batch_segments = 64;

// ---- One launch for few rows
// -----------------------------------------------------------------------------------------

constexpr int few_columns = 32, few_taps = 4;
constexpr int state_threads = 4 * few_columns;

struct FewRows {
  const float* x;      // [T, channels] input of the convolution; its output if taps is null
  const float *b, *a;  // [T, Hv]; beta and g if taps is null
  float* out;          // [T, Hv Dv]
  std::ptrdiff_t x_stride, b_stride, a_stride, out_stride;
  const float *taps, *A, *dt_bias;
  int key_heads, value_heads, value_dim, channels;
  bool wait_first;  // the kernel before may have written the state
};

// A thread block owns `few_columns` rows of the transposed state of a head, in registers of `state_threads` threads: 8
// lanes for two rows.  What its head needs of the convolution it computes itself, as the other blocks of the head do;
// one of them keeps it.  A single sequence waits for its one block: it has a thread for each channel, and a warp for
// the gates.  In a batch there are other blocks to run.
//
// Every sum has an order of its own, whatever the number of rows, and each product is rounded as written here: rows
// that come together are bit for bit rows that come one by one.
template <int N>
constexpr int few_threads = N == 1 ? 320 : 160;

template <int Dk, int N>
__global__ void __launch_bounds__(few_threads<N>, N == 1 ? 1 : 4)
    few_rows(const FewRows p, const __grid_constant__ DeltaBatch<N> batch) {
  constexpr int quads = Dk / 32, width = 2 * Dk + few_columns, window = few_taps - 1;
  constexpr int threads = few_threads<N>, slots = (width + threads - 1) / threads;
  __shared__ __align__(16) float conv[most_few_rows][width];
  __shared__ float2 gates[most_few_rows];  // beta, exp(g)

  const DeltaRows& d = batch.rows[N == 1 ? 0 : blockIdx.y];
  const int tid = static_cast<int>(threadIdx.x), groups = p.value_dim / few_columns;
  const int head = static_cast<int>(blockIdx.x) / groups, group = static_cast<int>(blockIdx.x) % groups;
  const int ratio = p.value_heads / p.key_heads, key_head = head / ratio;
  const int v = tid / 32 * 8 + tid % 32 / 8, part = tid % 8, C = p.channels;  // rows v, v + 4
  const int column = head * p.value_dim + group * few_columns;
  const bool has_state = tid < state_threads;
  const auto has_channel = [&](int s) { return tid + s * threads < width; };
  const auto channel_of = [&](int s) {
    const int c = tid + s * threads;
    return c < Dk       ? key_head * Dk + c
           : c < 2 * Dk ? (p.key_heads + key_head - 1) * Dk + c
                        : 2 * p.key_heads * Dk + column + c - 2 * Dk;
  };

  if (p.wait_first) wait_for_predecessor();
  float* const S_row = d.S + (static_cast<std::size_t>(column) + static_cast<std::size_t>(v)) * Dk + part * 4;
  float4 S[2][quads];
  if (has_state) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < quads; ++j) S[i][j] = *reinterpret_cast<const float4*>(S_row + i * 4 * Dk + j * 32);
    }
  }
  const auto store = [&] {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < quads; ++j) *reinterpret_cast<float4*>(S_row + i * 4 * Dk + j * 32) = S[i][j];
    }
  };
  float past[slots][window], taps[slots][few_taps], A = 0, dt_bias = 0;
#pragma unroll
  for (int s = 0; s < slots; ++s) {
    if (!has_channel(s)) continue;
#pragma unroll
    for (int j = 0; j < window; ++j) past[s][j] = past_input(d, few_taps, C, j, channel_of(s));
    if (p.taps) {
      const float4 t = *reinterpret_cast<const float4*>(p.taps + channel_of(s) * few_taps);
      taps[s][0] = t.x, taps[s][1] = t.y, taps[s][2] = t.z, taps[s][3] = t.w;
    }
  }
  if (p.taps) A = p.A[head], dt_bias = p.dt_bias[head];

  // With r = 1 / |k|, a = exp(g):  d = beta (v - a r S k),  S' = a S + d r k,  S' q = a S q + d r (k . q).
  // So one pass over S gives all that the update and the output need.
  const auto step = [&](int row, float(&out)[2]) {
    const float* x = conv[row];
    float4 k[quads];
    float sk[2] = {}, sq[2] = {}, kq = 0, kk = 0, qq = 0;
    const auto add = [&](float s0, float s1, float key, float query) {
      sk[0] = __fmaf_rn(s0, key, sk[0]), sk[1] = __fmaf_rn(s1, key, sk[1]);
      sq[0] = __fmaf_rn(s0, query, sq[0]), sq[1] = __fmaf_rn(s1, query, sq[1]);
      kq = __fmaf_rn(key, query, kq), kk = __fmaf_rn(key, key, kk), qq = __fmaf_rn(query, query, qq);
    };
#pragma unroll
    for (int j = 0; j < quads; ++j) {
      const float4 q = *reinterpret_cast<const float4*>(x + j * 32 + part * 4);
      k[j] = *reinterpret_cast<const float4*>(x + Dk + j * 32 + part * 4);
      add(S[0][j].x, S[1][j].x, k[j].x, q.x), add(S[0][j].y, S[1][j].y, k[j].y, q.y);
      add(S[0][j].z, S[1][j].z, k[j].z, q.z), add(S[0][j].w, S[1][j].w, k[j].w, q.w);
    }
    const auto sum_lanes = [](float& sum, int offset) {
      sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffff, sum, offset));
    };
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) {
      sum_lanes(sk[0], offset), sum_lanes(sk[1], offset), sum_lanes(kk, offset), sum_lanes(kq, offset);
      sum_lanes(sq[0], offset), sum_lanes(sq[1], offset), sum_lanes(qq, offset);
    }
    const float rk = rsqrtf(__fadd_rn(kk, 1e-6f));
    const float rq = rsqrtf(__fmul_rn(__fadd_rn(qq, 1e-6f), static_cast<float>(Dk)));
    const auto [beta, decay] = gates[row];
    const auto update = [&](float& s, float delta, float key) { s = __fmaf_rn(delta, key, __fmul_rn(decay, s)); };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float known = __fmul_rn(__fmul_rn(decay, rk), sk[i]);
      const float delta = __fmul_rn(__fmul_rn(beta, __fsub_rn(x[2 * Dk + v + 4 * i], known)), rk);
      out[i] = __fmul_rn(rq, __fmaf_rn(delta, kq, __fmul_rn(decay, sq[i])));
#pragma unroll
      for (int j = 0; j < quads; ++j) {
        update(S[i][j].x, delta, k[j].x), update(S[i][j].y, delta, k[j].y);
        update(S[i][j].z, delta, k[j].z), update(S[i][j].w, delta, k[j].w);
      }
    }
  };

  const int gate_row = tid - (threads - 32);
  float o[2];
  if (d.pending > 0) {
#pragma unroll
    for (int s = 0; s < slots; ++s) {
      for (int row = 0; row < d.pending && has_channel(s); ++row)
        conv[row][tid + s * threads] = Journal::outputs(d.journal, row, C)[channel_of(s)];
    }
    if (gate_row >= 0 && gate_row < d.pending) {
      gates[gate_row] = {Journal::beta(d.journal, gate_row, C, p.value_heads)[head],
                         expf(Journal::g(d.journal, gate_row, C, p.value_heads)[head])};
    }
    __syncthreads();
    for (int row = 0; row < d.pending && has_state; ++row) step(row, o);
    __syncthreads();
  }

  if (!p.wait_first) wait_for_predecessor();
  let_successor_start();

  constexpr int ahead = N == 1 ? most_few_rows : 1;  // rows read at once
  const auto input = [&](int s, int row) { return p.x[(d.begin + row) * p.x_stride + channel_of(s)]; };
  float fresh[slots][ahead];
#pragma unroll
  for (int s = 0; s < slots; ++s) {
#pragma unroll
    for (int row = 0; row < ahead; ++row) {
      if (row < d.count && has_channel(s)) fresh[s][row] = input(s, row);
    }
  }
  if (gate_row >= 0 && gate_row < d.count) {
    float beta = p.b[(d.begin + gate_row) * p.b_stride + head], g = p.a[(d.begin + gate_row) * p.a_stride + head];
    if (p.taps) beta = sigmoid(beta), g = __fmul_rn(A, softplus(__fadd_rn(g, dt_bias)));
    gates[gate_row] = {beta, expf(g)};
    if (d.next_journal && group == 0) {
      Journal::beta(d.next_journal, gate_row, C, p.value_heads)[head] = beta;
      Journal::g(d.next_journal, gate_row, C, p.value_heads)[head] = g;
    }
  }
#pragma unroll
  for (int s = 0; s < slots; ++s) {
    if (!has_channel(s)) continue;
    const int c = tid + s * threads, channel = channel_of(s);
    const bool keeper = c >= 2 * Dk || (head % ratio == 0 && group == 0);  // of this channel's window and journal
    float last[window];                                                    // of the window after the rows
#pragma unroll
    for (int j = 0; j < window; ++j) last[j] = past[s][j];
#pragma unroll(ahead)
    for (int row = 0; row < most_few_rows; ++row) {
      if (row >= d.count) break;
      const float x = N == 1 || row == 0 ? fresh[s][N == 1 ? row : 0] : input(s, row);
      float y = x;
      if (p.taps) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < window; ++j) sum = __fmaf_rn(taps[s][j], last[j], sum);
        y = silu(__fmaf_rn(taps[s][window], x, sum));
      }
#pragma unroll
      for (int j = 0; j + 1 < window; ++j) last[j] = last[j + 1];
      last[window - 1] = x;
      conv[row][c] = y;
      if (d.next_journal && keeper) {
        if (p.taps) Journal::inputs(d.next_journal, row, C)[channel] = x;
        Journal::outputs(d.next_journal, row, C)[channel] = y;
      }
    }
    if (d.next_window && keeper) {
#pragma unroll
      for (int j = 0; j < window; ++j) d.next_window[j * C + channel] = d.next_journal ? past[s][j] : last[j];
    }
  }
  __syncthreads();
  if (!has_state) return;
  if (d.pending > 0 && (d.next_journal || d.count == 0)) store();
  for (int row = 0; row < d.count; ++row) {
    step(row, o);
    if (part < 2) p.out[(d.begin + row) * p.out_stride + column + v + 4 * part] = part == 0 ? o[0] : o[1];
  }
  if (!d.next_journal && d.count > 0) store();
}

bool few_fit(DeltaShape s) noexcept {
  return (s.key_dim == 64 || s.key_dim == 128) && s.value_dim % few_columns == 0 && s.conv_kernel == few_taps;
}

template <int N>
void launch_few(const Device& device, const FewRows& p, const DeltaBatch<N>& batch, int segments, int key_dim) {
  const dim3 grid(static_cast<unsigned>(p.value_heads * (p.value_dim / few_columns)), static_cast<unsigned>(segments));
  launch(device, key_dim == 128 ? few_rows<128, N> : few_rows<64, N>, grid, few_threads<N>, 0, p, batch);
}

// ---- Any shape
// ---------------------------------------------------------------------------------------------------------

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
  wait_for_predecessor();
  let_successor_start();
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
    const float rk = rsqrtf(__fadd_rn(kk, 1e-6f));
    const float rq = rsqrtf(__fmul_rn(__fadd_rn(qq, 1e-6f), static_cast<float>(Dk)));
    const float decay = expf(g), known = __fmul_rn(__fmul_rn(decay, rk), sk);
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

// ---- Convolution and gates of many rows
// ----------------------------------------------------------------------------------

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
  wait_for_predecessor();
  let_successor_start();
  const int channel = static_cast<int>(blockIdx.x) * conv_threads + static_cast<int>(threadIdx.x);
  if (channel >= p.channels) return;
  const int begin = static_cast<int>(blockIdx.y) * conv_rows, end = min(begin + conv_rows, d.count);
  for (int t = begin; t < end; ++t) {
    float sum = 0;
    for (int j = 0; j < p.K; ++j)
      sum = __fmaf_rn(p.taps[channel * p.K + j], conv_input(p, d, t - (p.K - 1) + j, channel), sum);
    p.out[(d.begin + t) * p.out_stride + channel] = silu(sum);
  }
  if (blockIdx.y + 1 == gridDim.y) keep_inputs(p, d, channel);
}

// K = 4, four channels a thread.
__global__ void __launch_bounds__(conv_threads) wide_conv(const ConvRows p, const DeltaRows d) {
  wait_for_predecessor();
  let_successor_start();
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
    return silu(__fmaf_rn(tap.w, x3, __fmaf_rn(tap.z, x2, __fmaf_rn(tap.y, x1, __fmaf_rn(tap.x, x0, 0.0f)))));
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
  wait_for_predecessor();
  let_successor_start();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= static_cast<std::int64_t>(p.rows) * p.heads) return;
  const std::ptrdiff_t t = i / p.heads;
  const int head = static_cast<int>(i % p.heads);
  p.beta[t * p.beta_stride + head] = sigmoid(p.b[t * p.b_stride + head]);
  p.g[t * p.g_stride + head] = __fmul_rn(p.A[head], softplus(__fadd_rn(p.a[t * p.a_stride + head], p.dt_bias[head])));
}

// ---- Host
// --------------------------------------------------------------------------------------------------------------

using Deltas = std::span<const Segment<CudaDeltaState>>;

bool aligned_to_16(const void* p) noexcept { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

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
      launch_few(device, p, DeltaBatch<1>{part[0]}, 1, shape.key_dim);
    } else {
      DeltaBatch<batch_segments> batch{};
      std::copy(part.begin(), part.end(), batch.rows);
      launch_few(device, p, batch, static_cast<int>(part.size()), shape.key_dim);
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
