#pragma once
// The kernel of ManyProduct.  Each shape is compiled in a file of its own: all weight formats are in each.

#include <cuda_fp16.h>

#include "backends/cuda/launch.cuh"
#include "backends/cuda/many.cuh"
#include "backends/cuda/many_product.hpp"
#include "backends/cuda/scalar.cuh"

namespace qwen3next::cuda {

// Two rows of eight pairs of f16, transposed over the warp: lane (g, t) has row 2t, 2t + 1 of column g before, and
// columns 2t, 2t + 1 of row g after.
__device__ inline std::uint32_t transpose_halves(std::uint32_t pair) {
  std::uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Warps of a block: `groups` of weight rows x `splits` of columns.
template <class Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::blocks) many_product(const ManyProduct p) {
  let_successor_start();
  constexpr int R = Shape::tiles, J = Shape::rows / 8;
  extern __shared__ uint4 staged[];
  __shared__ std::uint32_t from[Shape::rows];  // rows of x, in chunks of eight
  __shared__ int to[Shape::rows];              // rows of y or hidden
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int groups = Shape::warps >> p.log_splits, group = warp % groups, split = warp / groups;

  // Which rows of x.
  int expert = 0, count;
  if (p.tiles) {
    wait_for_predecessor();
    if (static_cast<int>(blockIdx.y) >= *p.n_tiles) return;
    const PickTile tile = p.tiles[blockIdx.y];
    expert = tile.expert, count = tile.count;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += Shape::threads) {
      const int place = tile.first + i, pick = p.picks[place];
      from[i] = static_cast<std::uint32_t>(p.slots ? pick / p.slots : place) * p.x_chunks;
      to[i] = p.hidden ? place : pick;
    }
  } else {
    const int first = static_cast<int>(blockIdx.y) * Shape::rows;
    count = min(Shape::rows, p.rows - first);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += Shape::threads)
      from[i] = static_cast<std::uint32_t>(first + i) * p.x_chunks, to[i] = first + i;
  }

  // Which rows of weights.
  int m = 0;
  if (!p.hidden) {
    while (m + 1 < p.n_matrices && static_cast<int>(blockIdx.x) >= p.matrices[m + 1].first_block) ++m;
  }
  const ManyProduct::Part& part = p.matrices[m];
  const int first_tile = ((static_cast<int>(blockIdx.x) - part.first_block) * groups + group) * (p.hidden ? 1 : R);
  const int n_tiles = part.w.row_tiles();
  const std::byte* const slot = p.slots_of_experts ? p.slots_of_experts[expert] : nullptr;
  if (p.slots_of_experts && !slot) return;  // not on the card, or not in this wave
  __syncthreads();

  const StagedRows<Shape> x{staged, p.x, from, count, {(part.w.cols + tile_cols - 1) / tile_cols, p.log_splits}};
  typename Shape::Sums sums;
  with_reader(part.w.type, [&]<class Reader>() {
    Reader readers[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Matrix w = p.hidden ? p.matrices[r].w : part.w;
      if (slot) w.data = slot + (p.hidden ? p.matrices[r].at : part.at);
      readers[r] = Reader(w, min(p.hidden ? first_tile : first_tile + r, n_tiles - 1));
    }
    if constexpr (Shape::rows >= 64) {
      if (count > Shape::rows - 8 * Shape::group) return multiply_tiles<true, Shape>(readers, x, split, sums);
    }
    multiply_tiles<false, Shape>(readers, x, split, sums);
  });
  if (p.log_splits > 0)
    add_splits<Shape>(reinterpret_cast<float4*>(staged), group, groups, split, 1 << p.log_splits, sums);
  if (split != 0) return;

  const int g = lane / 4, t = lane % 4;
  const float unit = p.factor * tile_unit(part.w.type);
  float factor = unit * part.w.scale;
  if (p.scales) factor *= p.scales[3 * expert + part.scale];
  if (p.hidden) {
    // sums[0] are gates, sums[1] the same rows of up.
    const int row = first_tile * 16 + 2 * t;
    float up_factor = unit * p.matrices[1].w.scale;
    if (p.scales) up_factor *= p.scales[3 * expert + p.matrices[1].scale];
    up_factor *= first_tile < n_tiles ? hidden_scale : 0;  // zeros up to hidden_stride
#pragma unroll
    for (int j = 0; j < J; ++j) {
      std::uint32_t pairs[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float value[2];
#pragma unroll
        for (int c = 0; c < 2; ++c)
          value[c] = silu(factor * sums[0][j][2 * h + c]) * (up_factor * sums[1][j][2 * h + c]);
        pairs[h] = transpose_halves(half_bits(value[0]) | static_cast<std::uint32_t>(half_bits(value[1])) << 16);
      }
      const int i = 8 * j + g;
      if (i >= count) continue;
      std::uint16_t* const out = p.hidden + to[i] * p.hidden_stride + row;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (row + 8 * h < p.hidden_stride) *reinterpret_cast<std::uint32_t*>(out + 8 * h) = pairs[h];
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int i = 8 * j + 2 * t + c;
      if (i >= count) continue;
      float* const out = part.y + to[i] * part.y_stride + first_tile * 16 + g;
#pragma unroll
      for (int q = 0; q < 2 * R; ++q) {
        if (first_tile * 16 + 8 * q + g >= part.w.rows) continue;
        const float value = factor * sums[q / 2][j][q % 2 * 2 + c];
        out[8 * q] = p.add ? out[8 * q] + value : value;
      }
    }
  }
}

template <int rows>
void multiply_many(const Device& device, ManyProduct p, int log_splits) {
  using Shape = ManyShape<rows>;
  p.log_splits = log_splits;
  const int block_tiles = (Shape::warps >> log_splits) * (p.hidden ? 1 : Shape::tiles);
  int blocks = 0;
  for (int i = 0; i < p.n_matrices; ++i) {
    p.matrices[i].first_block = blocks;
    if (p.hidden && i > 0) continue;
    const int tiles = p.hidden ? static_cast<int>(p.hidden_stride) / 16 : p.matrices[i].w.row_tiles();
    blocks += (tiles + block_tiles - 1) / block_tiles;
  }
  const int row_tiles = p.tiles ? p.max_tiles : (p.rows + Shape::rows - 1) / Shape::rows;
  launch(device, many_product<Shape>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(row_tiles)),
         Shape::threads, Shape::shared_bytes, p);
}

}  // namespace qwen3next::cuda
