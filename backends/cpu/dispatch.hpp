#pragma once
// Which kernels this program holds, and the best of them for the machine at hand.

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cpu/kernels.hpp"
#include "backends/cpu/processor.hpp"
#include "core/error.hpp"

namespace qwen3next {

namespace cpu {

// Kernels for one instruction set.  `kernels` is asked only if it is supported here.
struct Level {
  const char* name;
  bool supported;
  const Kernels& (*kernels)() noexcept;
};

// What this program was built with, best first.
#if !defined(QWEN3NEXT_MULTI_ISA)
inline std::vector<Level> levels() {
#if defined(__AMX_TILE__) && defined(__AMX_INT8__)
  return {{native::kernels().name, this_x86().amx(), native::kernels}};
#else
  return {{native::kernels().name, true, native::kernels}};
#endif
}
#else
// Each defined by kernels_isa.cpp, compiled with its flags: cmake/CpuKernels.cmake.
#define QWEN3NEXT_DECLARE_LEVEL(isa) \
  namespace isa {                    \
  const Kernels& kernels() noexcept; \
  }
#if defined(__x86_64__)
QWEN3NEXT_DECLARE_LEVEL(amx)
QWEN3NEXT_DECLARE_LEVEL(avx512)
QWEN3NEXT_DECLARE_LEVEL(avx2_vnni)
QWEN3NEXT_DECLARE_LEVEL(avx2)
QWEN3NEXT_DECLARE_LEVEL(sse4)
QWEN3NEXT_DECLARE_LEVEL(baseline)
inline std::vector<Level> levels() {
  const X86 x = this_x86();
  return {{"amx", x.amx(), amx::kernels},
          {"avx512", x.avx512(), avx512::kernels},
          {"avx2_vnni", x.avx2_vnni(), avx2_vnni::kernels},
          {"avx2", x.avx2(), avx2::kernels},
          {"sse4", x.sse4(), sse4::kernels},
          {"baseline", true, baseline::kernels}};
}
#elif defined(__aarch64__)
QWEN3NEXT_DECLARE_LEVEL(neon_i8mm)
QWEN3NEXT_DECLARE_LEVEL(neon_dotprod)
QWEN3NEXT_DECLARE_LEVEL(neon)
inline std::vector<Level> levels() {
  const Arm arm = this_arm();
  return {{"neon_i8mm", arm.dotprod && arm.i8mm, neon_i8mm::kernels},
          {"neon_dotprod", arm.dotprod, neon_dotprod::kernels},
          {"neon", true, neon::kernels}};
}
#else
QWEN3NEXT_DECLARE_LEVEL(baseline)
inline std::vector<Level> levels() { return {{"baseline", true, baseline::kernels}}; }
#endif
#undef QWEN3NEXT_DECLARE_LEVEL
#endif

// The kernels called `isa`, or the best that run here if that is empty.
inline const Kernels& choose_kernels(std::string_view isa, std::span<const Level> all) {
  std::string names;
  bool known = false;
  for (const Level& level : all) {
    if (level.supported && (isa.empty() || isa == level.name)) return level.kernels();
    known = known || isa == level.name;
    names += (names.empty() ? "" : ", ") + std::string(level.name) + (level.supported ? "" : " (not on this machine)");
  }
  throw Error((known ? "this machine cannot run the CPU kernels '" : "there are no CPU kernels called '") +
              std::string(isa) + "'; choose from " + names);
}
inline const Kernels& choose_kernels(std::string_view isa) { return choose_kernels(isa, levels()); }

// The names of those that run here, best first.
inline std::vector<std::string_view> available_isas() {
  std::vector<std::string_view> names;
  for (const Level& level : levels()) {
    if (level.supported) names.emplace_back(level.name);
  }
  return names;
}

}  // namespace cpu

}  // namespace qwen3next
