#pragma once
// Keys and values of one attention layer and sequence in the card's memory.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "backends/cuda/device.hpp"
#include "backends/host_state.hpp"
#include "blocks/dtype.hpp"

namespace qwen3next::cuda {

// As HostKvCache: blocks of 256 positions that copies of the cache share until one of them writes; in a block, for K
// then V, for each head, 256 rows of head_dim values of the cache's type.  Kernels find the blocks through a table of
// pointers beside them, which changes only when a block is added or replaced.
//
// All is ordered by the device's stream: a block may be given back, and taken by another cache, while kernels that read
// it wait for their turn.
class CudaKvCache {
 public:
  static constexpr int block_positions = 256;

  CudaKvCache() = default;
  CudaKvCache(std::shared_ptr<Device> device, AttentionShape shape, KvType type)
      : device_(std::move(device)), shape_(shape), heads_(shape.kv_heads), type_(type) {
    row_bytes_ = qwen3next::row_bytes(stored_type(type), shape.head_dim);
  }

  KvType type() const noexcept { return type_; }
  std::int64_t length() const noexcept { return length_; }
  std::size_t row_bytes() const noexcept { return row_bytes_; }
  std::size_t block_bytes() const noexcept { return 2 * plane(heads_); }

  // Of the card's memory: block after block, as of the last extend().
  std::byte* const* table() const noexcept { return table_.pointers.data<std::byte*>(); }

  // Makes room for `count` more positions, owned by this cache alone, and counts them in.  Returns the first.
  std::int64_t extend(int count) {
    const std::int64_t first = length_;
    const std::size_t needed = blocks_of(first + count);
    if (count > 0 && first % block_positions != 0 && blocks_.back().use_count() > 1) {
      std::shared_ptr<Block> own = new_block(needed - blocks_.size() + 1);
      device_->copy_on_device(own->data, blocks_.back()->data, block_bytes());
      table_.known = std::min(table_.known, blocks_.size() - 1);
      blocks_.back() = std::move(own);
    }
    while (blocks_.size() < needed) blocks_.push_back(new_block(needed - blocks_.size()));
    if (table_.known < needed) update_table();
    length_ = first + count;
    return first;
  }

  // Forgets all but the first `length` positions.
  void truncate(std::int64_t length) noexcept {
    length_ = length;
    blocks_.resize(std::min(blocks_.size(), blocks_of(length)));
    table_.known = std::min(table_.known, blocks_.size());
  }

  // For files: the rows of positions 0 to length() - 1, of head after head of the keys, then of the values.  Valid
  // until the sink returns.
  void bytes(const BytesSink& sink) const {
    std::vector<std::byte> rows;
    each_piece([&](std::byte* data, std::size_t size) {
      rows.resize(size);
      device_->copy_to_host(rows.data(), data, size);
      sink(rows);
    });
  }
  // The same in this machine's memory, and back; both keep 256 positions in a block, so pieces are alike.
  HostKvCache to_host() const {
    HostKvCache host(shape_, type_);
    host.extend(static_cast<int>(length_));
    std::vector<std::span<const std::byte>> pieces;
    host.bytes([&](std::span<const std::byte> piece) { pieces.push_back(piece); });
    std::size_t next = 0;
    each_piece([&](std::byte* data, std::size_t size) {
      // The memory is the new cache's, which nobody else knows yet.
      device_->copy_to_host(const_cast<std::byte*>(pieces[next++].data()), data, size);
    });
    return host;
  }
  void from_host(const HostKvCache& host) {
    truncate(0);
    extend(static_cast<int>(host.length()));
    std::vector<std::span<const std::byte>> pieces;
    host.bytes([&](std::span<const std::byte> piece) { pieces.push_back(piece); });
    std::size_t next = 0;
    each_piece([&](std::byte* data, std::size_t size) { device_->copy_to_device(data, pieces[next++].data(), size); });
  }

  // Whether `longer`, of the same shape and type, begins with the same bytes.
  bool begins(const CudaKvCache& longer) const {
    if (length_ > longer.length_) return false;
    std::vector<std::byte> mine(block_bytes()), theirs(block_bytes());
    for (std::size_t b = 0; b < blocks_of(length_); ++b) {
      if (blocks_[b] == longer.blocks_[b]) continue;
      device_->copy_to_host(mine.data(), blocks_[b]->data, mine.size());
      device_->copy_to_host(theirs.data(), longer.blocks_[b]->data, theirs.size());
      for (int p = 0; p < 2 * heads_; ++p) {
        if (std::memcmp(mine.data() + plane(p), theirs.data() + plane(p), rows_of(b) * row_bytes_) != 0) return false;
      }
    }
    return true;
  }

  // Every block, and how many caches share it.
  void blocks(std::vector<SharedMemory>& out) const {
    for (const auto& block : blocks_) out.push_back({block.get(), block_bytes(), block.use_count()});
  }

  // Whether a kernel may read the rows before it waits for the one before it: that one did not write them.
  bool written_long_ago() const noexcept { return written_long_ago_; }
  void set_written_long_ago(bool yes) noexcept { written_long_ago_ = yes; }

