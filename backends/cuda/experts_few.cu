#include "backends/cuda/experts_few.hpp"

#include <algorithm>
#include <cassert>

#include "backends/cuda/few.cuh"

namespace qwen3next::cuda {
namespace {

// --- the router, in every thread block for itself, a warp a row ------------------------------------------------------

struct RankedExpert {
  float p;
  int id;
  __device__ __forceinline__ bool before(float other, int other_id) const {
    return (p > other) | ((p == other) & (id < other_id));
  }
};

// The place of p among those of all lanes; of equal ones the lower lane's is first.
__device__ __forceinline__ int rank_among_lanes(float p, int lane) {
  int rank = 0;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    const float other = __shfl_sync(0xffffffff, p, j);
    rank += static_cast<int>((other > p) | ((other == p) & (j < lane)));
  }
  return rank;
}

// The best of those that come after `last`: for many experts, or many of equal probability.
__device__ __noinline__ RankedExpert next_expert(const float* logits, int experts, float most, RankedExpert last,
                                                 int lane) {
  RankedExpert best{-1, experts};
  for (int i = lane; i < experts; i += 32) {
    const float p = expf(logits[i] - most);
    if (last.before(p, i) && !best.before(p, i)) best = {p, i};
  }
  for (int step = 16; step > 0; step /= 2) {
    const float p = __shfl_xor_sync(0xffffffff, best.p, step);
    const int id = __shfl_xor_sync(0xffffffff, best.id, step);
    if (!best.before(p, id)) best = {p, id};
  }
  return best;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, step));
  return v;
}

// ids, weights [k] = the k <= 16 largest of softmax(logits), by one warp.  Up to 512 experts lie in registers; those
// that are not below the k-th largest of the lanes' maxima are few, and ranked.  `found`: [32] in shared memory.
__device__ __forceinline__ void route_row(const float* logits, int experts, int k, bool normalise, RankedExpert* found,
                                          int* ids, float* weights, int lane) {
  constexpr int held = 16;
  float p[held], most = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < held; ++i) {
    p[i] = i * 32 + lane < experts ? logits[i * 32 + lane] : -INFINITY;
    most = fmaxf(most, p[i]);
  }
  for (int i = 32 * held + lane; i < experts; i += 32) most = fmaxf(most, logits[i]);
  most = warp_max(most);
  float highest = -1;  // of this lane
#pragma unroll
  for (int i = 0; i < held; ++i) {
    p[i] = expf(p[i] - most);  // 0 where there is no expert
    sum += p[i];
    if (i * 32 + lane >= experts) p[i] = -1;
    highest = fmaxf(highest, p[i]);
  }
  for (int i = 32 * held + lane; i < experts; i += 32) sum += expf(logits[i] - most);
  sum = warp_sum(sum);
  RankedExpert mine{-1, lane};
  if (!(sum <= 3.4e38f)) {  // not all are numbers: no order, but an order
    sum = 1;
  } else {
    int count = 33;
    if (experts <= 32 * held) {
      const int rank = rank_among_lanes(highest, lane);
      const unsigned at_k = __ballot_sync(0xffffffff, rank == k - 1);
      const float threshold = __shfl_sync(0xffffffff, highest, __ffs(static_cast<int>(at_k)) - 1);
      count = 0;
#pragma unroll
      for (int i = 0; i < held; ++i) {
        const bool candidate = p[i] >= threshold && p[i] >= 0;
        const unsigned lanes = __ballot_sync(0xffffffff, candidate);
        const int at = count + __popc(lanes & ((1u << lane) - 1));
        if (candidate && at < 32) found[at] = {p[i], i * 32 + lane};
        count += __popc(lanes);
      }
      __syncwarp();
    }
    if (count <= 32) {
      const RankedExpert candidate = lane < count ? found[lane] : RankedExpert{-1, 0};  // in the order of ids
      const int rank = rank_among_lanes(candidate.p, lane);
      __syncwarp();
      found[rank] = candidate;
      __syncwarp();
      mine = found[lane];
    } else {
      RankedExpert last{INFINITY, -1};
      for (int i = 0; i < k; ++i) {
        last = next_expert(logits, experts, most, last, lane);
        if (lane == i) mine = last;
      }
    }
  }
  const float weight = mine.p / sum;
  float total = 0;
