#pragma once
// The product of weight tiles (fragments.cuh) and many rows of activations, on tensor cores: what linear_many and
// experts_many share.
//
// A block owns `rows` rows of x and, with each warp, `tiles` x 16 rows of weights, so that a weight tile is unpacked
// once and serves all of its rows.  x goes through shared memory in stages of `stage_tiles` x 64 columns, copied
// `stages` - 1 ahead; weights come straight into registers, `depth` tiles ahead.  Where weights are few, `splits` warps
// share the columns of the same rows, and their sums are added in order at the end.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backends/cuda/fragments.cuh"
#include "backends/cuda/launch.cuh"
#include "backends/cuda/many_product.hpp"
#include "backends/cuda/scalar.cuh"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

template <int rows_>
struct ManyShape {
  static constexpr ManyBlock block = many_block(rows_);
  static constexpr int rows = rows_, tiles = 2;
  static constexpr int warps = block.warps, threads = 32 * warps, blocks = block.per_multiprocessor;
  static constexpr int stage_tiles = block.stage_tiles, depth = block.depth;
  static constexpr int stages = 4;
  static constexpr int tile_chunks = rows * tile_cols / 8;  // of 16 bytes: eight f16
  static constexpr int stage_chunks = stage_tiles * tile_chunks;
  static constexpr std::size_t shared_bytes = static_cast<std::size_t>(stages) * stage_chunks * 16;
  // Of the n8 tiles of x: those that one test of the number of rows covers, and those whose sums hide an mma's latency.
  static constexpr int part = rows >= 128 ? 4 : rows >= 32 ? 2 : rows / 8;
  static constexpr int together = rows >= 16 ? 2 : 1;
  using Sums = float[tiles][rows / 8][4];  // of mma.m16n8k16: weight rows g, g + 8 x activation rows 2t, 2t + 1
};

__device__ inline void copy_async(uint4* to_shared, const void* from) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// A row of tiles of a matrix, as a lane reads it.
template <DType type>
struct TileReader {
  using Packed = Tile<type>;
  const std::byte* strips;

  TileReader() = default;
  __device__ TileReader(const Matrix& w, int row_tile)
      : strips(w.data + static_cast<std::ptrdiff_t>(row_tile) * w.strips() * strip_layout(type).bytes) {}
  __device__ __forceinline__ void load(Packed& x, int k_tile, int lane) const {
    cuda::load(x, strips + k_tile / strip_tiles * strip_layout(type).bytes, k_tile % strip_tiles, lane);
  }
  __device__ __forceinline__ static void unpack(const Packed& x, std::uint32_t (&a)[4][4]) { dequantize(x, a); }
};

// f32 rounded to f16, as activations are: for experts, whose products of other types do no better.
template <>
struct TileReader<DType::f32> {
  struct Packed {
    float4 v[2][2][2];  // [r][u][c / 4]
  };
  const float* rows;
  std::ptrdiff_t stride;

  TileReader() = default;
  __device__ TileReader(const Matrix& w, int row_tile)
      : rows(reinterpret_cast<const float*>(w.data)), stride(static_cast<std::ptrdiff_t>(w.strips()) * strip_cols) {
    rows += row_tile * strip_rows * stride;
  }
  __device__ __forceinline__ void load(Packed& x, int k_tile, int lane) const {
    const float* const from = rows + lane / 4 * stride + k_tile * tile_cols + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = i / 4, u = i / 2 % 2, j = i % 2;
      x.v[r][u][j] = __ldg(reinterpret_cast<const float4*>(from + 8 * r * stride + 32 * u + 4 * j));
    }
  }
  __device__ __forceinline__ static void unpack(const Packed& x, std::uint32_t (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = i / 4, u = i / 2 % 2, j = i % 2;
      const float4 v = x.v[r][u][j];
      a[2 * u + j][r] = detail::bits(__halves2half2(to_half(v.x), to_half(v.y)));
      a[2 * u + j][2 + r] = detail::bits(__halves2half2(to_half(v.z), to_half(v.w)));
    }
  }
};

// f.operator()<TileReader<type>>().
template <class F>
__device__ __forceinline__ void with_reader(DType type, F f) {
  switch (type) {
    case DType::f32:
      return f.template operator()<TileReader<DType::f32>>();
    case DType::f16:
      return f.template operator()<TileReader<DType::f16>>();
    case DType::bf16:
      return f.template operator()<TileReader<DType::bf16>>();
    case DType::f8_e4m3:
      return f.template operator()<TileReader<DType::f8_e4m3>>();
    case DType::q4_0:
      return f.template operator()<TileReader<DType::q4_0>>();
    case DType::q4_1:
      return f.template operator()<TileReader<DType::q4_1>>();
    case DType::q5_0:
      return f.template operator()<TileReader<DType::q5_0>>();
    case DType::q5_1:
      return f.template operator()<TileReader<DType::q5_1>>();
    case DType::q8_0:
      return f.template operator()<TileReader<DType::q8_0>>();
    case DType::q2_k:
      return f.template operator()<TileReader<DType::q2_k>>();
    case DType::q3_k:
      return f.template operator()<TileReader<DType::q3_k>>();
    case DType::q4_k:
      return f.template operator()<TileReader<DType::q4_k>>();
    case DType::q5_k:
      return f.template operator()<TileReader<DType::q5_k>>();
    case DType::q6_k:
      return f.template operator()<TileReader<DType::q6_k>>();
    case DType::iq4_nl:
      return f.template operator()<TileReader<DType::iq4_nl>>();
    case DType::iq4_xs:
      return f.template operator()<TileReader<DType::iq4_xs>>();
    case DType::mxfp4:
      return f.template operator()<TileReader<DType::mxfp4>>();
    case DType::nvfp4:
      return f.template operator()<TileReader<DType::nvfp4>>();
  }
}

