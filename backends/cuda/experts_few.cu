#include "backends/cuda/experts_few.hpp"

#include <algorithm>
#include <cassert>

#include "backends/cuda/few.cuh"

namespace qwen3next::cuda {
namespace {

// --- the router, in every thread block for itself ------------------------------------------------------------------

// Shared memory of route(): per expert a probability, and a candidate's probability and id.
struct RouteMemory {
  float* p;
  float* candidate;
  int* candidate_id;
  float* group_max;   // [max_few_experts / 32]
  float* warp_value;  // [32]
  int* count;

  __host__ __device__ static int bytes(int experts) {
    return (experts * 12 + max_few_experts / 32 * 4 + 32 * 4 + 16 + 15) / 16 * 16;
  }
  __device__ RouteMemory(std::byte* at, int experts)
      : p(reinterpret_cast<float*>(at)),
        candidate(p + experts),
        candidate_id(reinterpret_cast<int*>(candidate + experts)),
        group_max(reinterpret_cast<float*>(candidate_id + experts)),
        warp_value(group_max + max_few_experts / 32),
        count(reinterpret_cast<int*>(warp_value + 32)) {}
};

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, step));
  return v;
}

// ids, weights [k] in shared memory = the k largest of softmax(logits).  By all threads; ends with a barrier.
// Candidates are what is not below the k-th largest of the maxima of 32 neighbours: few are left to be ranked.
__device__ void route(const RouteMemory& m, const float* logits, int experts, int k, bool normalise, int* ids,
                      float* weights) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int padded = (experts + 31) / 32 * 32;
  float most = -INFINITY;
  for (int i = thread; i < padded; i += threads) most = fmaxf(most, i < experts ? logits[i] : -INFINITY);
  most = warp_max(most);
  if (lane == 0) m.warp_value[warp] = most;
  if (thread == 0) *m.count = 0;
  __syncthreads();
  most = warp_max(lane < warps ? m.warp_value[lane] : -INFINITY);
  __syncthreads();
  float sum = 0;
  for (int i = thread; i < padded; i += threads) {
    const float p = i < experts ? expf(logits[i] - most) : 0.0f;
    if (i < experts) m.p[i] = p;
    sum += p;
    const float group = warp_max(p);
    if (lane == 0) m.group_max[i / 32] = group;
  }
  sum = warp_sum(sum);
  if (lane == 0) m.warp_value[warp] = sum;
  __syncthreads();
  sum = warp_sum(lane < warps ? m.warp_value[lane] : 0.0f);
  if (!(sum <= 3.4e38f)) {  // NaN: no order, but an order
    if (thread < k) ids[thread] = thread, weights[thread] = normalise ? 1 / static_cast<float>(k) : -1;
    __syncthreads();
    return;
  }
  float threshold = -1;
  if (k <= 32) {
    float mine = -1;
    for (int i = lane; i < padded / 32; i += 32) mine = fmaxf(mine, m.group_max[i]);
    int rank = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const float other = __shfl_sync(0xffffffff, mine, j);
      rank += other > mine || (other == mine && j < lane);
    }
    const unsigned found = __ballot_sync(0xffffffff, rank == k - 1);
    threshold = __shfl_sync(0xffffffff, mine, __ffs(static_cast<int>(found)) - 1);
  }
  for (int i = thread; i < experts; i += threads) {
    if (m.p[i] < threshold) continue;
    const int at = atomicAdd(m.count, 1);
    m.candidate[at] = m.p[i], m.candidate_id[at] = i;
  }
  __syncthreads();
  const int count = *m.count;
  for (int i = thread; i < count; i += threads) {
    const float p = m.candidate[i];
    const int id = m.candidate_id[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) {
      const float other = m.candidate[j];
      rank += other > p || (other == p && m.candidate_id[j] < id);
    }
    if (rank < k) ids[rank] = id, weights[rank] = p / sum;
  }
  __syncthreads();
  float own = 0;
  if (thread < k) {
    float total = 0;
    for (int i = 0; i < k; ++i) total += weights[i];
    own = normalise ? weights[thread] / total : weights[thread];
  }
  __syncthreads();
  if (thread < k) weights[thread] = own;
  __syncthreads();
}

// --- gate and up ---------------------------------------------------------------------------------------------------

