#pragma once
// The kernels that the tests of operations go through: the program's, and one set that only they can run.

#include <vector>

#include "backends/cpu/dispatch.hpp"

#if defined(QWEN3NEXT_TEST_EVEX)
namespace qwen3next::cpu::avx2_vnni_evex {
const Kernels& kernels() noexcept;
}
#endif

namespace qwen3next::test {

inline std::vector<cpu::Level> tested_levels() {
  std::vector<cpu::Level> levels;
  for (const cpu::Level& level : cpu::levels()) {
    if (level.supported) levels.push_back(level);
  }
#if defined(QWEN3NEXT_TEST_EVEX)
  // Where avx2_vnni itself can't run.
  if (cpu::this_x86().avx512() && !cpu::this_x86().avx2_vnni())
    levels.push_back({"avx2_vnni_evex", true, cpu::avx2_vnni_evex::kernels});
#endif
  return levels;
}

}  // namespace qwen3next::test
