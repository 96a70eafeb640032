#pragma once
// One launch of tile products for many rows (many.cuh): what linear_many and experts_many ask for.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backends/cuda/device.hpp"
#include "backends/cuda/router.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

// Either every matrix times every row of x:  y[row] = factor * W x[row]   (or +=)
// or, with `tiles`, the picked rows times the matrices of their expert e; `place` is that in the sorted picks:
//   y[pick] = factor * W_e x[..]                                 matrices[0]; pick = row * k + slot
//   hidden[place] = 2^-4 silu(gate_e x[..]) * (up_e x[..])       matrices[0], [1] = gate, up of the same type
struct ManyProduct {
  struct Part {
    Matrix w;
    float* y = nullptr;
    std::ptrdiff_t y_stride = 0;
    std::size_t at = 0;   // in the slots of experts
    int scale = 0;        // in the scales of an expert
    int first_block = 0;  // of blockIdx.x
  };
  static constexpr int most_matrices = 8;

  Part matrices[most_matrices];
  int n_matrices = 0;
  const uint4* x = nullptr;    // f16, in chunks of eight
  std::uint32_t x_chunks = 0;  // of a row
  int rows = 0;                // of x, if there are no tiles
  float factor = 1;
  bool add = false;
  int log_splits = 0;  // of the warps that share the columns of a row of weights

  const PickTile* tiles = nullptr;
  const std::int32_t* n_tiles = nullptr;
  int max_tiles = 0;
  const std::int32_t* picks = nullptr;
  int slots = 0;                                       // pick / slots is the row of x; 0: x has a row for each place
  const std::byte* const* slots_of_experts = nullptr;  // a null slot: its picks are left out
  const float* scales = nullptr;                       // [experts, 3]; null: all are 1
  std::uint16_t* hidden = nullptr;
  std::ptrdiff_t hidden_stride = 0;
};

// What a block does (tuned on an H200: a greater depth loses more by the longer code of the loop than it hides): `rows`
// of x times 32 rows of weights for each warp; `splits` warps may share the columns of those.
struct ManyBlock {
  int rows;
  int warps;
  int stage_tiles;  // of 64 columns of x that are waited for at once
  int stages;
  int depth;               // weights are loaded so many tiles ahead
  int per_multiprocessor;  // that are to fit
  constexpr int most_splits() const noexcept { return stage_tiles < warps ? stage_tiles : warps; }
  constexpr int weight_rows(int log_splits) const noexcept { return 32 * warps >> log_splits; }
};
constexpr ManyBlock many_block(int rows) noexcept {
  return rows <= 8    ? ManyBlock{8, 8, 8, 4, 1, 3}
         : rows <= 16 ? ManyBlock{16, 8, 8, 4, 2, 2}
         : rows <= 32 ? ManyBlock{32, 8, 8, 3, 1, 2}
         : rows <= 64 ? ManyBlock{64, 4, 4, 3, 1, 2}
                      : ManyBlock{128, 4, 1, 4, 1, 2};
}

template <int rows>  // 8, 16, 32, 64, 128
void multiply_many(const Device& device, ManyProduct product, int log_splits);

void multiply_many(const Device& device, const ManyProduct& product, int rows, int log_splits);

// All matrices f32, x [rows, cols] f32 in steps of x_stride.
void multiply_f32(const Device& device, const ManyProduct& product, const float* x, std::ptrdiff_t x_stride);

}  // namespace qwen3next::cuda
