#include "backends/cuda/experts_few.hpp"

#include <algorithm>
#include <cassert>

#include "backends/cuda/few.cuh"

namespace qwen3next::cuda {
namespace {

// --- the router, in every thread block for itself --------------------------------------------------------------------

struct Candidate {
  std::uint32_t key;  // ordered as the logits are
  int id;
  __device__ __forceinline__ bool before(Candidate other) const {
    return (key > other.key) | ((key == other.key) & (id < other.id));
  }
};
struct RoutingScratch {
  static constexpr int chunks = 32, candidates = 64;
  std::uint32_t largest[chunks];  // of 32 experts each
  Candidate found[candidates];
  Candidate best[max_few_slots];
  int count;
};

__device__ __forceinline__ std::uint32_t key_of(float logit) {
  const std::uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(std::uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// One after the other, by one warp: where many logits are equal.
__device__ __noinline__ void find_best_one_by_one(const float* logits, int experts, int k, bool numbers,
                                                  RoutingScratch& scratch, int lane) {
  Candidate last{0xffffffffu, -1};
#pragma unroll 1
  for (int slot = 0; slot < k; ++slot) {
    Candidate best{0, experts};
#pragma unroll 1
    for (int id = lane; id < experts; id += 32) {
      const Candidate c{numbers ? key_of(__ldcg(logits + id)) : 0, id};
      if (last.before(c) && c.before(best)) best = c;
    }
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
      const Candidate other{__shfl_xor_sync(0xffffffff, best.key, step), __shfl_xor_sync(0xffffffff, best.id, step)};
      if (other.before(best)) best = other;
    }
    if (lane == 0) scratch.best[slot] = best;
    last = best;
  }
}

// scratch.best [k] = the k <= 16 largest of the logits, by all threads, which see it on return.  What is at least the
// k-th largest of the largest of every 32 may be among them: these are few, and ranked.  False: not all are numbers,
// and the first k are the best.
__device__ __forceinline__ bool choose_experts(const float* logits, int experts, int k, RoutingScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, chunks = (experts + 31) / 32;
  std::uint32_t first = 0;  // of this warp's first chunk: the only one of 16 warps for 512 experts
  bool numbers = true;
#pragma unroll 1
  for (int chunk = warp; chunk < chunks; chunk += warps) {
    const int id = chunk * 32 + lane;
    const float logit = id < experts ? __ldcg(logits + id) : -INFINITY;
    const std::uint32_t key = id < experts ? key_of(logit) : 0;
    numbers &= logit < INFINITY;
    if (chunk == warp) first = key;
    const std::uint32_t largest = __reduce_max_sync(0xffffffff, key);
    if (lane == 0 && chunk < RoutingScratch::chunks) scratch.largest[chunk] = largest;
  }
  if (thread == 0) scratch.count = 0;
  numbers = __syncthreads_and(numbers);
  std::uint32_t threshold = 0;
  if (const int seen = min(chunks, RoutingScratch::chunks); seen >= k) {
    const std::uint32_t mine = lane < seen ? scratch.largest[lane] : 0;
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < seen; ++i) {
      const std::uint32_t other = scratch.largest[i];
      rank += static_cast<int>((other > mine) | ((other == mine) & (i < lane)));
    }
    threshold = __reduce_max_sync(0xffffffff, rank == k - 1 ? mine : 0u);
  }
#pragma unroll 1
  for (int chunk = warp; chunk < chunks; chunk += warps) {
    const int id = chunk * 32 + lane;
    const std::uint32_t mine = chunk == warp ? first : id < experts ? key_of(__ldcg(logits + id)) : 0;
    if (id < experts && mine >= threshold) {
      const int at = atomicAdd(&scratch.count, 1);
      if (at < RoutingScratch::candidates) scratch.found[at] = {mine, id};
    }
  }
  __syncthreads();
  const int count = scratch.count;
  if (count > RoutingScratch::candidates || !numbers) {
    if (warp == 0) find_best_one_by_one(logits, experts, k, numbers, scratch, lane);
  } else if (thread < count) {
    const Candidate mine = scratch.found[thread];
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) rank += static_cast<int>(scratch.found[i].before(mine));
    if (rank < k) scratch.best[rank] = mine;
  }
  __syncthreads();
  return numbers;
}

// The softmax of the best, over them if `normalise`, else over all; of lane i < k the i-th, by one warp.
__device__ __forceinline__ float weight_of_best(const float* logits, int experts, int k, bool normalise, bool numbers,
                                                const RoutingScratch& scratch, int lane) {
  const float most = logit_of(scratch.best[0].key);
  numbers &= most > -INFINITY;
  const float e = lane >= k ? 0.0f : numbers ? expf(logit_of(scratch.best[lane].key) - most) : -1.0f;
  float total = warp_sum(e);
  if (!normalise) {
    total = 0;
#pragma unroll 1
    for (int id = lane; id < experts; id += 32) total += expf(__ldcg(logits + id) - most);
    total = numbers ? warp_sum(total) : 1.0f;
  }
  return e / total;
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
  Shares pairs;  // of units
  bool normalise, single;
  int slot_bytes, depth, log2_split, rounds, rows_at, sums_at, half_floats;
};

struct UpSections {
  const UpWork& work;
  const std::byte* const* slots;  // of the picks
  const int* ids;
  int begin, end, count, rows;

