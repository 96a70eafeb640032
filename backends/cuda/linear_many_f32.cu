// Products of f32 weights with f32 rows, on tensor cores: both are split into two f16,
//   a = a0 + 2^-11 a1,   a b = a0 b0 + 2^-11 (a0 b1 + a1 b0) + O(2^-22 a b).
// Tensor cores round sums towards zero: those of 64 columns are added to the rest by ordinary additions.
// Relative error about 1e-7.  |w|, |x| < 65504.

#include <cuda_fp16.h>

#include "backends/cuda/launch.cuh"
#include "backends/cuda/many.cuh"
#include "backends/cuda/many_product.hpp"
#include "backends/cuda/scalar.cuh"

namespace qwen3next::cuda {

namespace {

constexpr int threads = 256, warps = 8, columns = 64;
constexpr float low_scale = 2048;

struct HighLow {
  std::uint32_t high, low;  // two f16 each
};

__device__ inline HighLow split_pair(float a, float b) {
  const __half2 high = __halves2half2(to_half(a), to_half(b));
  const float2 rounded = __half22float2(high);
  const __half2 low = __floats2half2_rn((a - rounded.x) * low_scale, (b - rounded.y) * low_scale);
  return {reinterpret_cast<const std::uint32_t&>(high), reinterpret_cast<const std::uint32_t&>(low)};
}

// `rows_` rows of x a block; a stage is `stage_tiles` x 64 columns.  A warp has 16 rows of weights, `splits` warps have
// the same and share the columns.
template <int rows_, int stage_tiles_, int splits_>
struct Shape {
  static constexpr int rows = rows_, tiles = 1, stage_tiles = stage_tiles_, splits = splits_;
  static constexpr int groups = warps / splits;           // of 16 weight rows
  static constexpr int tile_chunks = rows * columns / 8;  // of eight values: 16 bytes of high, 16 of low
  static constexpr int stage_chunks = stage_tiles * tile_chunks;
  static constexpr int chunks_of_thread = stage_chunks / threads;
  static constexpr std::size_t shared_bytes = 2 * 2 * stage_chunks * 16;  // high and low, of two stages
  using Sums = float[1][rows / 8][4];
};

struct Arguments {
  ManyProduct::Part matrices[ManyProduct::most_matrices];
  int n_matrices;
  const float* x;
  std::ptrdiff_t x_stride;
  int rows, cols;
  float factor;
  bool add;
};

template <class S>
__global__ void __launch_bounds__(threads, 1) f32_product(const Arguments p) {
  constexpr int J = S::rows / 8;
  extern __shared__ uint4 staged[];  // [stage][high, low][tile][row][8 chunks], chunks ^ 4 in odd rows
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = warp % S::groups, split = warp / S::groups, g = lane / 4, t = lane % 4;
  int m = 0;
  while (m + 1 < p.n_matrices && static_cast<int>(blockIdx.x) >= p.matrices[m + 1].first_block) ++m;
  const Matrix& w = p.matrices[m].w;
  const int row_tile = (static_cast<int>(blockIdx.x) - p.matrices[m].first_block) * S::groups + group;
  const int first = static_cast<int>(blockIdx.y) * S::rows, count = min(S::rows, p.rows - first);
  const int k_tiles = (p.cols + columns - 1) / columns, stages = (k_tiles + S::stage_tiles - 1) / S::stage_tiles;

  // Weights, a tile ahead: of rows g, g + 8 and halves of 32 columns, eight neighbours.
  const std::ptrdiff_t w_stride = static_cast<std::ptrdiff_t>(w.strips()) * strip_cols;
  const float* const w_rows = reinterpret_cast<const float*>(w.data) +
                              (min(row_tile, w.row_tiles() - 1) * std::ptrdiff_t{strip_rows} + g) * w_stride + 8 * t;
  float4 weights[2][2][2];  // [r][u][c / 4]
  const auto load_weights = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = i / 4, u = i / 2 % 2, c = i % 2;
      weights[r][u][c] = *reinterpret_cast<const float4*>(w_rows + 8 * r * w_stride + tile * columns + 32 * u + 4 * c);
    }
  };
  if (split < k_tiles) load_weights(split);

