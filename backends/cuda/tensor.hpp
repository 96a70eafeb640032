#pragma once
// Activations in the card's memory: float32 [rows, cols], and beside it the same values in f16, which products read.

#include <cassert>
#include <cstddef>
#include <cstdint>

namespace qwen3next::cuda {

// What f16 images of SwiGLU's results hold, and products with them undo: these are products of two projections, and may
// leave the range of f16 by a little.
inline constexpr float hidden_scale = 0.25f;

// A view; the backend that made it owns the memory.  Rows are `stride` elements apart in both images; the stride is a
// multiple of 64, and what lies between cols and stride is zero.  Only operations whose results enter products write
// `half` (see CudaBackend).
struct CudaTensor {
  float* data = nullptr;
  std::uint16_t* half = nullptr;  // f16 bits
  int n_rows = 0;
  int n_cols = 0;
  std::ptrdiff_t stride = 0;

  CudaTensor rows(int begin, int count) const noexcept {
    assert(begin >= 0 && count >= 0 && begin + count <= n_rows);
    return {data + begin * stride, half + begin * stride, count, n_cols, stride};
  }
  CudaTensor columns(int begin, int count) const noexcept {
    assert(begin >= 0 && count >= 0 && begin + count <= n_cols);
    return {data + begin, half + begin, n_rows, count, stride};
  }
};

}  // namespace qwen3next::cuda
