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

// Units of one type: of gate, of up or of both, of all picks or of the shared expert.
struct UpSection {
  DType type;
  bool shared;
  int strip_bytes, height;
  int units, per_pick, gate_units;  // of all picks; of one; of these so many are gate's, the others up's
  const std::byte *gate, *up;       // of the shared expert; where the picks' begin in their slots: gate_at, up_at
  std::size_t gate_at, up_at;
  float gate_factor, up_factor;
  int gate_rows, up_rows, up_begin;  // where up's values begin among a pick's
};
struct UpWork {
  UpSection sections[4];
  int count, units;
  float* routed;  // [T, k, routed_width]
  float* shared;  // [T, shared_width]
  int routed_width, shared_width;
  ExpertMatrices experts;
  CudaTensor x, logits;
  Routing routing;
  bool normalise, single;
  int slot_bytes, depth, split, rounds, rows_at, sums_at, half_floats;
};

struct UpSections {
  const UpWork& work;
  const std::byte* const* slots;  // of the picks
  const int* ids;
  int begin, end, count;

  __device__ __forceinline__ int before(int section) const {
    int sum = 0;
    for (int i = 0; i < section; ++i) sum += work.sections[i].units;
    return sum;
  }
  __device__ __forceinline__ DType type(int i) const { return work.sections[i].type; }
  __device__ __forceinline__ int strip_bytes(int i) const { return work.sections[i].strip_bytes; }
  __device__ __forceinline__ int first(int i) const { return max(begin, before(i)) - before(i); }
  __device__ __forceinline__ int last(int i) const { return min(end, before(i) + work.sections[i].units) - before(i); }
  __device__ __forceinline__ int columns(int i) const { return work.sections[i].shared ? work.x.n_rows : 1; }
  __device__ __forceinline__ Unit unit(int section, int unit) const {
    const UpSection& s = work.sections[section];
    const int pick = s.shared ? 0 : unit / s.per_pick;
    int i = unit - pick * s.per_pick;
    const bool up = i >= s.gate_units;
    if (up) i -= s.gate_units;
    const std::size_t at =
        static_cast<std::size_t>(i) * static_cast<std::size_t>(s.strip_bytes * work.experts.gate.strips());
    if (s.shared) return {(up ? s.up : s.gate) + at, -1};
    return {slots[pick] + (up ? s.up_at : s.gate_at) + at, pick / work.routing.k};
  }
  __device__ __forceinline__ void done(int section, int unit, int row, int n, float sum) const {
    const UpSection& s = work.sections[section];
    const int pick = s.shared ? n : unit / s.per_pick;
    int i = s.shared ? unit : unit - pick * s.per_pick;
    const bool up = i >= s.gate_units;
    if (up) i -= s.gate_units;
    i = i * s.height + row;
    if (i >= (up ? s.up_rows : s.gate_rows)) return;
    float factor = up ? s.up_factor : s.gate_factor;
    if (!s.shared && work.experts.scales) factor *= work.experts.scales[3 * ids[pick] + up];
    float* to = s.shared ? work.shared + pick * work.shared_width : work.routed + pick * work.routed_width;
    to[(up ? s.up_begin : 0) + i] = sum * factor;
  }
};

