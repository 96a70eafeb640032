#include "backends/cuda/attention.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "backends/cuda/attention.cuh"

namespace qwen3next::cuda {
namespace {

// Row `index` of the spans, one after the other.
struct SpanRow {
  int span, t;
};
__device__ SpanRow span_row(const KvSpans& spans, int index) {
  int span = 0;
  while (index >= spans.span[span].count) index -= spans.span[span++].count;
  return {span, index};
}

// --- The cache's types ---

__device__ void store_row(KvType type, std::byte* to, const float* row, int dims, int lane) {
  if (type == KvType::f32) {
    for (int d = lane; d < dims; d += 32) reinterpret_cast<float*>(to)[d] = row[d];
  } else if (type == KvType::f16) {
    for (int d = lane; d < dims; d += 32) reinterpret_cast<std::uint16_t*>(to)[d] = half_bits(row[d]);
  } else {
    for (int block = 0; block < dims / 32; ++block) {  // f16 scale, 32 bytes
      float largest = fabsf(row[32 * block + lane]);
      for (int offset = 16; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
      const Q8Scale scale(largest);
      std::byte* const at = to + 34 * block;
      if (lane == 0) *reinterpret_cast<__half*>(at) = scale.d;
      at[2 + lane] = static_cast<std::byte>(scale.level(row[32 * block + lane]));
    }
  }
}

struct F32Row {
  const float* row;
  __device__ explicit F32Row(const std::byte* at) : row(reinterpret_cast<const float*>(at)) {}
  __device__ float operator[](int d) const { return row[d]; }
};
struct F16Row {
  const __half* row;
  __device__ explicit F16Row(const std::byte* at) : row(reinterpret_cast<const __half*>(at)) {}
  __device__ float operator[](int d) const { return __half2float(row[d]); }
};
struct Q8Row {
  const std::byte* row;
  __device__ explicit Q8Row(const std::byte* at) : row(at) {}
  __device__ float operator[](int d) const {
    const std::byte* const block = row + d / 32 * 34;
    return __half2float(*reinterpret_cast<const __half*>(block)) *
           static_cast<float>(static_cast<signed char>(block[2 + d % 32]));
  }
};

// --- Norms, rotation, and the cache's new rows ---

struct PrepareWork {
  KvSpans spans;
  Rows q, k, v;
  std::uint16_t* q_half;  // of q; null: q itself is replaced
  Preparation prepare;
  KvLayout layout;
  int heads, head_dim;  // heads 0: only k and v
  int type;             // KvType
  int eight_a_lane;     // heads of 256 and an f16 cache
};

constexpr int prepare_warps = 4;

// A warp for each head of q, k and v of a row.
__global__ void prepare_kernel(__grid_constant__ const PrepareWork w) {
  extern __shared__ float shared[];
  let_successor_start();
  wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, D = w.head_dim;
  const int item = static_cast<int>(blockIdx.y) * prepare_warps + warp;
  if (item >= w.heads + 2 * w.layout.kv_heads) return;
  const auto [span, t] = span_row(w.spans, static_cast<int>(blockIdx.x));
  const KvSpan s = w.spans.span[span];
  const int row = s.begin + t, plane = item - w.heads;  // of the cache: keys, then values
  const bool is_query = plane < 0, is_value = plane >= w.layout.kv_heads;
  const float* const norm = is_query ? w.prepare.q_norm : is_value ? nullptr : w.prepare.k_norm;
  const float* const angles = is_value || !w.prepare.angles.data ? nullptr : w.prepare.angles.row(row);
  float* const x = is_query   ? w.q.row(row) + item * D
                   : is_value ? w.v.row(row) + (plane - w.layout.kv_heads) * D
                              : w.k.row(row) + plane * D;
  std::uint16_t* const q_half = w.q_half + row * w.q.stride + item * D;
  std::byte* const cached = is_query ? nullptr : w.layout.key_row(s.table, s.first + t, plane);

  if (w.eight_a_lane) {
    float values[8], weight[8];
    load_eight(values, x, lane);
    load_norm(weight, norm, lane);
    prepare_eight(values, lane, weight, norm, w.prepare.eps, angles, w.prepare.pairs);
    reinterpret_cast<uint4*>(is_query ? reinterpret_cast<std::byte*>(q_half) : cached)[lane] = eight_halves(values);
    return;
  }
  float* const normed = shared + warp * D;
  if (norm) {
    float squares = 0;
    for (int d = lane; d < D; d += 32) squares += x[d] * x[d];
    const float scale = 1 / sqrtf(warp_sum(squares) / static_cast<float>(D) + w.prepare.eps);
    for (int d = lane; d < D; d += 32) normed[d] = x[d] * scale * norm[d];
  } else {
    for (int d = lane; d < D; d += 32) normed[d] = x[d];
  }
  __syncwarp();
  if (angles) {
    for (int i = lane; i < w.prepare.pairs; i += 32) {
      const float a = normed[i], b = normed[i + w.prepare.pairs], cos = angles[i], sin = angles[w.prepare.pairs + i];
      normed[i] = a * cos - b * sin, normed[i + w.prepare.pairs] = b * cos + a * sin;
    }
    __syncwarp();
  }
  if (!is_query) {
    store_row(static_cast<KvType>(w.type), cached, normed, D, lane);
  } else if (w.q_half) {
    for (int d = lane; d < D; d += 32) q_half[d] = half_bits(normed[d]);
  } else {
    for (int d = lane; d < D; d += 32) x[d] = normed[d];
  }
}

// --- Any shape ---

struct PlainWork {
  Partials partials;
  Rows q;  // prepared
  KvLayout layout;
  int group, head_dim;
  float scale;  // of scores, times log2(e)
  int split;    // 0: a block does all positions of its row and head, and writes the result
  HeadsOut out;
};

constexpr int plain_threads = 128;

// A block for a row, a head and, if positions are split, a group of them.  128 positions at a time: their scores a
// thread each, then the sum of their values by dims.
template <class CacheRow>
__global__ void __launch_bounds__(plain_threads) attend_plain_kernel(__grid_constant__ const PlainWork w) {
  extern __shared__ float shared[];
  __shared__ float scores[plain_threads];
  let_successor_start();
  wait_for_predecessor();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, D = w.head_dim;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / w.group, unit = static_cast<int>(blockIdx.z);
  const SplitSpans& p = w.partials.split;
  const auto [span, t] = span_row(p.spans, static_cast<int>(blockIdx.x));
  const KvSpan s = p.spans.span[span];
  const bool split = w.split != 0;
  const int unit_positions = group_leaves * leaf_positions, visible = s.first + t + 1;
  const int first = split ? unit * unit_positions : 0, end = split ? min(visible, first + unit_positions) : visible;
  if (first >= visible) return;

  float *const query = shared, *const out = shared + D;
  const float* const q = w.q.row(s.begin + t) + head * D;
  for (int d = thread; d < D; d += plain_threads) query[d] = q[d], out[d] = 0;
  float most = -INFINITY, sum = 0;
  for (int begin = first; begin < end; begin += plain_threads) {
    const int count = min(plain_threads, end - begin);
    __syncthreads();  // the query is there; the scores before are read
    float score = -INFINITY;
    if (thread < count) {
      const CacheRow key(w.layout.key_row(s.table, begin + thread, kv_head));
      float product = 0;
#pragma unroll 8
      for (int d = 0; d < D; ++d) product = __fmaf_rn(query[d], key[d], product);
      score = __fmul_rn(product, w.scale);
    }
    scores[thread] = score;
    __syncthreads();
    float now = most;
    for (int i = lane; i < plain_threads; i += 32) now = fmaxf(now, scores[i]);
    for (int offset = 16; offset > 0; offset /= 2) now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, offset));
    __syncthreads();
    scores[thread] = exp2_fast(score - now);
    __syncthreads();
    const float factor = exp2_fast(most - now);
    float of_tile = 0;
    for (int i = lane; i < plain_threads; i += 32) of_tile += scores[i];
    sum = __fmaf_rn(sum, factor, warp_sum(of_tile));
    most = now;
    for (int d = thread; d < D; d += plain_threads) {
      float total = __fmul_rn(out[d], factor);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const CacheRow value(w.layout.value_row(s.table, begin + i, kv_head));
        total = __fmaf_rn(scores[i], value[d], total);
      }
      out[d] = total;
    }
  }
  if (split) {
    const int of_span = kv_head * p.units_of_head(span) + unit;
    const std::size_t row =
        static_cast<std::size_t>(p.first_unit[span] + of_span) * w.partials.rows + t * w.group + head % w.group;
    for (int d = thread; d < D; d += plain_threads) w.partials.out[row * D + d] = out[d];
    if (thread == 0) w.partials.max_sum[row] = {most, sum};
  } else {
    for (int d = thread; d < D; d += plain_threads) put_head_value(w.out, s.begin + t, head * D + d, out[d] / sum);
  }
}

