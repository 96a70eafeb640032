#pragma once
// Memory for activations, caches and states.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace qwen3next {

// Keeps the pages of [data, data + size) in memory until unlock_pages() or until they are unmapped; reads them where
// they lie in a file.  Whether the system allowed it: an ordinary user may lock little.
inline bool lock_pages([[maybe_unused]] const std::byte* data, [[maybe_unused]] std::size_t size) noexcept {
#if defined(__linux__)
  return size > 0 && ::mlock(data, size) == 0;
#else
  return false;
#endif
}
inline void unlock_pages([[maybe_unused]] const std::byte* data, [[maybe_unused]] std::size_t size) noexcept {
#if defined(__linux__)
  ::munlock(data, size);
#endif
}

// Bytes on a cache line boundary, zeroed; a value: copying copies the bytes.  Large pieces begin at a large page, and
// the system is asked for such pages: attention over a long context and the states of DeltaNet layers are otherwise
// slowed by address translation.
class AlignedBytes {
 public:
  static constexpr std::size_t large_page = std::size_t{2} << 20;
  // For what is written before it is read: of a large piece, only what is used takes memory.
  struct Uncleared {};

  AlignedBytes() = default;
  explicit AlignedBytes(std::size_t size) : AlignedBytes(size, Uncleared()) {
    if (size > 0) std::memset(data_.get(), 0, size);
  }
  AlignedBytes(std::size_t size, Uncleared)
      : data_(static_cast<std::byte*>(::operator new(size, alignment(size))), Free{size, false}), size_(size) {
#if defined(MADV_HUGEPAGE)
    if (size >= large_page) ::madvise(data_.get(), size / large_page * large_page, MADV_HUGEPAGE);  // or 4 KiB pages
#endif
  }
  AlignedBytes(const AlignedBytes& other) : AlignedBytes(other.size_, Uncleared()) {
    if (size_ > 0) std::memcpy(data_.get(), other.data_.get(), size_);
  }
  AlignedBytes(AlignedBytes&& other) noexcept : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  AlignedBytes& operator=(AlignedBytes&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }
  AlignedBytes& operator=(const AlignedBytes& other) {
    if (size_ != other.size_) return *this = AlignedBytes(other);
    if (size_ > 0 && this != &other) std::memcpy(data_.get(), other.data_.get(), size_);
    return *this;
  }
  std::byte* data() noexcept { return data_.get(); }
  const std::byte* data() const noexcept { return data_.get(); }
  float* floats() noexcept { return reinterpret_cast<float*>(data_.get()); }
  const float* floats() const noexcept { return reinterpret_cast<const float*>(data_.get()); }
  std::size_t size() const noexcept { return size_; }

  // Gives the memory of [offset, offset + size) back to the system, as far as it makes whole pages, until it is written
  // again; what was in it is lost.  Not for locked bytes.
  void discard([[maybe_unused]] std::size_t offset, [[maybe_unused]] std::size_t size) noexcept {
#if defined(__linux__)
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto start = reinterpret_cast<std::uintptr_t>(data_.get());
    const std::uintptr_t begin = (start + offset + page - 1) / page * page, end = (start + offset + size) / page * page;
    if (begin < end) ::madvise(data_.get() + (begin - start), end - begin, MADV_DONTNEED);
#endif
  }

  // Keeps all of it in memory; whether the system allowed it.
  bool lock() noexcept {
    if (!lock_pages(data_.get(), size_)) return false;
    data_.get_deleter().locked = true;
    return true;
  }

 private:
  static std::align_val_t alignment(std::size_t size) noexcept {
    return std::align_val_t{size < large_page ? 64 : large_page};
  }
  struct Free {
    std::size_t size;
    bool locked;
    void operator()(std::byte* p) const noexcept {
      if (locked) unlock_pages(p, size);  // whoever gets these pages next did not ask for it
      ::operator delete(p, alignment(size));
    }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace qwen3next
