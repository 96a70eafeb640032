#pragma once
// What a sequence keeps in host memory between calls: shared by the reference and the cpu backend.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "backends/backend.hpp"
#include "blocks/dtype.hpp"

namespace qwen3next {

// Bytes on a cache line boundary, zeroed; a value: copying copies the bytes.
class AlignedBytes {
 public:
  static constexpr std::size_t alignment = 64;
  // For what is written before it is read: of a large piece, only what is used takes memory.
  struct Uncleared {};

  AlignedBytes() = default;
  explicit AlignedBytes(std::size_t size) : AlignedBytes(size, Uncleared()) {
    if (size > 0) std::memset(data_.get(), 0, size);
  }
  AlignedBytes(std::size_t size, Uncleared)
      : data_(static_cast<std::byte*>(::operator new (size, std::align_val_t{alignment}))), size_(size) {}
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
  struct Free {
    void operator()(std::byte* p) const noexcept { ::operator delete (p, std::align_val_t{alignment}); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

// A DeltaNet layer's memory of a sequence, independent of its length.
struct HostDeltaState {
  HostDeltaState() = default;
  explicit HostDeltaState(DeltaShape s)
      : S(sizeof(float) * static_cast<std::size_t>(s.value_heads) * static_cast<std::size_t>(s.value_dim) *
          static_cast<std::size_t>(s.key_dim)),
        conv(sizeof(float) * static_cast<std::size_t>(s.conv_kernel - 1) * static_cast<std::size_t>(s.conv_dim())) {}

  AlignedBytes S;     // f32 [Hv, Dv, Dk]: transposed, so that S^T k and S^T q read rows
  AlignedBytes conv;  // f32 [K-1, channels]: the last inputs of the convolution, oldest first
};

// Keys and values of one attention layer and sequence, in blocks of 256 positions that copies of the cache share until
// one of them writes.  In a block: for K then V, for each head, 256 rows of head_dim values of the cache's type.
class HostKvCache {
 public:
  static constexpr int block_positions = 256;

  HostKvCache() = default;
  HostKvCache(AttentionShape shape, KvType type) : heads_(shape.kv_heads), type_(type) {
    row_bytes_ = qwen3next::row_bytes(stored_type(type), shape.head_dim);
  }

  KvType type() const noexcept { return type_; }
  std::int64_t length() const noexcept { return length_; }
  std::size_t row_bytes() const noexcept { return row_bytes_; }

  // Rows of 256 positions each, `row_bytes` apart.
  const std::byte* keys(std::int64_t block, int head) const noexcept {
    return blocks_[static_cast<std::size_t>(block)]->data() + plane(head);
  }
  const std::byte* values(std::int64_t block, int head) const noexcept { return keys(block, head) + plane(heads_); }

  // Makes room for `count` more positions, owned by this cache alone, and counts them in.  Returns the first.
  std::int64_t extend(int count) {
    const std::int64_t first = length_;
    length_ += count;
    if (first % block_positions != 0 && blocks_.back().use_count() > 1) {
      blocks_.back() = std::make_shared<AlignedBytes>(*blocks_.back());
    }
    const std::size_t needed = static_cast<std::size_t>((length_ + block_positions - 1) / block_positions);
    while (blocks_.size() < needed) blocks_.push_back(std::make_shared<AlignedBytes>(2 * plane(heads_)));
    return first;
  }
  std::byte* key_row(std::int64_t position, int head) noexcept {
    return blocks_[static_cast<std::size_t>(position / block_positions)]->data() + plane(head) +
           static_cast<std::size_t>(position % block_positions) * row_bytes_;
  }
  std::byte* value_row(std::int64_t position, int head) noexcept { return key_row(position, head) + plane(heads_); }

 private:
  std::size_t plane(int heads) const noexcept {
    return static_cast<std::size_t>(heads) * static_cast<std::size_t>(block_positions) * row_bytes_;
  }

  std::vector<std::shared_ptr<AlignedBytes>> blocks_;
  std::int64_t length_ = 0;
  int heads_ = 0;
  std::size_t row_bytes_ = 0;
  KvType type_ = KvType::f16;
};

// The experts chosen for each row of a batch.
struct HostRouting {
  HostRouting() = default;
  HostRouting(int max_rows, int per_token)
      : k(per_token),
        ids(static_cast<std::size_t>(max_rows) * static_cast<std::size_t>(per_token)),
        weights(ids.size()) {}
  int rows = 0;
  int k = 0;
  std::vector<std::int32_t> ids;  // [rows, k], most probable first
  std::vector<float> weights;     // [rows, k]
};

}  // namespace qwen3next
