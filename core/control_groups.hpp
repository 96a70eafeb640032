#pragma once
// The control groups of this process (Linux, version 1 and 2), whose files say what it may use of the machine.

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace qwen3next {

namespace detail {

inline std::string first_line(const std::filesystem::path& file) {
  std::ifstream in(file);
  std::string line;
  std::getline(in, line);
  return line;
}

// Whether `list`, separated by commas, has `word`.
inline bool lists(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// f(folder, v2) for the group of this process that `controller` ("cpu", "memory") governs, and for each above it.
// `root` is where proc lies and what the mounts' paths begin at.
template <class F>
void for_each_control_group(const std::filesystem::path& root, const std::string& controller, const F& f) {
  // "0::/user.slice" (version 2), "4:cpu,cpuacct:/docker/abc" (version 1)
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string group; std::getline(groups, group);) {
    const std::size_t a = group.find(':'), b = group.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = group.substr(a + 1, b - a - 1), path = group.substr(b + 1);
    const bool v2 = controllers.empty();
    if (!v2 && !lists(controllers, controller)) continue;
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
      if (v2 ? type != "cgroup2" : type != "cgroup" || !lists(options, controller)) continue;
      // In a container the group's path may be the host's, of which the mount shows only the end.
      std::string below = path;
      if (top != "/" && path.rfind(top, 0) == 0)
        below = path.substr(top.size());
      else if (top != "/")
        below = "";
      if (below.find("..") != std::string::npos) below = "";  // outside of what this namespace sees
      const std::filesystem::path hierarchy = root / std::filesystem::path(point).relative_path();
      for (std::filesystem::path at = std::filesystem::path(below).relative_path();; at = at.parent_path()) {
        f(hierarchy / at, v2);
        if (at.empty()) break;
      }
    }
  }
}

}  // namespace detail

}  // namespace qwen3next
