#pragma once
// Building the one-line messages of Error.

#include <charconv>
#include <concepts>
#include <filesystem>
#include <string>
#include <string_view>

#include "core/error.hpp"

namespace qwen3next {

// Text that comes from a file, fit to be shown: one line, ASCII, not endless.
inline std::string printable(std::string_view text, std::size_t limit = 160) {
  std::string out(text.substr(0, limit));
  for (char& c : out) {
    if (c < ' ' || c > '~') c = '?';
  }
  if (text.size() > limit) out += "...";
  return out;
}

// A path as the user knows it, in UTF-8 on every system.
inline std::string display(const std::filesystem::path& path) {
  const std::u8string text = path.u8string();
  return {text.begin(), text.end()};
}

namespace detail {
inline void append(std::string& out, std::string_view part) { out += part; }
inline void append(std::string& out, std::integral auto part) { out += std::to_string(part); }
inline void append(std::string& out, double part) {
  char text[32];
  out.append(text, std::to_chars(text, text + sizeof text, part).ptr);
}
}  // namespace detail

// Text and numbers, one after the other.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string out;
  (detail::append(out, parts), ...);
  return out;
}

template <class... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  throw Error(concat(parts...));
}

}  // namespace qwen3next
