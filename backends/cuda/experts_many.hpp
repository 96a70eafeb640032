#pragma once
// The routed experts of many rows (more than experts_few takes).

#include "backends/cuda/device.hpp"
#include "backends/cuda/router.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

// out = (add ? out : 0) + sum over slots of weight * down(silu(gate x) * (up x))
//                       + sigmoid(shared_gate) * shared, if there is one.
// Sums are in the order of the slots: equal inputs give equal bits.
struct ExpertsMany {
  CudaTensor out;  // [T, H], written as f32
  CudaTensor x;    // [T, H], read as f16 (as f32 by f32 experts)
  const CudaExperts* experts = nullptr;
  const Routing* routing = nullptr;
  CudaTensor shared{};       // [T, H] f32
  CudaTensor shared_gate{};  // [T, 1] f32
  bool add = false;
};
void experts_many(const Device& device, DeviceScratch& scratch, const ExpertsMany& e);

}  // namespace qwen3next::cuda
