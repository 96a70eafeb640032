#pragma once
// Memory: how much more of it this process may take without being killed and without making the system swap.

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "core/control_groups.hpp"

#if defined(_WIN32)
struct _MEMORYSTATUSEX;
extern "C" __declspec(dllimport) int __stdcall GlobalMemoryStatusEx(_MEMORYSTATUSEX* status);
#endif

namespace qwen3next {

struct AvailableMemory {
  std::uint64_t bytes;
  std::string_view limit;  // "free memory" or "control group limit": what there would have to be more of
};

namespace detail {

// A whole number at the beginning of `text`.
inline std::optional<std::uint64_t> number_of(std::string_view text) {
  std::uint64_t value = 0;
  if (std::from_chars(text.data(), text.data() + text.size(), value).ec != std::errc()) return {};
  return value;
}

// The number beside `name` in a file of lines "NAME VALUE ...".
inline std::optional<std::uint64_t> number_beside(const std::string& name, const std::filesystem::path& file) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string word, value;
    if (words >> word >> value && word == name) return number_of(value);
  }
  return {};
}

// What a control group may still take: its limit less what it uses, of which pages of files that nobody has looked at
// lately are given up before anybody is killed.
inline std::optional<std::uint64_t> left_of_group(const std::filesystem::path& group, bool v2) {
  auto limit = number_of(first_line(group / (v2 ? "memory.max" : "memory.limit_in_bytes")));  // none: "max"
  if (v2) {
    // Beyond `high` a group is slowed until it has given enough back.
    if (const auto high = number_of(first_line(group / "memory.high"))) limit = std::min(limit.value_or(*high), *high);
  }
  const auto used = number_of(first_line(group / (v2 ? "memory.current" : "memory.usage_in_bytes")));
  if (!limit || !used) return {};
  const std::uint64_t files =
      number_beside(v2 ? "inactive_file" : "total_inactive_file", group / "memory.stat").value_or(0);
  const std::uint64_t held = *used - std::min(*used, files);
  return *limit - std::min(*limit, held);
}

}  // namespace detail

// Nothing where the system does not say.  `root` is where proc lies and what the mounts' paths begin at.
inline std::optional<AvailableMemory> available_memory(const std::filesystem::path& root = "/") {
  std::optional<AvailableMemory> least;
  const auto consider = [&](std::uint64_t bytes, std::string_view limit) {
    if (!least || bytes < least->bytes) least = AvailableMemory{bytes, limit};
  };
  if (const auto kib = detail::number_beside("MemAvailable:", root / "proc/meminfo"))
    consider(std::min(*kib, UINT64_MAX / 1024) * 1024, "free memory");
  detail::for_each_control_group(root, "memory", [&](const std::filesystem::path& group, bool v2) {
    if (const auto left = detail::left_of_group(group, v2)) consider(*left, "control group limit");
  });
#if defined(_WIN32)
  // MEMORYSTATUSEX: its size and the load in percent; physical memory and how much is free; then pages that may be
  // committed, likewise, and addresses.
  struct {
    std::uint32_t size, load;
    std::uint64_t physical, physical_free, pages, pages_free, other[3];
  } status{64, 0, 0, 0, 0, 0, {}};
  static_assert(sizeof status == 64);
  if (!least && ::GlobalMemoryStatusEx(reinterpret_cast<_MEMORYSTATUSEX*>(&status)) != 0)
    consider(std::min(status.physical_free, status.pages_free), "free memory");
#endif
  return least;
}

}  // namespace qwen3next
