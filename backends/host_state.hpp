#pragma once
// What a sequence keeps in host memory between calls: shared by the reference and the cpu backend.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "backends/aligned_bytes.hpp"
#include "backends/backend.hpp"
#include "blocks/dtype.hpp"

namespace qwen3next {

// A DeltaNet layer's memory of a sequence, independent of its length.
//
// Tentative rows are journalled, and the state stays.  What is accepted of them enters the window of the convolution at
// once, but S only when it is read next: so that checking guesses moves no more memory than decoding, and never copies
// S.
struct HostDeltaState {
  HostDeltaState() = default;
  explicit HostDeltaState(DeltaShape s)
      : S(sizeof(float) * static_cast<std::size_t>(s.value_heads) * static_cast<std::size_t>(s.value_dim) *
          static_cast<std::size_t>(s.key_dim)),
        conv(sizeof(float) * static_cast<std::size_t>(s.conv_kernel - 1) * static_cast<std::size_t>(s.conv_dim())),
        channels(s.conv_dim()),
        heads(s.value_heads) {}

  AlignedBytes S;     // f32 [Hv, Dv, Dk]: transposed, so that S^T k and S^T q read rows
  AlignedBytes conv;  // f32 [K-1, channels]: the last inputs of the convolution, oldest first

  // For files: S, conv.
  void bytes(const BytesSink& sink) const { sink({S.data(), S.size()}), sink({conv.data(), conv.size()}); }
  std::uint64_t size_in_bytes() const noexcept { return S.size() + conv.size(); }
  // Of tentative rows: what the convolution read and made [rows, channels], and the gates [rows, Hv].
  int channels = 0, heads = 0;
  std::vector<float> inputs, qkv, beta, g;
  int accepted = 0;  // so many of these rows are yet to enter S

  void keep_inputs(int row, const float* x) { keep(inputs, row, x, channels); }
  void keep_rows(int row, const float* conv_output, const float* beta_of_heads, const float* g_of_heads) {
    keep(qkv, row, conv_output, channels);
    keep(beta, row, beta_of_heads, heads);
    keep(g, row, g_of_heads, heads);
  }
  void accept(int rows) noexcept {
    accepted = rows;
    const auto C = static_cast<std::size_t>(channels), window = conv.size() / sizeof(float) / C;
    const std::size_t n = std::min(static_cast<std::size_t>(rows), window), kept = window - n;
    float* past = conv.floats();
    std::copy_n(past + n * C, kept * C, past);
    std::copy_n(inputs.data() + (static_cast<std::size_t>(rows) - n) * C, n * C, past + kept * C);
  }
  // The accepted rows are in S now; gives the journal's memory back.
  void settled() noexcept {
    accepted = 0;
    for (std::vector<float>* v : {&inputs, &qkv, &beta, &g}) std::vector<float>().swap(*v);
  }