template <bool all_types>
__global__ void __launch_bounds__(256, 2) experts_up_kernel(const __grid_constant__ UpWork work) {
  extern __shared__ uint4 shared_memory[];
  __shared__ int ids[few_rows * max_few_slots];
  __shared__ float weights[few_rows * max_few_slots];
  __shared__ const std::byte* slots[few_rows * max_few_slots];
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int strips = work.experts.gate.strips(), warps = static_cast<int>(blockDim.x) / 32, k = work.routing.k;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const SharedRows rows(memory + work.rows_at, work.x.n_rows, strips, work.single);
  FewBlock block{rows, reinterpret_cast<float*>(memory + work.sums_at), work.half_floats, work.split, work.rounds};
  const auto share = [&](unsigned b) {
    return static_cast<int>(static_cast<std::int64_t>(work.units) * b / gridDim.x);
  };
  const UpSections sections{work, slots, ids, share(blockIdx.x), share(blockIdx.x + 1), work.count};
  const int picks = rows.rows * k;

  wait_for_predecessor();
  let_successor_start();
  if (work.logits.data) {
    // The rows that this block's picks belong to; who has a row's first unit writes its routing.
    int first = rows.rows, last = -1;
    for (int i = 0; i < work.count; ++i) {
      const UpSection& s = work.sections[i];
      const int from = sections.first(i), to = sections.last(i);
      if (s.shared || from >= to) continue;
      first = min(first, from / s.per_pick / k), last = max(last, (to - 1) / s.per_pick / k);
    }
    for (int n = first; n <= last; ++n) {  // in memory that the ring does not use yet
      route(RouteMemory(memory, work.experts.count), work.logits.data + n * work.logits.stride, work.experts.count, k,
            work.normalise, ids + n * k, weights + n * k);
      const int row_begin = n * k * work.sections[0].per_pick;
      if (row_begin < sections.begin || row_begin >= sections.end || thread >= k) continue;
      work.routing.ids[n * k + thread] = ids[n * k + thread];
      work.routing.weights[n * k + thread] = weights[n * k + thread];
    }
    for (int i = first * k + thread; i < (last + 1) * k; i += threads) slots[i] = work.experts.slots[ids[i]];
  } else {
    for (int i = thread; i < picks; i += threads) {
      ids[i] = work.routing.ids[i], slots[i] = work.experts.slots[ids[i]];
    }
  }
  __syncthreads();

  StripRing ring(memory, work.slot_bytes, work.depth, thread / 32);
  StripCursor cursor(sections, block, thread / 32, warps);
  ring.fill(cursor, thread % 32);
  for (int n = 0; n < rows.rows; ++n) prepare_plain_row(rows, work.x, n);
  __syncthreads();
  multiply_sections<all_types>(sections, block, ring, cursor);
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
  float factor, shared_factor;
  bool normalise, single;
  int slot_bytes, depth, rows_at, strip_bytes, shared_strip_bytes;
};

constexpr float down_unit = 16;  // SwiGLU's values are kept as f16 of a sixteenth

// The strips of 16 rows, one behind the other.
struct TileCursor {
  const std::byte* at;
  int left, strip_bytes;
  __device__ __forceinline__ bool next(const std::byte*& from, int& bytes, int& row_bytes) {
    if (left == 0) return false;
    from = at, bytes = strip_bytes, row_bytes = 0;
    at += strip_bytes, --left;
    return true;
  }
};

