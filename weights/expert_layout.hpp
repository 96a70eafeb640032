#pragma once
// Where each routed expert lies in the files, and where its three matrices go in a slot of memory.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "core/message.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"
#include "weights/checkpoint.hpp"

namespace qwen3next {

// The experts of all layers, the MTP layer's last.  A slot holds one expert as it is read: up to three pieces of files,
// each from and to a multiple of `alignment`, one behind the other; pieces that touch are one.
class ExpertLayout {
 public:
  struct Piece {
    int file = 0;              // of the checkpoint
    std::uint64_t offset = 0;  // in it, a multiple of the alignment
    std::size_t size = 0;      // likewise
    std::size_t needed = 0;    // bytes that must arrive; the rest may be beyond the file's end
    std::size_t into = 0;      // from the slot's start
  };
  struct Place {
    std::array<Piece, 3> pieces;
    int count = 0;
    std::array<std::size_t, 3> data{};  // of gate, up and down, from the slot's start
    std::span<const Piece> span() const noexcept { return {pieces.data(), static_cast<std::size_t>(count)}; }
    std::size_t bytes() const noexcept { return span().back().into + span().back().size; }
  };

  ExpertLayout(const Checkpoint& checkpoint, std::size_t alignment) : alignment_(alignment) {
    for (const LayerWeights<Views>& layer : checkpoint.weights.layers) views_.push_back(&layer.mlp.experts);
    if (checkpoint.weights.mtp) views_.push_back(&checkpoint.weights.mtp->layer.mlp.experts);
    places_.reserve(views_.size() * views_.front()->size());
    for (const ExpertViews* views : views_) {
      std::size_t slot = 0;
      for (const ExpertView& expert : *views) {
        places_.push_back(place(checkpoint, expert));
        slot = std::max(slot, places_.back().bytes());
      }
      const auto known = std::find(slot_bytes_.begin(), slot_bytes_.end(), slot);
      class_of_.push_back(static_cast<int>(known - slot_bytes_.begin()));
      if (known == slot_bytes_.end()) slot_bytes_.push_back(slot);
    }
  }

  int layers() const noexcept { return static_cast<int>(views_.size()); }
  int experts() const noexcept { return static_cast<int>(views_.front()->size()); }
  const ExpertViews& views(int layer) const noexcept { return *views_[static_cast<std::size_t>(layer)]; }
  const Place& place(int layer, int expert) const noexcept {
    return places_[static_cast<std::size_t>(layer) * views_.front()->size() + static_cast<std::size_t>(expert)];
  }

  // Layers whose slots have the same size are of one class.
  int classes() const noexcept { return static_cast<int>(slot_bytes_.size()); }
  const std::vector<int>& class_of_layer() const noexcept { return class_of_; }
  std::size_t slot_bytes(int cls) const noexcept { return slot_bytes_[static_cast<std::size_t>(cls)]; }
  std::uint64_t bytes() const noexcept {
    std::uint64_t sum = 0;
    for (const int cls : class_of_) sum += static_cast<std::uint64_t>(experts()) * slot_bytes(cls);
    return sum;
  }

  // What so many slots of each class take.
  std::uint64_t slot_memory(const std::vector<int>& slots) const noexcept {
    std::uint64_t sum = 0;
    for (int cls = 0; cls < classes(); ++cls)
      sum += static_cast<std::uint64_t>(slots[static_cast<std::size_t>(cls)]) * slot_bytes(cls);
    return sum;
  }

  // So many slots of each class as `memory` bytes hold, shared out by what the classes would take in whole; at least
  // `least` of each (and never more than there are experts), even if they take more.
  std::vector<int> slots(std::uint64_t memory, int least) const {
    std::vector<int> slots;
    for (int cls = 0; cls < classes(); ++cls) {
      const auto all = static_cast<std::int64_t>(std::count(class_of_.begin(), class_of_.end(), cls)) * experts();
      const double share = static_cast<double>(memory) / static_cast<double>(bytes());
      const auto fit = static_cast<std::int64_t>(std::min(share, 1.0) * static_cast<double>(all));
      slots.push_back(static_cast<int>(std::clamp<std::int64_t>(fit, std::min<std::int64_t>(least, all), all)));
    }
    return slots;
  }

 private:
  Place place(const Checkpoint& checkpoint, const ExpertView& expert) const {
    struct Matrix {
      int file;
      std::uint64_t begin, end;
      std::size_t which;
    };
    std::array<Matrix, 3> matrices;
    const std::array<const WeightView*, 3> views{&expert.gate, &expert.up, &expert.down};
    for (std::size_t i = 0; i < 3; ++i) {
      const auto at = checkpoint.locate(views[i]->data);
      if (!at || views[i]->group_rows != views[i]->rows)
        throw_error(display(checkpoint.path), ": its experts do not lie in one piece each: they cannot be streamed");
      matrices[i] = {at->file, at->offset, at->offset + views[i]->bytes(), i};
    }
    std::sort(matrices.begin(), matrices.end(),
              [](const Matrix& a, const Matrix& b) { return a.file != b.file ? a.file < b.file : a.begin < b.begin; });
    Place place;
    for (const Matrix& m : matrices) {
      const std::uint64_t begin = m.begin / alignment_ * alignment_;
      Piece* piece = place.count > 0 ? &place.pieces[static_cast<std::size_t>(place.count - 1)] : nullptr;
      if (!piece || piece->file != m.file || begin > piece->offset + piece->size) {
        const std::size_t into = piece ? place.bytes() : 0;
        piece = &place.pieces[static_cast<std::size_t>(place.count++)];
        *piece = {m.file, begin, 0, 0, into};
      }
      piece->needed = std::max(piece->needed, static_cast<std::size_t>(m.end - piece->offset));
      piece->size = (piece->needed + alignment_ - 1) / alignment_ * alignment_;
      place.data[m.which] = piece->into + static_cast<std::size_t>(m.begin - piece->offset);
    }
    return place;
  }

  std::size_t alignment_;
  std::vector<const ExpertViews*> views_;
  std::vector<Place> places_;  // [layer, expert]
  std::vector<int> class_of_;
  std::vector<std::size_t> slot_bytes_;
};

}  // namespace qwen3next
