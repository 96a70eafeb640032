#pragma once
// The GPU of the tests.

#include <memory>

#include "backends/cuda/device.hpp"

namespace qwen3next::test {

// One for all tests.  Throws Error if there is none: main() asks before any test runs.
inline const std::shared_ptr<cuda::Device>& gpu() {
  static const std::shared_ptr<cuda::Device> device = cuda::Device::open();
  return device;
}

}  // namespace qwen3next::test
