#pragma once
// Models as the tests of the API open them: those that ask for nothing that only the CPU has are compiled once more,
// for the cuda backend.

#include <string>
#include <utility>

#include "qwen3next.hpp"

namespace qwen3next::test {

inline Model open(const std::string& path, Options options = {}) {
#ifdef QWEN3NEXT_TEST_ON_CUDA
  if (options.backend == Backend::cpu && options.isa.empty() && !options.memory) {
    options.backend = Backend::cuda;
    options.threads = 0;
  }
#endif
  return Model::open(path, options);
}

}  // namespace qwen3next::test