// --- Partial results together ---

struct CombineWork {
  Partials partials;
  HeadsOut out;
  int group, head_dim;
};

constexpr int combine_warps = 8;

// A block for a row, a head and 32 dims.  Warp j adds up groups j, j + 8, ..., scaled to the largest score of all; then
// the warps' sums are added in order.
__global__ void __launch_bounds__(32 * combine_warps) combine_kernel(__grid_constant__ const CombineWork w) {
  __shared__ float outs[combine_warps][32], sums[combine_warps];
  let_successor_start();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, D = w.head_dim;
  const int head = static_cast<int>(blockIdx.y), d = min(static_cast<int>(blockIdx.z) * 32 + lane, D - 1);
  const SplitSpans& p = w.partials.split;
  const auto [span, t] = span_row(p.spans, static_cast<int>(blockIdx.x));
  const KvSpan& s = p.spans.span[span];
  const bool leaves = p.unit_leaves == 1;
  const int units = (s.first + t) / (leaves ? leaf_positions : group_leaves * leaf_positions) + 1;  // that the row sees
  int first_unit = p.first_unit[span], of_group = head;
  for (; of_group >= w.group; of_group -= w.group) first_unit += p.units_of_head(span);
  const int rows = w.partials.rows;
  const std::size_t first = static_cast<std::size_t>(first_unit) * rows + t * w.group + of_group;
  const float2* const max_sum = w.partials.max_sum + first;
  const float* const partial = w.partials.out + first * D + d;
  const int column = head * D + d;
  // 32 units at a time: of a warp four groups, or one group's leaves.
  constexpr int batch = 4;
  static_assert(batch == group_leaves);
  const int first_of_warp = leaves ? warp * group_leaves : warp, step = leaves ? 1 : combine_warps;
  wait_for_predecessor();

  const float gate = w.out.gate.data ? w.out.gate.row(s.begin + t)[column] : 0;
  float most = -INFINITY, out = 0, sum = 0;
#pragma unroll 1
  for (int u = first_of_warp; u - first_of_warp < units; u += batch * combine_warps) {
    float value[batch];
    float2 m[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int unit = min(u + i * step, units - 1);
      value[i] = partial[static_cast<std::ptrdiff_t>(unit * rows) * D], m[i] = max_sum[unit * rows];
    }
    if (u == first_of_warp) {  // while these are on their way
#pragma unroll 1
      for (int i = lane; i < units; i += 32) most = fmaxf(most, max_sum[i * rows].x);
#pragma unroll 1
      for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, offset));
    }
    if (leaves) {
#pragma unroll
      for (int i = 1; i < batch; ++i) {
        if (u + i >= units) break;
        const MergeFactors f = merge_factors(m[0].x, m[i].x);
        value[0] = merge(value[0], value[i], f);
        m[0] = {f.max, merge(m[0].y, m[i].y, f)};
      }
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (u + i * step >= units || (leaves && i > 0)) break;
      const float factor = exp2_fast(m[i].x - most);
      out = __fmaf_rn(value[i], factor, out), sum = __fmaf_rn(m[i].y, factor, sum);
    }
  }
  outs[warp][lane] = out;
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (warp != 0 || static_cast<int>(blockIdx.z) * 32 + lane >= D) return;
#pragma unroll
  for (int i = 1; i < combine_warps; ++i) out += outs[i][lane], sum += sums[i];
  if (w.out.gate.data) sum *= 1 + exp2_fast(-log2_e * gate);  // / sum * sigmoid(gate)
  const float result = __fdividef(out, sum);
  w.out.heads.row(s.begin + t)[column] = result;
  w.out.half[(s.begin + t) * w.out.heads.stride + column] = half_bits(result);
}

