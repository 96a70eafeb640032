#include "backends/cuda/router.hpp"

#include <cassert>

#include "backends/cuda/launch.cuh"

namespace qwen3next::cuda {

namespace {

constexpr unsigned all_lanes = 0xffffffff;

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }

// ---- softmax and top-k: a warp a row ----

// Probabilities as integers of the same order: 0 for what was taken, 1 for NaN, then 0.0 and up.
__device__ inline std::uint32_t order_of(float p) { return isnan(p) ? 1 : __float_as_uint(p) + 2; }
__device__ inline float probability_of(std::uint32_t order) { return order == 1 ? -1.0f : __uint_as_float(order - 2); }

__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(all_lanes, x, offset));
  return x;
}
__device__ inline float warp_total(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(all_lanes, x, offset);
  return x;
}
__device__ inline std::uint32_t largest_of_warp(std::uint32_t x) { return __reduce_max_sync(all_lanes, x); }
__device__ inline int lowest_of_warp(int x) { return __reduce_min_sync(all_lanes, x); }

constexpr int rows_per_block = 4;
constexpr int no_expert = 0x7fffffff;

// E <= 32 V, k <= 32: all probabilities in registers, expert i * 32 + lane in order[i].
template <int V>
__global__ void __launch_bounds__(32 * rows_per_block) route_rows(Routing routing, CudaTensor logits, bool normalise) {
  const int row = static_cast<int>(blockIdx.x) * rows_per_block + thread() / 32, lane = thread() % 32;
  let_successor_start();
  wait_for_predecessor();
  if (row >= routing.rows) return;
  const float* const in = logits.data + row * logits.stride;
  const int E = logits.n_cols;
  float p[V];
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int e = i * 32 + lane;
    p[i] = e < E ? in[e] : -INFINITY;
    most = fmaxf(most, p[i]);
  }
  most = warp_max(most);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    p[i] = i * 32 + lane < E ? expf(p[i] - most) : 0.0f;
    sum += p[i];
  }
  sum = warp_total(sum);
  std::uint32_t order[V];
#pragma unroll
  for (int i = 0; i < V; ++i) order[i] = i * 32 + lane < E ? order_of(p[i] / sum) : 0;

  float total = 0, weight = 0;
  int id = 0;
  for (int slot = 0; slot < routing.k; ++slot) {
    std::uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) best = max(best, order[i]);
    best = largest_of_warp(best);
    int first = no_expert;
#pragma unroll
    for (int i = V - 1; i >= 0; --i) first = order[i] == best ? i * 32 + lane : first;
    first = lowest_of_warp(first);
#pragma unroll
    for (int i = 0; i < V; ++i) order[i] = i * 32 + lane == first ? 0 : order[i];
    const float probability = probability_of(best);
    total += probability;
    if (lane == slot) weight = probability, id = first;
  }
  if (lane >= routing.k) return;
  const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(row) * routing.k + lane;
  routing.ids[at] = id;
  routing.weights[at] = normalise ? weight / total : weight;
}

// Any E and k: the next in order is searched anew for each slot.
__global__ void __launch_bounds__(32 * rows_per_block)
    route_long_rows(Routing routing, CudaTensor logits, bool normalise) {
  const int row = static_cast<int>(blockIdx.x) * rows_per_block + thread() / 32, lane = thread() % 32;
  let_successor_start();
  wait_for_predecessor();
  if (row >= routing.rows) return;
  const float* const in = logits.data + row * logits.stride;
  const int E = logits.n_cols, k = routing.k;
  float most = -INFINITY, sum = 0;
  for (int e = lane; e < E; e += 32) most = fmaxf(most, in[e]);
  most = warp_max(most);
  for (int e = lane; e < E; e += 32) sum += expf(in[e] - most);
  sum = warp_total(sum);

  std::int32_t* const ids = routing.ids + static_cast<std::ptrdiff_t>(row) * k;
  float* const weights = routing.weights + static_cast<std::ptrdiff_t>(row) * k;
  std::uint32_t last = 0xffffffff;
  int last_id = -1;
  float total = 0;
  for (int slot = 0; slot < k; ++slot) {
    std::uint32_t best = 0;
    int first = no_expert;
    for (int e = lane; e < E; e += 32) {
      const std::uint32_t order = order_of(expf(in[e] - most) / sum);
      if ((order < last || (order == last && e > last_id)) && order > best) best = order, first = e;
    }
    last = largest_of_warp(best);
    last_id = lowest_of_warp(best == last ? first : no_expert);
    const float probability = probability_of(last);
    total += probability;
    if (lane == 0) ids[slot] = last_id, weights[slot] = probability;
  }
  if (lane == 0 && normalise) {
    for (int slot = 0; slot < k; ++slot) weights[slot] /= total;
  }
}

