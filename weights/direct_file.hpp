#pragma once
// A file read around the system's cache: what is read for a cache of our own should not fill that one as well.

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "core/message.hpp"
#include "weights/mapped_file.hpp"

#if QWEN3NEXT_MMAP && defined(__linux__)
#include <linux/magic.h>
#include <sys/vfs.h>
#endif

#if QWEN3NEXT_FILE_MAPPING
// As <windows.h> declares them.
struct _OVERLAPPED;
extern "C" {
__declspec(dllimport) void* __stdcall CreateEventW(_SECURITY_ATTRIBUTES* security, int manual, int set,
                                                   const wchar_t* name);
__declspec(dllimport) int __stdcall ReadFile(void* file, void* into, unsigned long size, unsigned long* got,
                                             _OVERLAPPED* overlapped);
__declspec(dllimport) int __stdcall GetOverlappedResult(void* file, _OVERLAPPED* overlapped, unsigned long* got,
                                                        int wait);
}
#endif

namespace qwen3next {

// Open for reading.  Where the file system can't do without its cache (tmpfs, some FUSE), reads go through it.
class DirectFile {
 public:
  // Throws Error.
  static DirectFile open(const std::filesystem::path& path);
  // The file that `mapped` shows.  Throws Error also if another one has its name by now, or if it was changed.
  static DirectFile open(const MappedFile& mapped);

  DirectFile(DirectFile&& other) noexcept { swap(other); }
  DirectFile& operator=(DirectFile&& other) noexcept {
    DirectFile moved(std::move(other));
    swap(moved);
    return *this;
  }
  ~DirectFile();

  // Offsets, sizes and addresses of reads are multiples of it, a power of two: at least 4096, or 1 if not direct().
  std::size_t alignment() const noexcept { return alignment_; }
  std::uint64_t size() const noexcept { return size_; }  // when it was opened
  bool direct() const noexcept { return direct_; }
  const std::string& name() const noexcept { return name_; }  // the path, for messages

  // One call of the system, from any thread: how many bytes came, fewer than `size` perhaps, 0 at the end of the file;
  // or minus an errno value.
  std::int64_t read_at(std::byte* into, std::size_t size, std::uint64_t offset) const noexcept;

#if QWEN3NEXT_MMAP
  int descriptor() const noexcept { return descriptor_; }
#endif

 private:
  DirectFile() = default;
  static DirectFile open(const std::filesystem::path& path, FileIdentity& identity);
  void swap(DirectFile& other) noexcept {
    std::swap(name_, other.name_), std::swap(size_, other.size_), std::swap(alignment_, other.alignment_);
    std::swap(direct_, other.direct_), std::swap(descriptor_, other.descriptor_);
  }

  std::string name_;
  std::uint64_t size_ = 0;
  std::size_t alignment_ = 1;
  bool direct_ = false;
#if QWEN3NEXT_MMAP
  int descriptor_ = -1;
#elif QWEN3NEXT_FILE_MAPPING
  std::unique_ptr<detail::WindowsHandle> descriptor_;
#else
  struct Stream {
    std::mutex mutex;
    std::ifstream file;
  };
  std::unique_ptr<Stream> descriptor_;
#endif
};

inline DirectFile DirectFile::open(const std::filesystem::path& path) {
  FileIdentity ignored;
  return open(path, ignored);
}

inline DirectFile DirectFile::open(const MappedFile& mapped) {
  FileIdentity identity;
  DirectFile file = open(mapped.path(), identity);
  if (!identity.same_file(mapped.identity()))
    throw_error(file.name_, ": was replaced by another file while it was in use: start again");
  if (identity != mapped.identity() || file.size_ != mapped.size()) {
    throw_error(file.name_, ": was changed while it was in use (", mapped.size(), " bytes when it was opened, ",
                file.size_, " now); wait until it is complete, then start again");
  }
  return file;
}

#if QWEN3NEXT_MMAP

namespace detail {

// What a read around the cache must be a multiple of; 0 if this file has no such reads.
inline std::size_t direct_alignment([[maybe_unused]] int descriptor) {
  std::size_t alignment = 4096;
#if defined(__linux__)
  struct ::statfs system {};
  // Files in memory: newer kernels take O_DIRECT there and copy from the cache all the same.
  if (::fstatfs(descriptor, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC)) return 0;
#if defined(STATX_DIOALIGN)
  struct ::statx status {};
  if (::statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) return 0;
    alignment = std::max<std::size_t>({alignment, status.stx_dio_offset_align, status.stx_dio_mem_align});
  }
#endif
  // Some file systems take the flag and refuse the reads.
  const std::align_val_t aligned{alignment};
  void* const page = ::operator new(alignment, aligned);
  const bool refused = ::pread(descriptor, page, alignment, 0) < 0 && errno == EINVAL;
  ::operator delete(page, aligned);
  if (refused) return 0;
#endif
  return alignment;
}

}  // namespace detail

