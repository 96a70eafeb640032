#pragma once
// The number of threads, as users give it.

#include <algorithm>

#include "core/message.hpp"

namespace qwen3next {

// `wanted`, or all of `processors` (at least one) if it is 0.  Throws Error beyond 256 or the processors, whichever is
// more: that many would be a mistake.
inline int resolve_threads(int wanted, int processors) {
  const int all = std::max(1, processors), most = std::max(all, 256);
  if (wanted < 0 || wanted > most) throw_error("threads is ", wanted, ", expected 0 (all) to ", most);
  return wanted > 0 ? wanted : all;
}

}  // namespace qwen3next
