#pragma once
// Which kernels this program holds, and the best of them for the machine at hand.

#include <string>
#include <string_view>
#include <vector>

#include "backends/cpu/kernels.hpp"
#include "core/error.hpp"

#if defined(QWEN3NEXT_MULTI_ISA) && defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>  // getauxval
#endif

namespace qwen3next {

namespace cpu {

#if defined(QWEN3NEXT_MULTI_ISA)
// Defined by kernels_isa.cpp, compiled once for each.
#if defined(__x86_64__) || defined(_M_X64)
namespace avx512 {
const Kernels& kernels() noexcept;
}
namespace avx2 {
const Kernels& kernels() noexcept;
}
namespace baseline {
const Kernels& kernels() noexcept;
}
#elif defined(__aarch64__)
namespace neon_dotprod {
const Kernels& kernels() noexcept;
}
namespace neon {
const Kernels& kernels() noexcept;
}
#else
namespace baseline {
const Kernels& kernels() noexcept;
}
#endif
#endif

#if defined(QWEN3NEXT_MULTI_ISA) && defined(__aarch64__)
inline bool has_dot_product() noexcept {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}
#endif

// All kernels that can run here, best first.
inline std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
  [[maybe_unused]] auto add = [&](bool supported, const Kernels& (*kernels)() noexcept) {
    if (supported) usable.push_back(&kernels());
  };
#if !defined(QWEN3NEXT_MULTI_ISA)
  add(true, native::kernels);
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  add(has_avx512, avx512::kernels);
  add(has_avx2, avx2::kernels);  // every CPU with AVX2 has F16C
  add(true, baseline::kernels);
#elif defined(__aarch64__)
  add(has_dot_product(), neon_dotprod::kernels);
  add(true, neon::kernels);
#else
  add(true, baseline::kernels);
#endif
  return usable;
}

// The kernels called `isa`, or the best if that is empty.
inline const Kernels& choose_kernels(std::string_view isa) {
  const std::vector<const Kernels*> usable = usable_kernels();
  if (isa.empty()) return *usable.front();
  std::string names;
  for (const Kernels* k : usable) {
    if (isa == k->name) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw Error("no CPU kernels called '" + std::string(isa) + "' run on this machine; there are: " + names);
}

}  // namespace cpu

inline std::vector<std::string_view> available_isas() {
  std::vector<std::string_view> names;
  for (const cpu::Kernels* k : cpu::usable_kernels()) names.emplace_back(k->name);
  return names;
}

}  // namespace qwen3next
