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
  static constexpr int stages = block.stages;
  static constexpr int tile_chunks = rows * tile_cols / 8;  // of 16 bytes: eight f16
  static constexpr int stage_chunks = stage_tiles * tile_chunks;
  static constexpr std::size_t shared_bytes = static_cast<std::size_t>(stages) * stage_chunks * 16;
  static constexpr int group = rows >= 32 ? 4 : rows / 8;  // n8 tiles of x that are multiplied side by side
  using Sums = float[tiles][rows / 8][4];  // of mma.m16n8k16: weight rows g, g + 8 x activation rows 2t, 2t + 1
};

__device__ inline void copy_async(std::uint32_t to, const void* from) {  // 16 bytes; `to` in shared memory
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// (v & mask) | base in one instruction: the compiler makes two of two constants.
template <std::uint32_t mask>
__device__ __forceinline__ std::uint32_t and_or(std::uint32_t v, std::uint32_t base) {
  std::uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(v), "n"(mask), "r"(base));
  return out;
}

// As detail::levels() for codes that are numbers of four to six bits; `base` is 0x64006400, in a register.
template <DType type>
__device__ __forceinline__ void number_levels(const Tile<type>& x, int r, int u, std::uint32_t base,
                                              __half2 (&pair)[4]) {
  constexpr StripFormat f = Tile<type>::format;
  const std::uint32_t w = detail::word(x.codes[0], 2 * r + u);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const std::uint32_t v = j == 0 ? w : w >> 8;
    std::uint32_t low = and_or<0x000f000f>(v, base), high = and_or<0x00f000f0>(v, base);
    if constexpr (f.bits == 5) {
      const std::uint32_t h = __funnelshift_r(x.high[0], x.high[0], high_rotation(5, 2 * r + u, j));
      low = and_or<0x00100010>(h, low), high = and_or<0x01000100>(h, high);
    }
    if constexpr (f.bits == 6) {
      const std::uint32_t h = __funnelshift_r(x.high[r], x.high[r], high_rotation(6, u, j));
      low = and_or<0x00300030>(h, low), high = and_or<0x03000300>(h, high);
    }
    pair[j] = __hsub2(detail::halves(low), detail::twice(1024 + f.zero));
    pair[2 + j] = __hfma2(detail::halves(high), detail::twice(0.0625f), detail::twice(-(64 + f.zero)));
  }
}

// A row of tiles of a matrix, as a lane reads it.  unpack() gives the A fragments of half u of a tile.
template <DType type>
struct TileReader {
  using Packed = Tile<type>;
  const std::byte* strips;

  TileReader() = default;
  __device__ TileReader(const Matrix& w, int row_tile)
      : strips(w.data + static_cast<std::ptrdiff_t>(row_tile) * w.strips() * strip_layout(type).bytes) {
    asm("" : "+l"(strips));  // or the compiler takes this sum apart, and does it again for each tile
  }
  __device__ __forceinline__ void load(Packed& x, int strip, int tile, int lane) const {
    cuda::load(x, strips + strip * strip_layout(type).bytes, tile, lane);
  }
  __device__ __forceinline__ static void unpack(const Packed& x, int u, std::uint32_t (&a)[2][4]) {
    constexpr StripFormat f = Packed::format;
    constexpr bool numbers = f.bits >= 4 && f.bits <= 6 && type != DType::iq4_nl && type != DType::iq4_xs &&
                             type != DType::mxfp4 && type != DType::nvfp4;
    std::uint32_t base = 0x64006400;
    if constexpr (numbers) asm volatile("" : "+r"(base));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      __half2 pair[4];
      if constexpr (numbers)
        number_levels(x, r, u, base, pair);
      else
        detail::levels(x, r, u, pair);
      detail::apply_scale(x, r, u, pair);
#pragma unroll
      for (int p = 0; p < 4; ++p) a[p / 2][p % 2 * 2 + r] = detail::bits(pair[p]);
    }
  }
};

