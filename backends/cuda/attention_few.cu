#include <algorithm>

#include "backends/cuda/attention.cuh"

namespace qwen3next::cuda {
namespace {

constexpr int D = fast_head_dim, G = fast_group, L = leaf_positions;
constexpr int warps = G + 2, threads = 32 * warps;          // one for each query head, and for new keys and values
constexpr int tile_bytes = L * D * 2;                       // of the keys or the values of a leaf
constexpr int score_stride = L + 4, weight_stride = L + 8;  // f32, f16: rows that meet all banks
constexpr int q8_0_row_bytes = D / 32 * 34;

// Of a leaf on its way: keys, then values, as the cache keeps them.
template <bool q8_0>
constexpr int stage_bytes = 2 * (q8_0 ? L * q8_0_row_bytes : tile_bytes);
constexpr std::size_t shared_bytes(int tokens, bool q8_0, int stages) {
  const int copies = stages * (q8_0 ? stage_bytes<true> : stage_bytes<false>), f16_leaf = q8_0 ? 2 * tile_bytes : 0;
  const int of_row = D * 2 + 2 * score_stride * 4 + weight_stride * 2 + static_cast<int>(sizeof(float2));
  return static_cast<std::size_t>(copies + f16_leaf + tokens * G * of_row);
}

// All copies but those of the leaves ahead, and `more`.
template <int more>
__device__ void await_leaf(int stages) {
  if (stages == 1) return await_copies<more>();
  if (stages == 2) return await_copies<2 + more>();
  await_copies<4 + more>();
}

// A leaf on the way through a block's units.
struct Place {
  int unit, span, head;     // KV head
  int of_head, head_units;  // which of the head's units it is, and of how many
  int begin, leaf, end;     // leaves from position 0: the unit is [begin, end)