// Units of one kind: gate, up or both of the picks, or of the shared expert.
struct Section {
  DType type;
  bool shared;
  int units;       // of all picks, or of the shared expert
  int per_pick;    // of one pick
  int gate_units;  // of these so many are gate's, the others up's
  std::size_t gate_at, up_at, unit_bytes;
  const std::byte *gate, *up;  // of the shared expert
  float gate_scale, up_scale;  // of the shared expert
  int gate_begin, up_begin;    // where their values lie among a pick's
  int gate_rows, up_rows;
};
struct UpWork {
  Section sections[4];
  int count, units;
  float* routed;  // [T, k, routed_width]
  float* shared;  // [T, shared_width]
  int routed_width, shared_width;
  ExpertMatrices experts;
  CudaTensor x, logits;
  Routing routing;
  bool normalise, single;
};

struct UpUnits {
  const Section* section;
  const ExpertMatrices* experts;
  const int* ids;  // of the picks, in shared memory
  int k;
  __device__ __forceinline__ Unit operator()(int unit) const {
    const Section& s = *section;
    const int pick = s.shared ? 0 : unit / s.per_pick;
    int i = unit - pick * s.per_pick;
    const bool up = i >= s.gate_units;
    if (up) i -= s.gate_units;
    if (s.shared) return {(up ? s.up : s.gate) + i * s.unit_bytes, -1};
    return {experts->slot_or_zeros(ids[pick]) + (up ? s.up_at : s.gate_at) + i * s.unit_bytes, pick / k};
  }
};
struct UpResult {
  const Section* section;
  float* to;
  const float* scales;
  const int* ids;
  int width, height;
  float unit_scale;
  __device__ __forceinline__ void operator()(int unit, int row, int n, float sum) const {
    const Section& s = *section;
    const int pick = s.shared ? n : unit / s.per_pick;
    int i = s.shared ? unit : unit - pick * s.per_pick;
    const bool up = i >= s.gate_units;
    if (up) i -= s.gate_units;
    const int of = i * height + row;
    if (of >= (up ? s.up_rows : s.gate_rows)) return;
    float scale = unit_scale;
    if (s.shared) scale *= up ? s.up_scale : s.gate_scale;
    if (!s.shared && scales) scale *= scales[3 * ids[pick] + up];
    to[pick * width + (up ? s.up_begin : s.gate_begin) + of] = sum * scale;
  }
};

template <bool all_types>
__global__ void __launch_bounds__(256, 2) experts_up_kernel(const __grid_constant__ UpWork work) {
  extern __shared__ uint4 shared_memory[];
  __shared__ int ids[few_rows * max_few_slots];
  __shared__ float weights[few_rows * max_few_slots];
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int strips = work.experts.gate.strips(), warps = static_cast<int>(blockDim.x) / 32, k = work.routing.k;
  const SharedRows rows(memory, work.x.n_rows, strips, work.single);
  memory += SharedRows::bytes(work.x.n_rows, strips, work.single);
  // The sums come after routing.
  const RouteMemory route_memory(memory, work.experts.count);
  FewBlock block{rows, reinterpret_cast<float*>(memory), 1, split_of(warps, strips)};
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  const auto share = [&](unsigned b) {
    return static_cast<int>(static_cast<std::int64_t>(work.units) * b / gridDim.x);
  };
  const int begin = share(blockIdx.x), end = share(blockIdx.x + 1);

  wait_for_predecessor();
  let_successor_start();
  for (int n = 0; n < rows.rows; ++n) {
    for (int i = thread; i < strips * strip_cols / 8; i += threads) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int c = 8 * i + j;
        v[j] = c >= work.x.n_cols ? 0.0f
               : work.single      ? work.x.data[n * work.x.stride + c]
                                  : __half2float(__ushort_as_half(work.x.half[n * work.x.stride + c]));
      }
      rows.store(n, i, v);
    }
  }
  if (work.logits.data) {
    // The rows that this block's picks belong to; the first block computes all, to be written.
    int first = work.units, last = -1, before = 0;
    for (int i = 0; i < work.count; before += work.sections[i++].units) {
      const Section& s = work.sections[i];
      if (s.shared) continue;
      const int from = max(begin, before) - before, to = min(end, before + s.units) - before;
      if (from >= to) continue;
      first = min(first, from / s.per_pick / k), last = max(last, (to - 1) / s.per_pick / k);
    }
    if (blockIdx.x == 0) first = 0, last = rows.rows - 1;
    for (int n = first; n <= last; ++n) {
      route(route_memory, work.logits.data + n * work.logits.stride, work.experts.count, k, work.normalise, ids + n * k,
            weights + n * k);
    }
    if (blockIdx.x == 0) {
      for (int i = thread; i < rows.rows * k; i += threads) {
        work.routing.ids[i] = ids[i], work.routing.weights[i] = weights[i];
      }
    }
  } else {
    for (int i = thread; i < rows.rows * k; i += threads) ids[i] = work.routing.ids[i];
  }
  __syncthreads();

  for (int i = 0, before = 0; i < work.count; before += work.sections[i++].units) {
    const Section& s = work.sections[i];
    const int first = max(begin, before) - before, last = min(end, before + s.units) - before;
    if (first >= last) continue;
    block.columns = s.shared ? rows.rows : 1;
    const UpUnits at{&s, &work.experts, ids, k};
    const UpResult done{&s,
                        s.shared ? work.shared : work.routed,
                        work.experts.scales,
                        ids,
                        s.shared ? work.shared_width : work.routed_width,
                        unit_rows(s.type),
                        s.type == DType::f32 ? 1.0f : strip_unit(s.type)};
    multiply_units<all_types>(
        s.type, block, first, last, at, [] {}, done);
    __syncthreads();  // the sums are read
  }
}