// --- Rotation ---

constexpr int most_frequencies = 128;  // of a launch
struct Frequencies {
  double of[most_frequencies];
};

__global__ void rope_angles_kernel(__grid_constant__ const KvSpans spans, Rows angles, int pairs, int begin, int count,
                                   __grid_constant__ const Frequencies frequencies, float scale) {
  let_successor_start();
  wait_for_predecessor();
  const auto [span, t] = span_row(spans, static_cast<int>(blockIdx.x));
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  double sine = 0, cosine = 0;
  sincos(static_cast<double>(spans.span[span].first + t) * frequencies.of[i], &sine, &cosine);
  float* const row = angles.row(spans.span[span].begin + t) + begin + i;
  row[0] = scale * static_cast<float>(cosine);
  row[pairs] = scale * static_cast<float>(sine);
}

__global__ void rope_kernel(Rows x, Rows angles, int pairs, int heads, int head_dim) {
  let_successor_start();
  wait_for_predecessor();
  const int at = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x), row = static_cast<int>(blockIdx.x);
  if (at >= heads * pairs) return;
  const int i = at % pairs;
  float *const first = x.row(row) + at / pairs * head_dim + i, *const second = first + pairs;
  const float a = *first, b = *second, cos = angles.row(row)[i], sin = angles.row(row)[pairs + i];
  *first = a * cos - b * sin, *second = b * cos + a * sin;
}