  __device__ void enter(const SplitSpans& p) {
    begin = leaf = of_head * p.unit_leaves;
    const KvSpan& s = p.spans.span[span];
    end = min(begin + p.unit_leaves, (s.first + s.count + L - 1) / L);
  }
  __device__ void start(const SplitSpans& p, int first_unit) {
    unit = first_unit, span = 0;
    while (unit >= p.first_unit[span + 1]) ++span;
    head_units = p.units_of_head(span);
    head = 0, of_head = unit - p.first_unit[span];
    for (; of_head >= head_units; of_head -= head_units) ++head;
    enter(p);
  }
  __device__ void next(const SplitSpans& p, int end_unit) {
    if (++leaf < end || ++unit == end_unit) return;
    if (++of_head == head_units) {
      of_head = 0, ++head;
      if (unit == p.first_unit[span + 1]) head = 0, head_units = p.units_of_head(++span);
    }
    enter(p);
  }
};

// Scores are K q^T and results V^T p^T, so that a row's eight query heads of a KV head are the eight columns of an mma:
// nothing is padded, and the rows of a span only add columns.  Keys and values of a leaf arrive in shared memory some
// leaves ahead; each of eight warps takes 16 positions and half of the dims of the scores, then one head's softmax,
// then 32 dims of the results.  Rows that do not see a leaf take part in it, so that nothing branches, and leave what
// they got.
//
// A single row comes to code that the caches have lost (its weights went through them), and each 128 bytes of it cost
// their way through memory: loops over more than a token's work stay loops.  `one_leaf`: a block has a unit of one
// leaf; the same in fewer instructions.  It rehearses, on numbers that mean nothing and leave no trace: then the code
// has come through memory when what it waits for is there.
template <int tokens, bool q8_0, bool one_leaf>
__global__ void __launch_bounds__(threads, one_leaf ? 3 : 1)
    attend_few_kernel(__grid_constant__ const FewWork w, int most_stages, Shares shares) {
  const int stages = one_leaf ? 1 : most_stages;
  extern __shared__ __align__(1024) unsigned char shared[];
  let_successor_start();
  unsigned char* const f16_leaf = shared + stages * stage_bytes<q8_0>;           // of q8_0: the leaf at hand
  unsigned char* const queries = f16_leaf + (q8_0 ? 2 * tile_bytes : 0);         // f16 [tokens * G, D]
  float* const scores = reinterpret_cast<float*>(queries + tokens * G * D * 2);  // [2, tokens * G, L]
  __half* const weights = reinterpret_cast<__half*>(scores + 2 * tokens * G * score_stride);  // [tokens * G, L]
  float2* const factors = reinterpret_cast<float2*>(weights + tokens * G * weight_stride);    // [tokens * G]
  const SplitSpans& p = w.partials.split;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t4 = lane % 4;

  const int end_unit = shares.begin(blockIdx.x + 1);
  Place here{}, ahead{};
  here.start(p, shares.begin(blockIdx.x));
  ahead = here;
  const auto block_ahead = [&] { return p.spans.span[ahead.span].table[ahead.leaf * L / kv_block]; };
  std::byte* block = block_ahead();  // loaded a leaf before it is needed

  // The past rows of a leaf, and zeros for those that will never be; the new ones are left out.
  const auto start_leaf = [&](int stage) {
    constexpr int row_bytes = q8_0 ? q8_0_row_bytes : D * 2, chunks = L * row_bytes / 16;
    const int begin = ahead.leaf * L, first = p.spans.span[ahead.span].first, count = p.spans.span[ahead.span].count;
    const bool all_past = begin + L <= first;
    const std::byte* from = block + ahead.head * (kv_block * row_bytes) + begin % kv_block * row_bytes;
    std::uint32_t to = shared_address(shared + stage * stage_bytes<q8_0>);
#pragma unroll 1
    for (int kv = 0; kv < 2; ++kv) {
#pragma unroll 1
      for (int i = thread; i < chunks && (one_leaf || ahead.unit < end_unit); i += threads) {
        const int row = begin + i / (row_bytes / 16);
        if (all_past || row < first || row >= first + count)
          copy_or_clear_async(to + (q8_0 ? i * 16 : tile_offset(i / 32, i % 32)), from + i * 16,
                              all_past || row < first);
      }
      end_of_copies();
      from += w.layout.kv_heads * (kv_block * row_bytes), to += stage_bytes<q8_0> / 2;
    }
    if (one_leaf || ahead.unit == end_unit) return;
    ahead.next(p, end_unit);
    if (ahead.unit < end_unit) block = block_ahead();
  };

  // What is a warp's to prepare: queries of a head, or the new keys or values.
  const bool is_query = warp < G, is_value = warp == G + 1;
  const Rows& sources = is_query ? w.q : is_value ? w.v : w.k;
  const float* const norm = is_query ? w.prepare.q_norm : is_value ? nullptr : w.prepare.k_norm;
  float norm_weight[8];
  if (tokens == 1) load_norm(norm_weight, norm, lane);  // it has the registers

  float group_out[tokens][2][4];               // dims 32 warp + 16 i + g (+ 8), heads 2 t4 (+ 1)
  float group_max[tokens], group_sum[tokens];  // of head `warp`
  bool queries_ready = false;                  // those of a span and KV head
  if (!w.early) wait_for_predecessor();
  for (int step = 0, stage = 0, stage_ahead = 0, left = stages; here.unit < end_unit;
       ++step, stage = stage + 1 == stages ? 0 : stage + 1) {
    const KvSpan& s = p.spans.span[here.span];
    const int begin = here.leaf * L;
    const auto visible = [&](int t) { return tokens == 1 || (t < s.count && begin <= s.first + t); };
    const bool first_of_unit = one_leaf || here.leaf == here.begin,
               last_of_unit = one_leaf || here.leaf + 1 == here.end;
    if (step > 0) __syncthreads();  // the leaf before, and the queries, are read
#pragma unroll 1
    for (; left > 0; --left, stage_ahead = stage_ahead + 1 == stages ? 0 : stage_ahead + 1) start_leaf(stage_ahead);
    left = one_leaf ? 0 : 1;  // for the next step
    const bool now = !one_leaf || step > 0;
    if (step == (one_leaf ? 1 : 0) && w.early) wait_for_predecessor();
    const auto* const anything = reinterpret_cast<const float*>(block);
    unsigned char* const cached = shared + stage * stage_bytes<q8_0>;
    unsigned char* const keys = q8_0 ? f16_leaf : cached;
    unsigned char* const values = keys + tile_bytes;

    {
      const bool queries_due = one_leaf || (first_of_unit && (!queries_ready || here.of_head == 0));
      queries_ready = queries_ready || queries_due;
      const int first_row = is_query ? 0 : max(begin - s.first, 0);
      const int end_row = is_query ? (queries_due ? tokens : 0) : min(begin + L - s.first, s.count);
      const int column = (is_query ? here.head * G + warp : here.head) * D;
      const auto is_due = [&](int t) { return first_row <= t && t < end_row; };
      float x[tokens][8];
#pragma unroll
      for (int t = 0; t < tokens; ++t)
        if (is_due(t)) load_eight(x[t], now ? sources.row(s.begin + min(t, s.count - 1)) + column : anything, lane);
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        if (!is_due(t)) continue;
        if (tokens > 1) load_norm(norm_weight, norm, lane);
        if (!is_value)
          prepare_eight(x[t], lane, norm_weight, norm, w.prepare.eps,
                        !w.prepare.angles.data ? nullptr
                        : now                  ? w.prepare.angles.row(s.begin + min(t, s.count - 1))
                                               : anything,
                        w.prepare.pairs);
        const int position = s.first + t;
        constexpr int row_bytes = q8_0 ? q8_0_row_bytes : D * 2;
        std::byte* const to = (one_leaf ? block : s.table[begin / kv_block]) +
                              (here.head + (is_value ? w.layout.kv_heads : 0)) * (kv_block * row_bytes) +
                              position % kv_block * row_bytes;
        if (q8_0 && !is_query) {
          const EightOfQ8 eight(x[t]);
          if (now) eight.store(to, lane);
          eight.store(reinterpret_cast<std::byte*>(cached + (is_value ? L * q8_0_row_bytes : 0) +
                                                   (position - begin) * q8_0_row_bytes),
                      lane);
        } else {
          const uint4 halves = eight_halves(x[t]);
          unsigned char* const tile = is_query ? queries : is_value ? values : keys;
          *reinterpret_cast<uint4*>(tile + tile_offset(is_query ? t * G + warp : position - begin, lane)) = halves;
          if (now && !is_query) reinterpret_cast<uint4*>(to)[lane] = halves;
        }
      }
    }
    await_leaf<q8_0 ? 0 : 1>(stages);
    __syncthreads();  // keys and queries are there for all
    if constexpr (q8_0) {
#pragma unroll 2
      for (int at = thread; at < 2 * L * 32; at += threads) {
        const int row = at / 32, chunk = at % 32;  // rows of keys, then of values
        *reinterpret_cast<uint4*>(keys + row / L * tile_bytes + tile_offset(row % L, chunk)) =
            eight_of_q8_0(reinterpret_cast<const std::byte*>(cached + row * q8_0_row_bytes), chunk);
      }
      __syncthreads();
    }

    if (warp < G) {  // scores: positions 16 tile + g (+ 8), heads 2 t4 (+ 1), by half of the dims
      const int tile = warp % 4, half = warp / 4;
      float sums[tokens][2][4] = {};
#pragma unroll(tokens == 1 ? 1 : D / 64)
      for (int kk = 0; kk < D / 32; kk += 2) {
        std::uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int chunk = half * D / 16 + 2 * (kk + i) + lane / 16;
          load_matrices(a[i], shared_address(keys + tile_offset(16 * tile + lane % 16, chunk)));
        }
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
          std::uint32_t b[4];
          load_matrices(b, shared_address(queries + tile_offset(t * G + lane % 8, half * D / 16 + 2 * kk + lane / 8)));
          multiply_add(sums[t][0], a[0], b[0], b[1]);
          multiply_add(sums[t][1], a[1], b[2], b[3]);
        }
      }
      float* const to = scores + (half * tokens * G + 2 * t4) * score_stride + 16 * tile + g;
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[(t * G + i % 2) * score_stride + i / 2 * 8] = sums[t][0][i] + sums[t][1][i];
      }
    }
    __syncthreads();

    if (warp < G) {  // softmax of head `warp`; two positions a lane
      float2 x[tokens];
      float most[tokens], sum[tokens];
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        const float2* const row = reinterpret_cast<const float2*>(scores + (t * G + warp) * score_stride) + lane;
        const float2 a = row[0], b = row[tokens * G * score_stride / 2];
        const int position = begin + 2 * lane;
        x[t].x = position <= s.first + t ? __fmul_rn(__fadd_rn(a.x, b.x), w.scale) : -INFINITY;
        x[t].y = position + 1 <= s.first + t ? __fmul_rn(__fadd_rn(a.y, b.y), w.scale) : -INFINITY;
        most[t] = fmaxf(x[t].x, x[t].y);
      }
