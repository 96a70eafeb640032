#pragma once
// Processors: how many this process may use (those it is bound to, or fewer if its control group has a quota of time),
// and which one a thread is on.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <sstream>
#include <string>
#include <thread>

#include "core/control_groups.hpp"
#include "core/message.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

namespace qwen3next {

namespace detail {

// "max 100000" or "150000 100000": microseconds of processor time in a period.
inline std::optional<double> quota_of(const std::string& quota, const std::string& period) {
  try {
    const double q = std::stod(quota), p = std::stod(period);
    if (q > 0 && p > 0) return q / p;
  } catch (const std::exception&) {  // "max", or no number
  }
  return {};
}

}  // namespace detail

// The quota of processor time of this process's control groups (Linux, version 1 and 2), in processors; nothing if
// there is none.  `root` is where proc lies and what the mounts' paths begin at.
inline std::optional<double> cgroup_quota(const std::filesystem::path& root = "/") {
  std::optional<double> least;
  detail::for_each_control_group(root, "cpu", [&](const std::filesystem::path& group, bool v2) {
    std::optional<double> quota;
    if (v2) {
      std::istringstream words(detail::first_line(group / "cpu.max"));
      std::string q, p;
      words >> q >> p;
      quota = detail::quota_of(q, p);
    } else {
      quota = detail::quota_of(detail::first_line(group / "cpu.cfs_quota_us"),
                               detail::first_line(group / "cpu.cfs_period_us"));
    }
    if (quota) least = std::min(least.value_or(*quota), *quota);
  });
  return least;
}

// The processor that the calling thread is on; -1 if the system does not say.
inline int this_processor() noexcept {
#if defined(__linux__)
  return ::sched_getcpu();
#else
  return -1;
#endif
}

// Moves the calling thread from `processor` to another one that it may run on, where the system lets it.
inline void leave_processor([[maybe_unused]] int processor) noexcept {
#if defined(__linux__)
  cpu_set_t all, others;
  if (processor < 0 || processor >= CPU_SETSIZE || ::sched_getaffinity(0, sizeof all, &all) != 0) return;
  others = all;
  CPU_CLR(static_cast<std::size_t>(processor), &others);
  if (CPU_COUNT(&others) > 0 && ::sched_setaffinity(0, sizeof others, &others) == 0)
    ::sched_setaffinity(0, sizeof all, &all);
#endif
}

// At least 1.  A part of a processor counts as one: its time is used up sooner, and the rest of a period waited for.
inline int available_processors() {
  int bound = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  // As large as the system's sets are; it refuses smaller ones.
  for (int most = 1024; most <= 1 << 18; most *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(most));
    if (!set) break;
    const std::size_t size = CPU_ALLOC_SIZE(static_cast<std::size_t>(most));
    const bool known = ::sched_getaffinity(0, size, set) == 0;
    if (known) bound = CPU_COUNT_S(size, set);
    CPU_FREE(set);
    if (known) break;
  }
#endif
  const std::optional<double> quota = cgroup_quota();
  return std::max(1, quota ? std::min(bound, static_cast<int>(std::ceil(std::min(*quota, 1e6)))) : bound);
}

// The number of threads as users give it: `wanted`, or as many as there are processors to use if it is 0.  Throws Error
// beyond 256 or those processors, whichever is more: that many would be a mistake.
inline int resolve_threads(int wanted) {
  const int all = available_processors(), most = std::max(all, 256);
  if (wanted < 0 || wanted > most) throw_error("threads is ", wanted, ", expected 0 (all) to ", most);
  return wanted > 0 ? wanted : all;
}

}  // namespace qwen3next