#pragma unroll
  for (int i = 0; i < max_few_slots; ++i) {
    const float other = __shfl_sync(0xffffffff, weight, i);
    if (i < k) total += other;
  }
  if (lane < k) ids[lane] = mine.id, weights[lane] = normalise ? weight / total : weight;
  __syncwarp();
}

// --- gate and up ---------------------------------------------------------------------------------------------------

// Units of one type, of all picks or of the shared expert: of gate or of up, or in pairs of both, which SwiGLU joins.
struct UpSection {
  DType type;
  bool shared, paired;
  int strip_bytes, height;
  int before, units, per_pick;  // in the sections before; of all picks; of one
  const std::byte *gate, *up;   // of the shared expert; up only: gate is null
  std::size_t gate_at, up_at;   // of the picks, in their slots
  float gate_factor, up_factor;
  int rows, begin;  // of a matrix; where the values begin among a pick's
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

  __device__ __forceinline__ DType type(int i) const { return work.sections[i].type; }
  __device__ __forceinline__ int strip_bytes(int i) const { return work.sections[i].strip_bytes; }
  __device__ __forceinline__ int first(int i) const {
    return max(begin, work.sections[i].before) - work.sections[i].before;
  }
  __device__ __forceinline__ int last(int i) const {
    return min(end - work.sections[i].before, work.sections[i].units);
  }
  __device__ __forceinline__ int columns(int i) const { return work.sections[i].shared ? work.x.n_rows : 1; }
  __device__ __forceinline__ bool paired(int i) const { return work.sections[i].paired; }
  __device__ __forceinline__ Unit unit(int section, int unit) const {
    const UpSection& s = work.sections[section];
    const int pick = s.shared ? 0 : unit / s.per_pick;
    int i = unit - pick * s.per_pick;
    bool up = s.gate_factor == 0;
    if (s.paired) up = i % 2, i /= 2;
    const std::size_t at =
        static_cast<std::size_t>(i) * static_cast<std::size_t>(s.strip_bytes * work.experts.gate.strips());
    if (s.shared) return {(up ? s.up : s.gate) + at, -1};
    return {slots[pick] + (up ? s.up_at : s.gate_at) + at, pick / work.routing.k};
  }
  __device__ __forceinline__ void done(int section, int unit, int row, int n, float sum, float second) const {
    const UpSection& s = work.sections[section];
    const int pick = s.shared ? n : unit / s.per_pick;
    int i = s.shared ? unit : unit - pick * s.per_pick;
    if (s.paired) i /= 2;
    i = i * s.height + row;
    if (i >= s.rows) return;
    const float* scales = s.shared || !work.experts.scales ? nullptr : work.experts.scales + 3 * ids[pick];
    float value;
    if (s.paired) {
      const float gate = sum * s.gate_factor * (scales ? scales[0] : 1.0f);
      value = silu(gate) * (second * s.up_factor * (scales ? scales[1] : 1.0f));
    } else {
      const bool up = s.gate_factor == 0;
      value = sum * (up ? s.up_factor : s.gate_factor) * (scales ? scales[up] : 1.0f);
    }
    float* to = s.shared ? work.shared + pick * work.shared_width : work.routed + pick * work.routed_width;
    to[s.begin + i] = value;
  }
};