// f32 rounded to f16, as activations are: for experts, whose products of other types do no better.
template <>
struct TileReader<DType::f32> {
  struct Packed {
    float4 v[2][2][2];  // [u][r][c / 4]
  };
  const float* rows;
  std::ptrdiff_t stride;

  TileReader() = default;
  __device__ TileReader(const Matrix& w, int row_tile)
      : rows(reinterpret_cast<const float*>(w.data)), stride(static_cast<std::ptrdiff_t>(w.strips()) * strip_cols) {
    rows += row_tile * strip_rows * stride;
  }
  __device__ __forceinline__ void load(Packed& x, int strip, int tile, int lane) const {
    const float* const from = rows + lane / 4 * stride + strip * strip_cols + tile * tile_cols + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int u = i / 4, r = i / 2 % 2, j = i % 2;
      x.v[u][r][j] = __ldg(reinterpret_cast<const float4*>(from + 8 * r * stride + 32 * u + 4 * j));
    }
  }
  __device__ __forceinline__ static void unpack(const Packed& x, int u, std::uint32_t (&a)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, j = i % 2;
      const float4 v = x.v[u][r][j];
      a[j][r] = detail::bits(__halves2half2(to_half(v.x), to_half(v.y)));
      a[j][2 + r] = detail::bits(__halves2half2(to_half(v.z), to_half(v.w)));
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

// sums += a b; in the order of the program, which is one of long distances between sums that depend on each other.
__device__ __forceinline__ void mma_in_order(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Which columns a warp takes, if 2^log_splits warps share them: strips split, split + splits, ..., tile by tile.  All
// take as many steps; a stage holds `per_stage` steps of each.
template <class Shape>
struct Columns {
  int k_tiles;     // of 64 columns
  int log_splits;  // at most log2 of Shape::stage_tiles

  __device__ int splits() const { return 1 << log_splits; }
  __device__ int steps() const { return (((k_tiles + 3) / 4 + splits() - 1) >> log_splits) * 4; }
  __device__ int per_stage() const { return Shape::stage_tiles >> log_splits; }
  __device__ int strip(int step, int split) const { return ((step >> 2) << log_splits) + split; }
};

// Rows of f16 on their way through shared memory.  There, a row of a tile is eight chunks; the halves of odd rows
// change places, so that the lanes of a quarter warp, which read a half of two rows, meet all banks.
template <class Shape>
struct StagedRows {
  static constexpr int row_chunks = Shape::stage_tiles * 8;
  static constexpr int row_step = Shape::threads / row_chunks;  // a thread copies the same columns of every such row
  static_assert(Shape::threads % row_chunks == 0 && (row_step % 2 == 0 || row_step >= Shape::rows));

  const uint4* shared;        // [stages][stage_tiles][rows][8]
  const uint4* x;             // in chunks of eight
  const std::uint32_t* rows;  // [rows], in shared memory: where each begins in x
  int count;                  // rows that there are; sums of the others are of no meaning
  Columns<Shape> columns;

  __device__ __forceinline__ void start(int stage, int slot) const {
    const unsigned row = threadIdx.x / row_chunks, place = threadIdx.x % row_chunks / 8, chunk = threadIdx.x % 8;
    const int split = static_cast<int>(place) & (columns.splits() - 1);
    const int step = stage * columns.per_stage() + (static_cast<int>(place) >> columns.log_splits);
    const int tile = columns.strip(step, split) * 4 + (step & 3);
    const std::uint32_t from = static_cast<std::uint32_t>(tile) * 8 + chunk;
    const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) +
                    (static_cast<std::uint32_t>(slot) * Shape::stage_chunks + place * Shape::tile_chunks + row * 8 +
                     (chunk ^ (row & 1) * 4)) *
                        16;
    if (tile < columns.k_tiles) {
      constexpr int copies = (Shape::rows + row_step - 1) / row_step;
      std::uint32_t begin[copies];  // all at once: one wait for them
#pragma unroll
      for (int i = 0; i < copies; ++i) begin[i] = rows[min(row + i * row_step, Shape::rows - 1u)];
      const uint4* const column = x + from;
#pragma unroll
      for (int i = 0; i < copies; ++i) {
        if (static_cast<int>(row) + i * row_step < count) copy_async(to + i * row_step * 128, column + begin[i]);
      }
    }
    close_copies();
  }
};

// sums = tiles[r] x of the columns that are this warp's.  full: no n8 tile of x is left out.
template <bool full, class Shape, class Reader>
__device__ __forceinline__ void multiply_tiles(const Reader (&weights)[Shape::tiles], const StagedRows<Shape>& x,
                                               int split, typename Shape::Sums& sums) {
  constexpr int R = Shape::tiles, J = Shape::rows / 8, G = Shape::group;
  constexpr int registers = static_cast<int>(sizeof(typename Reader::Packed)) / 4 * R;
  constexpr int P = Shape::depth * registers <= 96 ? Shape::depth : registers <= 32 ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Columns<Shape>& columns = x.columns;
  const int steps = columns.steps(), stage_mask = columns.per_stage() - 1;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int j = 0; j < J; ++j) sums[r][j][0] = sums[r][j][1] = sums[r][j][2] = sums[r][j][3] = 0;
  }

  const int strips = (columns.k_tiles + 3) / 4;
  typename Reader::Packed ahead[P][R];
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (split < strips) weights[r].load(ahead[p][r], split, p, lane);
  }
  wait_for_predecessor();