// ---- a counting sort ----
// Chunks of picks, a block each.  Every block counts its own picks of each expert (1); then every block adds up what
// the others counted, and knows where its own go (2).  One chunk needs no (1).

constexpr int sort_threads = 512;
constexpr int sort_warps = sort_threads / 32;
constexpr int chunk_steps = 2;                           // of 32 picks a warp, if there are several chunks
constexpr int chunk_picks = sort_threads * chunk_steps;  // 1024: 80 chunks of 8192 x 10 picks
constexpr int one_chunk_steps = 8;                       // up to 4096 picks are sorted by one block
constexpr int one_chunk_picks = sort_threads * one_chunk_steps;

int chunks_of(std::ptrdiff_t picks) {
  return picks <= one_chunk_picks ? 1 : static_cast<int>((picks + chunk_picks - 1) / chunk_picks);
}

__global__ void __launch_bounds__(sort_threads)
    count_picks(const std::int32_t* __restrict__ ids, int n, int experts, std::int32_t* counts) {
  extern __shared__ std::int32_t count[];  // [experts]
  for (int e = thread(); e < experts; e += sort_threads) count[e] = 0;
  __syncthreads();
  let_successor_start();
  wait_for_predecessor();
  const int begin = static_cast<int>(blockIdx.x) * chunk_picks;
  for (int i = begin + thread(); i < min(begin + chunk_picks, n); i += sort_threads) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  for (int e = thread(); e < experts; e += sort_threads)
    counts[static_cast<std::ptrdiff_t>(blockIdx.x) * experts + e] = count[e];
}

// Exclusive sums over the block of two numbers a thread; `sums` are the totals.
__device__ int2 scan_block(int2 x, int2& sums) {
  __shared__ int2 of_warps[sort_warps];
  const int lane = thread() % 32, warp = thread() / 32;
  int2 inclusive = x;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int a = __shfl_up_sync(all_lanes, inclusive.x, offset), b = __shfl_up_sync(all_lanes, inclusive.y, offset);
    if (lane >= offset) inclusive.x += a, inclusive.y += b;
  }
  __syncthreads();
  if (lane == 31) of_warps[warp] = inclusive;
  __syncthreads();
  int2 before{0, 0};
  sums = {0, 0};
  for (int w = 0; w < sort_warps; ++w) {
    if (w == warp) before = sums;
    sums.x += of_warps[w].x, sums.y += of_warps[w].y;
  }
  return {before.x + inclusive.x - x.x, before.y + inclusive.y - x.y};
}

// A warp ranks its picks 32 at a time; `seen` [experts] counts those it had before, per expert.
template <int steps>
__global__ void __launch_bounds__(sort_threads)
    sort_picks(const std::int32_t* __restrict__ ids, int n, int experts, int chunks, int tile_rows,
               const std::int32_t* __restrict__ counts, PickGroups groups) {
  extern __shared__ std::int32_t shared[];
  std::int32_t* const place = shared;                                     // [experts]: of a chunk's first
  auto* const seen = reinterpret_cast<std::uint16_t*>(shared + experts);  // [warps, experts]
  const int lane = thread() % 32, warp = thread() / 32, chunk = static_cast<int>(blockIdx.x);
  for (int i = thread(); i < sort_warps * experts; i += sort_threads) seen[i] = 0;
  __syncthreads();
  let_successor_start();
  wait_for_predecessor();

  int id[steps], rank[steps];
  std::uint16_t* const mine = seen + warp * experts;
  const int begin = chunk * steps * sort_threads + warp * steps * 32 + lane;
#pragma unroll
  for (int s = 0; s < steps; ++s) id[s] = begin + s * 32 < n ? ids[begin + s * 32] : -1;
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    const unsigned same = __match_any_sync(all_lanes, id[s]);
    const int before = __popc(same & ((1u << lane) - 1));
    if (id[s] >= 0) rank[s] = mine[id[s]] + before;
    __syncwarp();
    if (id[s] >= 0 && before == 0) mine[id[s]] = static_cast<std::uint16_t>(mine[id[s]] + __popc(same));
    __syncwarp();
  }
  __syncthreads();

  int2 done{0, 0};  // picks and tiles of the experts before
  for (int base = 0; base < experts; base += sort_threads) {
    const int e = base + thread();
    int in_chunk = 0;  // this one
    if (e < experts) {
      for (int w = 0; w < sort_warps; ++w) {
        const int count = seen[w * experts + e];
        seen[w * experts + e] = static_cast<std::uint16_t>(in_chunk);
        in_chunk += count;
      }
    }
    int before = 0, total = in_chunk;
    if (chunks > 1 && e < experts) {
      total = 0;
#pragma unroll 16
      for (int c = 0; c < chunks; ++c) {
        const int count = counts[static_cast<std::ptrdiff_t>(c) * experts + e];
        total += count;
        before += c < chunk ? count : 0;
      }
    }
    const int tiles = (total + tile_rows - 1) / tile_rows;
    int2 sums;
    int2 start = scan_block({total, tiles}, sums);
    start.x += done.x, start.y += done.y;
    done.x += sums.x, done.y += sums.y;
    if (e < experts) {
      place[e] = start.x + before;
      if (chunk == 0) {
        groups.offsets[e] = start.x;
        for (int i = 0; i < tiles; ++i) {
          groups.tiles[start.y + i] = {e, start.x + i * tile_rows, min(tile_rows, total - i * tile_rows)};
        }
      }
    }
  }
  if (chunk == 0 && thread() == 0) {
    groups.offsets[experts] = done.x;
    *groups.n_tiles = done.y;
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < steps; ++s) {
    if (id[s] >= 0) groups.picks[place[id[s]] + mine[id[s]] + rank[s]] = begin + s * 32;
  }
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