// --- Host ---

// Calls use(spans) with at most most_spans of them at a time.
template <class Use>
class SpanBatch {
 public:
  explicit SpanBatch(Use use) : use_(use) {}
  void add(const KvSpan& span) {
    if (span.count == 0) return;
    spans_.span[spans_.count++] = span;
    spans_.rows += span.count;
    if (spans_.count == most_spans) flush();
  }
  void flush() {
    if (spans_.count > 0) use_(spans_);
    spans_ = {};
  }

 private:
  Use use_;
  KvSpans spans_{};
};

int most_rows_of(const KvSpans& spans) {
  int rows = 0;
  for (int i = 0; i < spans.count; ++i) rows = std::max(rows, spans.span[i].count);
  return rows;
}

struct Inputs {
  CudaTensor out, q, gate, k, v;  // gate without data: none
  Preparation prepare;
  AttentionShape shape;
  KvType type;

  KvLayout layout() const { return {static_cast<int>(row_bytes(stored_type(type), shape.head_dim)), shape.kv_heads}; }
  HeadsOut heads_out() const { return {rows_of(out), rows_of(gate), out.half}; }
  float scale() const { return log2_e / std::sqrt(static_cast<float>(shape.head_dim)); }
  int group() const { return shape.heads / shape.kv_heads; }
  bool fast() const {
    return shape.head_dim == fast_head_dim && group() == fast_group && prepare.pairs % 8 == 0 && type != KvType::f32;
  }
};

// q as f16 or in place, and the new rows of the caches.  For k and v alone: shape.heads 0.
void prepare_rows(Device& device, const Inputs& in, bool q_half, const KvSpans& spans) {
  PrepareWork w{};
  w.spans = spans;
  w.q = rows_of(in.q), w.k = rows_of(in.k), w.v = rows_of(in.v);
  w.q_half = q_half ? in.q.half : nullptr;
  w.prepare = in.prepare, w.layout = in.layout(), w.type = static_cast<int>(in.type);
  w.heads = in.shape.heads, w.head_dim = in.shape.head_dim;
  w.eight_a_lane =
      w.head_dim == fast_head_dim && in.prepare.pairs % 8 == 0 && in.type == KvType::f16 && (q_half || w.heads == 0);
  const int items = w.heads + 2 * in.shape.kv_heads;
  launch(device, prepare_kernel,
         dim3(static_cast<unsigned>(spans.rows), static_cast<unsigned>((items + prepare_warps - 1) / prepare_warps)),
         dim3(32 * prepare_warps), w.eight_a_lane ? 0 : prepare_warps * sizeof(float) * w.head_dim, w);
}

