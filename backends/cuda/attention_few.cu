#include <algorithm>

#include "backends/cuda/attention.cuh"

namespace qwen3next::cuda {
namespace {

constexpr int D = fast_head_dim, G = fast_group, L = leaf_positions;
constexpr int threads = 256, warps = threads / 32;
constexpr int tile_bytes = L * D * 2;                       // of the keys or the values of a leaf
constexpr int score_stride = L + 4, weight_stride = L + 8;  // f32, f16: rows that meet all banks
static_assert(warps == G, "a warp for each query head");

constexpr std::size_t shared_bytes(int tokens, int stages) {
  return static_cast<std::size_t>(stages) * 2 * tile_bytes +
         static_cast<std::size_t>(tokens * G) * (D * 2 + score_stride * 4 + weight_stride * 2 + sizeof(float2));
}

__device__ void await_copies_but(int left) {
  switch (left) {
    case 0:
      return await_copies<0>();
    case 1:
      return await_copies<1>();
    case 2:
      return await_copies<2>();
    case 3:
      return await_copies<3>();
    case 4:
      return await_copies<4>();
    default:
      return await_copies<5>();
  }
}

// A leaf on the way through a block's units.
struct Place {
  int unit, span, head;  // KV head
  int leaf, end;         // of the positions from 0; where the unit ends

