#pragma once
// A file in memory, read-only.  The operating system's mapping where there is one, else a plain copy.
//
// All system calls for reading weights are here, POSIX's and Windows'.  QWEN3NEXT_NO_MMAP chooses the copy.

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "core/message.hpp"

#if (defined(__unix__) || defined(__APPLE__)) && !defined(QWEN3NEXT_NO_MMAP)
#define QWEN3NEXT_MMAP 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#define QWEN3NEXT_MMAP 0
#endif

#if defined(_WIN32) && !defined(QWEN3NEXT_NO_MMAP)
#define QWEN3NEXT_FILE_MAPPING 1
// Seven functions, declared as <windows.h> does, without its thousands of macros.
struct _SECURITY_ATTRIBUTES;
struct _BY_HANDLE_FILE_INFORMATION;
extern "C" {
__declspec(dllimport) void* __stdcall CreateFileW(const wchar_t* name, unsigned long access, unsigned long share,
                                                  _SECURITY_ATTRIBUTES* security, unsigned long creation,
                                                  unsigned long flags, void* template_file);
__declspec(dllimport) void* __stdcall CreateFileMappingW(void* file, _SECURITY_ATTRIBUTES* security,
                                                         unsigned long protection, unsigned long size_high,
                                                         unsigned long size_low, const wchar_t* name);
__declspec(dllimport) void* __stdcall MapViewOfFile(void* mapping, unsigned long access, unsigned long offset_high,
                                                    unsigned long offset_low, std::size_t size);
__declspec(dllimport) int __stdcall UnmapViewOfFile(const void* view);
__declspec(dllimport) int __stdcall GetFileInformationByHandle(void* file, _BY_HANDLE_FILE_INFORMATION* information);
__declspec(dllimport) int __stdcall CloseHandle(void* handle);
__declspec(dllimport) unsigned long __stdcall GetLastError();
}
#else
#define QWEN3NEXT_FILE_MAPPING 0
#endif

namespace qwen3next {

static_assert(sizeof(std::size_t) == 8, "qwen3next is for 64-bit machines: its files are larger than 4 GiB");

// Which file it is, and its last change.
struct FileIdentity {
  std::uint64_t device = 0, inode = 0;
  std::int64_t seconds = 0, nanoseconds = 0;  // of the last change to its bytes; 0 on Windows
  bool same_file(const FileIdentity& other) const noexcept { return device == other.device && inode == other.inode; }
  bool operator==(const FileIdentity&) const = default;
};

// The bytes stay where they are when the object is moved.  Sizes are checked at open.  If another program truncates the
// file later, reading the lost pages is a bus error, as with every mapping; who works for hours asks check_unchanged()
// now and then.  A file that is replaced (a new one renamed to its name) stays as it was opened.
class MappedFile {
 public:
  enum class Advice { normal, sequential, random, will_need, dont_need };

  static MappedFile open(const std::filesystem::path& path);