  // Rows of x, a stage ahead.
  float4 ahead[S::chunks_of_thread][2];
  constexpr int row_chunks = S::stage_tiles * 8;
  const auto load_rows = [&](int stage) {
#pragma unroll
    for (int i = 0; i < S::chunks_of_thread; ++i) {
      const int at = i * threads + static_cast<int>(threadIdx.x), row = at / row_chunks;
      const int column = (stage * row_chunks + at % row_chunks) * 8;
      const float* const from = p.x + (first + row) * p.x_stride + column;
      const bool there = row < count && column < k_tiles * columns;
      ahead[i][0] = there ? *reinterpret_cast<const float4*>(from) : float4{};
      ahead[i][1] = there ? *reinterpret_cast<const float4*>(from + 4) : float4{};
      // An f32 image isn't cleared behind the last column of a view; weights there are zero, but what is no number
      // stays.
      if (there && column + 8 > p.cols) {
        float* const values = &ahead[i][0].x;
#pragma unroll
        for (int c = 0; c < 8; ++c) values[c] = column + c < p.cols ? values[c] : 0;
      }
    }
  };
  const auto store_rows = [&](int stage) {
    uint4* const to = staged + stage % 2 * 2 * S::stage_chunks;
#pragma unroll
    for (int i = 0; i < S::chunks_of_thread; ++i) {
      const int at = i * threads + static_cast<int>(threadIdx.x), row = at / row_chunks;
      const int tile = at % row_chunks / 8, chunk = at % 8;
      const HighLow q0 = split_pair(ahead[i][0].x, ahead[i][0].y), q1 = split_pair(ahead[i][0].z, ahead[i][0].w);
      const HighLow q2 = split_pair(ahead[i][1].x, ahead[i][1].y), q3 = split_pair(ahead[i][1].z, ahead[i][1].w);
      uint4* const place = to + tile * S::tile_chunks + row * 8 + (chunk ^ (row & 1) * 4);
      place[0] = {q0.high, q1.high, q2.high, q3.high};
      place[S::stage_chunks] = {q0.low, q1.low, q2.low, q3.low};
    }
  };

  typename S::Sums sums{};
  float cross[J][4] = {};
  let_successor_start();
  wait_for_predecessor();
  load_rows(0);
  store_rows(0);
  for (int stage = 0; stage < stages; ++stage) {
    __syncthreads();  // this stage is there, the one before is read
    if (stage + 1 < stages) load_rows(stage + 1);
#pragma unroll 1
    for (int in_stage = split; in_stage < S::stage_tiles; in_stage += S::splits) {
      const int tile = stage * S::stage_tiles + in_stage;
      if (tile >= k_tiles) break;
      std::uint32_t high[4][4], low[4][4];  // [2 u + j][A register]
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = i / 4, u = i / 2 % 2, j = i % 2;
        const float4 v = weights[r][u][j];
        const HighLow a = split_pair(v.x, v.y), b = split_pair(v.z, v.w);
        high[2 * u + j][r] = a.high, high[2 * u + j][2 + r] = b.high;
        low[2 * u + j][r] = a.low, low[2 * u + j][2 + r] = b.low;
      }
      if (tile + S::splits < k_tiles) load_weights(tile + S::splits);
      const uint4* const b = staged + stage % 2 * 2 * S::stage_chunks + in_stage * S::tile_chunks + g * 8;
#pragma unroll
      for (int j = 0; j < J; ++j) {
        float part[4] = {};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const uint4 b0 = b[j * 64 + ((4 * u + t) ^ (g & 1) * 4)];
          const uint4 b1 = b[j * 64 + ((4 * u + t) ^ (g & 1) * 4) + S::stage_chunks];
          mma(part, high[2 * u], b0.x, b0.y);
          mma(cross[j], low[2 * u], b0.x, b0.y);
          mma(cross[j], high[2 * u], b1.x, b1.y);
          mma(part, high[2 * u + 1], b0.z, b0.w);
          mma(cross[j], low[2 * u + 1], b0.z, b0.w);
          mma(cross[j], high[2 * u + 1], b1.z, b1.w);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[0][j][c] += part[c];
      }
    }
    if (stage + 1 < stages) store_rows(stage + 1);
  }
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[0][j][c] += cross[j][c] / low_scale;
  }
  add_splits<S>(reinterpret_cast<float4*>(staged), group, S::groups, split, S::splits, sums);
  if (split != 0) return;
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int i = 8 * j + 2 * t + c % 2, row = row_tile * 16 + g + c / 2 * 8;
      if (i >= count || row >= w.rows) continue;
      float* const out = p.matrices[m].y + (first + i) * p.matrices[m].y_stride + row;
      *out = (p.add ? *out : 0) + p.factor * w.scale * sums[0][j][c];
    }
  }
}

template <class S>
void launch_f32(const Device& device, const ManyProduct& product, const float* x, std::ptrdiff_t x_stride) {
  Arguments a{};
  unsigned blocks = 0;
  for (int i = 0; i < product.n_matrices; ++i) {
    a.matrices[i] = product.matrices[i];
    a.matrices[i].first_block = static_cast<int>(blocks);
    blocks += static_cast<unsigned>((product.matrices[i].w.row_tiles() + S::groups - 1) / S::groups);
  }
  a.n_matrices = product.n_matrices, a.x = x, a.x_stride = x_stride, a.rows = product.rows;
  a.cols = product.matrices[0].w.cols, a.factor = product.factor, a.add = product.add;
  launch(device, f32_product<S>, dim3(blocks, static_cast<unsigned>((product.rows + S::rows - 1) / S::rows)), threads,
         S::shared_bytes, a);
}

}  // namespace

void multiply_f32(const Device& device, const ManyProduct& product, const float* x, std::ptrdiff_t x_stride) {
  // Few rows: more blocks, which share the columns among their warps.
  if (product.rows <= 64) return launch_f32<Shape<16, 8, 8>>(device, product, x, x_stride);
  if (product.rows <= 1024) return launch_f32<Shape<32, 4, 4>>(device, product, x, x_stride);
  launch_f32<Shape<64, 2, 2>>(device, product, x, x_stride);
}

}  // namespace qwen3next::cuda
