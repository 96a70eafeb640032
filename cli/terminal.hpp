#pragma once
// What may be done to the terminal.  The program reads the environment for this; the library never does.

#include <cstdio>
#include <cstdlib>
#include <string_view>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#elif defined(_WIN32)
#include <io.h>
#endif

namespace qwen3next::cli {

inline bool is_terminal(std::FILE* file) {
#if defined(__unix__) || defined(__APPLE__)
  return ::isatty(::fileno(file)) == 1;
#elif defined(_WIN32)
  return ::_isatty(::_fileno(file)) != 0;
#else
  return false && file;
#endif
}

// Whether the locale is one of UTF-8, so that more than ASCII can be drawn.
inline bool utf8_terminal() {
  for (const char* variable : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(variable);
    if (!value || !*value) continue;
    const std::string_view locale = value;
    return locale.find("UTF-8") != locale.npos || locale.find("utf8") != locale.npos;
  }
  return false;
}

// Escape sequences for one stream; empty where they don't belong: in files and pipes, and where NO_COLOR asks for none
// (https://no-color.org).
class Style {
 public:
  explicit Style(std::FILE* file) : on_(is_terminal(file) && !plain()) {}
  bool on() const { return on_; }
  std::string_view dim() const { return on_ ? "\x1b[2m" : ""; }
  std::string_view bold() const { return on_ ? "\x1b[1m" : ""; }
  std::string_view accent() const { return on_ ? "\x1b[36m" : ""; }   // cyan
  std::string_view warning() const { return on_ ? "\x1b[33m" : ""; }  // yellow
  std::string_view reset() const { return on_ ? "\x1b[0m" : ""; }

 private:
  static bool plain() {
    const char* no_color = std::getenv("NO_COLOR");
    const char* term = std::getenv("TERM");
    return (no_color && *no_color) || !term || std::string_view(term) == "dumb";
  }
  bool on_;
};

}  // namespace qwen3next::cli
