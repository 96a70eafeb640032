#pragma once

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <system_error>

namespace qwen3next::test {

// A folder that goes away with the test.
class TempFolder {
 public:
  explicit TempFolder(const std::filesystem::path& where = std::filesystem::temp_directory_path()) {
    std::random_device random;
    path_ = where / ("qwen3next-test-" + std::to_string(random()) + std::to_string(random()));
    std::filesystem::create_directories(path_);
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }
  // A folder in it that nobody has used: on Windows a file that is mapped can't be written again.
  std::filesystem::path fresh() const {
    const std::filesystem::path folder = path_ / std::to_string(++used_);
    std::filesystem::create_directory(folder);
    return folder;
  }

 private:
  std::filesystem::path path_;
  mutable int used_ = 0;
};

// A file, with the folders above it.
inline void write_file(const std::filesystem::path& file, const std::string& text) {
  std::filesystem::create_directories(file.parent_path());
  std::ofstream(file) << text;
}

}  // namespace qwen3next::test
