#pragma once
// The backends by name: what a user chooses between.

#include <cstdint>

namespace qwen3next {

// What computes.
enum class Backend : std::uint8_t {
  cpu,        // vector kernels, all cores; quantised weights meet int8 activations
  reference,  // the specification: float32, one thread, slow
  cuda,       // an NVIDIA GPU, in builds that have it; activations enter products in f16
};

}  // namespace qwen3next
