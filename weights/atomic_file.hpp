#pragma once
// Writing a file so that it is either complete under its name or not there at all.
//
// The only POSIX call is fsync, on Windows its equal; elsewhere the data is left to the system's own time.

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "core/message.hpp"

#if defined(__unix__) || defined(__APPLE__)
#define QWEN3NEXT_FSYNC 1
#include <fcntl.h>
#include <unistd.h>
#else
#define QWEN3NEXT_FSYNC 0
#endif
#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
#endif

namespace qwen3next {

// Writes to a temporary name in the same folder; commit() makes it durable and gives it its name, replacing what was
// there.  Without commit the destructor removes it.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  AtomicFile(AtomicFile&& other) noexcept
      : path_(std::move(other.path_)),
        temporary_(std::move(other.temporary_)),
        file_(std::exchange(other.file_, nullptr)),
        written_(other.written_) {}
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile() { abandon(); }

  // Throws at once if the disk has no room for `bytes`, rather than after an hour.
  void expect_room(std::uint64_t bytes) const;
  void write(std::span<const std::byte> bytes);
  void commit();

  const std::filesystem::path& path() const noexcept { return path_; }
  std::uint64_t written() const noexcept { return written_; }

 private:
  [[noreturn]] void fail(std::string_view what, int code);
  void abandon() noexcept;

  std::filesystem::path path_, temporary_;
  std::FILE* file_ = nullptr;
  std::uint64_t written_ = 0;
};

namespace detail {

inline std::FILE* create_exclusively(const std::filesystem::path& path) {
#if defined(_WIN32)  // its older C library has no "x"
  const int fd = ::_wopen(path.c_str(), _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY, _S_IREAD | _S_IWRITE);
  return fd < 0 ? nullptr : ::_fdopen(fd, "wb");
#else
  return std::fopen(path.c_str(), "wbx");
#endif
}

}  // namespace detail

inline AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  std::error_code ignored;
  if (path_.filename().empty() || std::filesystem::is_directory(path_, ignored)) {
    throw_error(display(path_), ": is a folder, expected the name of a file to write");
  }
  // Renaming would put a file in the place of a device (/dev/null) or a pipe.
  if (std::filesystem::exists(path_, ignored) && !std::filesystem::is_regular_file(path_, ignored)) {
    throw_error(display(path_), ": is not a regular file; give the name of a file to write");
  }
  std::random_device random;
  for (int attempt = 0; !file_; ++attempt) {
    temporary_ = path_;
    temporary_ += concat(".", random(), ".part");
    errno = 0;
    file_ = detail::create_exclusively(temporary_);
    if (!file_ && (errno != EEXIST || attempt == 8)) fail("create it", errno);
  }
}

inline void AtomicFile::expect_room(std::uint64_t bytes) const {
  std::error_code error;
  const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
  const std::filesystem::space_info space = std::filesystem::space(folder, error);
  if (error || space.available == 0 || space.available >= bytes) return;  // 0: a file system that does not say
  throw_error(display(path_), ": needs ", bytes, " bytes, but the disk has ", std::uintmax_t{space.available},
              " left; free some or write elsewhere");
}

inline void AtomicFile::write(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  errno = 0;
  if (std::fwrite(bytes.data(), 1, bytes.size(), file_) != bytes.size()) fail("write it", errno);
  written_ += bytes.size();
}

inline void AtomicFile::commit() {
  errno = 0;
  if (std::fflush(file_) != 0) fail("write it", errno);
#if QWEN3NEXT_FSYNC
  if (::fsync(::fileno(file_)) != 0 && errno != EINVAL && errno != ENOTSUP) fail("write it", errno);
#elif defined(_WIN32)
  if (::_commit(::_fileno(file_)) != 0 && errno != EINVAL) fail("write it", errno);
#endif
  if (std::fclose(std::exchange(file_, nullptr)) != 0) {
    const int code = errno;
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
    fail("write it", code);
  }
  std::error_code error;
  std::filesystem::rename(temporary_, path_, error);
  if (error) {
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
    throw_error(display(path_), ": cannot give the finished file its name: ", error.message());
  }
#if QWEN3NEXT_FSYNC  // the name, too; best effort
  const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path(".");
  if (const int fd = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC); fd >= 0) {
    (void)::fsync(fd);
    ::close(fd);
  }
#endif
}

inline void AtomicFile::fail(std::string_view what, int code) {
  std::string_view advice;
  if (code == ENOSPC || code == EFBIG) advice = "; free some space or write elsewhere";
#ifdef EDQUOT
  if (code == EDQUOT) advice = "; your quota is used up: free some space or write elsewhere";
#endif
  if (code == EACCES || code == EPERM || code == EROFS) advice = "; choose a folder that you may write to";
  if (code == ENOENT) advice = "; create the folder first";
  throw_error(display(path_), ": cannot ", what, ": ", std::generic_category().message(code), advice);
}

inline void AtomicFile::abandon() noexcept {
  if (!file_) return;
  (void)std::fclose(std::exchange(file_, nullptr));
  std::error_code ignored;
  std::filesystem::remove(temporary_, ignored);
}

}  // namespace qwen3next
