#pragma once
// A fuzz target is a function of bytes that nobody vouches for:
//
//   FUZZ_TARGET(name) { ...; use `input`; expect(what must hold, "in words"); }
//
// An Error is a fine end, if its message is one line.  Everything else that is thrown, every sanitizer report, timeout
// or large allocation is a finding.  fuzz_main.cpp feeds targets from libFuzzer, test_main.cpp with seeds and old
// findings.

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.hpp"

namespace qwen3next::fuzz {

struct Target {
  std::string_view name;
  void (*run)(std::string_view input);
};

inline std::vector<Target>& targets() {
  static std::vector<Target> all;
  return all;
}

struct Registration {
  Registration(std::string_view name, void (*run)(std::string_view)) { targets().push_back({name, run}); }
};

#define FUZZ_TARGET(name)                                                         \
  static void fuzz_##name(std::string_view input);                                \
  static const qwen3next::fuzz::Registration register_##name(#name, fuzz_##name); \
  static void fuzz_##name([[maybe_unused]] std::string_view input)

inline void expect(bool holds, std::string_view what) {
  if (!holds) throw std::logic_error("broken: " + std::string(what));
}

// Runs f, which may refuse its input.
template <class F>
void may_refuse(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    const std::string_view message = e.what();
    expect(!message.empty() && message.size() < 4000 && message.find('\n') == message.npos, "errors are one line");
  }
}

// A folder of this process for input files, removed at its end.
inline const std::filesystem::path& folder() {
  struct Folder {
    std::filesystem::path path =
        std::filesystem::temp_directory_path() / ("qwen3next-fuzz-" + std::to_string(::getpid()));
    Folder() { std::filesystem::create_directories(path); }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  };
  static const Folder it;
  return it.path;
}

inline std::filesystem::path write_file(const std::string& name, std::string_view bytes) {
  const std::filesystem::path path = folder() / name;
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

// Takes numbers from the front of an input; zeros when nothing is left.
class Numbers {
 public:
  explicit Numbers(std::string_view& input) : input_(input) {}
  template <class T>
  T take() {
    T value{};
    const std::size_t size = std::min(sizeof value, input_.size());
    std::memcpy(&value, input_.data(), size);
    input_.remove_prefix(size);
    return value;
  }

 private:
  std::string_view& input_;
};

}  // namespace qwen3next::fuzz
