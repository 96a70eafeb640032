#pragma once
// What Windows needs to be spoken to in UTF-8 and in bytes, as every other system is.

#include <string>
#include <vector>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <fcntl.h>
#include <io.h>
#include <windows.h>
// after windows.h
#include <shellapi.h>
#endif

namespace qwen3next::cli {

#if defined(_WIN32)

// No line ends translated, neither in nor out; text of the console in UTF-8.
inline void prepare_streams() {
  for (std::FILE* stream : {stdin, stdout, stderr}) ::_setmode(::_fileno(stream), _O_BINARY);
  ::SetConsoleOutputCP(CP_UTF8);
  ::SetConsoleCP(CP_UTF8);
}

// The command line in UTF-8; argv has it in the code page of the user's country.
class Arguments {
 public:
  Arguments(int, char**) {
    int n = 0;
    wchar_t** wide = ::CommandLineToArgvW(::GetCommandLineW(), &n);
    for (int i = 0; wide && i < n; ++i) {
      const int bytes = ::WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, nullptr, 0, nullptr, nullptr);
      std::string& text = texts_.emplace_back(static_cast<std::size_t>(bytes > 0 ? bytes : 1), '\0');
      ::WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, text.data(), bytes, nullptr, nullptr);
    }
    ::LocalFree(wide);
    for (std::string& text : texts_) pointers_.push_back(text.data());
    pointers_.push_back(nullptr);
  }
  int count() const noexcept { return static_cast<int>(texts_.size()); }
  char** values() noexcept { return pointers_.data(); }

 private:
  std::vector<std::string> texts_;
  std::vector<char*> pointers_;
};

#else

inline void prepare_streams() {}

class Arguments {
 public:
  Arguments(int argc, char** argv) : argc_(argc), argv_(argv) {}
  int count() const noexcept { return argc_; }
  char** values() const noexcept { return argv_; }

 private:
  int argc_;
  char** argv_;
};

#endif

}  // namespace qwen3next::cli
