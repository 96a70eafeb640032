#pragma once
// Writing a file so that it is either complete under its name or not there at all.
//
// The POSIX calls are those that make data durable (Windows has an equal) and that lock a file to go on with; elsewhere
// the data is left to the system's own time, and every file is begun anew.

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
#include <sys/file.h>
#include <sys/stat.h>
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

  // For work of hours: the temporary name is `path` + `suffix`, where a process that was killed, or a machine that lost
  // power, leaves what was written.  The next one finds it: see kept().  Throws if another process writes it right now.
  // `sync_bytes`, at least 1, are written between two syncs to the disk.
  static AtomicFile resumable(std::filesystem::path path, std::string_view suffix, std::uint64_t sync_bytes);

  AtomicFile(AtomicFile&& other) noexcept
      : path_(std::move(other.path_)),
        temporary_(std::move(other.temporary_)),
        file_(std::exchange(other.file_, nullptr)),
        written_(other.written_),
        kept_(other.kept_),
        sync_bytes_(other.sync_bytes_),
        unsynced_(other.unsynced_) {}
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile() { abandon(); }

  // Throws at once if the disk has no room for `bytes`, rather than after an hour.
  void expect_room(std::uint64_t bytes) const;
  void write(std::span<const std::byte> bytes);
  void commit();

  // How much of the file an earlier process left, sure to be on the disk: no more than the last `sync_bytes` are not.
  // If any, read it and choose by go_on() where writing begins; what lies behind is dropped.
  std::uint64_t kept() const noexcept { return kept_; }
  void read(std::uint64_t offset, std::span<std::byte> bytes);
  void go_on(std::uint64_t offset);

  const std::filesystem::path& path() const noexcept { return path_; }
  std::uint64_t written() const noexcept { return written_; }

 private:
  AtomicFile() = default;
  void expect_file_name() const;
  void sync();
  [[noreturn]] void fail(std::string_view what, int code);
  void abandon() noexcept;

  std::filesystem::path path_, temporary_;
  std::FILE* file_ = nullptr;
  std::uint64_t written_ = 0, kept_ = 0;
  std::uint64_t sync_bytes_ = 0, unsynced_ = 0;  // 0: synced at the end only
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

inline void AtomicFile::expect_file_name() const {
  std::error_code ignored;
  if (path_.filename().empty() || std::filesystem::is_directory(path_, ignored)) {
    throw_error(display(path_), ": is a folder, expected the name of a file to write");
  }
  // Renaming would put a file in the place of a device (/dev/null) or a pipe.
  if (std::filesystem::exists(path_, ignored) && !std::filesystem::is_regular_file(path_, ignored)) {
    throw_error(display(path_), ": is not a regular file; give the name of a file to write");
  }
}

inline AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  expect_file_name();
  std::random_device random;
  for (int attempt = 0; !file_; ++attempt) {
    temporary_ = path_;
    temporary_ += concat(".", random(), ".part");
    errno = 0;
    file_ = detail::create_exclusively(temporary_);
    if (!file_ && (errno != EEXIST || attempt == 8)) fail("create it", errno);
  }
}

inline AtomicFile AtomicFile::resumable(std::filesystem::path path, std::string_view suffix, std::uint64_t sync_bytes) {
#if QWEN3NEXT_FSYNC
  AtomicFile file;
  file.path_ = std::move(path);
  file.sync_bytes_ = sync_bytes;
  file.expect_file_name();
  std::filesystem::path name = file.path_;
  name += suffix;
  for (;;) {
    const int fd = ::open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) file.fail("create it", errno);
    struct Closer {
      int fd;
      ~Closer() {
        if (fd >= 0) ::close(fd);
      }
    } closer{fd};
    if (::flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      throw_error(display(name), ": another process is writing it; wait for its end, or choose another name");
    }
    // Whoever had the lock before may have given the file its final name: then that is not ours to write.
    struct ::stat opened {
    }, named{};
    if (::fstat(fd, &opened) != 0) file.fail("read its size", errno);
    if (::stat(name.c_str(), &named) != 0 || named.st_ino != opened.st_ino || named.st_dev != opened.st_dev) continue;
    file.file_ = ::fdopen(fd, "r+b");
    if (!file.file_) file.fail("create it", errno);
    closer.fd = -1;
    file.temporary_ = std::move(name);
    const auto size = static_cast<std::uint64_t>(opened.st_size);
    file.kept_ = size > sync_bytes ? size - sync_bytes : 0;
    if (file.kept_ == 0) file.go_on(0);
    return file;
  }
#else
  (void)suffix, (void)sync_bytes;
  return AtomicFile(std::move(path));
#endif
}

inline void AtomicFile::read(std::uint64_t offset, std::span<std::byte> bytes) {
#if QWEN3NEXT_FSYNC
  for (std::size_t done = 0; done < bytes.size();) {
    const auto n =
        ::pread(::fileno(file_), bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("read what an earlier run left of it", n < 0 ? errno : EIO);
    done += static_cast<std::size_t>(n);
  }
#else
  (void)offset, (void)bytes;
#endif
}

inline void AtomicFile::go_on(std::uint64_t offset) {
#if QWEN3NEXT_FSYNC
  if (::ftruncate(::fileno(file_), static_cast<off_t>(offset)) != 0)
    fail("shorten what an earlier run left of it", errno);
  if (::fseeko(file_, static_cast<off_t>(offset), SEEK_SET) != 0) fail("write it", errno);
#endif
  written_ = offset;
  kept_ = 0;
}

inline void AtomicFile::sync() {
  errno = 0;
  if (std::fflush(file_) != 0) fail("write it", errno);
#if QWEN3NEXT_FSYNC
  if (::fsync(::fileno(file_)) != 0 && errno != EINVAL && errno != ENOTSUP) fail("write it", errno);
#elif defined(_WIN32)
  if (::_commit(::_fileno(file_)) != 0 && errno != EINVAL) fail("write it", errno);
#endif
  unsynced_ = 0;
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
  for (std::span<const std::byte> left = bytes; !left.empty();) {
    const std::uint64_t room = sync_bytes_ > 0 ? sync_bytes_ - unsynced_ : left.size();
    const auto piece = left.first(room < left.size() ? static_cast<std::size_t>(room) : left.size());
    errno = 0;
    if (std::fwrite(piece.data(), 1, piece.size(), file_) != piece.size()) fail("write it", errno);
    written_ += piece.size();
    unsynced_ += piece.size();
    if (unsynced_ == sync_bytes_) sync();
    left = left.subspan(piece.size());
  }
}

inline void AtomicFile::commit() {
  sync();
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