// Rows of f16 on their way through shared memory.  There, a row of a tile is eight chunks; the halves of odd rows
// change places, so that the lanes of a quarter warp, which read a half of two rows, meet all banks.
template <class Shape>
struct StagedRows {
  uint4* shared;              // [stages][stage_tiles][rows][8]
  const uint4* x;             // in chunks of eight
  const std::uint32_t* rows;  // [rows], in shared memory: where each begins in x
  int count;                  // rows that there are; sums of the others are of no meaning
  int k_tiles;                // of 64 columns

  __device__ void start(int stage) const {
    uint4* const to = shared + stage % Shape::stages * Shape::stage_chunks;
    constexpr int row_chunks = Shape::stage_tiles * 8;
#pragma unroll
    for (int i = 0; i < Shape::stage_chunks / Shape::threads; ++i) {
      const int at = i * Shape::threads + static_cast<int>(threadIdx.x);
      const int row = at / row_chunks, tile = at % row_chunks / 8, chunk = at % 8;
      const int k_tile = stage * Shape::stage_tiles + tile;
      if (row < count && k_tile < k_tiles)
        copy_async(to + tile * Shape::tile_chunks + row * 8 + (chunk ^ (row & 1) * 4),
                   x + rows[row] + k_tile * 8 + chunk);
    }
    close_copies();
  }
};

// sums = tiles[r] x of the k tiles that are this warp's: split, split + splits, ...
//   weights[r]: a Format's reader of a row of tiles.  splits: a power of two, at most Shape::most_splits.
template <class Shape, class Reader>
__device__ __forceinline__ void multiply_tiles(const Reader (&weights)[Shape::tiles], const StagedRows<Shape>& x,
                                               int split, int splits, typename Shape::Sums& sums) {
  constexpr int R = Shape::tiles, J = Shape::rows / 8;
  constexpr int registers = static_cast<int>(sizeof(typename Reader::Packed)) / 4 * R;
  constexpr int P = Shape::depth * registers <= 64 ? Shape::depth : registers <= 32 ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int steps = (x.k_tiles + splits - 1) / splits;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int j = 0; j < J; ++j) sums[r][j][0] = sums[r][j][1] = sums[r][j][2] = sums[r][j][3] = 0;
  }

  typename Reader::Packed ahead[P][R];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int tile = split + p * splits;
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (tile < x.k_tiles) weights[r].load(ahead[p][r], tile, lane);
  }
  wait_for_predecessor();
  let_successor_start();
#pragma unroll
  for (int s = 0; s < Shape::stages - 1; ++s) x.start(s);

  const int g = lane / 4, t = lane % 4;
  for (int begin = 0; begin < steps; begin += P) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int step = begin + p, tile = split + step * splits;
      if (step >= steps) break;
      const int stage = tile / Shape::stage_tiles;
      if (tile % Shape::stage_tiles < splits) {  // the warp's first of it
        wait_copies<Shape::stages - 2>();
        __syncthreads();  // the stage is there for all, and the one before is read
        x.start(stage + Shape::stages - 1);
      }
      if (tile >= x.k_tiles) continue;
      std::uint32_t a[R][4][4];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        Reader::unpack(ahead[p][r], a[r]);
        if (tile + P * splits < x.k_tiles) weights[r].load(ahead[p][r], tile + P * splits, lane);
      }
      const uint4* const b = x.shared + stage % Shape::stages * Shape::stage_chunks +
                             tile % Shape::stage_tiles * Shape::tile_chunks + g * 8;
#pragma unroll
      for (int part = 0; part < J; part += Shape::part) {
        if (part > 0 && 8 * part >= x.count) break;
#pragma unroll
        for (int j = part; j < part + Shape::part; j += Shape::together) {
          uint4 v[Shape::together][2];
#pragma unroll
          for (int i = 0; i < Shape::together; ++i) {
#pragma unroll
            for (int u = 0; u < 2; ++u) v[i][u] = b[(j + i) * 64 + ((4 * u + t) ^ (g & 1) * 4)];
          }
#pragma unroll
          for (int s = 0; s < 4; ++s) {
#pragma unroll
            for (int i = 0; i < Shape::together; ++i) {
              const uint4& w = v[i][s / 2];
#pragma unroll
              for (int r = 0; r < R; ++r) mma(sums[r][j + i], a[r][s], s % 2 == 0 ? w.x : w.z, s % 2 == 0 ? w.y : w.w);
            }
          }
        }
      }
    }
  }
  wait_copies<0>();
}

// Adds up the sums of the warps that share weight rows, into those of split 0.  For all warps of a block.
template <class Shape>
__device__ inline void add_splits(float4* shared, int group, int groups, int split, int splits,
                                  typename Shape::Sums& sums) {
  constexpr int R = Shape::tiles, J = Shape::rows / 8;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int from = 1; from < splits; ++from) {
    __syncthreads();  // x is read; or the sums before are
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int j = 0; j < J; ++j) {
        float4* const at = shared + ((group * R + r) * J + j) * 32 + lane;
        if (split == from) *at = {sums[r][j][0], sums[r][j][1], sums[r][j][2], sums[r][j][3]};
      }
    }
    __syncthreads();
    if (split != 0) continue;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const float4 other = shared[((group * R + r) * J + j) * 32 + lane];
        sums[r][j][0] += other.x, sums[r][j][1] += other.y, sums[r][j][2] += other.z, sums[r][j][3] += other.w;
      }
    }
  }
}

}  // namespace qwen3next::cuda
