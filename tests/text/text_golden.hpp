#pragma once
// Files that the text tests read.

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.hpp"
#include "text/python_json.hpp"

namespace qwen3next::test {

inline std::optional<std::string> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return {};
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline std::filesystem::path text_golden_path(std::string_view name) {
  return std::filesystem::path(QWEN3NEXT_SOURCE_DIR) / "tests/golden/text" / name;
}

// A golden of this repository, which must be there.
inline std::string text_golden(std::string_view name) {
  auto text = read_file(text_golden_path(name));
  if (!text) throw Error(text_golden_path(name).string() + ": missing, run tools/make_text_goldens.py");
  return *text;
}
inline ordered_json text_golden_json(std::string_view name) { return parse_json(text_golden(name), name); }

// The real tokenizer, templates and corpus live beside the repository and are not part of it.
inline std::filesystem::path shared_path(std::string_view name) {
  return std::filesystem::path(QWEN3NEXT_SOURCE_DIR) / "../shared" / name;
}

// Reports, loudly, a test that cannot run here; every such test has a twin on the repository's own data.
#define QWEN3NEXT_SKIP(what)                                                 \
  do {                                                                       \
    MESSAGE("SKIPPED, not tested here: ", std::string(what), " is missing"); \
    return;                                                                  \
  } while (false)

inline constexpr std::uint64_t fnv_seed = 0xCBF29CE484222325u;
inline std::uint64_t fnv(std::string_view bytes, std::uint64_t hash = fnv_seed) {
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  return hash;
}
inline std::string hex(std::uint64_t value) {
  std::string out;
  for (int shift = 60; shift >= 0; shift -= 4) out += "0123456789abcdef"[value >> shift & 15];
  return out;
}

// A small deterministic generator, the same on every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
  std::size_t below(std::size_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::size_t>(state_ >> 33) % n;
  }
  template <class T>
  const T& pick(const std::vector<T>& from) {
    return from[below(from.size())];
  }

 private:
  std::uint64_t state_;
};

}  // namespace qwen3next::test
