#pragma once
// The mixture of experts for at most eight rows, in two launches.

#include "backends/cuda/device.hpp"
#include "backends/cuda/router.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

inline constexpr int max_few_slots = 16, max_few_experts = 4096;  // experts a row, experts of a layer

// mix = sum over slots of weight * down(silu(gate x) * (up x)), in the order of the slots,
//     + sigmoid(shared_logit) * the same of the shared expert, if there is one.
// out = mix and residual += mix, of these those that have data.
struct ExpertsFew {
  CudaTensor out{};       // [T, H]
  CudaTensor residual{};  // [T, H]
  CudaTensor x;           // [T, H]: half; for f32 weights data
  const CudaExperts* experts = nullptr;
  CudaTensor logits{};    // [T, E]: routing is computed from them, as router() does, and written;
  Routing routing{};      //   without them it is read
  bool normalise = true;  // weights divided by their sum
  Matrix shared_gate{}, shared_up{}, shared_down{};
  CudaTensor shared_logit{};  // [T, 1]; no data: there is no shared expert
};

// `logits` must have been written by the launch before, or earlier.
void experts_few(const Device& device, DeviceScratch& scratch, const ExpertsFew& e);

}  // namespace qwen3next::cuda