// --- SwiGLU and down -----------------------------------------------------------------------------------------------

struct DownWork {
  ExpertMatrices experts;
  Matrix shared_down;
  CudaTensor out, residual, logits, shared_logit;
  Routing routing;
  const float* routed;  // as UpWork has them
  const float* shared;
  int routed_width, shared_width, up_begin, shared_up_begin;
  int strips;  // of the wider of the two
  int slots;   // k, or with the shared expert k + 1
  bool normalise, single;
};

constexpr float down_unit = 16;  // SwiGLU's values are kept as f16 of a sixteenth

template <DType type, class Ready>
__device__ __forceinline__ void down_tile(const std::byte* tile, int strips, const SharedRows& rows, int slot, int lane,
                                          Ready&& ready, float* sums) {
  StripOf<type> next;
  load(next, tile, lane);
  ready();
  float acc[4] = {};
  for (int s = 0; s < strips; ++s) {
    const StripOf<type> x = next;
    if (s + 1 < strips) load(next, tile + (s + 1) * strip_layout(type).bytes, lane);
    StripInput in;
    rows.load(in, slot, s, lane);
    strip_product(x, in, acc);
  }
  store_sums<type>(sums, acc, 1, lane);
}
template <DType type>
__device__ __noinline__ void down_tile_apart(const std::byte* tile, int strips, SharedRows rows, int slot, int lane,
                                             float* sums) {
  down_tile<type>(
      tile, strips, rows, slot, lane, [] {}, sums);
}
__device__ __noinline__ void down_tile_f32(const std::byte* tile, int strips, SharedRows rows, int slot, int lane,
                                           float* sums) {
  const int columns = strips * strip_cols;
  const float* x = rows.single + slot * rows.strips * strip_cols;
  for (int i = 0; i < strip_rows; ++i) {
    const auto* w = reinterpret_cast<const float*>(tile) + i * columns;
    float sum = 0;
    for (int c = lane; c < columns; c += 32) sum = fmaf(w[c], x[c], sum);
    sum = warp_sum(sum);
    if (lane == 0) sums[i] = sum;
  }
}