  MappedFile(MappedFile&& other) noexcept { swap(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    MappedFile moved(std::move(other));
    swap(moved);
    return *this;
  }
  ~MappedFile();

  const std::filesystem::path& path() const noexcept { return path_; }
  const std::string& name() const noexcept { return name_; }  // the path, for messages
  std::size_t size() const noexcept { return size_; }
  const std::byte* data() const noexcept { return data_; }
  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  std::string_view text() const noexcept { return {reinterpret_cast<const char*>(data_), size_}; }
  bool contains(const std::byte* p) const noexcept {
    const auto address = reinterpret_cast<std::uintptr_t>(p), begin = reinterpret_cast<std::uintptr_t>(data_);
    return address >= begin && address - begin < size_;
  }

  const FileIdentity& identity() const noexcept { return identity_; }  // all 0 if this is a copy

  // Throws Error if the file at path() is still this one and was written to or truncated since it was opened.
  void check_unchanged() const;

  // A hint about the pages that hold [offset, offset + size); never fails.
  void advise(Advice advice, std::size_t offset, std::size_t size) const noexcept;

 private:
  MappedFile() = default;
  void swap(MappedFile& other) noexcept {
    std::swap(path_, other.path_), std::swap(name_, other.name_), std::swap(data_, other.data_);
    std::swap(size_, other.size_), std::swap(copy_, other.copy_), std::swap(identity_, other.identity_);
  }

  std::filesystem::path path_;
  std::string name_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::unique_ptr<std::byte[]> copy_;  // only without mmap
  FileIdentity identity_;
};

namespace detail {

// Refuses what cannot be read to the end (folders, pipes, devices) before it is opened: opening a pipe would wait.
inline void expect_regular_file(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) throw_error(display(path), ": no such file");
  if (error) throw_error(display(path), ": ", error.message());
  if (status.type() == std::filesystem::file_type::directory) {
    throw_error(display(path), ": is a folder, expected a file");
  }
  if (status.type() != std::filesystem::file_type::regular) throw_error(display(path), ": is not a regular file");
}

}  // namespace detail

#if QWEN3NEXT_MMAP

namespace detail {
inline FileIdentity file_identity(const struct ::stat& status) noexcept {
#if defined(__APPLE__)
  const auto& changed = status.st_mtimespec;
#else
  const auto& changed = status.st_mtim;
#endif
  return {static_cast<std::uint64_t>(status.st_dev), static_cast<std::uint64_t>(status.st_ino), changed.tv_sec,
          changed.tv_nsec};
}
}  // namespace detail

inline MappedFile MappedFile::open(const std::filesystem::path& path) {
  detail::expect_regular_file(path);
  MappedFile file;
  file.path_ = path;
  file.name_ = display(path);
  const auto fail = [&](std::string_view what) {
    throw_error(file.name_, ": cannot ", what, ": ", std::generic_category().message(errno));
  };
  struct Descriptor {
    int fd;
    ~Descriptor() {
      if (fd >= 0) ::close(fd);
    }
  } const descriptor{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};  // should it be a pipe by now
  if (descriptor.fd < 0) fail("open it");
  struct ::stat status {};
  if (::fstat(descriptor.fd, &status) != 0) fail("read its size");
  if (!S_ISREG(status.st_mode)) throw_error(file.name_, ": is not a regular file");
  file.identity_ = detail::file_identity(status);
  if (static_cast<std::uintmax_t>(status.st_size) > std::numeric_limits<std::ptrdiff_t>::max()) {
    throw_error(file.name_, ": ", status.st_size, " bytes are more than this machine can address");
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) return file;  // nothing to map
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor.fd, 0);
  if (data == MAP_FAILED) fail("map it into memory");
  file.data_ = static_cast<const std::byte*>(data);
  file.size_ = size;
  return file;
}

inline MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

inline void MappedFile::check_unchanged() const {
  struct ::stat status {};
  if (::stat(path_.c_str(), &status) != 0) return;  // deleted: its bytes live on
  const auto now = detail::file_identity(status);
  if (!now.same_file(identity_)) return;
  if (now == identity_ && static_cast<std::uintmax_t>(status.st_size) == size_) return;
  throw_error(name_, ": was changed while it was in use (", size_, " bytes when it was opened, ",
              static_cast<std::int64_t>(status.st_size), " now); wait until it is complete, then start again");
}

inline void MappedFile::advise(Advice advice, std::size_t offset, std::size_t size) const noexcept {
  if (offset >= size_ || size == 0) return;
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t begin = offset / page * page, end = offset + std::min(size, size_ - offset);
  int code = MADV_NORMAL;
  switch (advice) {
    case Advice::normal:
      break;
    case Advice::sequential:
      code = MADV_SEQUENTIAL;
      break;
    case Advice::random:
      code = MADV_RANDOM;
      break;
    case Advice::will_need:
      code = MADV_WILLNEED;
      break;
    case Advice::dont_need:
      code = MADV_DONTNEED;
      break;
  }
  (void)::madvise(const_cast<std::byte*>(data_) + begin, end - begin, code);
}

#elif QWEN3NEXT_FILE_MAPPING

