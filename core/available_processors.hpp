#pragma once
// Processors: how many this process may use (those it is bound to, or fewer if its control group has a quota of time),
// and which one a thread is on.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <thread>

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

inline std::string first_line(const std::filesystem::path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

// The least quota of the group `path` and those above it, in processors; files below `mount`.
inline std::optional<double> least_quota(const std::filesystem::path& mount, std::filesystem::path path, bool v2) {
  std::optional<double> least;
  path = path.relative_path();
  for (;;) {
    std::optional<double> quota;
    if (v2) {
      std::istringstream words(first_line(mount / path / "cpu.max"));
      std::string q, p;
      words >> q >> p;
      quota = quota_of(q, p);
    } else {
      quota = quota_of(first_line(mount / path / "cpu.cfs_quota_us"), first_line(mount / path / "cpu.cfs_period_us"));
    }
    if (quota) least = std::min(least.value_or(*quota), *quota);
    if (path.empty()) return least;
    path = path.parent_path();
  }
}

// Whether `list`, separated by commas, has `word`.
inline bool lists(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

}  // namespace detail

// The quota of processor time of this process's control groups (Linux, version 1 and 2), in processors; nothing if
// there is none.  `root` is where proc lies and what the mounts' paths begin at.
inline std::optional<double> cgroup_quota(const std::filesystem::path& root = "/") {
  std::optional<double> least;
  // "0::/user.slice" (version 2), "4:cpu,cpuacct:/docker/abc" (version 1)
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string group; std::getline(groups, group);) {
    const std::size_t a = group.find(':'), b = group.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = group.substr(a + 1, b - a - 1), path = group.substr(b + 1);
    const bool v2 = controllers.empty();
    if (!v2 && !detail::lists(controllers, "cpu")) continue;
    // "30 23 0:26 /docker/abc /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu": what of the hierarchy is mounted
    // where
    std::ifstream mounts(root / "proc/self/mountinfo");
    for (std::string mount; std::getline(mounts, mount);) {
      const std::size_t dash = mount.find(" - ");
      if (dash == std::string::npos) continue;
      std::istringstream left(mount), right(mount.substr(dash + 3));
      std::string skip, top, point, type, options;
      left >> skip >> skip >> skip >> top >> point;
      right >> type >> skip >> options;
      if (v2 ? type != "cgroup2" : type != "cgroup" || !detail::lists(options, "cpu")) continue;
      // In a container the group's path may be the host's, of which the mount shows only the end.
      std::string below = path;
      if (top != "/" && path.rfind(top, 0) == 0)
        below = path.substr(top.size());
      else if (top != "/")
        below = "";
      if (below.find("..") != std::string::npos) below = "";  // outside of what this namespace sees
      const auto quota =
          detail::least_quota(root / std::filesystem::path(point).relative_path(), std::filesystem::path(below), v2);
      if (quota) least = std::min(least.value_or(*quota), *quota);
    }
  }
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