template <bool all_types>
__global__ void __launch_bounds__(32 * (max_few_slots + 1), 1)
    experts_down_kernel(const __grid_constant__ DownWork work) {
  extern __shared__ uint4 shared_memory[];
  __shared__ int ids[max_few_slots];
  __shared__ float weights[max_few_slots];
  __shared__ float sums[max_few_slots + 1][strip_rows];
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int k = work.routing.k, t = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, slot = thread / 32;
  const SharedRows rows(memory, work.slots, work.strips, work.single);
  memory += SharedRows::bytes(work.slots, work.strips, work.single);
  const bool shared = slot == k;

  if (work.logits.data) {  // two launches old, so it can be read before waiting
    route(RouteMemory(memory, work.experts.count), work.logits.data + t * work.logits.stride, work.experts.count, k,
          work.normalise, ids, weights);
  } else {
    wait_for_predecessor();
    if (thread < k)
      ids[thread] = work.routing.ids[t * k + thread], weights[thread] = work.routing.weights[t * k + thread];
    __syncthreads();
  }

  const Matrix& w = shared ? work.shared_down : work.experts.down;
  const int strips = w.strips();
  const std::byte* base = shared ? w.data : work.experts.slot_or_zeros(ids[slot]) + work.experts.down_at;
  const std::byte* from =
      base + static_cast<std::size_t>(tile) * static_cast<std::size_t>(strips * strip_layout(w.type).bytes);
  const auto ready = [&] {
    for (int i = strip_layout(w.type).bytes + lane * 128; i < strips * strip_layout(w.type).bytes; i += 32 * 128) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
    }
    wait_for_predecessor();
    let_successor_start();
    const int width = w.cols;
    const float* gate = shared ? work.shared + t * work.shared_width : work.routed + (t * k + slot) * work.routed_width;
    const float* up = gate + (shared ? work.shared_up_begin : work.up_begin);
    for (int i = lane; i < work.strips * strip_cols / 8; i += 32) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int c = 8 * i + j;
        v[j] = c < width ? silu(gate[c]) * up[c] * (1 / down_unit) : 0.0f;
      }
      rows.store(slot, i, v);
    }
    __syncwarp();
  };
  if (w.type == DType::q4_k) {
    down_tile<DType::q4_k>(from, strips, rows, slot, lane, ready, sums[slot]);
  } else if (w.type == DType::q6_k) {
    down_tile<DType::q6_k>(from, strips, rows, slot, lane, ready, sums[slot]);
  } else {
    ready();
    if (w.type == DType::f32) down_tile_f32(from, strips, rows, slot, lane, sums[slot]);
    if constexpr (all_types) {
      switch (w.type) {
#define QWEN3NEXT_CASE(name)                                                  \
  case DType::name:                                                           \
    down_tile_apart<DType::name>(from, strips, rows, slot, lane, sums[slot]); \
    break;
        QWEN3NEXT_CASE(f16)
        QWEN3NEXT_CASE(bf16)
        QWEN3NEXT_CASE(f8_e4m3)
        QWEN3NEXT_CASE(q4_0)
        QWEN3NEXT_CASE(q4_1)
        QWEN3NEXT_CASE(q5_0)
        QWEN3NEXT_CASE(q5_1)
        QWEN3NEXT_CASE(q8_0)
        QWEN3NEXT_CASE(q2_k)
        QWEN3NEXT_CASE(q3_k)
        QWEN3NEXT_CASE(q5_k)
        QWEN3NEXT_CASE(iq4_nl)
        QWEN3NEXT_CASE(iq4_xs)
        QWEN3NEXT_CASE(mxfp4)
        QWEN3NEXT_CASE(nvfp4)
#undef QWEN3NEXT_CASE
        default:
          break;  // done above
      }
    }
  }
  __syncthreads();
  const int row = tile * strip_rows + thread;
  if (thread >= strip_rows || row >= work.experts.down.rows) return;
  float unit = down_unit * (work.experts.down.type == DType::f32 ? 1.0f : strip_unit(work.experts.down.type));
  float mix = 0;
  for (int i = 0; i < k; ++i) {
    const float scale = work.experts.scales ? unit * work.experts.scales[3 * ids[i] + 2] : unit;
    mix = fmaf(weights[i], sums[i][thread] * scale, mix);
  }
  if (work.slots > k) {
    const Matrix& s = work.shared_down;
    unit = down_unit * s.scale * (s.type == DType::f32 ? 1.0f : strip_unit(s.type));
    mix = fmaf(sigmoid(work.shared_logit.data[t * work.shared_logit.stride]), sums[k][thread] * unit, mix);
  }
  if (work.out.data) work.out.data[t * work.out.stride + row] = mix;
  if (work.residual.data) work.residual.data[t * work.residual.stride + row] += mix;
}