  __device__ void enter(const Partials& p) {
    while (unit >= p.first_unit[span + 1]) ++span;
    const int of_span = unit - p.first_unit[span], of_head = p.units_of_head(span);
    head = of_span / of_head;
    leaf = of_span % of_head * p.unit_leaves;
    const KvSpan& s = p.spans.span[span];
    end = min(leaf + p.unit_leaves, (s.first + s.count + L - 1) / L);
  }
  __device__ void next(const Partials& p, int end_unit) {
    if (++leaf == end && ++unit < end_unit) enter(p);
  }
};

// Scores are K q^T and results V^T p^T, so that a row's eight query heads of a KV head are the eight columns of an mma:
// nothing is padded, and the rows of a span only add columns.  Keys and values of a leaf arrive in shared memory some
// leaves ahead; a warp takes 16 positions of the scores of every other row, then one head's softmax, then 32 dims of
// the results.
template <int tokens>
__global__ void __launch_bounds__(threads, 1)
    attend_few_kernel(__grid_constant__ const FewWork w, int total_units, int stages) {
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* const queries = shared + stages * 2 * tile_bytes;                          // f16 [tokens * G, D]
  float* const scores = reinterpret_cast<float*>(queries + tokens * G * D * 2);             // [tokens * G, L]
  __half* const weights = reinterpret_cast<__half*>(scores + tokens * G * score_stride);    // [tokens * G, L]
  float2* const factors = reinterpret_cast<float2*>(weights + tokens * G * weight_stride);  // [tokens * G]
  const Partials& p = w.partials;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t4 = lane % 4;

  const auto unit_of = [&](unsigned block) {
    return static_cast<int>(static_cast<long long>(total_units) * block / gridDim.x);
  };
  const int end_unit = unit_of(blockIdx.x + 1);
  Place here{unit_of(blockIdx.x), 0, 0, 0, 0};
  if (here.unit < end_unit) here.enter(p);
  Place ahead = here;

  // The past rows of a leaf; zeros for the others.
  const auto start_leaf = [&](int stage) {
    if (ahead.unit < end_unit) {
      const KvSpan& s = p.spans.span[ahead.span];
      const int begin = ahead.leaf * L;
      const std::byte* const block = s.table[begin / kv_block] + static_cast<std::size_t>(begin % kv_block) * (D * 2);
#pragma unroll
      for (int kv = 0; kv < 2; ++kv) {
        const std::byte* const from = block + (kv * w.layout.kv_heads + ahead.head) * w.layout.plane();
        const std::uint32_t to = shared_address(shared + (2 * stage + kv) * tile_bytes);
#pragma unroll
        for (int i = 0; i < L * 32 / threads; ++i) {
          const int at = i * threads + thread, row = at / 32, chunk = at % 32;
          copy_or_clear_async(to + tile_offset(row, chunk), from + at * 16, begin + row < s.first);
        }
        end_of_copies();
      }
      ahead.next(p, end_unit);
    } else {
      end_of_copies();
      end_of_copies();
    }
  };
  if (!w.early) wait_for_predecessor();
  for (int stage = 0; stage < stages; ++stage) start_leaf(stage);
  if (w.early) wait_for_predecessor();
  let_successor_start();

  float group_out[tokens][2][4];               // dims 32 warp + 16 i + g (+ 8), heads 2 t4 (+ 1)
  float group_max[tokens], group_sum[tokens];  // of head `warp`
  int queries_unit = -1;                       // queries are those of this unit's span and head
  for (int step = 0, stage = 0; here.unit < end_unit; ++step, stage = stage + 1 == stages ? 0 : stage + 1) {
    const KvSpan& s = p.spans.span[here.span];
    const int begin = here.leaf * L;
    const auto visible = [&](int t) { return t < s.count && begin <= s.first + t; };
    const bool first_of_unit = here.leaf % p.unit_leaves == 0, last_of_unit = here.leaf + 1 == here.end;
    if (step > 0) {
      __syncthreads();  // the leaf before, and the queries, are read
      start_leaf(stage == 0 ? stages - 1 : stage - 1);
    }
    if (first_of_unit &&
        (queries_unit < 0 || (here.unit - p.first_unit[here.span]) % p.units_of_head(here.span) == 0)) {
      queries_unit = here.unit;
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        if (t >= s.count) break;
        const int row = s.begin + t;
        float x[8];
        load_eight(x, w.q.row(row) + (here.head * G + warp) * D, lane);
        prepare_eight(x, lane, w.prepare.q_norm, w.prepare.eps,
                      w.prepare.angles.data ? w.prepare.angles.row(row) : nullptr, w.prepare.pairs);
        *reinterpret_cast<uint4*>(queries + tile_offset(t * G + warp, lane)) = eight_halves(x);
      }
    }
    unsigned char* const keys = shared + 2 * stage * tile_bytes;
    unsigned char* const values = keys + tile_bytes;
    const bool new_rows = begin + L > s.first;
    if (new_rows) {
      await_copies_but(2 * stages - 2);
    } else {
      await_copies_but(2 * stages - 1);
    }
    __syncthreads();  // keys and queries are there for all
    if (new_rows) {
      // Of this pass: here and in the cache.
      const int from = max(begin, s.first), count = min(begin + L, s.first + s.count) - from;
      for (int i = warp; i < 2 * count; i += warps) {
        const int position = from + i / 2, row = s.begin + position - s.first;
        float x[8];
        load_eight(x, (i % 2 == 0 ? w.k : w.v).row(row) + here.head * D, lane);
        if (i % 2 == 0) {
          prepare_eight(x, lane, w.prepare.k_norm, w.prepare.eps,
                        w.prepare.angles.data ? w.prepare.angles.row(row) : nullptr, w.prepare.pairs);
        }
        const uint4 halves = eight_halves(x);
        *reinterpret_cast<uint4*>((i % 2 == 0 ? keys : values) + tile_offset(position - begin, lane)) = halves;
        reinterpret_cast<uint4*>(
            w.layout.key_row(s.table, position, here.head + (i % 2 == 0 ? 0 : w.layout.kv_heads)))[lane] = halves;
      }
      __syncthreads();
    }

    {  // scores: positions 16 tile + g (+ 8), heads 2 t4 (+ 1)
      const int tile = warp % 4;
      constexpr int mine = (tokens + 1) / 2;
      float sums[mine][2][4] = {};
#pragma unroll
      for (int kk = 0; kk < D / 16; kk += 2) {
        if (warp / 4 >= tokens) break;
        std::uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          load_matrices(a[i], shared_address(keys + tile_offset(16 * tile + lane % 16, 2 * (kk + i) + lane / 16)));
#pragma unroll
        for (int m = 0; m < mine; ++m) {
          const int t = 2 * m + warp / 4;
          if (!visible(t)) continue;
          std::uint32_t b[4];
          load_matrices(b, shared_address(queries + tile_offset(t * G + lane % 8, 2 * kk + lane / 8)));
          multiply_add(sums[m][0], a[0], b[0], b[1]);
          multiply_add(sums[m][1], a[1], b[2], b[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < mine; ++m) {
        const int t = 2 * m + warp / 4;
        if (t >= tokens || !visible(t)) continue;
        float* const to = scores + (t * G + 2 * t4) * score_stride + 16 * tile + g;
        to[0] = sums[m][0][0] + sums[m][1][0], to[score_stride] = sums[m][0][1] + sums[m][1][1];
        to[8] = sums[m][0][2] + sums[m][1][2], to[score_stride + 8] = sums[m][0][3] + sums[m][1][3];
      }
    }
    __syncthreads();

#pragma unroll
    for (int t = 0; t < tokens; ++t) {  // softmax of head `warp`; two positions a lane
      if (!visible(t)) continue;
      const int row = t * G + warp;
      float2 x = reinterpret_cast<const float2*>(scores + row * score_stride)[lane];
      x.x = begin + 2 * lane <= s.first + t ? __fmul_rn(x.x, w.scale) : -INFINITY;
      x.y = begin + 2 * lane + 1 <= s.first + t ? __fmul_rn(x.y, w.scale) : -INFINITY;
      float most = fmaxf(x.x, x.y);
      for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, offset));
      const __half2 e = __floats2half2_rn(exp2_fast(x.x - most), exp2_fast(x.y - most));
      reinterpret_cast<__half2*>(weights + row * weight_stride)[lane] = e;
      const float sum = warp_sum(__low2float(e) + __high2float(e));
      if (first_of_unit) {
        group_max[t] = most, group_sum[t] = sum;
      } else {
        const MergeFactors f = merge_factors(group_max[t], most);
        group_max[t] = f.max, group_sum[t] = merge(group_sum[t], sum, f);
        if (lane == 0) factors[row] = {f.of_a, f.of_b};
      }
    }
    await_copies_but(2 * stages - 2);
    __syncthreads();  // weights and values are there for all

    float out[tokens][2][4] = {};
#pragma unroll
    for (int kk = 0; kk < L / 16; kk += 2) {
      std::uint32_t a[2][2][4];  // positions 16 (kk + i), dims 32 warp + 16 j
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          load_transposed(a[i][j], shared_address(values + tile_offset(16 * (kk + i) + lane / 16 * 8 + lane % 8,
                                                                       4 * warp + 2 * j + lane / 8 % 2)));
      }
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        if (!visible(t)) continue;
        std::uint32_t b[4];
        load_matrices(b, shared_address(weights + (t * G + lane % 8) * weight_stride + 16 * kk + lane / 8 * 8));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) multiply_add(out[t][j], a[i][j], b[2 * i], b[2 * i + 1]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      if (!visible(t)) continue;
      const int row = t * G + 2 * t4;
      const float2 even = first_of_unit ? float2{0, 1} : factors[row];
      const float2 odd = first_of_unit ? float2{0, 1} : factors[row + 1];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 f = i % 2 == 0 ? even : odd;
          group_out[t][j][i] = first_of_unit ? out[t][j][i] : merge(group_out[t][j][i], out[t][j][i], {0, f.x, f.y});
        }
      }
    }

