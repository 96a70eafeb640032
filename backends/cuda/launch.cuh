#pragma once
// Launching kernels so that one begins while the one before it ends (programmatic dependent launch, compute
// capability 9.0 and later; elsewhere they follow one another as usual).
//
// Every kernel of this folder keeps three rules:
//   1. before wait_for_predecessor() it writes nothing, and reads only what no kernel of the same pass writes: weights,
//      and what sessions keep from earlier passes.  Their way through memory is what there is to hide;
//   2. it calls let_successor_start() as soon as it likes, even before it waits: so kernels follow one another as their
//      blocks find room, each waits for the one before, and each is complete before the one after is;
//   3. experts_down alone also reads the router's logits, the experts' slots and what lies there before it waits:
//      experts_up, which is always before it, lets it start only after having waited for them.

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "backends/cuda/device.hpp"
#include "backends/cuda/launch_record.hpp"

namespace qwen3next::cuda {

__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `count` things dealt out to the thread blocks, as evenly as can be.
struct Shares {
  int each, rest;  // so many blocks have one more

  Shares() = default;
  Shares(int count, int blocks) : each(count / blocks), rest(count % blocks) {}
  __device__ __forceinline__ int begin(unsigned block) const {
    const auto b = static_cast<int>(block);
    return b * each + min(b, rest);
  }
};

// Starts a kernel now.
void start(const Device& device, const void* kernel, const LaunchShape& shape, void** parameters);

// Starts it, or adds it to the pass that is being gathered (launch_record.hpp).
template <class... Parameters, class... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Arguments&&... arguments) {
  const LaunchShape shape{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes};
  const auto* address = reinterpret_cast<const void*>(kernel);
  [&](Parameters... values) {
    LaunchRecord* record = device.record();
    if (record && record->gathering()) {
      record->add(address, shape);
      (record->add_parameter(&values, sizeof values, alignof(Parameters)), ...);
    } else {
      void* parameters[] = {const_cast<void*>(static_cast<const void*>(&values))..., nullptr};
      start(device, address, shape, parameters);
    }
  }(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
}

}  // namespace qwen3next::cuda