template <bool all_types>
__global__ void __launch_bounds__(512, 2) experts_up_kernel(const __grid_constant__ UpWork work) {
  extern __shared__ uint4 shared_memory[];
  __shared__ int ids[few_rows * max_few_slots];
  __shared__ float weights[few_rows * max_few_slots];
  __shared__ const std::byte* slots[few_rows * max_few_slots];
  __shared__ std::uint64_t barriers[16 * most_depth];
  __shared__ RankedExpert found[few_rows][32];
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int strips = work.experts.gate.strips(), warps = static_cast<int>(blockDim.x) / 32, k = work.routing.k;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const SharedRows rows(memory + work.rows_at, work.x.n_rows, strips, work.single);
  FewBlock block{rows, reinterpret_cast<float*>(memory + work.sums_at), work.half_floats, work.split, work.rounds};
  const auto share = [&](unsigned b) {  // whole pairs
    return static_cast<int>(static_cast<std::int64_t>(work.units / 2) * b / gridDim.x) * 2;
  };
  const UpSections sections{work, slots, ids, share(blockIdx.x), share(blockIdx.x + 1), work.count};
  const int picks = rows.rows * k;

  for (int i = thread * 16; i < work.experts.count; i += threads * 16) prefetch(work.experts.slots + i);
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
    const int lane = thread % 32;
    for (int n = first + thread / 32; n <= last; n += warps) {
      route_row(work.logits.data + n * work.logits.stride, work.experts.count, k, work.normalise, found[n], ids + n * k,
                weights + n * k, lane);
      const int row_begin = n * k * work.sections[0].per_pick;
      if (row_begin >= sections.begin && row_begin < sections.end && lane < k) {
        work.routing.ids[n * k + lane] = ids[n * k + lane];
        work.routing.weights[n * k + lane] = weights[n * k + lane];
      }
    }
    __syncthreads();
    for (int i = first * k + thread; i < (last + 1) * k; i += threads) slots[i] = work.experts.slots[ids[i]];
  } else {
    for (int i = thread; i < picks; i += threads) {
      ids[i] = work.routing.ids[i], slots[i] = work.experts.slots[ids[i]];
    }
  }
  __syncthreads();

  StripRing ring(memory, barriers, work.slot_bytes, work.depth, thread / 32, thread % 32);
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
  int routed_width, shared_width;
  int up_begin, shared_up_begin;  // 0: the values are SwiGLU's, not gate's
  int strips;                     // of the wider of the two
  int slots;                      // k, or with the shared expert k + 1
  float factor, shared_factor;
  bool normalise, single;
  int slot_bytes, depth, rows_at, strip_bytes, shared_strip_bytes;
};

constexpr float down_unit = 1 / hidden_scale;

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
    product.add(ring.take(), rows, s, slot, 1, lane);
    __syncwarp();
    ring.ask(cursor, lane);
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

// Two kernels of this file, or one and a product before or after it, should fit into a multiprocessor together.
inline constexpr int usual_slots = 11;