// How these spans are split.
SplitSpans split_spans(const Inputs& in, const KvSpans& spans, int unit_leaves) {
  SplitSpans split{};
  split.spans = spans, split.unit_leaves = unit_leaves;
  for (int i = 0; i < spans.count; ++i)
    split.first_unit[i + 1] = split.first_unit[i] + in.shape.kv_heads * split.units_of_head(i);
  return split;
}

// Their partial results in scratch memory, which seldom grows.
Partials make_partials(DeviceScratch& scratch, const Inputs& in, const SplitSpans& split, int rows) {
  const auto units = std::bit_ceil(std::max(64u, static_cast<unsigned>(split.first_unit[split.spans.count])));
  const std::size_t results = std::size_t{units} * static_cast<std::size_t>(rows * in.group());
  float2* const max_sum = scratch.get<float2>(results * (1 + static_cast<std::size_t>(in.shape.head_dim + 1) / 2));
  return {split, reinterpret_cast<float*>(max_sum + results), max_sum, rows * in.group()};
}

void combine(Device& device, const Inputs& in, const KvSpans& spans, const Partials& partials) {
  const CombineWork w{partials, in.heads_out(), in.group(), in.shape.head_dim};
  launch(device, combine_kernel,
         dim3(static_cast<unsigned>(spans.rows), static_cast<unsigned>(in.shape.heads),
              static_cast<unsigned>((in.shape.head_dim + 31) / 32)),
         dim3(32 * combine_warps), 0, w);
}

void few_fast(Device& device, DeviceScratch& scratch, const Inputs& in, const KvSpans& spans, bool early) {
  FewWork w{};
  const int most_rows = most_rows_of(spans), rows = most_rows <= 5 ? most_rows : few_rows;  // as attend_few() rounds
  int leaves = 0;
  for (int i = 0; i < spans.count; ++i)
    leaves += in.shape.kv_heads * ((spans.span[i].first + spans.span[i].count - 1) / leaf_positions + 1);
  const bool in_leaves = leaves <= device.properties().multiprocessors;
  const SplitSpans split = split_spans(in, spans, in_leaves ? 1 : group_leaves);
  w.partials = make_partials(scratch, in, split, rows);
  w.q = rows_of(in.q), w.k = rows_of(in.k), w.v = rows_of(in.v);
  w.prepare = in.prepare, w.layout = in.layout(), w.scale = in.scale(), w.early = early;
  attend_few(device, w, split.first_unit[spans.count], in_leaves, most_rows);
  combine(device, in, spans, w.partials);
}

void plain(Device& device, DeviceScratch& scratch, const Inputs& in, const KvSpans& spans, bool split) {
  prepare_rows(device, in, false, spans);
  PlainWork w{};
  unsigned units = 1;
  const SplitSpans parts = split_spans(in, spans, group_leaves);
  if (split) {
    w.partials = make_partials(scratch, in, parts, most_rows_of(spans));
    for (int i = 0; i < spans.count; ++i) units = std::max(units, static_cast<unsigned>(parts.units_of_head(i)));
  } else {
    w.partials.split = parts;
  }
  w.split = split;
  w.q = rows_of(in.q), w.layout = in.layout(), w.group = in.group(), w.head_dim = in.shape.head_dim;
  w.scale = in.scale(), w.out = in.heads_out();
  const dim3 grid(static_cast<unsigned>(spans.rows), static_cast<unsigned>(in.shape.heads), units);
  const std::size_t shared = 2 * sizeof(float) * static_cast<std::size_t>(in.shape.head_dim);
  const auto kernel = in.type == KvType::f32   ? attend_plain_kernel<F32Row>
                      : in.type == KvType::f16 ? attend_plain_kernel<F16Row>
                                               : attend_plain_kernel<Q8Row>;
  launch(device, kernel, grid, dim3(plain_threads), shared, w);
  if (split) combine(device, in, spans, w.partials);
}

