#pragma once
// Numbers for people.

#include <cstdint>
#include <cstdio>
#include <string>

namespace qwen3next::cli {

template <class... Args>
std::string format(const char* pattern, Args... args) {
  char text[256];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
#pragma GCC diagnostic ignored "-Wformat-security"
  std::snprintf(text, sizeof text, pattern, args...);
#pragma GCC diagnostic pop
  return text;
}

// 2.1 GiB
inline std::string bytes_text(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1000 && unit < 4; ++unit) bytes /= 1024;  // 0.98 MiB rather than 1004 KiB
  return format(unit == 0     ? "%.0f %s"
                : bytes < 10  ? "%.2f %s"
                : bytes < 100 ? "%.1f %s"
                              : "%.0f %s",
                bytes, units[unit]);
}
inline std::string bytes_text(std::uint64_t bytes) { return bytes_text(static_cast<double>(bytes)); }

// 3.21, 32.1, 321
inline std::string rate_text(double x) { return format(x < 10 ? "%.2f" : x < 100 ? "%.1f" : "%.0f", x); }

// 45 s, 3:20, 1:02:03
inline std::string duration_text(double seconds) {
  const auto s = static_cast<long long>(seconds + 0.5);
  if (s < 60) return format("%lld s", s);
  if (s < 3600) return format("%lld:%02lld", s / 60, s % 60);
  return format("%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
}

// 1,234,567
inline std::string count_text(std::int64_t n) {
  std::string digits = std::to_string(n);
  for (auto i = static_cast<int>(digits.size()) - 3; i > (n < 0 ? 1 : 0); i -= 3) {
    digits.insert(static_cast<std::size_t>(i), ",");
  }
  return digits;
}

}  // namespace qwen3next::cli
