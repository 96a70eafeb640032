#pragma once
// What the kernels of attention share.
//
// Three of them attend: attend_few (rows of decoding; attention_few.cu), attend_many (prefill; attention_many.cu), both
// on tensor cores for heads of 256 in groups of 8, and attend_plain (any shape and cache type, f32; attention.cu).
//
// Few rows split the positions: a leaf is 64 of them, a group four leaves, wherever the text ends.  Of each, a row's
// partial result is (max, sum, out) of exp2(score - max), and partial results are added up leaf by leaf in a group,
// then group by group as combine() says.  Which block does which of them does not matter to a row, nor do the other
// rows.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backends/backend.hpp"
#include "backends/cuda/launch.cuh"
#include "backends/cuda/scalar.cuh"
#include "backends/cuda/tensor.hpp"

namespace qwen3next::cuda {

constexpr int kv_block = 256;  // CudaKvCache::block_positions
constexpr int leaf_positions = 64, group_leaves = 4;
constexpr int fast_head_dim = 256,
              fast_group = 8;  // what attend_few and attend_many are made for: query heads a KV head
constexpr int few_rows = 8;    // most rows of a segment that splits the positions

// A segment as kernels see it: row begin + t is at position first + t of the cache.
struct KvSpan {
  std::byte* const* table;
  int begin, count, first;
};
constexpr int most_spans = 16;  // of a launch
struct KvSpans {
  KvSpan span[most_spans];
  int count, rows;  // of all of them
};

// What lies where in a cache's block.
struct KvLayout {
  int row_bytes, kv_heads;

  __device__ std::size_t plane() const { return static_cast<std::size_t>(kv_block) * row_bytes; }
  __device__ std::byte* key_row(std::byte* const* table, int position, int head) const {
    return table[position / kv_block] + head * plane() + static_cast<std::size_t>(position % kv_block) * row_bytes;
  }
  __device__ std::byte* value_row(std::byte* const* table, int position, int head) const {
    return key_row(table, position, head + kv_heads);
  }
};

// f32 [T, cols], `stride` floats apart.
struct Rows {
  float* data = nullptr;
  std::ptrdiff_t stride = 0;
  __device__ float* row(int r) const { return data + r * stride; }
};
inline Rows rows_of(const CudaTensor& t) { return {t.data, t.stride}; }

// How q and k become what is compared; what is null is left out.
struct Preparation {
  const float *q_norm, *k_norm;  // [D]
  Rows angles;                   // [T, 2 pairs]
  float eps;
  int pairs;
};

// Where results go; heads *= sigmoid(gate) unless gate is null.
struct HeadsOut {
  Rows heads, gate;
  std::uint16_t* half;  // the same stride as heads
};
__device__ inline void put_head_value(const HeadsOut& out, int row, int column, float value) {
  if (out.gate.data) value *= sigmoid(out.gate.row(row)[column]);
  out.heads.row(row)[column] = value;
  out.half[row * out.heads.stride + column] = half_bits(value);
}

// Spans of few rows, whose positions are split: in units of a leaf or a group, of each span and KV head in order.
struct SplitSpans {
  KvSpans spans;
  int first_unit[most_spans + 1];  // of each span; then how many there are
  int unit_leaves;                 // 1 or group_leaves