    if (last_of_unit) {
      const int unit_begin = here.leaf / p.unit_leaves * p.unit_leaves * L;
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        if (t >= s.count || unit_begin > s.first + t) continue;
        const std::size_t row = static_cast<std::size_t>(here.unit) * p.rows + t * G;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            p.out[(row + 2 * t4 + i % 2) * D + 32 * warp + 16 * j + g + i / 2 * 8] = group_out[t][j][i];
        }
        if (lane == 0) p.max_sum[row + warp] = {group_max[t], group_sum[t]};
      }
    }
    here.next(p, end_unit);
  }
  await_copies<0>();
}

template <int tokens>
void start(const Device& device, const FewWork& work, int total_units) {
  const int blocks = std::min(total_units, device.properties().multiprocessors);
  const int leaves = work.partials.unit_leaves * ((total_units + blocks - 1) / blocks);
  int stages = std::min(3, leaves);
  while (stages > 1 && shared_bytes(tokens, stages) > device.properties().shared_memory_per_block) --stages;
  launch(device, attend_few_kernel<tokens>, dim3(static_cast<unsigned>(blocks)), dim3(threads),
         shared_bytes(tokens, stages), work, total_units, stages);
}

}  // namespace

void attend_few(const Device& device, const FewWork& work, int total_units, int most_rows) {
  if (most_rows == 1) {
    start<1>(device, work, total_units);
  } else if (most_rows == 2) {
    start<2>(device, work, total_units);
  } else if (most_rows <= 4) {
    start<4>(device, work, total_units);
  } else {
    start<8>(device, work, total_units);
  }
}

}  // namespace qwen3next::cuda
