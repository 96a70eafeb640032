#pragma once
// Products with at most eight rows of activations: what linear_few and experts_few share.
//
// The rows lie in shared memory as f16 (and as f32 where a weight is f32).  The units of work are 16 rows of a matrix
// (4 of an f32 one); a unit's strips are dealt out to `split` warps, whose sums meet in shared memory and are added in
// their order.  So a row's arithmetic depends on the matrices alone: not on how many rows there are, nor on time.

#include <cuda_fp16.h>

#include <cstdint>

#include "backends/cuda/fragments.cuh"
#include "backends/cuda/launch.cuh"
#include "backends/cuda/scalar.cuh"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

inline constexpr int few_rows = 8;  // an n8 tile
inline constexpr int f32_unit_rows = 4;
inline constexpr int few_rounds = 4;  // units of a warp between two barriers

__host__ __device__ constexpr int unit_rows(DType type) { return type == DType::f32 ? f32_unit_rows : strip_rows; }
__host__ __device__ inline int units_of(const Matrix& m) {
  return (m.rows + unit_rows(m.type) - 1) / unit_rows(m.type);
}

// Warps that share a unit: the largest power of two that leaves none idle.
__host__ __device__ inline int split_of(int warps, int strips) {
  int split = 1;
  while (2 * split <= warps && 2 * split <= strips) split *= 2;
  return split;
}

// For f16; a NaN stays one.
__device__ __forceinline__ float saturated(float v) { return v > 65504 ? 65504 : v < -65504 ? -65504 : v; }

// Rows of activations in shared memory.
struct SharedRows {
  std::uint16_t* half;   // [rows, stride]
  std::uint16_t* upper;  // [rows, 8 strips]: sums of 32 columns, and what rounding them to f16 left
  std::uint16_t* lower;
  float* single;  // [rows, 256 strips], or null
  int rows, strips;

  __host__ __device__ static int stride(int strips) { return strips * strip_cols + 32; }  // neighbours in other banks
  __host__ __device__ static int bytes(int rows, int strips, bool single) {
    return rows * (2 * stride(strips) + 32 * strips + (single ? 4 * strips * strip_cols : 0));
  }
  __device__ SharedRows(std::byte* at, int n_rows, int n_strips, bool with_single) : rows(n_rows), strips(n_strips) {
    single = with_single ? reinterpret_cast<float*>(at) : nullptr;
    half = reinterpret_cast<std::uint16_t*>(at + (with_single ? rows * strips * strip_cols * 4 : 0));
    upper = half + rows * stride(strips);
    lower = upper + rows * 8 * strips;
  }

