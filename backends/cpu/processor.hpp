#pragma once
// What the processor can run, and the operating system lets it: instructions, and registers saved when threads change.

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qwen3next::cpu {

// x86: what CPUID and XGETBV answer, and what the kernels of each level need of it (cmake/CpuKernels.cmake).
struct X86 {
  std::uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0;
  std::uint64_t xcr0 = 0;      // register states that the system saves; 0 if it does not use XSAVE
  bool tiles_allowed = false;  // the system lets this process use tile registers, 8 KiB for every thread

  bool sse4() const noexcept {  // SSSE3, SSE4.1, SSE4.2, POPCNT
    return has(leaf1_ecx, 9) && has(leaf1_ecx, 19) && has(leaf1_ecx, 20) && has(leaf1_ecx, 23);
  }
  bool avx2() const noexcept {  // AVX, FMA, F16C, AVX2, BMI2; XMM and YMM saved
    return sse4() && has(leaf1_ecx, 28) && has(leaf1_ecx, 12) && has(leaf1_ecx, 29) && has(leaf7_ebx, 5) &&
           has(leaf7_ebx, 8) && (xcr0 & 0x6) == 0x6;
  }
  bool avx2_vnni() const noexcept { return avx2() && has(leaf7_1_eax, 4); }
  bool avx512() const noexcept {  // F, DQ, BW, VL, VNNI; mask registers and all of ZMM0 to ZMM31 saved
    return avx2() && has(leaf7_ebx, 16) && has(leaf7_ebx, 17) && has(leaf7_ebx, 30) && has(leaf7_ebx, 31) &&
           has(leaf7_ecx, 11) && (xcr0 & 0xe6) == 0xe6;
  }
  bool amx() const noexcept {  // TILE and INT8; tile configuration and data saved
    return avx512() && has(leaf7_edx, 24) && has(leaf7_edx, 25) && (xcr0 & 0x60000) == 0x60000 && tiles_allowed;
  }

 private:
  static bool has(std::uint32_t word, int bit) noexcept { return (word >> bit & 1u) != 0; }
};

#if defined(__x86_64__)
// Linux gives the room that tiles need to processes that ask for it, once for all threads: arch_prctl(2).
inline bool ask_for_tiles() noexcept {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return ::syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline X86 this_x86() noexcept {
  X86 x;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return x;
  x.leaf1_ecx = c;
  if ((c >> 27 & 1u) != 0) {  // OSXSAVE: XGETBV may be asked
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    x.xcr0 = static_cast<std::uint64_t>(high) << 32 | low;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    x.leaf7_ebx = b;
    x.leaf7_ecx = c;
    x.leaf7_edx = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) x.leaf7_1_eax = a;
  }
  x.tiles_allowed = true;
  x.tiles_allowed = x.amx() && ask_for_tiles();
  return x;
}
#endif

// AArch64: NEON is always there, dot products (ARMv8.2) and int8 matrix products (ARMv8.6) are asked for.
struct Arm {
  bool dotprod = false, i8mm = false;
};

#if defined(__aarch64__)
inline Arm this_arm() noexcept {
#if defined(__linux__)
  return {(getauxval(AT_HWCAP) >> 20 & 1u) != 0,    // HWCAP_ASIMDDP
          (getauxval(AT_HWCAP2) >> 13 & 1u) != 0};  // HWCAP2_I8MM
#elif defined(__APPLE__)
  auto ask = [](const char* name) {
    int value = 0;
    std::size_t size = sizeof value;
    return ::sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  return {ask("hw.optional.arm.FEAT_DotProd"), ask("hw.optional.arm.FEAT_I8MM")};
#else
  return {};
#endif
}
#endif

}  // namespace qwen3next::cpu
