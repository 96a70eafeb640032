#pragma once
// The kernels that the tests of operations go through: the program's, and sets that only they can run.

#include <vector>

#include "backends/cpu/dispatch.hpp"

#if defined(QWEN3NEXT_TEST_STAND_INS)
namespace qwen3next::cpu {
namespace avx2_vnni_evex {
const Kernels& kernels() noexcept;
}
namespace amx_emulated {
const Kernels& kernels() noexcept;
}
}  // namespace qwen3next::cpu
#endif

namespace qwen3next::test {

inline std::vector<cpu::Level> tested_levels() {
  std::vector<cpu::Level> levels;
  for (const cpu::Level& level : cpu::levels()) {
    if (level.supported) levels.push_back(level);
  }
#if defined(QWEN3NEXT_TEST_STAND_INS)
  // Where the level itself can't run, but the rest of its instructions can.
  const cpu::X86 x = cpu::this_x86();
  if (x.avx512() && !x.avx2_vnni()) levels.push_back({"avx2_vnni_evex", true, cpu::avx2_vnni_evex::kernels});
  if (x.avx512() && !x.amx()) levels.push_back({"amx_emulated", true, cpu::amx_emulated::kernels});
#endif
  return levels;
}

}  // namespace qwen3next::test
