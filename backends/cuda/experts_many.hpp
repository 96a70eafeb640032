#pragma once
// The routed experts of many rows (more than experts_few takes).

#include "backends/cuda/device.hpp"
#include "backends/cuda/router.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

// Experts that pass through the card one wave after the other.
class ExpertWaves {
 public:
  virtual ~ExpertWaves() = default;
  // The slots of the next wave, as ExpertMatrices::slots; null after the last, then from the first again.
  virtual const std::byte* const* next() = 0;
};

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
  ExpertWaves* waves = nullptr;  // null: experts->matrices has the slots.  Bit for bit the same
};
void experts_many(const Device& device, DeviceScratch& scratch, const ExpertsMany& e);

}  // namespace qwen3next::cuda