 private:
  static void keep(std::vector<float>& rows, int row, const float* x, int n) {
    if (rows.empty()) rows.resize(static_cast<std::size_t>(max_tentative_rows) * static_cast<std::size_t>(n));
    std::copy_n(x, n, rows.begin() + std::ptrdiff_t{row} * n);
  }
};

// Keys and values of one attention layer and sequence, in blocks of 256 positions that copies of the cache share until
// one of them writes.  In a block: for K then V, for each head, 256 rows of head_dim values of the cache's type.
// Blocks are cut from slabs of up to a large page.
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
    return blocks_[static_cast<std::size_t>(block)]->data + plane(head);
  }
  const std::byte* values(std::int64_t block, int head) const noexcept { return keys(block, head) + plane(heads_); }

  // Makes room for `count` more positions, owned by this cache alone, and counts them in.  Returns the first.
  std::int64_t extend(int count) {
    const std::int64_t first = length_;
    length_ += count;
    if (first % block_positions != 0 && blocks_.back().use_count() > 1) {
      const std::shared_ptr<Block> shared = std::exchange(blocks_.back(), new_block());
      std::memcpy(blocks_.back()->data, shared->data, block_bytes());
    }
    const std::size_t needed = static_cast<std::size_t>((length_ + block_positions - 1) / block_positions);
    while (blocks_.size() < needed) blocks_.push_back(new_block());
    return first;
  }
  // Forgets all but the first `length` positions.  A block that was this cache's alone is used again: guesses are
  // taken back all the time, and a slab does not take blocks back.
  void truncate(std::int64_t length) noexcept {
    length_ = length;
    const auto blocks = static_cast<std::size_t>((length + block_positions - 1) / block_positions);
    if (blocks < blocks_.size() && blocks_[blocks].use_count() == 1) spare_ = std::move(blocks_[blocks]);
    blocks_.resize(blocks);
  }
  std::byte* key_row(std::int64_t position, int head) noexcept {
    return blocks_[static_cast<std::size_t>(position / block_positions)]->data + plane(head) +
           static_cast<std::size_t>(position % block_positions) * row_bytes_;
  }
  std::byte* value_row(std::int64_t position, int head) noexcept { return key_row(position, head) + plane(heads_); }

  // For files: the rows of positions 0 to length() - 1, of head after head of the keys, then of the values.
  void bytes(const BytesSink& sink) const {
    for (int plane_index = 0; plane_index < 2 * heads_; ++plane_index) {
      for (std::int64_t first = 0; first < length_; first += block_positions) {
        const auto rows = static_cast<std::size_t>(std::min<std::int64_t>(block_positions, length_ - first));
        const auto block = static_cast<std::size_t>(first / block_positions);
        sink({blocks_[block]->data + plane(plane_index), rows * row_bytes_});
      }
    }
  }
  // Whether `longer`, of the same shape and type, begins with the same bytes.
  bool begins(const HostKvCache& longer) const {
    if (length_ > longer.length_) return false;
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
      if (blocks_[b] == longer.blocks_[b]) continue;
      const auto first = static_cast<std::int64_t>(b) * block_positions;
      const auto rows = static_cast<std::size_t>(std::min<std::int64_t>(block_positions, length_ - first));
      for (int p = 0; p < 2 * heads_; ++p) {
        if (std::memcmp(blocks_[b]->data + plane(p), longer.blocks_[b]->data + plane(p), rows * row_bytes_) != 0)
          return false;
      }
    }
    return true;
  }
  // Every block, and how many caches share it.
  void blocks(std::vector<SharedMemory>& out) const {
    for (const auto& block : blocks_) out.push_back({block.get(), block_bytes(), block.use_count()});
  }

 private:
  // Copies of a cache take their blocks from the same slab, perhaps on several threads.
  struct Slab {
    Slab(std::size_t blocks, std::size_t bytes) : memory(bytes, AlignedBytes::Uncleared()), count(blocks) {}
    AlignedBytes memory;
    std::size_t count;
    std::atomic<std::size_t> used{0};
  };
  struct Block {
    std::shared_ptr<Slab> slab;
    std::byte* data;
  };

  std::size_t plane(int heads) const noexcept {
    return static_cast<std::size_t>(heads) * static_cast<std::size_t>(block_positions) * row_bytes_;
  }
  std::size_t block_bytes() const noexcept { return 2 * plane(heads_); }

  std::shared_ptr<Block> new_block() {
    if (spare_ && spare_.use_count() == 1) return std::move(spare_);
    std::size_t at = slab_ ? slab_->used.fetch_add(1) : 0;
    if (!slab_ || at >= slab_->count) {
      // As much again as there is, up to a large page: little is left over in a short text.
      const std::size_t most = std::max<std::size_t>(1, AlignedBytes::large_page / block_bytes());
      const std::size_t blocks = std::clamp<std::size_t>(blocks_.size(), 1, most);
      const bool whole = blocks == most && most > 1;
      slab_ = std::make_shared<Slab>(blocks, whole ? AlignedBytes::large_page : blocks * block_bytes());
      at = slab_->used.fetch_add(1);
    }
    return std::make_shared<Block>(Block{slab_, slab_->memory.data() + at * block_bytes()});
  }

  std::vector<std::shared_ptr<Block>> blocks_;
  std::shared_ptr<Block> spare_;
  std::shared_ptr<Slab> slab_;
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
