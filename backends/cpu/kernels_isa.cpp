// Compiled once per instruction set, with -DQWEN3NEXT_ISA=<name> and its flags: see cmake/CpuKernels.cmake.
#include "backends/cpu/kernels.hpp"
