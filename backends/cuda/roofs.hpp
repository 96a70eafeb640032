#pragma once
// What the card can do at most, measured.  Plain C++.

#include <memory>

#include "backends/cuda/device.hpp"

namespace qwen3next::cuda {

// Bytes per second of a copy from the card's memory into it, both directions counted, the best of several; takes up to
// 1 GiB and some milliseconds.  Throws Error if the card has no 64 MiB left.
double measure_copy_bandwidth(const std::shared_ptr<Device>& device);

// Multiply-adds per second of the tensor cores as these kernels use them: f16 into f32, by mma.sync.
double measure_tensor_peak(const std::shared_ptr<Device>& device);

}  // namespace qwen3next::cuda