  __host__ __device__ int units_of_head(int span) const {
    const int leaves = (spans.span[span].first + spans.span[span].count + leaf_positions - 1) / leaf_positions;
    return unit_leaves == 1 ? leaves : (leaves + group_leaves - 1) / group_leaves;  // no division on the card
  }
};
// Their partial results: of unit u, row t of its span and head h of its KV head's group, out [u][t * group + h][D], and
// max and sum.
struct Partials {
  SplitSpans split;
  float* out;
  float2* max_sum;  // [u][rows]
  int rows;         // of a unit: group times the most rows of a span
};

// --- Arithmetic of partial results ---

// Adding (max, sum) b to a: the factors of what either stands for.
struct MergeFactors {
  float max, of_a, of_b;
};
__device__ inline MergeFactors merge_factors(float a_max, float b_max) {
  const float most = fmaxf(a_max, b_max);
  return {most, exp2_fast(a_max - most), exp2_fast(b_max - most)};
}
__device__ inline float merge(float a, float b, const MergeFactors& f) {
  return __fmaf_rn(b, f.of_b, __fmul_rn(a, f.of_a));
}

// --- Tensor cores and shared memory ---

__device__ inline std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes; zeros unless `valid`.
__device__ inline void copy_or_clear_async(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

__device__ inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// c [16, 8] += a [16, 16] b [16, 8]
__device__ inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline std::uint32_t half_pair(float a, float b) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const std::uint32_t*>(&h);
}

// Rows of 256 f16 in shared memory: 32 chunks of 16 bytes, changing places so that eight rows' chunks of one column
// meet all banks.
__device__ inline std::uint32_t tile_offset(int row, int chunk) {
  return static_cast<std::uint32_t>(row * 512 + ((chunk ^ (row & 7)) << 4));
}

// --- A head of 256, eight dims [8 lane, 8 lane + 8) a lane of a warp ---

__device__ inline void load_eight(float (&x)[8], const float* row, int lane) {
  const float4 a = reinterpret_cast<const float4*>(row)[2 * lane],
               b = reinterpret_cast<const float4*>(row)[2 * lane + 1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
// Saturating.
__device__ inline uint4 eight_halves(const float (&x)[8]) {
  const __half2 most = __half2half2(__ushort_as_half(0x7bff));
  std::uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __hmin2(__hmax2(__floats2half2_rn(x[2 * i], x[2 * i + 1]), __hneg2(most)), most);
    y[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  return {y[0], y[1], y[2], y[3]};
}

// Of a q8_0 row, which lies at an even address: chunk [8 chunk, 8 chunk + 8).
__device__ inline uint4 eight_of_q8_0(const std::byte* row, int chunk) {
  const auto* const block = reinterpret_cast<const std::uint16_t*>(row) + chunk / 4 * 17;
  const float d = __half2float(__ushort_as_half(block[0]));
  float x[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const std::uint16_t pair = block[1 + chunk % 4 * 4 + i];
    x[2 * i] = d * static_cast<float>(static_cast<signed char>(pair & 0xff));
    x[2 * i + 1] = d * static_cast<float>(static_cast<signed char>(pair >> 8));
  }
  return eight_halves(x);
}

// A q8_0 block is 32 values, an f16 scale and a byte each.
struct Q8Scale {
  __half d;
  float inverse;
  __device__ explicit Q8Scale(float largest) : d(to_half(largest / 127)) {
    const float stored = __half2float(d);
    inverse = stored > 0 ? 1 / stored : 0;
  }
  __device__ int level(float x) const {
    const float scaled = __fmul_rn(x, inverse);
    return min(127, max(-127, static_cast<int>(__fadd_rn(scaled, scaled < 0 ? -0.5f : 0.5f))));
  }
};

// The eight values of each lane as q8_0.
struct EightOfQ8 {
  __half d;
  std::uint16_t pairs[4];

  __device__ explicit EightOfQ8(const float (&x)[8]) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
    const Q8Scale scale(largest);
    d = scale.d;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = static_cast<std::uint16_t>((scale.level(x[2 * i]) & 0xff) | (scale.level(x[2 * i + 1]) & 0xff) << 8);
  }
  __device__ void store(std::byte* row, int lane) const {
    auto* const block = reinterpret_cast<std::uint16_t*>(row) + lane / 4 * 17;
    if (lane % 4 == 0) block[0] = __half_as_ushort(d);
#pragma unroll
    for (int i = 0; i < 4; ++i) block[1 + lane % 4 * 4 + i] = pairs[i];
  }
};

// The weights of a norm; ones if there is none.
__device__ inline void load_norm(float (&weight)[8], const float* norm, int lane) {
  if (norm) return load_eight(weight, norm, lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) weight[i] = 1;
}
// x = rope(rms_norm(x)) by the weights of load_norm(); without the norm unless `normed`; `angles` null: no rotation;
// pairs a multiple of 8.  All is loaded before the first sum: it costs the way through memory once.
__device__ inline void prepare_eight(float (&x)[8], int lane, const float (&weight)[8], bool normed, float eps,
                                     const float* angles, int pairs) {
  float cos[8], sin[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) cos[i] = 1, sin[i] = 0;
  const int lanes = pairs / 8;
  const bool first = lane < lanes, turned = angles && lane < 2 * lanes;
  const int pair = first ? lane : lane - lanes, partner = first ? lane + lanes : turned ? pair : lane;
  if (turned) load_eight(cos, angles, pair), load_eight(sin, angles + pairs, pair);
  float scale = 1;
  if (normed) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = __fmaf_rn(x[i], x[i], squares);
#pragma unroll 1
    for (int offset = 16; offset > 0; offset /= 2)
      squares = __fadd_rn(squares, __shfl_xor_sync(0xffffffff, squares, offset));
    scale = rsqrt_fast(__fmaf_rn(squares, 1.0f / fast_head_dim, eps));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(__fmul_rn(x[i], scale), weight[i]);
  if (!angles) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float other = __shfl_sync(0xffffffff, x[i], partner);
    x[i] = __fmaf_rn(x[i], cos[i], __fmul_rn(first ? -other : other, sin[i]));
  }
}

// --- Host: the fast kernels ---

struct FewWork {
  Partials partials;
  Rows q, k, v;
  Preparation prepare;
  KvLayout layout;
  float scale;  // of scores, times log2(e)
  int early;    // whether past rows may be read before the kernel before has ended
};
int most_few_rows(const Device& device, bool q8_0);  // of a span, as far as shared memory goes; a power of two, or 0
// `leaves`: units are leaves, for a block each.
void attend_few(const Device& device, const FewWork& work, int units, bool leaves, int most_rows);

struct ManyWork {
  KvSpan span;
  const std::uint16_t* q;  // f16 [T, Hq D], prepared
  std::ptrdiff_t q_stride;
  KvLayout layout;
  float scale;
  HeadsOut out;
};
void attend_many(const Device& device, const ManyWork& work);

}  // namespace qwen3next::cuda