 private:
  static constexpr std::size_t most_slab_bytes = std::size_t{16} << 20;

  // Blocks are cut from slabs, and go back to them.  Copies of a cache share a slab, perhaps on several threads.
  class Slab {
   public:
    Slab(const std::shared_ptr<Device>& device, std::size_t blocks, std::size_t block_bytes)
        : memory_(device, blocks * block_bytes, "keys and values of a session") {
      for (std::size_t i = blocks; i-- > 0;) free_.push_back(memory_.data() + i * block_bytes);
    }
    std::byte* take() noexcept {  // null if there is none left
      const std::lock_guard lock(mutex_);
      if (free_.empty()) return nullptr;
      std::byte* const block = free_.back();
      free_.pop_back();
      return block;
    }
    void put_back(std::byte* block) noexcept {
      const std::lock_guard lock(mutex_);
      free_.push_back(block);  // has had room for all from the beginning
    }

   private:
    DeviceBytes memory_;
    std::mutex mutex_;
    std::vector<std::byte*> free_;
  };
  struct Block {
    Block(std::shared_ptr<Slab> from, std::byte* at) noexcept : slab(std::move(from)), data(at) {}
    Block(const Block&) = delete;
    ~Block() { slab->put_back(data); }
    std::shared_ptr<Slab> slab;
    std::byte* data;
  };

  // Where the blocks are, for kernels.  Each cache has its own: a copy gets one when it grows.
  struct Table {
    Table() = default;
    Table(const Table&) noexcept {}
    Table(Table&& other) noexcept { *this = std::move(other); }
    Table& operator=(const Table&) noexcept {
      known = 0;
      return *this;
    }
    Table& operator=(Table&& other) noexcept {
      std::swap(pointers, other.pointers), std::swap(uploaded, other.uploaded), std::swap(known, other.known);
      return *this;
    }
    DeviceBytes pointers;
    std::vector<std::byte*> uploaded;  // what it holds
    std::size_t known = 0;             // so many of them are blocks_'
  };

  std::size_t plane(int heads) const noexcept {
    return static_cast<std::size_t>(heads) * static_cast<std::size_t>(block_positions) * row_bytes_;
  }
  static std::size_t blocks_of(std::int64_t length) noexcept {
    return static_cast<std::size_t>((length + block_positions - 1) / block_positions);
  }
  std::size_t rows_of(std::size_t block) const noexcept {
    const std::int64_t first = static_cast<std::int64_t>(block) * block_positions;
    return static_cast<std::size_t>(std::min<std::int64_t>(block_positions, length_ - first));
  }
  template <class Work>
  void each_piece(Work work) const {
    for (int p = 0; p < 2 * heads_; ++p) {
      for (std::size_t b = 0; b < blocks_of(length_); ++b) work(blocks_[b]->data + plane(p), rows_of(b) * row_bytes_);
    }
  }

  // One of `wanted` that will be asked for.
  std::shared_ptr<Block> new_block(std::size_t wanted) {
    if (!blocks_.empty() && blocks_.back()->slab != slab_) {
      if (std::byte* const data = blocks_.back()->slab->take())
        return std::make_shared<Block>(blocks_.back()->slab, data);
    }
    std::byte* data = slab_ ? slab_->take() : nullptr;
    if (!data) {
      // As much again as there is: little is left over in a short text.
      const std::size_t most = std::max<std::size_t>(1, most_slab_bytes / block_bytes());
      slab_ = std::make_shared<Slab>(device_, std::clamp(std::max(wanted, blocks_.size()), std::size_t{1}, most),
                                     block_bytes());
      data = slab_->take();
    }
    return std::make_shared<Block>(slab_, data);
  }

  void update_table() {
    std::size_t begin = table_.known;
    const std::size_t end = blocks_.size(), room = table_.pointers.size() / sizeof(std::byte*);
    if (end > room) {
      table_.pointers = DeviceBytes();
      table_.pointers =
          DeviceBytes(device_, std::max<std::size_t>(64, 2 * end) * sizeof(std::byte*), "a session's state");
      table_.uploaded.clear();
      begin = 0;
    }
    table_.uploaded.resize(std::max(table_.uploaded.size(), end));
    std::size_t first = end, last = begin;  // of those that differ
    for (std::size_t i = begin; i < end; ++i) {
      if (table_.uploaded[i] == blocks_[i]->data) continue;
      table_.uploaded[i] = blocks_[i]->data;
      first = std::min(first, i), last = i + 1;
    }
    if (first < last) {
      device_->copy_to_device(table_.pointers.data<std::byte*>() + first, table_.uploaded.data() + first,
                              (last - first) * sizeof(std::byte*));
    }
    table_.known = end;
  }

  std::shared_ptr<Device> device_;
  std::vector<std::shared_ptr<Block>> blocks_;
  std::shared_ptr<Slab> slab_;
  Table table_;
  std::int64_t length_ = 0;
  AttentionShape shape_{};
  int heads_ = 0;
  std::size_t row_bytes_ = 0;
  KvType type_ = KvType::f16;
  bool written_long_ago_ = true;
};

}  // namespace qwen3next::cuda
