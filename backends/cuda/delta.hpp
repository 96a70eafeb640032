#pragma once
// Gated DeltaNet between its projections: convolution, gates and the gated delta rule.
//
// Meaning and shapes: backends/backend.hpp and model/forward.hpp.  The state is S^T per value head, f32 [Dv, Dk].
// Vectors (taps [channels, K], A [Hv], dt_bias [Hv]) are f32 in the card's memory.  Of `out` tensors only the f32 image
// is written.
//
// Between two uses of one state lies a copy, or one belongs to another graph, as it always is in a model, whose passes
// begin with a copy of the tokens: these kernels read states while kernels before them still run.

#include <span>

#include "backends/backend.hpp"
#include "backends/cuda/delta_state.hpp"
#include "backends/cuda/device.hpp"
#include "backends/cuda/tensor.hpp"

namespace qwen3next::cuda {

// The operations of the concept.
void causal_conv1d(const Device& device, CudaTensor out, CudaTensor x, const float* taps, int conv_kernel,
                   std::span<const Segment<CudaDeltaState>> segments);
void delta_gates(const Device& device, CudaTensor beta, CudaTensor g, CudaTensor b, CudaTensor a, const float* A,
                 const float* dt_bias);
void gated_delta_rule(const Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor qkv, CudaTensor beta,
                      CudaTensor g, DeltaShape shape, std::span<const Segment<CudaDeltaState>> segments);
void settle(const Device& device, CudaDeltaState& state, DeltaShape shape);  // gives the journal's memory back

// All three at once.  Segments of few rows take one launch all together; their parts of conv, beta and g, which are
// scratch memory, are then not written.
struct DeltaNetInputs {
  CudaTensor qkv;            // [T, channels] input of the convolution
  CudaTensor b, a;           // [T, Hv]
  const float* taps;         // [channels, K]
  const float *A, *dt_bias;  // [Hv]
  CudaTensor conv;           // [T, channels] scratch
  CudaTensor beta, g;        // [T, Hv] scratch
};
void delta_net(const Device& device, DeviceScratch& scratch, CudaTensor o, const DeltaNetInputs& in, DeltaShape shape,
               std::span<const Segment<CudaDeltaState>> segments);

}  // namespace qwen3next::cuda
