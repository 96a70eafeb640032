#pragma once
// What works on each row, or each value, for itself.  Shapes and meaning: backends/backend.hpp.

#include "backends/cuda/device.hpp"
#include "backends/cuda/tensor.hpp"

namespace qwen3next::cuda {

// Each writes both images of `out`: products read it next.  Groups of `size` columns have a norm of their own.
void rms_norm(const Device& device, CudaTensor out, CudaTensor x, const float* weight, int size, float eps);
void gated_rms_norm(const Device& device, CudaTensor out, CudaTensor o, CudaTensor z, const float* weight, int size,
                    float eps);
void sigmoid_gate(const Device& device, CudaTensor x, CudaTensor gate);
// out = silu(gate) * up; its f16 image holds `half_scale` times that.
void swiglu(const Device& device, CudaTensor out, CudaTensor gate, CudaTensor up, float half_scale);
void copy(const Device& device, CudaTensor out, CudaTensor x);

void add(const Device& device, CudaTensor x, CudaTensor y);
void add_gated(const Device& device, CudaTensor x, CudaTensor y, CudaTensor gate);  // gate [T, 1]

// The f16 image of what was written to `x` from elsewhere.
void round_to_half(const Device& device, CudaTensor x);

}  // namespace qwen3next::cuda