Section section_of(const Matrix& gate, const Matrix& up, bool with_gate, bool with_up, int up_begin) {
  Section s{};
  s.type = with_gate ? gate.type : up.type;
  s.gate_units = with_gate ? units_of(gate) : 0;
  s.per_pick = s.gate_units + (with_up ? units_of(up) : 0);
  s.unit_bytes = static_cast<std::size_t>(gate.strips()) * static_cast<std::size_t>(strip_layout(s.type).bytes) /
                 static_cast<std::size_t>(strip_rows / unit_rows(s.type));
  s.gate = gate.data, s.up = up.data, s.gate_scale = gate.scale, s.up_scale = up.scale;
  s.gate_rows = gate.rows, s.up_rows = up.rows, s.up_begin = up_begin;
  return s;
}

}  // namespace

void experts_few(const Device& device, DeviceScratch& scratch, const ExpertsFew& e) {
  const ExpertMatrices& m = e.experts->matrices;
  const int T = e.x.n_rows, k = e.routing.k;
  assert(T <= few_rows && k <= max_few_slots && m.count <= max_few_experts);
  if (T == 0) return;
  const bool with_shared = e.shared_logit.data != nullptr;

  UpWork up{};
  up.experts = m, up.x = e.x, up.logits = e.logits, up.routing = e.routing, up.normalise = e.normalise;
  up.routed_width = m.gate.rows + m.up.rows;
  up.shared_width = with_shared ? e.shared_gate.rows + e.shared_up.rows : 0;
  up.routed = scratch.get<float>(static_cast<std::size_t>(T * (k * up.routed_width + up.shared_width)));
  up.shared = up.routed + T * k * up.routed_width;
  bool all_types = false;
  const auto add = [&](const Matrix& gate, const Matrix& up_matrix, bool shared) {
    const auto add_section = [&](bool with_gate, bool with_up) {
      Section s = section_of(gate, up_matrix, with_gate, with_up, gate.rows);
      s.shared = shared, s.units = (shared ? 1 : T * k) * s.per_pick;
      s.gate_at = 0, s.up_at = m.up_at;
      up.units += s.units, up.single |= s.type == DType::f32, all_types |= !usual(s.type);
      up.sections[up.count++] = s;
    };
    if (gate.type == up_matrix.type) return add_section(true, true);
    add_section(true, false), add_section(false, true);
  };
  add(m.gate, m.up, false);
  if (with_shared) add(e.shared_gate, e.shared_up, true);

  constexpr int warps = 8;
  const int blocks = std::min(up.units, 2 * device.properties().multiprocessors);
  const int strips = m.gate.strips();
  const int after = std::max(FewBlock::sum_bytes(warps, T), RouteMemory::bytes(m.count));
  launch(device, all_types ? experts_up_kernel<true> : experts_up_kernel<false>, dim3(static_cast<unsigned>(blocks)),
         dim3(32 * warps), static_cast<std::size_t>(SharedRows::bytes(T, strips, up.single) + after), up);

  DownWork down{};
  down.experts = m, down.out = e.out, down.residual = e.residual, down.logits = e.logits, down.routing = e.routing;
  down.routed = up.routed, down.shared = up.shared;
  down.routed_width = up.routed_width, down.shared_width = up.shared_width, down.up_begin = m.gate.rows;
  down.normalise = e.normalise, down.strips = m.down.strips(), down.slots = k;
  down.single = m.down.type == DType::f32;
  all_types = !usual(m.down.type);
  if (with_shared) {
    down.shared_down = e.shared_down, down.shared_logit = e.shared_logit, down.shared_up_begin = e.shared_gate.rows;
    down.strips = std::max(down.strips, e.shared_down.strips()), ++down.slots;
    down.single |= e.shared_down.type == DType::f32, all_types |= !usual(e.shared_down.type);
  }
  const std::size_t shared =
      static_cast<std::size_t>(SharedRows::bytes(down.slots, down.strips, down.single) + RouteMemory::bytes(m.count));
  launch(device, all_types ? experts_down_kernel<true> : experts_down_kernel<false>,
         dim3(static_cast<unsigned>(m.down.row_tiles()), static_cast<unsigned>(T)),
         dim3(static_cast<unsigned>(32 * down.slots)), shared, down);
}

}  // namespace qwen3next::cuda