#pragma unroll(tokens == 1 ? 1 : 5)
      for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
        for (int t = 0; t < tokens; ++t) most[t] = fmaxf(most[t], __shfl_xor_sync(0xffffffff, most[t], offset));
      }
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        const __half2 e = __floats2half2_rn(exp2_fast(x[t].x - most[t]), exp2_fast(x[t].y - most[t]));
        reinterpret_cast<__half2*>(weights + (t * G + warp) * weight_stride)[lane] = e;
        sum[t] = __low2float(e) + __high2float(e);
      }
#pragma unroll(tokens == 1 ? 1 : 5)
      for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
        for (int t = 0; t < tokens; ++t) sum[t] += __shfl_xor_sync(0xffffffff, sum[t], offset);
      }
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        if (first_of_unit) {
          group_max[t] = most[t], group_sum[t] = sum[t];
        } else if (visible(t)) {
          const MergeFactors f = merge_factors(group_max[t], most[t]);
          group_max[t] = f.max, group_sum[t] = merge(group_sum[t], sum[t], f);
          if (lane == 0) factors[t * G + warp] = {f.of_a, f.of_b};
        }
      }
    }
    await_leaf<0>(stages);
    __syncthreads();  // weights and values are there for all

    if (warp < G) {
      float out[tokens][2][4] = {};
#pragma unroll(tokens == 1 ? 1 : L / 32)
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
        if (first_of_unit) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) group_out[t][j][i] = out[t][j][i];
          }
        } else if (visible(t)) {
          const float2 even = factors[t * G + 2 * t4], odd = factors[t * G + 2 * t4 + 1];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 f = i % 2 == 0 ? even : odd;
              group_out[t][j][i] = merge(group_out[t][j][i], out[t][j][i], {0, f.x, f.y});
            }
          }
        }
      }

      if (now && last_of_unit) {
        const int unit_begin = here.begin * L;
#pragma unroll
        for (int t = 0; t < tokens; ++t) {
          if (tokens > 1 && (t >= s.count || unit_begin > s.first + t)) continue;
          const std::size_t row = static_cast<std::size_t>(here.unit) * w.partials.rows + t * G;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
              w.partials.out[(row + 2 * t4 + i % 2) * D + 32 * warp + 16 * j + g + i / 2 * 8] = group_out[t][j][i];
          }
          if (lane == 0) w.partials.max_sum[row + warp] = {group_max[t], group_sum[t]};
        }
      }
    }
    if (!one_leaf) {
      here.next(p, end_unit);
    } else if (now) {
      break;
    }
  }
  await_copies<0>();
}

