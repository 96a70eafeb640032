#pragma once
// All weights but the routed experts, read into memory of our own: what every token needs must not be paged out.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "backends/aligned_bytes.hpp"
#include "model/weights.hpp"
#include "weights/checkpoint.hpp"
#include "weights/expert_layout.hpp"

namespace qwen3next {

class DenseWeights {
 public:
  // Plans; reads nothing.  `alignment` is that of all files' reads.
  DenseWeights(const Checkpoint& checkpoint, const ExpertLayout& experts, std::size_t alignment) {
    std::vector<const std::byte*> routed;
    for (int layer = 0; layer < experts.layers(); ++layer) {
      for (const ExpertView& e : experts.views(layer)) {
        routed.insert(routed.end(), {e.gate.data, e.up.data, e.down.data});
      }
    }
    std::sort(routed.begin(), routed.end());
    std::vector<const TensorRecord*> records;
    for (const TensorRecord& record : checkpoint.records) {
      const auto first = std::lower_bound(routed.begin(), routed.end(), record.data);
      const bool holds_experts = first != routed.end() && *first < record.data + record.bytes;
      if (!holds_experts && record.bytes > 0) records.push_back(&record);
    }
    std::sort(records.begin(), records.end(), [](const TensorRecord* a, const TensorRecord* b) {
      return a->file != b->file ? a->file < b->file : a->offset < b->offset;
    });
    for (const TensorRecord* record : records) {
      const std::uint64_t begin = record->offset / alignment * alignment, end = record->offset + record->bytes;
      if (runs_.empty() || runs_.back().file != record->file || begin > runs_.back().end + close) {
        const std::size_t into = runs_.empty() ? 0 : runs_.back().into + size_of(runs_.back(), alignment);
        runs_.push_back(
            {record->file, begin, end, into, checkpoint.files[static_cast<std::size_t>(record->file)].data()});
      }
      runs_.back().end = std::max(runs_.back().end, end);
    }
    for (const Run& run : runs_) {
      const std::size_t size = size_of(run, alignment);
      for (std::size_t done = 0; done < size; done += piece) {
        const std::size_t n = std::min(piece, size - done);
        const auto left = static_cast<std::size_t>(run.end - run.begin) - done;
        pieces_.push_back({run.file, run.begin + done, n, std::min(n, left), run.into + done});
      }
      bytes_ += size;
    }
    std::sort(runs_.begin(), runs_.end(), [](const Run& a, const Run& b) { return a.address() < b.address(); });
  }

  std::uint64_t bytes() const noexcept { return bytes_; }

  // What is to be read, into `memory()`.
  std::span<const ExpertLayout::Piece> pieces() const noexcept { return pieces_; }
  void allocate() {
    // From a large page on, it begins where reads around the cache may write.
    memory_ =
        AlignedBytes(std::max(static_cast<std::size_t>(bytes_), AlignedBytes::large_page), AlignedBytes::Uncleared());
  }
  std::byte* memory() noexcept { return memory_.data(); }
  void lock() noexcept { memory_.lock(); }  // where the system allows it

  // Points everything but the experts' matrices from the mapped files to the copy.
  void adopt(ModelWeights<Views>& weights) const {
    ModelWeights<Views> moved;
    zip(weights, moved, Move{*this});
    weights = std::move(moved);
  }
  // The matrix's factors, where it has some.
  void adopt_factors(WeightView& w) const noexcept { w.grid.data = moved(w.grid.data); }

 private:
  static constexpr std::size_t piece = std::size_t{4} << 20, close = std::size_t{64} << 10;

  struct Run {  // tensors that are neighbours in a file
    int file;
    std::uint64_t begin, end;
    std::size_t into;
    const std::byte* mapped;  // the file's start
    std::uintptr_t address() const noexcept { return reinterpret_cast<std::uintptr_t>(mapped) + begin; }
  };
  struct Move {
    const DenseWeights& dense;
    void operator()(const WeightView& from, WeightView& to) const noexcept {
      to = from;
      to.data = dense.moved(from.data);
      dense.adopt_factors(to);
    }
    void operator()(const VectorView& from, VectorView& to) const noexcept {
      to = from;
      to.data = reinterpret_cast<const float*>(dense.moved(reinterpret_cast<const std::byte*>(from.data)));
    }
    void operator()(const ExpertViews& from, ExpertViews& to) const { to = from; }
  };

  static std::size_t size_of(const Run& run, std::size_t alignment) noexcept {
    return static_cast<std::size_t>((run.end - run.begin + alignment - 1) / alignment * alignment);
  }

  // Converted copies that the checkpoint owns stay where they are.
  const std::byte* moved(const std::byte* data) const noexcept {
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const auto after = std::upper_bound(runs_.begin(), runs_.end(), address,
                                        [](std::uintptr_t at, const Run& run) { return at < run.address(); });
    if (after == runs_.begin()) return data;
    const Run& run = *std::prev(after);
    if (address - run.address() < run.end - run.begin) return memory_.data() + run.into + (address - run.address());
    return data;
  }

  std::vector<Run> runs_;  // by address
  std::vector<ExpertLayout::Piece> pieces_;
  std::uint64_t bytes_ = 0;
  AlignedBytes memory_;
};

}  // namespace qwen3next
