#pragma once
// Memory for activations, caches and states.

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qwen3next {

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
      : data_(static_cast<std::byte*>(::operator new(size, alignment(size))), Free{size}), size_(size) {
#if defined(MADV_HUGEPAGE)
    if (size >= large_page) ::madvise(data_.get(), size / large_page * large_page, MADV_HUGEPAGE);  // or 4 KiB pages
#endif
  }
  AlignedBytes(const AlignedBytes& other) : AlignedBytes(other.size_, Uncleared()) {
    if (size_ > 0) std::memcpy(data_.get(), other.data_.get(), size_);
  }
  AlignedBytes(AlignedBytes&&) noexcept = default;
  AlignedBytes& operator=(AlignedBytes other) noexcept {
    data_ = std::move(other.data_);
    size_ = other.size_;
    return *this;
  }
  std::byte* data() noexcept { return data_.get(); }
  const std::byte* data() const noexcept { return data_.get(); }
  float* floats() noexcept { return reinterpret_cast<float*>(data_.get()); }
  const float* floats() const noexcept { return reinterpret_cast<const float*>(data_.get()); }
  std::size_t size() const noexcept { return size_; }

 private:
  static std::align_val_t alignment(std::size_t size) noexcept {
    return std::align_val_t{size < large_page ? 64 : large_page};
  }
  struct Free {
    std::size_t size;
    void operator()(std::byte* p) const noexcept { ::operator delete(p, alignment(size)); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace qwen3next
