#pragma once
// Rows as a file stores them, in the card's memory, to strips.

#include <cstddef>

#include "backends/cuda/device.hpp"
#include "blocks/dtype.hpp"

namespace qwen3next::cuda {

struct RawRows {
  const std::byte* data;  // rows, one behind the other, at any address
  std::size_t row_bytes;
  int rows, cols;
  const float* factors;  // f8: [rows, ceil(cols / 128)], or null
};

// To `to`: the strips of all these rows (Matrix::bytes() of them).
void repack(const Device& device, DType type, const RawRows& raw, std::byte* to);

}  // namespace qwen3next::cuda
