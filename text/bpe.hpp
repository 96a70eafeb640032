#pragma once
// Byte-pair encoding of one piece: merge the pair of lowest rank (leftmost first) until none is left.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <utility>
#include <vector>

namespace qwen3next {

// The merge rules, (left id, right id) -> (rank, merged id): an open-addressing hash table, at most half full.
class MergeTable {
 public:
  struct Merge {
    std::uint32_t left, right, rank, merged;
  };
  static constexpr std::uint32_t no_rank = std::numeric_limits<std::uint32_t>::max();

  MergeTable() : MergeTable(0) {}
  explicit MergeTable(std::size_t count)
      : shift_(64 - static_cast<int>(std::bit_width(2 * count + 1))),
        slots_(std::size_t{1} << (64 - shift_), Merge{0, 0, no_rank, 0}) {}

  // False if the pair has a rule already.  At most the `count` of the constructor may be inserted.
  bool insert(const Merge& merge) {
    Merge& slot = slots_[slot_of(merge.left, merge.right)];
    if (slot.rank != no_rank) return false;
    slot = merge;
    return true;
  }

  // rank == no_rank means that there is none.
  const Merge& find(std::uint32_t left, std::uint32_t right) const noexcept { return slots_[slot_of(left, right)]; }

 private:
  std::size_t slot_of(std::uint32_t left, std::uint32_t right) const noexcept {
    std::uint64_t hash = (std::uint64_t{left} << 32 | right) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
    hash *= 0xD6E8FEB86659FD93u;
    std::size_t i = static_cast<std::size_t>(hash >> shift_);
    while (slots_[i].rank != no_rank && (slots_[i].left != left || slots_[i].right != right))
      i = (i + 1) & (slots_.size() - 1);
    return i;
  }

  int shift_;
  std::vector<Merge> slots_;
};

// Applies a MergeTable; keeps its working memory between pieces, so one per thread or per call.
class BpeMerger {
 public:
  explicit BpeMerger(const MergeTable& merges) : merges_(merges) {}

  std::vector<std::uint32_t> ids;  // in: one id per byte, fewer than 2^32; out: the tokens

  void merge() {
    // Rescanning all ranks after each merge is quadratic, yet beats the heap on words, which are short.
    if (ids.size() <= 48)
      merge_short();
    else
      merge_long();
  }

 private:
  void merge_short() {
    std::size_t n = ids.size();
    if (n < 2) return;
    ranks_.resize(n);
    const auto rank_at = [&](std::size_t i) { return merges_.find(ids[i], ids[i + 1]).rank; };
    for (std::size_t i = 0; i + 1 < n; ++i) ranks_[i] = rank_at(i);
    while (n >= 2) {
      std::size_t best = 0;
      for (std::size_t i = 1; i + 1 < n; ++i)
        if (ranks_[i] < ranks_[best]) best = i;
      if (ranks_[best] == MergeTable::no_rank) break;
      ids[best] = merges_.find(ids[best], ids[best + 1]).merged;
      --n;
      for (std::size_t i = best + 1; i < n; ++i) {
        ids[i] = ids[i + 1];
        ranks_[i] = ranks_[i + 1];
      }
      if (best > 0) ranks_[best - 1] = rank_at(best - 1);
      if (best + 1 < n) ranks_[best] = rank_at(best);
    }
    ids.resize(n);
  }

  // n log n: a heap of (rank, position) over a linked list.  Entries are not removed when their pair changes; they are
  // recognised by a rank that is no longer the position's.
  void merge_long() {
    struct Symbol {
      std::uint32_t previous, next, id, rank;  // rank of the pair (this, next)
    };
    constexpr std::uint32_t none = std::numeric_limits<std::uint32_t>::max();
    const auto n = static_cast<std::uint32_t>(ids.size());
    std::vector<Symbol> symbols(n);
    std::vector<std::uint64_t> entries;  // rank << 32 | position
    entries.reserve(n);
    for (std::uint32_t i = 0; i < n; ++i) {
      const bool last = i + 1 == n;
      const std::uint32_t rank = last ? MergeTable::no_rank : merges_.find(ids[i], ids[i + 1]).rank;
      symbols[i] = {i == 0 ? none : i - 1, last ? none : i + 1, ids[i], rank};
      if (rank != MergeTable::no_rank) entries.push_back(std::uint64_t{rank} << 32 | i);
    }
    std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> heap({}, std::move(entries));
    const auto update = [&](std::uint32_t i) {
      Symbol& s = symbols[i];
      s.rank = s.next == none ? MergeTable::no_rank : merges_.find(s.id, symbols[s.next].id).rank;
      if (s.rank != MergeTable::no_rank) heap.push(std::uint64_t{s.rank} << 32 | i);
    };
    while (!heap.empty()) {
      const auto i = static_cast<std::uint32_t>(heap.top());
      const auto rank = static_cast<std::uint32_t>(heap.top() >> 32);
      heap.pop();
      Symbol& s = symbols[i];
      if (s.rank != rank) continue;
      Symbol& gone = symbols[s.next];
      s.id = merges_.find(s.id, gone.id).merged;
      s.next = gone.next;
      gone.rank = MergeTable::no_rank;
      if (s.next != none) symbols[s.next].previous = i;
      update(i);
      if (s.previous != none) update(s.previous);
    }
    std::size_t out = 0;
    for (std::uint32_t i = 0; i != none; i = symbols[i].next) ids[out++] = symbols[i].id;
    ids.resize(out);
  }

  const MergeTable& merges_;
  std::vector<std::uint32_t> ranks_;
};

}  // namespace qwen3next