namespace detail {

struct WindowsHandle {
  void* value;
  explicit WindowsHandle(void* handle) noexcept : value(handle) {}
  WindowsHandle(const WindowsHandle&) = delete;
  WindowsHandle& operator=(const WindowsHandle&) = delete;
  ~WindowsHandle() {
    if (good()) ::CloseHandle(value);
  }
  bool good() const noexcept { return value != nullptr && value != reinterpret_cast<void*>(-1); }
};

inline FileIdentity file_identity(void* handle) noexcept {
  std::uint32_t words[13] = {};  // BY_HANDLE_FILE_INFORMATION: [7] the volume, [11] and [12] the file's number on it
  if (::GetFileInformationByHandle(handle, reinterpret_cast<_BY_HANDLE_FILE_INFORMATION*>(words)) == 0) return {};
  return {words[7], std::uint64_t{words[11]} << 32 | words[12], 0, 0};
}

}  // namespace detail

// While it is mapped, others may read the file, but neither write to it nor delete it.
inline MappedFile MappedFile::open(const std::filesystem::path& path) {
  detail::expect_regular_file(path);
  MappedFile file;
  file.path_ = path;
  file.name_ = display(path);
  const auto fail = [&](std::string_view what) {
    throw_error(file.name_, ": cannot ", what, ": ",
                std::system_category().message(static_cast<int>(::GetLastError())));
  };
  constexpr unsigned long generic_read = 0x80000000, share_read = 1, open_existing = 3, attribute_normal = 0x80;
  const detail::WindowsHandle handle{
      ::CreateFileW(path.c_str(), generic_read, share_read, nullptr, open_existing, attribute_normal, nullptr)};
  if (!handle.good()) fail("open it");
  file.identity_ = detail::file_identity(handle.value);
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) throw_error(file.name_, ": cannot read its size: ", error.message());
  if (size == 0) return file;  // nothing to map
  constexpr unsigned long page_readonly = 2, map_read = 4;
  const detail::WindowsHandle mapping{::CreateFileMappingW(handle.value, nullptr, page_readonly, 0, 0, nullptr)};
  if (!mapping.good()) fail("map it into memory");
  const void* data = ::MapViewOfFile(mapping.value, map_read, 0, 0, static_cast<std::size_t>(size));
  if (!data) fail("map it into memory");
  file.data_ = static_cast<const std::byte*>(data);
  file.size_ = static_cast<std::size_t>(size);
  return file;
}

inline MappedFile::~MappedFile() {
  if (data_) ::UnmapViewOfFile(data_);
}

inline void MappedFile::check_unchanged() const {}  // Windows lets nobody truncate a mapped file

inline void MappedFile::advise(Advice, std::size_t, std::size_t) const noexcept {}

#else

inline MappedFile MappedFile::open(const std::filesystem::path& path) {
  detail::expect_regular_file(path);
  MappedFile file;
  file.path_ = path;
  file.name_ = display(path);
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) throw_error(file.name_, ": cannot read its size: ", error.message());
  if (size > static_cast<std::uintmax_t>(std::numeric_limits<std::ptrdiff_t>::max())) {
    throw_error(file.name_, ": ", size, " bytes are more than this machine can address");
  }
  if (size == 0) return file;
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw_error(file.name_, ": cannot open it");
  try {
    file.copy_.reset(new std::byte[static_cast<std::size_t>(size)]);
  } catch (const std::bad_alloc&) {
    throw_error(file.name_, ": no memory for its ", size, " bytes");
  }
  stream.read(reinterpret_cast<char*>(file.copy_.get()), static_cast<std::streamsize>(size));
  if (stream.gcount() != static_cast<std::streamsize>(size)) throw_error(file.name_, ": cannot read all of it");
  file.data_ = file.copy_.get();
  file.size_ = static_cast<std::size_t>(size);
  return file;
}

inline MappedFile::~MappedFile() = default;

inline void MappedFile::check_unchanged() const {}  // this is a copy

inline void MappedFile::advise(Advice, std::size_t, std::size_t) const noexcept {}

#endif

}  // namespace qwen3next