int most_tiles(std::ptrdiff_t picks, int experts, int tile_rows) {
  const std::ptrdiff_t with_picks = picks < experts ? picks : experts;  // each has one tile that isn't full
  return static_cast<int>(with_picks + (picks - with_picks) / tile_rows);
}

}  // namespace

void router(const Device& device, Routing& routing, CudaTensor logits, int k, bool normalise) {
  assert(k <= logits.n_cols);
  routing.rows = logits.n_rows, routing.k = k;
  if (routing.rows == 0) return;
  const auto blocks = static_cast<unsigned>((routing.rows + rows_per_block - 1) / rows_per_block);
  const auto kernel = k > 32 || logits.n_cols > 512 ? route_long_rows
                      : logits.n_cols > 128         ? route_rows<16>
                                                    : route_rows<4>;
  launch(device, kernel, blocks, 32 * rows_per_block, 0, routing, logits, normalise);
}

std::size_t pick_groups_bytes(int rows, int k, int experts, int tile_rows) {
  const std::ptrdiff_t picks = static_cast<std::ptrdiff_t>(rows) * k;
  const auto E = static_cast<std::size_t>(experts), n = static_cast<std::size_t>(picks);
  return aligned((E + 2) * 4) + aligned(n * 4) +
         aligned(static_cast<std::size_t>(most_tiles(picks, experts, tile_rows)) * sizeof(PickTile)) +
         static_cast<std::size_t>(chunks_of(picks)) * E * 4;
}

PickGroups group_picks(const Device& device, const Routing& routing, int experts, int tile_rows, void* memory) {
  const std::ptrdiff_t picks = routing.picks();
  const auto E = static_cast<std::size_t>(experts), n = static_cast<std::size_t>(picks);
  auto* at = static_cast<std::byte*>(memory);
  PickGroups groups;
  groups.max_tiles = most_tiles(picks, experts, tile_rows);
  groups.offsets = reinterpret_cast<std::int32_t*>(at);
  groups.n_tiles = groups.offsets + experts + 1;
  at += aligned((E + 2) * 4);
  groups.picks = reinterpret_cast<std::int32_t*>(at);
  at += aligned(n * 4);
  groups.tiles = reinterpret_cast<PickTile*>(at);
  at += aligned(static_cast<std::size_t>(groups.max_tiles) * sizeof(PickTile));
  auto* const counts = reinterpret_cast<std::int32_t*>(at);

  const int chunks = chunks_of(picks);
  const std::size_t shared = E * (4 + 2 * sort_warps);
  if (chunks > 1) {
    launch(device, count_picks, static_cast<unsigned>(chunks), sort_threads, E * 4, routing.ids,
           static_cast<int>(picks), experts, counts);
  }
  const auto kernel = chunks > 1                     ? sort_picks<chunk_steps>
                      : picks <= one_chunk_picks / 4 ? sort_picks<one_chunk_steps / 4>
                                                     : sort_picks<one_chunk_steps>;
  launch(device, kernel, static_cast<unsigned>(chunks), sort_threads, shared, routing.ids, static_cast<int>(picks),
         experts, chunks, tile_rows, counts, groups);
  return groups;
}

}  // namespace qwen3next::cuda
