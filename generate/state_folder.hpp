#pragma once
// States of prompts in a folder, for later processes: one file each (state_file.hpp), found by its name.
//
//   MODEL-KV-COUNT-TOKENS.q3nstate     identity of the model, KV type, number of tokens, hash of these
// There is no index: processes that share the folder only ever see whole files come and go.

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "core/message.hpp"
#include "core/xxhash64.hpp"
#include "generate/state_file.hpp"

namespace qwen3next {

class StateFolder {
 public:
  // Makes the folder, if it is not there; `limit` is the most bytes of all its files.  Throws Error.
  StateFolder(std::filesystem::path folder, std::uint64_t limit) : folder_(std::move(folder)), limit_(limit) {
    std::error_code error;
    std::filesystem::create_directories(folder_, error);
    if (error) throw_error(display(folder_), ": cannot make this folder: ", error.message());
    if (!std::filesystem::is_directory(folder_)) throw_error(display(folder_), ": is not a folder");
  }

  struct Entry {
    std::int64_t position = 0;
    std::filesystem::path path;
  };
  // The files of beginnings of `tokens`, longest first; the names are not proof of what is in them.
  std::vector<Entry> find(std::uint64_t identity, KvType kv, std::span<const std::int32_t> tokens) const {
    std::vector<Entry> found;
    const std::string start = prefix(identity, kv);
    for_each_file([&](const std::filesystem::directory_entry& file, const std::string& name) {
      if (!name.starts_with(start)) return;
      std::int64_t count = 0;
      const char* const end = name.data() + name.size();
      if (std::from_chars(name.data() + start.size(), end, count).ec != std::errc() || count < 1) return;
      if (count > static_cast<std::int64_t>(tokens.size())) return;
      if (name == file_name(identity, kv, tokens.first(static_cast<std::size_t>(count))))
        found.push_back({count, file.path()});
    });
    std::sort(found.begin(), found.end(), [](const Entry& a, const Entry& b) { return a.position > b.position; });
    return found;
  }

  // Where the state of `tokens` is, or would be.
  std::filesystem::path path(std::uint64_t identity, KvType kv, std::span<const std::int32_t> tokens) const {
    return folder_ / file_name(identity, kv, tokens);
  }

  // Marks a file as used lately.
  static void touch(const std::filesystem::path& path) {
    std::error_code ignored;
    std::filesystem::last_write_time(path, std::filesystem::file_time_type::clock::now(), ignored);
  }

  // Writes a file, unless it is there or larger than the limit, and removes those that were not used for longest until
  // all fit.  Whether it was written.  Throws Error.
  bool store(std::uint64_t identity, const SavedStates& states) const {
    const std::filesystem::path to = path(identity, states.kv, states.tokens);
    std::error_code ignored;
    if (std::filesystem::exists(to, ignored)) {
      touch(to);
      return false;
    }
    const SavedStates saved = downloaded(states);
    if (state_file_size(saved) > limit_) return false;
    write_state_file(to, identity, saved);
    fit();
    return true;
  }
  // Of a beginning of `tokens`, which something longer has taken the place of.
  void remove(std::uint64_t identity, KvType kv, std::span<const std::int32_t> tokens) const {
    std::error_code ignored;
    std::filesystem::remove(path(identity, kv, tokens), ignored);
  }

 private:
  static constexpr std::string_view suffix = ".q3nstate";

  static std::string hex(std::uint64_t value) {
    std::string text(16, '0');
    for (std::size_t i = 16; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
    return text;
  }
  static std::string prefix(std::uint64_t identity, KvType kv) {
    return concat(hex(identity), "-", static_cast<int>(kv), "-");
  }
  static std::string file_name(std::uint64_t identity, KvType kv, std::span<const std::int32_t> tokens) {
    return concat(prefix(identity, kv), tokens.size(), "-", hex(xxhash64(std::as_bytes(tokens))), suffix);
  }

  // Whatever else lies in the folder is left alone.
  template <class Visit>
  void for_each_file(const Visit& visit) const {
    std::error_code error;
    for (std::filesystem::directory_iterator file(folder_, error), end; !error && file != end; file.increment(error)) {
      const std::string name = display(file->path().filename());
      std::error_code ignored;
      if (name.find(suffix) != name.npos && file->is_regular_file(ignored)) visit(*file, name);
    }
  }

  void fit() const {
    struct File {
      std::filesystem::file_time_type used;
      std::uint64_t bytes;
      std::filesystem::path path;
    };
    std::vector<File> files;
    std::uint64_t sum = 0;
    const auto now = std::filesystem::file_time_type::clock::now();
    for_each_file([&](const std::filesystem::directory_entry& file, const std::string& name) {
      std::error_code gone, ignored;
      const File f{file.last_write_time(gone), file.file_size(ignored), file.path()};
      if (gone || ignored) return;    // another process was faster
      if (!name.ends_with(suffix)) {  // being written, unless its process was killed
        if (now - f.used > std::chrono::hours(1)) std::filesystem::remove(f.path, ignored);
        return;
      }
      files.push_back(f);
      sum += f.bytes;
    });
    std::sort(files.begin(), files.end(), [](const File& a, const File& b) { return a.used < b.used; });
    for (const File& file : files) {
      if (sum <= limit_) break;
      std::error_code ignored;
      std::filesystem::remove(file.path, ignored);
      sum -= file.bytes;
    }
  }

  std::filesystem::path folder_;
  std::uint64_t limit_;
};

}  // namespace qwen3next