#pragma unroll
  for (int s = 0; s < Shape::stages - 1; ++s) x.start(s, s);

  const int g = lane / 4, t = lane % 4;
  const uint4* const b_lane = x.shared + g * 8 + (t ^ (g & 1) * 4);  // of u = 0
  const int other_half = 4 - (g & 1) * 8;                            // from there to u = 1
  int slot = Shape::stages - 1, stage = -1;
  for (int begin = 0; begin < steps; begin += P) {  // P divides 4
    const int strip = columns.strip(begin, split), next = strip + columns.splits();
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int step = begin + p;
      if ((step & stage_mask) == 0) {
        wait_copies<Shape::stages - 2>();
        __syncthreads();  // the stage is there for all, and the one before is read
        ++stage;
        x.start(stage + Shape::stages - 1, slot);
        slot = slot + 1 == Shape::stages ? 0 : slot + 1;
      }
      const int tile = P == 4 ? p : step & 3;
      if (strip * 4 + tile >= columns.k_tiles) continue;
      const uint4* const b = b_lane + slot * Shape::stage_chunks +
                             (split + ((step & stage_mask) << columns.log_splits)) * Shape::tile_chunks;
      // Groups of G n8 tiles of each half, B fragments one group ahead.
      std::uint32_t a[R][2][4];
      uint4 v[2][G];
#pragma unroll
      for (int i = 0; i < G; ++i) v[0][i] = b[i * 64];
#pragma unroll
      for (int n = 0; n < 2 * (J / G); ++n) {
        const int u = n / (J / G), j = n % (J / G) * G, next_j = (n + 1) % (J / G) * G;
        if (j == 0) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            Reader::unpack(ahead[p][r], u, a[r]);
            const int from = tile + P < 4 ? strip : next;
            if (u == 1 && from < strips) weights[r].load(ahead[p][r], from, (tile + P) % 4, lane);
          }
        }
        if (n + 1 < 2 * (J / G) && (full || next_j == 0 || 8 * next_j < x.count)) {
#pragma unroll
          for (int i = 0; i < G; ++i)
            v[(n + 1) % 2][i] = b[(next_j + i) * 64 + ((n + 1) / (J / G) == 0 ? 0 : other_half)];
        }
        if (full || j == 0 || 8 * j < x.count) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int i = 0; i < G; ++i) {
              const uint4& w = v[n % 2][i];
#pragma unroll
              for (int r = 0; r < R; ++r) mma_in_order(sums[r][j + i], a[r][s], s == 0 ? w.x : w.z, s == 0 ? w.y : w.w);
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