// sums [16] = the tile times row `slot`.
template <DType type>
__device__ __forceinline__ void down_tile(StripRing& ring, TileCursor& cursor, int strips, const SharedRows& rows,
                                          int slot, int lane, float* sums) {
  UnitProduct<type> product;
  product.clear();
  for (int s = 0; s < strips; ++s) {
    product.add(ring.take(), rows, s, slot, 1, lane, [&] { ring.ask(cursor, lane); });
  }
  product.store(sums, 1, lane);
}
template <DType type>
__device__ __noinline__ void down_tile_apart(StripRing& ring, TileCursor& cursor, int strips, const SharedRows& rows,
                                             int slot, int lane, float* sums) {
  down_tile<type>(ring, cursor, strips, rows, slot, lane, sums);
}
__device__ __noinline__ void down_tile_f32(const std::byte* tile, int strips, const SharedRows& rows, int slot,
                                           int lane, float* sums) {
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
  const SharedRows rows(memory + work.rows_at, work.slots, work.strips, work.single);
  const bool shared = slot == k;

  if (work.logits
          .data) {  // two launches old, so it can be read before waiting; in memory that the ring does not use yet
    route(RouteMemory(memory, work.experts.count), work.logits.data + t * work.logits.stride, work.experts.count, k,
          work.normalise, ids, weights);
  } else {
    wait_for_predecessor();
    if (thread < k) {
      ids[thread] = work.routing.ids[t * k + thread], weights[thread] = work.routing.weights[t * k + thread];
    }
    __syncthreads();
  }

  const DType type = shared ? work.shared_down.type : work.experts.down.type;
  const int width = shared ? work.shared_down.cols : work.experts.down.cols;
  const int strips = (width + strip_cols - 1) / strip_cols;
  const int strip_bytes = shared ? work.shared_strip_bytes : work.strip_bytes;
  const std::byte* from = shared ? work.shared_down.data : work.experts.slots[ids[slot]] + work.experts.down_at;
  from += static_cast<std::size_t>(tile) * static_cast<std::size_t>(strips * strip_bytes);
  StripRing ring(memory, work.slot_bytes, work.depth, slot);
  TileCursor cursor{from, type == DType::f32 ? 0 : strips, strip_bytes};
  ring.fill(cursor, lane);
  wait_for_predecessor();
  let_successor_start();
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
  if (type == DType::q4_k) {
    down_tile<DType::q4_k>(ring, cursor, strips, rows, slot, lane, sums[slot]);
  } else if (type == DType::q6_k) {
    down_tile<DType::q6_k>(ring, cursor, strips, rows, slot, lane, sums[slot]);
  } else if (type == DType::f32) {
    down_tile_f32(from, strips, rows, slot, lane, sums[slot]);
  } else if constexpr (all_types) {
    switch (type) {
#define QWEN3NEXT_CASE(name)                                                          \
  case DType::name:                                                                   \
    down_tile_apart<DType::name>(ring, cursor, strips, rows, slot, lane, sums[slot]); \
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
  __syncthreads();
  const int row = tile * strip_rows + thread;
  if (thread >= strip_rows || row >= work.experts.down.rows) return;
  float mix = 0;
  for (int i = 0; i < k; ++i) {
    const float factor = work.experts.scales ? work.factor * work.experts.scales[3 * ids[i] + 2] : work.factor;
    mix = fmaf(weights[i], sums[i][thread] * factor, mix);
  }
  if (work.slots > k) {
    const float gate = sigmoid(work.shared_logit.data[t * work.shared_logit.stride]);
    mix = fmaf(gate, sums[k][thread] * work.shared_factor, mix);
  }
  if (work.out.data) work.out.data[t * work.out.stride + row] = mix;
  if (work.residual.data) work.residual.data[t * work.residual.stride + row] += mix;
}

float factor_of(const Matrix& m) { return m.scale * (m.type == DType::f32 ? 1.0f : strip_unit(m.type)); }

UpSection section_of(const Matrix& gate, const Matrix& up, bool with_gate, bool with_up) {
  UpSection s{};
  s.type = with_gate ? gate.type : up.type;
  s.strip_bytes = bytes_on_the_way(s.type), s.height = unit_rows(s.type);
  s.gate_units = with_gate ? units_of(gate) : 0;
  s.per_pick = s.gate_units + (with_up ? units_of(up) : 0);
  s.gate = gate.data, s.up = up.data, s.gate_factor = factor_of(gate), s.up_factor = factor_of(up);
  s.gate_rows = gate.rows, s.up_rows = up.rows, s.up_begin = gate.rows;
  return s;
}

}  // namespace

void experts_few(const Device& device, DeviceScratch& scratch, const ExpertsFew& e) {
  const ExpertMatrices& m = e.experts->matrices;
  const int T = e.x.n_rows, k = e.routing.k;
  assert(T <= few_rows && k <= max_few_slots && m.count <= max_few_experts);
  if (T == 0) return;
  const bool with_shared = e.shared_logit.data != nullptr;
  const auto limit = static_cast<int>(device.properties().shared_memory_per_block) - 4096;

  UpWork up{};
  up.experts = m, up.x = e.x, up.logits = e.logits, up.routing = e.routing, up.normalise = e.normalise;
  up.routed_width = m.gate.rows + m.up.rows;
  up.shared_width = with_shared ? e.shared_gate.rows + e.shared_up.rows : 0;
  up.routed = scratch.get<float>(static_cast<std::size_t>(T * (k * up.routed_width + up.shared_width)));
  up.shared = up.routed + T * k * up.routed_width;
  bool all_types = false;
  const auto add_section = [&](UpSection s, bool shared) {
    s.shared = shared, s.units = (shared ? 1 : T * k) * s.per_pick;
    s.up_at = m.up_at;
    up.units += s.units, up.single |= s.type == DType::f32, all_types |= !usual(s.type);
    up.slot_bytes = std::max(up.slot_bytes, s.strip_bytes);
    up.sections[up.count++] = s;
  };
  const auto add = [&](const Matrix& gate, const Matrix& up_matrix, bool shared) {
    if (gate.type == up_matrix.type) return add_section(section_of(gate, up_matrix, true, true), shared);
    add_section(section_of(gate, up_matrix, true, false), shared);
    add_section(section_of(gate, up_matrix, false, true), shared);
  };
  add(m.gate, m.up, false);
  if (with_shared) add(e.shared_gate, e.shared_up, true);

  int warps = 8;
  const int strips = m.gate.strips(), route_bytes = RouteMemory::bytes(m.count);
  const auto lay_out = [&](int rows) {
    up.split = split_of(warps, strips), up.rounds = 2;
    up.half_floats = FewBlock::sum_bytes(warps, up.rounds, rows) / 8;
    const int row_bytes = SharedRows::bytes(rows, strips, up.single), rest = row_bytes + 8 * up.half_floats;
    up.depth = std::clamp((limit / 2 - rest) / (warps * up.slot_bytes), 1, most_depth);
    up.rows_at = std::max(up.depth * warps * up.slot_bytes, route_bytes);
    up.sums_at = up.rows_at + row_bytes;
    return up.sums_at + 8 * up.half_floats;
  };
  // How k is split must not depend on the number of rows, which is split instead if need be.
  while (lay_out(1) > limit && warps > 1) warps /= 2;
  if (lay_out(T) > limit && T > 1) {
    for (int begin = 0, half = (T + 1) / 2; begin < T; begin += half) {
      const int n = std::min(half, T - begin);
      const auto part = [&](CudaTensor t) { return t.data ? t.rows(begin, n) : t; };
      ExpertsFew rows = e;
      rows.out = part(e.out), rows.residual = part(e.residual), rows.x = part(e.x), rows.logits = part(e.logits);
      rows.shared_logit = part(e.shared_logit), rows.routing = e.routing.slice(begin, n);
      experts_few(device, scratch, rows);
    }
    return;
  }
  const int blocks = std::min(up.units, 2 * device.properties().multiprocessors);
  launch(device, all_types ? experts_up_kernel<true> : experts_up_kernel<false>, dim3(static_cast<unsigned>(blocks)),
         dim3(static_cast<unsigned>(32 * warps)), static_cast<std::size_t>(lay_out(T)), up);

  DownWork down{};
  down.experts = m, down.out = e.out, down.residual = e.residual, down.logits = e.logits, down.routing = e.routing;
  down.routed = up.routed, down.shared = up.shared;
  down.routed_width = up.routed_width, down.shared_width = up.shared_width, down.up_begin = m.gate.rows;
  down.normalise = e.normalise, down.strips = m.down.strips(), down.slots = k;
  down.factor = down_unit * factor_of(m.down), down.strip_bytes = strip_layout(m.down.type).bytes;
  down.single = m.down.type == DType::f32;
  all_types = !usual(m.down.type);
  if (with_shared) {
    const Matrix& s = e.shared_down;
    down.shared_down = s, down.shared_logit = e.shared_logit, down.shared_up_begin = e.shared_gate.rows;
    down.strips = std::max(down.strips, s.strips()), ++down.slots;
    down.shared_factor = down_unit * factor_of(s), down.shared_strip_bytes = strip_layout(s.type).bytes;
    down.single |= s.type == DType::f32, all_types |= !usual(s.type);
  }
  for (const DType type : {m.down.type, with_shared ? e.shared_down.type : m.down.type}) {
    if (type != DType::f32) down.slot_bytes = std::max(down.slot_bytes, strip_layout(type).bytes);
  }
  const int row_bytes = SharedRows::bytes(down.slots, down.strips, down.single);
  const int slot_bytes = std::max(1, down.slots * down.slot_bytes);
  down.depth = std::clamp((limit - row_bytes) / slot_bytes, 1, std::min(most_depth, down.strips));
  down.rows_at = std::max(down.depth * down.slots * down.slot_bytes, route_bytes);
  launch(device, all_types ? experts_down_kernel<true> : experts_down_kernel<false>,
         dim3(static_cast<unsigned>(m.down.row_tiles()), static_cast<unsigned>(T)),
         dim3(static_cast<unsigned>(32 * down.slots)), static_cast<std::size_t>(down.rows_at + row_bytes), down);
}

}  // namespace qwen3next::cuda