  // Eight columns from 8 i of a row, by all lanes of a warp: neighbours have neighbouring i.
  __device__ __forceinline__ void store(int row, int i, const float (&v)[8]) const {
    uint4 bits;
    auto* pair = reinterpret_cast<__half2*>(&bits);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      pair[k] = __floats2half2_rn(saturated(v[2 * k]), saturated(v[2 * k + 1]));
      const float2 rounded = __half22float2(pair[k]);
      sum += rounded.x + rounded.y;
    }
    store_bits(row, i, bits, sum);
    if (single) {
      auto* to = reinterpret_cast<float4*>(single + row * strips * strip_cols + 8 * i);
      to[0] = make_float4(v[0], v[1], v[2], v[3]), to[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  __device__ __forceinline__ void store_bits(int row, int i, uint4 bits, float sum) const {
    *reinterpret_cast<uint4*>(half + row * stride(strips) + 8 * i) = bits;
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (i % 4 == 0) {
      const __half high = __float2half_rn(saturated(sum));
      upper[row * 8 * strips + i / 4] = __half_as_ushort(high);
      lower[row * 8 * strips + i / 4] = __half_as_ushort(__float2half_rn(saturated(sum - __half2float(high))));
    }
  }

  // Of activation row `row` for every lane, or of lane / 4 where there are so many.
  __device__ __forceinline__ void load(StripInput& in, int row, int s, int lane) const {
    const std::uint16_t* from = half + row * stride(strips) + s * strip_cols;
#pragma unroll
    for (int i = 0; i < strip_tiles; ++i) load_b(in.b[i], from + i * tile_cols, lane);
    const int k = row * 8 * strips + s * 8 + lane % 4 * 2;
    in.sums[0] = *reinterpret_cast<const std::uint32_t*>(upper + k);
    in.sums[1] = *reinterpret_cast<const std::uint32_t*>(lower + k);
  }
};

// A unit: where its strips begin, which rows it is multiplied with (all, or one), whether there is more of it.
struct Unit {
  const std::byte* data;
  int row;  // of the activations; -1: all
};

struct FewBlock {
  SharedRows in;
  float* sums;  // [2][few_rounds * lanes of units][split][columns][16]
  int columns;  // rows of activations in a unit
  int split;

  __host__ __device__ static int sum_bytes(int warps, int columns) { return 2 * few_rounds * warps * columns * 64; }
};

template <DType type>
__device__ __forceinline__ void store_sums(float* to, const float (&acc)[4], int columns, int lane) {
  const int g = lane / 4, n = lane % 4 * 2;
  if (n < columns) to[n * 16 + g] = acc[0], to[n * 16 + g + 8] = acc[2];
  if (n + 1 < columns) to[(n + 1) * 16 + g] = acc[1], to[(n + 1) * 16 + g + 8] = acc[3];
}

// Adds up the warps' sums of `count` units and hands them out: done(unit, row of 16, column, sum).
template <class Done>
__device__ __forceinline__ void finish_units(const FewBlock& block, const float* sums, int first, int count, int rows,
                                             Done&& done) {
  const int per_unit = block.columns * rows;
  for (int i = static_cast<int>(threadIdx.x); i < count * per_unit; i += static_cast<int>(blockDim.x)) {
    const int unit = i / per_unit, n = i % per_unit / rows, row = i % rows;
    const float* from = sums + (unit * block.split * block.columns + n) * 16 + row;
    float sum = 0;
    for (int k = 0; k < block.split; ++k) sum += from[k * block.columns * 16];
    done(first + unit, row, n, sum);
  }
}

// Units [begin, end) of one type by all warps of the block: `at(unit)` is a Unit, `ready()` is called once, when the
// first weights are on their way and before any activation is read; `done` as above.
template <DType type, class At, class Ready, class Done>
__device__ __forceinline__ void multiply_units(const FewBlock& block, int begin, int end, At&& at, Ready&& ready,
                                               Done&& done) {
  constexpr bool ahead = sizeof(StripOf<type>) <= 128;  // registers for two
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lanes = static_cast<int>(blockDim.x) / 32 / block.split;  // of units
  const int k = warp % block.split, own = warp / block.split, strips = block.in.strips;
  const int batch = few_rounds * lanes;
  const auto strip_at = [&](const Unit& u, int s) { return u.data + s * strip_layout(type).bytes; };

  StripOf<type> next;
  StripInput in;
  int loaded_strip = -1, loaded_row = -2;
  if (begin + own < end && k < strips) load(next, strip_at(at(begin + own), k), lane);
  ready();
  int half = 0;
  for (int first = begin; first < end; first += batch, half ^= 1) {
    float* sums = block.sums + half * batch * block.split * block.columns * 16;
    for (int unit = first + own; unit < min(first + batch, end); unit += lanes) {
      const Unit u = at(unit);
      float acc[4] = {};
      for (int s = k; s < strips; s += block.split) {
        StripOf<type> x;
        if constexpr (ahead) {
          x = next;
          const int next_strip = s + block.split < strips ? s + block.split : k;
          const int next_unit = next_strip > s ? unit : unit + lanes;
          if (next_unit < end) load(next, strip_at(next_unit == unit ? u : at(next_unit), next_strip), lane);
        } else if (first == begin && unit == begin + own && s == k) {
          x = next;
        } else {
          load(x, strip_at(u, s), lane);
        }
        if (s != loaded_strip || u.row != loaded_row) {
          const int g = lane / 4;
          block.in.load(in, u.row >= 0 ? u.row : g < block.in.rows ? g : 0, s, lane);
          loaded_strip = s, loaded_row = u.row;
        }
        strip_product(x, in, acc);
      }
      store_sums<type>(sums + ((unit - first) * block.split + k) * block.columns * 16, acc, block.columns, lane);
    }
    __syncthreads();
    finish_units(block, sums, first, min(batch, end - first), strip_rows, done);
  }
}

// The same for f32: a warp takes 256 columns of four rows at a time.
template <class At, class Ready, class Done>
__device__ __forceinline__ void multiply_units_f32(const FewBlock& block, int begin, int end, At&& at, Ready&& ready,
                                                   Done&& done) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lanes = static_cast<int>(blockDim.x) / 32 / block.split;
  const int k = warp % block.split, own = warp / block.split, strips = block.in.strips;
  const int batch = few_rounds * lanes, row_floats = strips * strip_cols;
  float4 w[f32_unit_rows][2];
  const auto load_rows = [&](const Unit& u, int s) {
#pragma unroll
    for (int i = 0; i < f32_unit_rows; ++i) {
      const auto* from = u.data + (i * row_floats + s * strip_cols) * 4 + lane * 16;
      w[i][0] = detail::load_stream<float4>(from), w[i][1] = detail::load_stream<float4>(from + 512);
    }
  };
  bool waiting = begin + own < end && k < strips;  // the first rows are on their way
  if (waiting) load_rows(at(begin + own), k);
  ready();
  int half = 0;
  for (int first = begin; first < end; first += batch, half ^= 1) {
    float* sums = block.sums + half * batch * block.split * block.columns * 16;
    for (int unit = first + own; unit < min(first + batch, end); unit += lanes) {
      const Unit u = at(unit);
      float acc[f32_unit_rows][few_rows] = {};
      for (int s = k; s < strips; s += block.split) {
        if (!waiting) load_rows(u, s);
        waiting = false;
#pragma unroll
        for (int n = 0; n < few_rows; ++n) {
          if (n >= block.columns) break;
          const auto* x = reinterpret_cast<const float4*>(block.in.single + (u.row >= 0 ? u.row : n) * row_floats +
                                                          s * strip_cols + lane * 4);
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const float4 v = x[32 * part];
#pragma unroll
            for (int i = 0; i < f32_unit_rows; ++i) {
              acc[i][n] = fmaf(w[i][part].x, v.x, acc[i][n]), acc[i][n] = fmaf(w[i][part].y, v.y, acc[i][n]);
              acc[i][n] = fmaf(w[i][part].z, v.z, acc[i][n]), acc[i][n] = fmaf(w[i][part].w, v.w, acc[i][n]);
            }
          }
        }
      }
      float* to = sums + ((unit - first) * block.split + k) * block.columns * 16;
#pragma unroll
      for (int n = 0; n < few_rows; ++n) {
        if (n >= block.columns) break;
#pragma unroll
        for (int i = 0; i < f32_unit_rows; ++i) {
          float sum = acc[i][n];
#pragma unroll
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
          if (lane == 0) to[n * 16 + i] = sum;
        }
      }
    }
    __syncthreads();
    finish_units(block, sums, first, min(batch, end - first), f32_unit_rows, done);
  }
}