template <int tokens, bool q8_0>
void start(const Device& device, const FewWork& work, int units, bool leaves) {
  const int blocks = std::min(units, device.properties().multiprocessors);
  int stages = leaves ? 1 : 3;
  while (stages > 1 && shared_bytes(tokens, q8_0, stages) > device.properties().shared_memory_per_block) --stages;
  const auto kernel = tokens == 1 && leaves && units == blocks ? attend_few_kernel<tokens, q8_0, tokens == 1>
                                                               : attend_few_kernel<tokens, q8_0, false>;
  launch(device, kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes(tokens, q8_0, stages), work,
         stages, Shares(units, blocks));
}

template <bool q8_0>
void start(const Device& device, const FewWork& work, int units, bool leaves, int most_rows) {
  switch (most_rows) {
    case 1:
      return start<1, q8_0>(device, work, units, leaves);
    case 2:
      return start<2, q8_0>(device, work, units, leaves);
    case 3:
      return start<3, q8_0>(device, work, units, leaves);
    case 4:
      return start<4, q8_0>(device, work, units, leaves);
    case 5:
      return start<5, q8_0>(device, work, units, leaves);
    default:
      return start<8, q8_0>(device, work, units, leaves);
  }
}

}  // namespace

int most_few_rows(const Device& device, bool q8_0) {
  int rows = few_rows;
  while (rows > 0 && shared_bytes(rows, q8_0, 1) > device.properties().shared_memory_per_block) rows /= 2;
  return rows;
}

void attend_few(const Device& device, const FewWork& work, int units, bool leaves, int most_rows) {
  if (work.layout.row_bytes == q8_0_row_bytes) {
    start<true>(device, work, units, leaves, most_rows);
  } else {
    start<false>(device, work, units, leaves, most_rows);
  }
}

}  // namespace qwen3next::cuda
