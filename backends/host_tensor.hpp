#pragma once
// Activations in host memory: float32 [rows, cols], a row apart every `stride` floats.

#include <cassert>
#include <cstddef>
#include <span>

namespace qwen3next {

// A view; the backend that made it owns the memory.  Slices of rows or columns are views of the same memory.
struct HostTensor {
  float* data = nullptr;
  int n_rows = 0;
  int n_cols = 0;
  std::ptrdiff_t stride = 0;

  HostTensor rows(int begin, int count) const noexcept {
    assert(begin >= 0 && count >= 0 && begin + count <= n_rows);
    return {data + begin * stride, count, n_cols, stride};
  }
  HostTensor columns(int begin, int count) const noexcept {
    assert(begin >= 0 && count >= 0 && begin + count <= n_cols);
    return {data + begin, n_rows, count, stride};
  }
  float* row(int r) const noexcept { return data + r * stride; }
  std::span<float> operator[](int r) const noexcept { return {row(r), static_cast<std::size_t>(n_cols)}; }
};

}  // namespace qwen3next
