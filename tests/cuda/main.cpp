// The CUDA backend's tests.  Cases whose names begin with "host: " need no GPU and must not see one.
//   usage: test_cuda [--host] [doctest's options]     --host: those cases alone, and any GPU hidden
// Exit status 77: skipped, there is no GPU.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdlib>
#include <iostream>
#include <string_view>

#include "backends/cuda/device.hpp"
#include "core/error.hpp"

int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  if (argc > 1 && std::string_view(argv[1]) == "--host") {
    ::setenv("CUDA_VISIBLE_DEVICES", "-1", 1);  // before the driver is asked for the first time
    context.addFilter("test-case", "host: *");
    return context.run();
  }
  try {
    qwen3next::cuda::Device::open();
  } catch (const qwen3next::Error& e) {
    std::cout << "SKIPPED: no NVIDIA GPU, so the CUDA kernels were compiled but not run (" << e.what() << ")\n";
    return 77;
  }
  context.addFilter("test-case-exclude", "host: *");
  return context.run();
}
