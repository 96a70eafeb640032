#pragma once
// Weights as they lie in a mapped file: nothing is owned, nothing is moved.

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "blocks/dtype.hpp"

namespace qwen3next {

// The factors of a matrix stored as F8_E4M3, one for every 128 x 128 values (Hugging Face's weight_scale_inv):
//   W[i, c] = stored[i, c] * grid[i / 128, c / 128]
// i counts the rows of the file's tensor, whichever of them a view picks: blocks know nothing of heads.
struct ScaleGrid {
  static constexpr int block = 128;

  const std::byte* data = nullptr;  // row-major, at any address; null: there is none
  DType type = DType::f32;          // or bf16
  int cols = 0;                     // of the grid
  int first_row = 0;                // i of the view's row 0
};

// A matrix [rows, cols], y = W x.  Its rows may be interleaved with those of other matrices in the file: they come in
// groups of `group_rows` neighbours, and `group_stride` bytes lie between the starts of two groups.
//
//   Hugging Face's in_proj_qkvz holds, for each key head, [q k v v z z].  Its `q` is a view with group_rows = Dk and
//   group_stride = (2 Dk + 2 r Dv) rows, so q, k, v and z are four matrices to the model and none is copied.
//
// `data` need not be aligned: safetensors promises nothing.
struct WeightView {
  const std::byte* data = nullptr;
  DType type = DType::f32;
  int rows = 0;
  int cols = 0;
  int group_rows = 1;            // > 0; rows / group_rows groups; one group if the matrix is contiguous
  std::size_t group_stride = 0;  // bytes
  ScaleGrid grid{};              // what the stored values are multiplied with, if there is one
  float scale = 1;               // what all values are multiplied with (GGUF's X.scale)

  static WeightView contiguous(const std::byte* data, DType type, int rows, int cols) noexcept {
    return {.data = data,
            .type = type,
            .rows = rows,
            .cols = cols,
            .group_rows = rows > 0 ? rows : 1,
            .group_stride = static_cast<std::size_t>(rows) * qwen3next::row_bytes(type, cols)};
  }

  std::size_t row_bytes() const noexcept { return qwen3next::row_bytes(type, cols); }
  std::size_t bytes() const noexcept { return static_cast<std::size_t>(rows) * row_bytes(); }

  const std::byte* row(int r) const noexcept {
    assert(r >= 0 && r < rows);
    return data + static_cast<std::size_t>(r / group_rows) * group_stride +
           static_cast<std::size_t>(r % group_rows) * row_bytes();
  }

  // The factors of row r, one for every 128 columns; null if there are none.
  const std::byte* grid_row(int r) const noexcept {
    if (!grid.data) return nullptr;
    const int period = static_cast<int>(group_stride / row_bytes());
    const int i = grid.first_row + r / group_rows * period + r % group_rows;
    return grid.data + static_cast<std::size_t>(i / ScaleGrid::block) * qwen3next::row_bytes(grid.type, grid.cols);
  }

  // Rows [begin, begin + count) of a contiguous matrix.
  WeightView slice(int begin, int count) const noexcept {
    assert(group_rows == rows && begin >= 0 && begin + count <= rows);
    return part(begin, contiguous(nullptr, type, count, cols));
  }

  // Of a contiguous matrix of groups of `period` rows: rows [first, first + count) of every group.
  WeightView every(int period, int first, int count) const noexcept {
    assert(group_rows == rows && rows % period == 0 && first + count <= period);
    return part(first, {.data = nullptr,
                        .type = type,
                        .rows = rows / period * count,
                        .cols = cols,
                        .group_rows = count,
                        .group_stride = static_cast<std::size_t>(period) * row_bytes()});
  }

 private:
  // `shape`, with its row 0 where row `first` of this is.
  WeightView part(int first, WeightView shape) const noexcept {
    shape.data = data + static_cast<std::size_t>(first) * row_bytes();
    shape.grid = grid;
    shape.grid.first_row += first;
    shape.scale = scale;
    return shape;
  }
};

// A small vector in F32 (norm weights, biases, convolution taps): in the file where it can be, else a converted copy
// that the loader owns.  cols > 1 only for the convolution: [size / cols, cols].
struct VectorView {
  const float* data = nullptr;
  int size = 0;
  int cols = 1;
};

// One expert, y = down (silu(gate x) * (up x)):  gate, up [width, hidden]  down [hidden, width].
struct ExpertView {
  WeightView gate, up, down;
};

// The routed experts of a layer, by id.
using ExpertViews = std::vector<ExpertView>;

// The weight types of `ModelWeights<Views>`: the model as it lies in its file, before a backend takes it.
struct Views {
  using Weight = WeightView;
  using Vector = VectorView;
  using Experts = ExpertViews;
};

}  // namespace qwen3next