  __device__ __forceinline__ DType type(int i) const { return work.sections[i].type; }
  __device__ __forceinline__ int strip_bytes(int i) const { return work.sections[i].strip_bytes; }
  __device__ __forceinline__ int first(int i) const {
    return max(begin, work.sections[i].before) - work.sections[i].before;
  }
  __device__ __forceinline__ int last(int i) const {
    return min(end - work.sections[i].before, work.sections[i].units);
  }
  __device__ __forceinline__ int columns(int i) const { return work.sections[i].shared ? rows : 1; }
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
    const auto* const from = reinterpret_cast<const std::byte*>((up ? s.up_at : s.gate_at) + at);
    return {from, rows == 1 ? 0 : pick / work.routing.k, pick};
  }
  __device__ __forceinline__ const std::byte* address(const std::byte* from, int pick) const {
    return pick < 0 ? from : slots[pick] + reinterpret_cast<std::uintptr_t>(from);
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

template <unsigned types, bool one_row>
__global__ void __launch_bounds__(512, 2) experts_up_kernel(const __grid_constant__ UpWork work) {
  extern __shared__ uint4 shared_memory[];
  __shared__ int ids[few_rows * max_few_slots];
  __shared__ const std::byte* slots[few_rows * max_few_slots];
  __shared__ std::uint64_t barriers[16 * most_depth];
  __shared__ RoutingScratch scratch;
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int strips = work.experts.gate.strips(), warps = static_cast<int>(blockDim.x) / 32, k = work.routing.k;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const SharedRows<types> rows(memory + work.rows_at, one_row ? 1 : work.x.n_rows, strips, work.single);
  FewBlock<types> block{rows, reinterpret_cast<float*>(memory + work.sums_at), work.half_floats, work.log2_split,
                        work.rounds};
  const UpSections sections{
      work, slots, ids, 2 * work.pairs.begin(blockIdx.x), 2 * work.pairs.begin(blockIdx.x + 1), work.count, rows.rows};
  StripRing ring(memory, barriers, work.slot_bytes, work.depth, thread / 32, thread % 32);
  StripCursor cursor(sections, block, thread / 32, warps);
  Piece pieces[most_depth];
  ring.plan(cursor, pieces);
  for (int i = thread * 16; i < work.experts.count; i += threads * 16) prefetch(work.experts.slots + i);
  const auto take = [&](int pick) { slots[pick] = work.experts.slots[ids[pick]]; };
  wait_for_predecessor();
  let_successor_start();  // experts_down, which reads the logits before it waits: not earlier
#pragma unroll 1
  for (int n = 0; n < rows.rows; ++n) prepare_plain_row(rows, work.x, n);
  if (work.logits.data) {
    // The rows that this block's picks belong to; who has a row's first unit writes its routing.
    int first = 0, last = 0;
    if (!one_row) {
      first = rows.rows, last = -1;
      for (int i = 0; i < work.count; ++i) {
        const UpSection& s = work.sections[i];
        const int from = sections.first(i), to = sections.last(i);
        if (s.shared || from >= to) continue;
        first = min(first, from / s.per_pick / k), last = max(last, (to - 1) / s.per_pick / k);
      }
    }
#pragma unroll 1
    for (int n = first; n <= last; ++n) {
      const float* const logits = work.logits.data + n * work.logits.stride;
      const bool numbers = choose_experts(logits, work.experts.count, k, scratch);
      if (thread < k) ids[n * k + thread] = scratch.best[thread].id, take(n * k + thread);
      const int row_begin = n * k * work.sections[0].per_pick;
      if (row_begin >= sections.begin && row_begin < sections.end && thread < 32) {
        const float weight =
            weight_of_best(logits, work.experts.count, k, work.normalise, numbers, scratch, thread % 32);
        if (thread < k) {
          work.routing.ids[n * k + thread] = scratch.best[thread].id;
          work.routing.weights[n * k + thread] = weight;
        }
      }
    }
  } else {
    for (int i = thread; i < rows.rows * k; i += threads) ids[i] = work.routing.ids[i], take(i);
  }
  __syncthreads();
  ring.fill(cursor, pieces, thread % 32);
  multiply_sections(sections, block, ring, cursor);
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
  __device__ __forceinline__ bool next(Piece& piece) {
    if (left == 0) return false;
    piece = {at, -1, strip_bytes, 0};
    at += strip_bytes, --left;
    return true;
  }
  __device__ __forceinline__ static const std::byte* address(const Piece& piece) { return piece.from; }
};

// sums [16] = the tile times row `slot`.
template <DType type, unsigned types>
__device__ __forceinline__ void down_tile(StripRing& ring, TileCursor& cursor, int strips,
                                          const SharedRows<types>& rows, int slot, int lane, float* sums) {
  UnitProduct<type> product;
  product.clear();
#pragma unroll 1
  for (int s = 0; s < strips; ++s) {
    product.add(ring.take(), rows, s, slot, 1, lane);
    __syncwarp();
    ring.ask(cursor, lane);
  }
  product.store(sums, 1, lane);
}
template <DType type, unsigned types>
__device__ __noinline__ void down_tile_apart(StripRing& ring, TileCursor& cursor, int strips,
                                             const SharedRows<types>& rows, int slot, int lane, float* sums) {
  down_tile<type>(ring, cursor, strips, rows, slot, lane, sums);
}
template <unsigned types>
__device__ __noinline__ void down_tile_f32(const std::byte* tile, int strips, const SharedRows<types>& rows, int slot,
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

// SwiGLU's values, or gate's and, from `up_begin` on, up's, as row `slot`.
template <unsigned types>
__device__ __noinline__ void prepare_hidden(const SharedRows<types>& rows, int slot, const float* gate, int up_begin,
                                            int width, int lane) {
  for (int i = lane; i < rows.strips * strip_cols / 8; i += 32) {
    float v[8];
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      const int c = 8 * i + k;
      const float value = c < width ? __ldcg(gate + c) : 0.0f;
      v[k] = (up_begin > 0 && c < width ? silu(value) * __ldcg(gate + up_begin + c) : value) * (1 / down_unit);
    }
    rows.store(slot, i, v);
  }
}

// Two kernels of this file, or one and a product before or after it, should fit into a multiprocessor together.
inline constexpr int usual_slots = 11;

template <unsigned types, int most_slots>
__global__ void __launch_bounds__(32 * most_slots, most_slots <= usual_slots ? 2 : 1)
    experts_down_kernel(const __grid_constant__ DownWork work) {
  extern __shared__ uint4 shared_memory[];
  __shared__ int ids[max_few_slots];
  __shared__ float weights[max_few_slots + 1];  // of the sums
  __shared__ float sums[max_few_slots + 1][strip_rows];
  __shared__ std::uint64_t barriers[(max_few_slots + 1) * most_depth];
  __shared__ RoutingScratch scratch;
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int k = work.routing.k, t = static_cast<int>(blockIdx.y), tile = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, slot = thread / 32;
  const SharedRows<types> rows(memory + work.rows_at, work.slots, work.strips, work.single);
  const bool shared = slot == k;

  let_successor_start();
  float weight = 0;        // of a thread's slot, if it has one
  if (work.logits.data) {  // complete, since experts_up had waited for it when it let this kernel start
    const float* const logits = work.logits.data + t * work.logits.stride;
    const bool numbers = choose_experts(logits, work.experts.count, k, scratch);
    if (thread < k) ids[thread] = scratch.best[thread].id;
    if (slot == 0) weight = weight_of_best(logits, work.experts.count, k, work.normalise, numbers, scratch, lane);
  } else {
    wait_for_predecessor();
    if (thread < k) ids[thread] = work.routing.ids[t * k + thread], weight = work.routing.weights[t * k + thread];
  }
  if (thread < k) weight *= work.factor * (work.experts.scales ? work.experts.scales[3 * ids[thread] + 2] : 1.0f);
  __syncthreads();

  const DType type = shared ? work.shared_down.type : work.experts.down.type;
  const int width = shared ? work.shared_down.cols : work.experts.down.cols;
  const int strips = (width + strip_cols - 1) / strip_cols;
  const int strip_bytes = shared ? work.shared_strip_bytes : work.strip_bytes;
  const std::byte* from = shared ? work.shared_down.data : work.experts.slots[ids[slot]] + work.experts.down_at;
  from += static_cast<std::size_t>(tile) * static_cast<std::size_t>(strips * strip_bytes);
  StripRing ring(memory, barriers, work.slot_bytes, work.depth, slot, lane);
  TileCursor cursor{from, type == DType::f32 ? 0 : strips, strip_bytes};
  ring.fill(cursor, lane);
  const float* gate = shared ? work.shared + t * work.shared_width : work.routed + (t * k + slot) * work.routed_width;
  const int up_begin = shared ? work.shared_up_begin : work.up_begin;
  wait_for_predecessor();
  const bool for_shared = thread == k && work.slots > k;
  if (for_shared) weight = work.shared_logit.data[t * work.shared_logit.stride];
  if (up_begin == 0 && width == work.strips * strip_cols) {
#pragma unroll 2
    for (int i = lane; i < width / 8; i += 32) {
      float v[8];
      load_eight(v, gate + 8 * i);
#pragma unroll
      for (float& value : v) value *= 1 / down_unit;
      rows.store(slot, i, v);
    }
  } else {
    prepare_hidden(rows, slot, gate, up_begin, width, lane);
  }
  __syncwarp();
  if (is<types>(type, q4_k_alone)) {
    down_tile<DType::q4_k>(ring, cursor, strips, rows, slot, lane, sums[slot]);
  } else if (is<types>(type, q6_k_alone)) {
    down_tile<DType::q6_k>(ring, cursor, strips, rows, slot, lane, sums[slot]);
  } else if (is<types>(type, f32_alone)) {
    down_tile_f32(from, strips, rows, slot, lane, sums[slot]);
  } else if constexpr (types == all_types) {
    with_type(type, [&](auto t) {
      if constexpr (!usual(t.value)) down_tile_apart<t.value>(ring, cursor, strips, rows, slot, lane, sums[slot]);
    });
  }
  if (thread < work.slots) weights[thread] = for_shared ? sigmoid(weight) * work.shared_factor : weight;
  __syncthreads();
  const int row = tile * strip_rows + thread;
  if (thread >= strip_rows || row >= work.experts.down.rows) return;
  float mix = 0;
#pragma unroll 4
  for (int i = 0; i < work.slots; ++i) mix = fmaf(weights[i], sums[i][thread], mix);
  if (work.out.data) work.out.data[t * work.out.stride + row] = mix;
  if (work.residual.data) add_to_memory(work.residual.data + t * work.residual.stride + row, mix);
}

// Kernels for Q4_K or Q6_K alone; `types` are those that there are.
using UpKernel = void (*)(UpWork);
UpKernel up_kernel(unsigned types, bool one_row) {
  if ((types & ~usual_types) != 0) return with_shared_memory<experts_up_kernel<all_types, false>>();
  if (types != q4_k_alone) return with_shared_memory<experts_up_kernel<usual_types, false>>();
  return one_row ? with_shared_memory<experts_up_kernel<q4_k_alone, true>>()
                 : with_shared_memory<experts_up_kernel<q4_k_alone, false>>();
}
using DownKernel = void (*)(DownWork);
DownKernel down_kernel(unsigned types, int slots) {
  if (slots > usual_slots || (types & ~usual_types) != 0)
    return with_shared_memory<experts_down_kernel<all_types, max_few_slots + 1>>();
  return types == q4_k_alone   ? with_shared_memory<experts_down_kernel<q4_k_alone, usual_slots>>()
         : types == q6_k_alone ? with_shared_memory<experts_down_kernel<q6_k_alone, usual_slots>>()
                               : with_shared_memory<experts_down_kernel<usual_types, usual_slots>>();
}

float factor_of(const Matrix& m) { return m.scale * (m.type == DType::f32 ? 1.0f : strip_unit(m.type)); }

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
  unsigned types = 0;
  const auto add_section = [&](UpSection s, int matrices) {
    s.strip_bytes = strip_bytes(s.type), s.height = unit_rows(s.type);
    s.per_pick = matrices * ((s.rows + s.height - 1) / s.height);
    s.before = up.units, s.units = (s.shared ? 1 : T * k) * s.per_pick;
    up.units += (s.units + 1) / 2 * 2;  // so that pairs begin at even ones
    types |= types_of(s.type);
    up.slot_bytes = std::max(up.slot_bytes, piece_bytes(s.type));
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
  up.single = (types & f32_alone) != 0;
  if (up.single) types |= q4_k_alone;  // no kernel is for f32 alone
  const auto lay_out = [&](int rows) {
    up.log2_split = log2_split_of(warps, strips),
    up.rounds = up.units > 4 * device.properties().multiprocessors ? 4 : 2;
    up.half_floats = sum_bytes(warps, up.rounds, rows) / 8;
    const int row_bytes = bytes_of_rows(types, rows, strips), rest = row_bytes + 8 * up.half_floats;
    up.depth = std::clamp((limit / 8 * 5 - rest) / (warps * up.slot_bytes), 1, most_depth);
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
  up.pairs = Shares(up.units / 2, blocks);
  launch(device, up_kernel(types, T == 1), dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * warps)),
         static_cast<std::size_t>(lay_out(T)), up);

  DownWork down{};
  down.experts = m, down.out = e.out, down.residual = e.residual, down.logits = e.logits, down.routing = e.routing;
  down.routed = up.routed, down.shared = up.shared;
  down.routed_width = up.routed_width, down.shared_width = up.shared_width,
  down.up_begin = m.gate.type == m.up.type ? 0 : m.gate.rows;
  down.normalise = e.normalise, down.strips = m.down.strips(), down.slots = k;
  down.factor = down_unit * factor_of(m.down), down.strip_bytes = strip_layout(m.down.type).bytes;
  types = types_of(m.down.type);
  if (with_shared) {
    const Matrix& s = e.shared_down;
    down.shared_down = s, down.shared_logit = e.shared_logit,
    down.shared_up_begin = e.shared_gate.type == e.shared_up.type ? 0 : e.shared_gate.rows;
    down.strips = std::max(down.strips, s.strips()), ++down.slots;
    down.shared_factor = down_unit * factor_of(s), down.shared_strip_bytes = strip_layout(s.type).bytes;
    types |= types_of(s.type);
  }
  down.single = (types & f32_alone) != 0;
  if (down.single) types |= q4_k_alone;
  for (const DType type : {m.down.type, with_shared ? e.shared_down.type : m.down.type}) {
    if (type != DType::f32) down.slot_bytes = std::max(down.slot_bytes, strip_layout(type).bytes);
  }
  const int row_bytes = bytes_of_rows(types, down.slots, down.strips);
  const int slot_bytes = std::max(1, down.slots * down.slot_bytes);
  down.depth = std::clamp((limit - row_bytes) / slot_bytes, 1, std::min(most_depth, down.strips));
  down.rows_at = down.depth * down.slots * down.slot_bytes;
  launch(device, down_kernel(types, down.slots),
         dim3(static_cast<unsigned>(m.down.row_tiles()), static_cast<unsigned>(T)),
         dim3(static_cast<unsigned>(32 * down.slots)), static_cast<std::size_t>(down.rows_at + row_bytes), down);
}

}  // namespace qwen3next::cuda
