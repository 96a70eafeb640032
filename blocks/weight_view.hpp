#pragma once
// Weights as they lie in a mapped file: nothing is owned, nothing is moved.

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "blocks/dtype.hpp"

namespace qwen3next {

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

  static WeightView contiguous(const std::byte* data, DType type, int rows, int cols) noexcept {
    return {
        data, type, rows, cols, rows > 0 ? rows : 1, static_cast<std::size_t>(rows) * qwen3next::row_bytes(type, cols)};
  }

  std::size_t row_bytes() const noexcept { return qwen3next::row_bytes(type, cols); }
  std::size_t bytes() const noexcept { return static_cast<std::size_t>(rows) * row_bytes(); }

  const std::byte* row(int r) const noexcept {
    assert(r >= 0 && r < rows);
    return data + static_cast<std::size_t>(r / group_rows) * group_stride +
           static_cast<std::size_t>(r % group_rows) * row_bytes();
  }

  // Rows [begin, begin + count) of a contiguous matrix.
  WeightView slice(int begin, int count) const noexcept {
    assert(group_rows == rows && begin >= 0 && begin + count <= rows);
    return contiguous(data + static_cast<std::size_t>(begin) * row_bytes(), type, count, cols);
  }

  // Of a contiguous matrix of groups of `period` rows: rows [first, first + count) of every group.
  WeightView every(int period, int first, int count) const noexcept {
    assert(group_rows == rows && rows % period == 0 && first + count <= period);
    return {data + static_cast<std::size_t>(first) * row_bytes(), type, rows / period * count, cols, count,
            static_cast<std::size_t>(period) * row_bytes()};
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
