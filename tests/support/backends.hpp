#pragma once
// Backends as tests want them.

#include <string_view>

#include "backends/cpu/cpu_backend.hpp"

namespace qwen3next::test {

inline CpuOptions cpu(std::string_view isa, int threads, KvType kv) {
  CpuOptions options = resolve_cpu_options(std::string(isa), threads);
  options.kv = kv;
  return options;
}

}  // namespace qwen3next::test
