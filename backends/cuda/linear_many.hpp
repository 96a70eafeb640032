#pragma once
// Matrix products of many rows (more than linear_few takes).

#include <span>

#include "backends/cuda/device.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

// y [T, N] = w x.
struct ManyOutput {
  Matrix w;
  CudaTensor y;
};

// y = factor * w x, or y += that, for every output; x [T, D].  Reads x.half, for f32 weights x.data; writes y.data.
// Any mix of types: a launch for those that are f32, one for the others.
void linear_many(const Device& device, CudaTensor x, std::span<const ManyOutput> outputs, float factor = 1,
                 bool add = false);

}  // namespace qwen3next::cuda