inline DirectFile DirectFile::open(const std::filesystem::path& path, FileIdentity& identity) {
  detail::expect_regular_file(path);
  DirectFile file;
  file.name_ = display(path);
  const auto fail = [&](std::string_view what) {
    throw_error(file.name_, ": cannot ", what, ": ", std::generic_category().message(errno));
  };
  constexpr int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;  // should it be a pipe by now
#if defined(O_DIRECT)
  file.descriptor_ = ::open(path.c_str(), flags | O_DIRECT);
  file.direct_ = file.descriptor_ >= 0;
#endif
  if (file.descriptor_ < 0) file.descriptor_ = ::open(path.c_str(), flags);
  if (file.descriptor_ < 0) fail("open it");
  struct ::stat status {};
  if (::fstat(file.descriptor_, &status) != 0) fail("read its size");
  if (!S_ISREG(status.st_mode)) throw_error(file.name_, ": is not a regular file");
  identity = detail::file_identity(status);
  file.size_ = static_cast<std::uint64_t>(status.st_size);
#if !defined(O_DIRECT) && defined(F_NOCACHE)
  file.direct_ = ::fcntl(file.descriptor_, F_NOCACHE, 1) == 0;
#endif
  if (const std::size_t alignment = file.direct_ ? detail::direct_alignment(file.descriptor_) : 0)
    file.alignment_ = alignment;
  else
    file.direct_ = false;
  int now = ::fcntl(file.descriptor_, F_GETFL) & ~O_NONBLOCK;  // io_uring would not wait for the disk, either
#if defined(O_DIRECT)
  if (!file.direct_) now &= ~O_DIRECT;
#endif
  if (::fcntl(file.descriptor_, F_SETFL, now) != 0) fail("set how to read it");
  return file;
}

inline DirectFile::~DirectFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

inline std::int64_t DirectFile::read_at(std::byte* into, std::size_t size, std::uint64_t offset) const noexcept {
  const ::ssize_t got = ::pread(descriptor_, into, size, static_cast<::off_t>(offset));
  return got >= 0 ? got : -errno;
}

#elif QWEN3NEXT_FILE_MAPPING

inline DirectFile DirectFile::open(const std::filesystem::path& path, FileIdentity& identity) {
  detail::expect_regular_file(path);
  DirectFile file;
  file.name_ = display(path);
  const auto fail = [&](std::string_view what, unsigned long code) {
    throw_error(file.name_, ": cannot ", what, ": ", std::system_category().message(static_cast<int>(code)));
  };
  // Overlapped: else one read waits for another.
  constexpr unsigned long generic_read = 0x80000000, share_read = 1, open_existing = 3, overlapped = 0x40000000,
                          no_buffering = 0x20000000;
  void* const handle =
      ::CreateFileW(path.c_str(), generic_read, share_read, nullptr, open_existing, overlapped | no_buffering, nullptr);
  const unsigned long code = ::GetLastError();
  file.descriptor_ = std::make_unique<detail::WindowsHandle>(handle);
  if (!file.descriptor_->good()) fail("open it", code);
  identity = detail::file_identity(handle);
  std::error_code error;
  file.size_ = std::filesystem::file_size(path, error);
  if (error) throw_error(file.name_, ": cannot read its size: ", error.message());
  file.alignment_ = 4096;
  file.direct_ = true;
  return file;
}

inline DirectFile::~DirectFile() = default;

inline std::int64_t DirectFile::read_at(std::byte* into, std::size_t size, std::uint64_t offset) const noexcept {
  constexpr unsigned long end_of_file = 38, pending = 997;
  const auto failure = [](unsigned long code) -> std::int64_t {
    if (code == end_of_file) return 0;
    const std::error_condition same = std::system_category().default_error_condition(static_cast<int>(code));
    return same.category() == std::generic_category() && same.value() > 0 ? -same.value() : -EIO;
  };
  struct {
    std::uintptr_t internal[2];
    std::uint32_t offset, offset_high;
    void* event;
  } where{{}, static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32), nullptr};  // OVERLAPPED
  const detail::WindowsHandle event(::CreateEventW(nullptr, 1, 0, nullptr));
  if (!event.good()) return failure(::GetLastError());
  where.event = event.value;
  auto* const overlapped = reinterpret_cast<_OVERLAPPED*>(&where);
  unsigned long got = 0;
  if (::ReadFile(descriptor_->value, into, static_cast<unsigned long>(size), nullptr, overlapped) == 0) {
    if (const unsigned long code = ::GetLastError(); code != pending) return failure(code);
  }
  if (::GetOverlappedResult(descriptor_->value, overlapped, &got, 1) == 0) return failure(::GetLastError());
  return static_cast<std::int64_t>(got);
}

#else

inline DirectFile DirectFile::open(const std::filesystem::path& path, FileIdentity&) {
  detail::expect_regular_file(path);
  DirectFile file;
  file.name_ = display(path);
  std::error_code error;
  file.size_ = std::filesystem::file_size(path, error);
  if (error) throw_error(file.name_, ": cannot read its size: ", error.message());
  file.descriptor_ = std::make_unique<Stream>();
  file.descriptor_->file.open(path, std::ios::binary);
  if (!file.descriptor_->file) throw_error(file.name_, ": cannot open it");
  return file;
}

inline DirectFile::~DirectFile() = default;

inline std::int64_t DirectFile::read_at(std::byte* into, std::size_t size, std::uint64_t offset) const noexcept {
  try {
    const std::lock_guard lock(descriptor_->mutex);
    std::ifstream& stream = descriptor_->file;
    stream.clear();
    stream.seekg(static_cast<std::streamoff>(offset));
    stream.read(reinterpret_cast<char*>(into), static_cast<std::streamsize>(size));
    return stream.bad() ? -EIO : stream.gcount();
  } catch (const std::exception&) {
    return -EIO;
  }
}

#endif

}  // namespace qwen3next