void attend(Device& device, DeviceScratch& scratch, Inputs in, KvSegments segments) {
  if (segments.empty()) return;
  in.type = segments[0].state->type();
  const bool fast = in.fast();
  const int most_few = fast ? most_few_rows(device, in.type == KvType::q8_0) : 0;
  const bool fast_few = most_few > 0;
  bool early = true;
  SpanBatch few([&](const KvSpans& spans) {
    fast_few ? few_fast(device, scratch, in, spans, early) : plain(device, scratch, in, spans, true);
  });
  SpanBatch many([&](const KvSpans& spans) {
    if (!fast) return plain(device, scratch, in, spans, false);
    prepare_rows(device, in, true, spans);
    for (int i = 0; i < spans.count; ++i) {
      attend_many(device, {spans.span[i], in.q.half, in.q.stride, in.layout(), in.scale(), in.heads_out()});
    }
  });
  for (const Segment<CudaKvCache>& s : segments) {
    CudaKvCache& cache = *s.state;
    const int first = static_cast<int>(cache.extend(s.count));
    const KvSpan span{cache.table(), s.begin, s.count, first};
    if (s.count > few_rows) {
      many.add(span);
    } else if (!fast_few || s.count <= most_few) {
      early = early && cache.written_long_ago();
      few.add(span);
    } else {
      for (int from = 0; from < s.count; from += most_few) {
        few.flush();
        early = from == 0 && cache.written_long_ago();
        few.add({span.table, span.begin + from, std::min(most_few, s.count - from), first + from});
        few.flush();
      }
      early = true;
    }
    cache.set_written_long_ago(true);
  }
  few.flush();
  many.flush();
}

}  // namespace

void rope_angles(Device& device, CudaTensor angles, std::span<const double> frequency, float scale,
                 KvSegments segments) {
  const int pairs = static_cast<int>(frequency.size());
  SpanBatch batch([&](const KvSpans& spans) {
    for (int begin = 0; begin < pairs; begin += most_frequencies) {
      const int count = std::min(most_frequencies, pairs - begin);
      Frequencies frequencies{};
      std::copy_n(frequency.begin() + begin, count, frequencies.of);
      launch(device, rope_angles_kernel, dim3(static_cast<unsigned>(spans.rows)),
             dim3(static_cast<unsigned>((count + 31) / 32 * 32)), 0, spans, rows_of(angles), pairs, begin, count,
             frequencies, scale);
    }
  });
  for (const auto& s : segments) batch.add({nullptr, s.begin, s.count, static_cast<int>(s.position)});
  batch.flush();
}

void rope(Device& device, CudaTensor x, CudaTensor angles, int head_dim) {
  const int pairs = angles.n_cols / 2, heads = x.n_cols / head_dim;
  if (pairs == 0 || x.n_rows == 0) return;
  constexpr unsigned threads = 256;
  launch(device, rope_kernel,
         dim3(static_cast<unsigned>(x.n_rows), (static_cast<unsigned>(heads * pairs) + threads - 1) / threads),
         dim3(threads), 0, rows_of(x), rows_of(angles), pairs, heads, head_dim);
}

void append_kv(Device& device, CudaTensor k, CudaTensor v, AttentionShape shape, KvSegments segments) {
  if (segments.empty()) return;
  Inputs in{};
  in.k = k, in.v = v, in.shape = {0, shape.kv_heads, shape.head_dim}, in.type = segments[0].state->type();
  SpanBatch batch([&](const KvSpans& spans) { prepare_rows(device, in, false, spans); });
  for (const auto& s : segments) {
    const int first = static_cast<int>(s.state->extend(s.count));
    s.state->set_written_long_ago(false);
    batch.add({s.state->table(), s.begin, s.count, first});
  }
  batch.flush();
}

void attention(Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor q, CudaTensor k, CudaTensor v,
               AttentionShape shape, KvSegments segments) {
  attend(device, scratch, {out, q, {}, k, v, {}, shape, KvType::f16}, segments);
}

void gated_attention(Device& device, DeviceScratch& scratch, CudaTensor heads, CudaTensor q, CudaTensor gate,
                     CudaTensor k, CudaTensor v, const float* q_norm, const float* k_norm, float eps, CudaTensor angles,
                     AttentionShape shape, KvSegments segments) {
  Preparation prepare{q_norm, k_norm, {}, eps, angles.n_cols / 2};
  if (prepare.pairs > 0) prepare.angles = rows_of(angles);
  attend(device, scratch, {heads, q, gate, k, v, prepare, shape, KvType::f16}, segments);
}

}  // namespace qwen3next::cuda