template <bool all_types, int most_slots>
__global__ void __launch_bounds__(32 * most_slots, most_slots <= usual_slots ? 2 : 1)
    experts_down_kernel(const __grid_constant__ DownWork work) {
  extern __shared__ uint4 shared_memory[];
  __shared__ int ids[max_few_slots];
  __shared__ float weights[max_few_slots];
  __shared__ float sums[max_few_slots + 1][strip_rows];
  __shared__ std::uint64_t barriers[(max_few_slots + 1) * most_depth];
  __shared__ RankedExpert found[32];
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int k = work.routing.k, t = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, slot = thread / 32;
  const SharedRows rows(memory + work.rows_at, work.slots, work.strips, work.single);
  const bool shared = slot == k;

  if (work.logits.data) {  // two launches old, so it can be read before waiting
    if (slot == 0) {
      route_row(work.logits.data + t * work.logits.stride, work.experts.count, k, work.normalise, found, ids, weights,
                lane);
    }
    __syncthreads();
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
  StripRing ring(memory, barriers, work.slot_bytes, work.depth, slot, lane);
  TileCursor cursor{from, type == DType::f32 ? 0 : strips, strip_bytes};
  ring.fill(cursor, lane);
  wait_for_predecessor();
  let_successor_start();
  const float* gate = shared ? work.shared + t * work.shared_width : work.routed + (t * k + slot) * work.routed_width;
  const int up_begin = shared ? work.shared_up_begin : work.up_begin;
  for (int i = lane; i < work.strips * strip_cols / 8; i += 32) {
    float v[8], g[8];
    load_eight(g, gate, 8 * i, width);
    if (up_begin > 0) load_eight(v, gate + up_begin, 8 * i, width);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = (up_begin > 0 ? silu(g[j]) * v[j] : g[j]) * (1 / down_unit);
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
    with_type(type, [&](auto t) {
      if constexpr (!usual(t.value)) down_tile_apart<t.value>(ring, cursor, strips, rows, slot, lane, sums[slot]);
    });
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

}  // namespace

void experts_few(const Device& device, DeviceScratch& scratch, const ExpertsFew& e) {
  const ExpertMatrices& m = e.experts->matrices;
  const int T = e.x.n_rows, k = e.routing.k;
  assert(T <= few_rows && k <= max_few_slots && m.count <= max_few_experts);
  if (T == 0) return;
  constexpr int most_slots = max_few_slots + 1;
  [[maybe_unused]] static const bool asked =
      prefer_shared_memory(experts_up_kernel<false>, experts_up_kernel<true>, experts_down_kernel<false, usual_slots>,
                           experts_down_kernel<true, most_slots>);
  const bool with_shared = e.shared_logit.data != nullptr;
  const auto limit = static_cast<int>(device.properties().shared_memory_per_block) - 4096;

  UpWork up{};
  up.experts = m, up.x = e.x, up.logits = e.logits, up.routing = e.routing, up.normalise = e.normalise;
  up.routed_width = m.gate.rows + m.up.rows;
  up.shared_width = with_shared ? e.shared_gate.rows + e.shared_up.rows : 0;
  up.routed = scratch.get<float>(static_cast<std::size_t>(T * (k * up.routed_width + up.shared_width)));
  up.shared = up.routed + T * k * up.routed_width;
  bool all_types = false;
  const auto add_section = [&](UpSection s, int matrices) {
    s.strip_bytes = bytes_on_the_way(s.type), s.height = unit_rows(s.type);
    s.per_pick = matrices * ((s.rows + s.height - 1) / s.height);
    s.before = up.units, s.units = (s.shared ? 1 : T * k) * s.per_pick;
    up.units += (s.units + 1) / 2 * 2;  // so that pairs begin at even ones
    up.single |= s.type == DType::f32, all_types |= !usual(s.type);
    up.slot_bytes = std::max(up.slot_bytes, s.strip_bytes);
    up.sections[up.count++] = s;
  };
  const auto add = [&](const Matrix& gate, const Matrix& up_matrix, bool shared) {
    UpSection s{};
    s.type = gate.type, s.shared = shared, s.paired = gate.type == up_matrix.type;
    s.gate = gate.data, s.up = up_matrix.data, s.up_at = m.up_at;
    s.gate_factor = factor_of(gate), s.up_factor = factor_of(up_matrix), s.rows = gate.rows;
    add_section(s, s.paired ? 2 : 1);
    if (s.paired) return;
    s.type = up_matrix.type, s.gate_factor = 0, s.begin = gate.rows;
    add_section(s, 1);
  };
  add(m.gate, m.up, false);
  if (with_shared) add(e.shared_gate, e.shared_up, true);

  int warps = 16;
  const int strips = m.gate.strips();
  const auto lay_out = [&](int rows) {
    up.split = split_of(warps, strips), up.rounds = up.units > 4 * device.properties().multiprocessors ? 4 : 2;
    up.half_floats = FewBlock::sum_bytes(warps, up.rounds, rows) / 8;
    const int row_bytes = SharedRows::bytes(rows, strips, up.single), rest = row_bytes + 8 * up.half_floats;
    up.depth = std::clamp((limit / 2 - rest) / (warps * up.slot_bytes), 1, most_depth);
    up.rows_at = up.depth * warps * up.slot_bytes;
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
  const int blocks = std::min(up.units / 2, device.properties().multiprocessors);
  launch(device, all_types ? experts_up_kernel<true> : experts_up_kernel<false>, dim3(static_cast<unsigned>(blocks)),
         dim3(static_cast<unsigned>(32 * warps)), static_cast<std::size_t>(lay_out(T)), up);

  DownWork down{};
  down.experts = m, down.out = e.out, down.residual = e.residual, down.logits = e.logits, down.routing = e.routing;
  down.routed = up.routed, down.shared = up.shared;
  down.routed_width = up.routed_width, down.shared_width = up.shared_width,
  down.up_begin = m.gate.type == m.up.type ? 0 : m.gate.rows;
  down.normalise = e.normalise, down.strips = m.down.strips(), down.slots = k;
  down.factor = down_unit * factor_of(m.down), down.strip_bytes = strip_layout(m.down.type).bytes;
  down.single = m.down.type == DType::f32;
  all_types = !usual(m.down.type);
  if (with_shared) {
    const Matrix& s = e.shared_down;
    down.shared_down = s, down.shared_logit = e.shared_logit,
    down.shared_up_begin = e.shared_gate.type == e.shared_up.type ? 0 : e.shared_gate.rows;
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
  down.rows_at = down.depth * down.slots * down.slot_bytes;
  launch(device,
         all_types || down.slots > usual_slots ? experts_down_kernel<true, most_slots>
                                               : experts_down_kernel<false, usual_slots>,
         dim3(static_cast<unsigned>(m.down.row_tiles()), static_cast<unsigned>(T)),
         dim3(static_cast<unsigned>(32 * down.slots)), static_cast<std::size_t>(down.rows_at + row_bytes), down);
}

}  // namespace qwen3next::cuda
