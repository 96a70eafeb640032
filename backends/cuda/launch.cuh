#pragma once
// Launching kernels so that one begins while the one before it ends (programmatic dependent launch, compute
// capability 9.0 and later; elsewhere they follow one another as usual).
//
// Every kernel of this folder keeps three rules:
//   1. it calls wait_for_predecessor() before it reads what an earlier kernel wrote, and before it writes anything;
//      weights, which no kernel writes, it may read before that: their way through memory is what there is to hide;
//   2. it calls let_successor_start() after that, as soon as it likes, and in every thread block;
//   3. so what was written two kernels ago is complete when it starts, and may be read before waiting, too.

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "backends/cuda/device.hpp"

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

template <class... Parameters, class... Arguments>
void launch(const Device& device, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Arguments&&... arguments) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "asking for shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.stream = device.stream();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = device.dependent_launch() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(std::forward<Arguments>(arguments))...),
        "starting a kernel");
}

}  // namespace qwen3next::cuda
