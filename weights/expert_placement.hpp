#pragma once
// Which experts lie on a card that does not hold them all: what it begins with, and exchanges as texts change.
// Bookkeeping alone, as ExpertCache, which keeps the scores.

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "weights/expert_cache.hpp"
#include "weights/expert_profile.hpp"

namespace qwen3next {

// What the slots of a card are for.  Layers whose experts take as many bytes there are of one class.
struct SlotClasses {
  int experts = 0;                      // of a layer
  std::vector<int> of_layer;            // the MTP layer's last
  std::vector<std::size_t> slot_bytes;  // of each class

  static SlotClasses of(std::span<const std::size_t> slot_bytes_of_layer, int experts) {
    SlotClasses classes;
    classes.experts = experts;
    for (const std::size_t bytes : slot_bytes_of_layer) {
      const auto known = std::find(classes.slot_bytes.begin(), classes.slot_bytes.end(), bytes);
      classes.of_layer.push_back(static_cast<int>(known - classes.slot_bytes.begin()));
      if (known == classes.slot_bytes.end()) classes.slot_bytes.push_back(bytes);
    }
    return classes;
  }

  int count() const noexcept { return static_cast<int>(slot_bytes.size()); }
  int all_of(int cls) const noexcept {
    return static_cast<int>(std::count(of_layer.begin(), of_layer.end(), cls)) * experts;
  }
  std::uint64_t all_bytes() const noexcept {
    return bytes_of([&](int cls) { return all_of(cls); });
  }
  std::uint64_t bytes(const std::vector<int>& slots) const noexcept {
    return bytes_of([&](int cls) { return slots[static_cast<std::size_t>(cls)]; });
  }
  // So many of each class as `memory` holds, of each the same part.
  std::vector<int> slots(std::uint64_t memory) const {
    const double part = std::min(1.0, static_cast<double>(memory) / static_cast<double>(all_bytes()));
    std::vector<int> slots;
    for (int cls = 0; cls < count(); ++cls) slots.push_back(static_cast<int>(part * all_of(cls)));
    return slots;
  }

 private:
  template <class Slots>
  std::uint64_t bytes_of(Slots slots_of) const noexcept {
    std::uint64_t sum = 0;
    for (int cls = 0; cls < count(); ++cls)
      sum += static_cast<std::uint64_t>(slots_of(cls)) * slot_bytes[static_cast<std::size_t>(cls)];
    return sum;
  }
};

class ExpertPlacement {
 public:
  using Key = ExpertCache::Key;
  static constexpr int none = ExpertCache::none;

  struct Placed {
    Key key;
    int slot;
  };
  // `in` takes the slot of `out` (which is {none, none} where it was free): it is not there until arrived(slot).
  struct Exchange {
    Key in, out;
    int slot;
  };

  ExpertPlacement(const SlotClasses& classes, const std::vector<int>& slots)
      : classes_(classes),
        cache_(static_cast<int>(classes.of_layer.size()), classes.experts, classes.of_layer, slots),
        there_(static_cast<std::size_t>(cache_.slots())),
        missing_(classes.of_layer.size(), classes.experts),
        candidates_(classes.slot_bytes.size(), Key{none, none}) {}

  int layers() const noexcept { return cache_.layers(); }
  int experts() const noexcept { return cache_.experts(); }
  int slots() const noexcept { return cache_.slots(); }
  int class_of(int slot) const noexcept { return cache_.class_of(slot); }
  int missing(int layer) const noexcept { return missing_[static_cast<std::size_t>(layer)]; }
  bool is_there(int layer, int expert) const noexcept {
    const int slot = cache_.slot_of(layer, expert);
    return slot != none && there_[static_cast<std::size_t>(slot)] != 0;
  }

  // What the empty slots are to hold: those that the profile's text picked most; without one as many of each layer, of
  // the first `trunk` layers before the MTP layer.  They count as being there.
  std::vector<Placed> fill(int trunk, const ExpertProfile* profile) {
    std::vector<Placed> placed;
    const auto place = [&](int layer, int expert) {
      if (cache_.slot_of(layer, expert) != none) return;
      if (cache_.free_slots(classes_.of_layer[static_cast<std::size_t>(layer)]) == 0) return;
      const int slot = cache_.insert(layer, expert);
      arrived(slot);
      placed.push_back({{layer, expert}, slot});
    };
    if (profile) {
      cache_.warm(*profile);
      for (const Key key : cache_.wanted()) place(key.layer, key.expert);
    }
    for (int expert = 0; expert < experts(); ++expert)
      for (int layer = 0; layer < trunk; ++layer) place(layer, expert);
    for (int expert = 0; expert < experts(); ++expert)
      for (int layer = trunk; layer < layers(); ++layer) place(layer, expert);
    return placed;
  }

  // A pass of `tokens` tokens picked these experts, ascending, each for counts[i] of them.
  void record(int layer, std::span<const std::int32_t> ids, std::span<const std::int32_t> counts, int tokens) {
    cache_.record(layer, ids, counts, tokens);
    Key& best = candidates_[static_cast<std::size_t>(classes_.of_layer[static_cast<std::size_t>(layer)])];
    for (const std::int32_t id : ids) {
      if (cache_.slot_of(layer, id) != none) continue;
      if (best.layer == none || cache_.picks_of_late(layer, id) > cache_.picks_of_late(best.layer, best.expert))
        best = {layer, id};
    }
  }

  // The exchange that gains most, if one of the experts missed since the last is clearly picked more often than what it
  // would drive out: chance makes differences of a few picks.
  std::optional<Exchange> exchange() {
    int cls = none;
    double most = 0;
    for (int c = 0; c < classes_.count(); ++c) {
      const Key key = candidates_[static_cast<std::size_t>(c)];
      const int slot = cache_.least(c);
      if (key.layer == none || slot == none) continue;
      const Key least = cache_.key_of(slot);
      const double in = cache_.picks_of_late(key.layer, key.expert);
      const double out = least.layer == none ? 0 : cache_.picks_of_late(least.layer, least.expert);
      const double gain = in - 2 * out - (least.layer == none ? 0 : chance);
      if (gain > most) most = gain, cls = c;
    }
    if (cls == none) return {};
    const Key in = std::exchange(candidates_[static_cast<std::size_t>(cls)], Key{none, none});
    const Key out = cache_.key_of(cache_.least(cls));
    if (out.layer != none) ++missing_[static_cast<std::size_t>(out.layer)];
    const int slot = cache_.insert(in.layer, in.expert);
    there_[static_cast<std::size_t>(slot)] = 0;
    return Exchange{in, out, slot};
  }
  void arrived(int slot) {
    there_[static_cast<std::size_t>(slot)] = 1;
    --missing_[static_cast<std::size_t>(cache_.key_of(slot).layer)];
    cache_.unpin(slot);
  }

  // Takes a slot, into which nothing is on its way, out of use for good; what lay there, or {none, none}.
  Key retire(int slot) {
    const Key key = cache_.key_of(slot);
    if (key.layer != none) {
      cache_.erase(slot);
      ++missing_[static_cast<std::size_t>(key.layer)];
      there_[static_cast<std::size_t>(slot)] = 0;
    }
    cache_.retire_free(slot);
    return key;
  }

 private:
  static constexpr double chance = 8;  // picks

  SlotClasses classes_;
  ExpertCache cache_;
  std::vector<char> there_;      // of each slot: the expert has arrived
  std::vector<int> missing_;     // of each layer: experts that are not there
  std::vector<Key> candidates_;  // of each class: the missed expert that is picked most
};

}  // namespace qwen3next
