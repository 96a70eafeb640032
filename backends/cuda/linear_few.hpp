#pragma once
// Matrix products of at most eight rows, with what comes before and after them, in one launch.

#include <span>

#include "backends/cuda/device.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

inline constexpr int max_few_rows = 8, max_few_products = 8;

// y [T, N] = w x.
struct Product {
  Matrix w;
  CudaTensor y;  // y.data is written
};

// What is multiplied, computed from x [T, D] by every thread block for itself.
struct FewInput {
  enum class Kind { plain, rms_norm, gated_rms_norm, sigmoid_gate };
  Kind kind = Kind::plain;      // x as it is: x.half; for f32 weights x.data
  const float* norm = nullptr;  // [norm_size]: rms_norm(x) of every group of norm_size columns,
  int norm_size = 0;
  float eps = 0;
  CudaTensor gate{};     // [T, D]: gated_rms_norm: times silu(gate); sigmoid_gate: x sigmoid(gate)
  CudaTensor written{};  // if it has data: [T, D], takes the input computed here, f32 and f16
};

// All products have one x.  If `residual` [T, N of the first product] has data, the first y is added to it as well.
// Rows do not depend on one another, nor on how many there are.
void linear_few(const Device& device, CudaTensor x, std::span<const Product> products, const FewInput& input = {},
                CudaTensor residual = {});

}  // namespace qwen3next::cuda