// Types that big models rarely come in: a call each, so that they take no registers from the others.
template <DType type, class At, class Done>
__device__ __noinline__ void multiply_units_apart(FewBlock block, int begin, int end, At at, Done done) {
  multiply_units<type>(
      block, begin, end, at, [] {}, done);
}

// Whether a kernel for the usual types alone will do.
__host__ __device__ constexpr bool usual(DType type) {
  return type == DType::q4_k || type == DType::q6_k || type == DType::f32;
}

template <bool all_types, class At, class Ready, class Done>
__device__ __forceinline__ void multiply_units(DType type, const FewBlock& block, int begin, int end, const At& at,
                                               const Ready& ready, const Done& done) {
  if (type == DType::q4_k) return multiply_units<DType::q4_k>(block, begin, end, at, ready, done);
  if (type == DType::q6_k) return multiply_units<DType::q6_k>(block, begin, end, at, ready, done);
  if (type == DType::f32) return multiply_units_f32(block, begin, end, at, ready, done);
  if constexpr (!all_types) return;
  ready();
  switch (type) {
#define QWEN3NEXT_CASE(name) \
  case DType::name:          \
    return multiply_units_apart<DType::name>(block, begin, end, at, done);
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
      return;  // done above
  }
}

// Asks for bytes that will be read soon, by all threads of the block.
__device__ __forceinline__ void prefetch(const std::byte* from, std::size_t bytes) {
  for (std::size_t i = threadIdx.x * std::size_t{128}; i < bytes; i += blockDim.x * std::size_t{128}) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
  }
}

}  // namespace qwen3next::cuda
