#pragma once
// Which experts stay in memory, when not all fit: bookkeeping alone, without memory, threads or files, and
// deterministic.
//
// An expert is worth what it is picked per token, of late.  A pick at time t, in tokens, counts
//
//   2^((t - now) / half_life)
//
// and the sum over its picks is an expert's score: decayed frequency, LRFU of Lee et al. 2001, "LRFU: a spectrum of
// policies that subsumes the least recently used and least frequently used policies".  The expert with the lowest score
// goes first, in whatever layer: layers that pick few of their experts over and over keep those and leave their share
// to others.  Scores are kept times 2^(now / half_life), so that time passing changes none of them, and their order
// lies in a heap per class of slots.
//
// A pass over many tokens counts as if they had come one by one, evenly mixed, but at most `longest_pass` of them: what
// the tokens before them needed is not forgotten for one prompt.  Such a pass brings in experts of low score, too, but
// these are the next to go: a prompt that touches all experts passes through few slots.

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "weights/expert_profile.hpp"

namespace qwen3next {

class ExpertCache {
 public:
  static constexpr int none = -1;
  static constexpr double half_life = 256;     // tokens; bench/RESULTS.md, "Which experts stay"
  static constexpr double longest_pass = 512;  // tokens

  struct Key {
    int layer, expert;
    bool operator==(const Key&) const = default;
  };

  // Layers whose experts take the same number of bytes share a class of slots.  Slots are numbered through all classes:
  // class 0's first.
  ExpertCache(int layers, int experts, std::vector<int> class_of_layer, std::vector<int> slots_of_class);

  int layers() const noexcept { return layers_; }
  int experts() const noexcept { return experts_; }
  int slots() const noexcept { return static_cast<int>(slots_.size()); }
  int class_of(int slot) const noexcept { return at(slot).cls; }

  int slot_of(int layer, int expert) const noexcept { return slot_of_[index(layer, expert)]; }  // or none
  Key key_of(int slot) const noexcept {                                                         // {none, none} if free
    const std::int32_t key = at(slot).key;
    return key < 0 ? Key{none, none} : Key{key / experts_, key % experts_};
  }

  // One pass of `tokens` tokens through a layer picked these experts (distinct, ascending), each for counts[i] tokens.
  // Ages and counts; time passes with layer 0.
  void record(int layer, std::span<const std::int32_t> ids, std::span<const std::int32_t> counts, int tokens);

  // Gives an absent expert a slot, pinned once: a free one, or that of the unpinned expert least worth keeping, which
  // loses it.  None if every slot of the class is pinned.
  int insert(int layer, int expert);

  // For look-ahead, as insert(): but only a free slot, or that of an expert which the next token will pick less
  // probably than this one.  `probability` is what else is known of that, such as how often such guesses came true.
  // What was fetched for a guess is worth no more than before: leave it pinned until its layer has run.
  int insert_if_better(int layer, int expert, double probability = 0);

  // The slot that insert() would take next; none if all of the class are pinned.
  int least(int cls) const noexcept {
    const Class& c = classes_[static_cast<std::size_t>(cls)];
    return !c.free.empty() ? c.free.back() : c.heap.empty() ? none : c.heap.front();
  }

  void pin(int slot) noexcept;
  void unpin(int slot) noexcept;
  bool pinned(int slot) const noexcept { return at(slot).pins > 0; }

  // Its read failed: the slot, not pinned any more, is free again.
  void erase(int slot);

  // Takes a slot of a class out of use (its memory is wanted elsewhere): a free one, or that of the unpinned expert
  // least worth keeping.  None if there is none.  restore() gives it back.
  int retire(int cls);
  void retire_free(int slot);  // this one
  void restore(int slot);

  int slots_in_use(int cls) const noexcept { return classes_[static_cast<std::size_t>(cls)].in_use; }
  int free_slots(int cls) const noexcept {
    return static_cast<int>(classes_[static_cast<std::size_t>(cls)].free.size());
  }

  // Adds the profile's picks to the scores, as if its text were so short that an expert is picked once on average:
  // enough to say what to begin with, and soon outweighed where the text at hand is of another kind.  Throws Error if
  // the profile has another shape.
  void warm(const ExpertProfile& profile);

  // What to fill the free slots with, best first: absent experts that were picked at all.
  std::vector<Key> wanted() const;

  // All that was recorded; not what warm() was given.
  const ExpertProfile& picks() const noexcept { return picks_; }

  // Its score: how many tokens picked it, those of long ago counting less.
  double picks_of_late(int layer, int expert) const noexcept { return scores_[index(layer, expert)] / gain(); }
  // How often a token picks the expert, by its score.
  double rate(int layer, int expert) const noexcept {
    return every_token_ > 0 ? scores_[index(layer, expert)] / every_token_ : 0;
  }

 private:
  static constexpr double window = half_life / 0.69314718055994530942;  // the integral of 2^(-t / half_life)
  static constexpr double rescale_at = 64;                              // half-lives

  struct Slot {
    std::int32_t key = none;  // layer * experts + expert
    int cls = 0;
    int pins = 0;
    int place = none;  // in its class's heap, where all lie that may be evicted
    bool retired = false;
  };
  struct Class {
    std::vector<int> heap;  // slots, 4-ary, the least worth first
    std::vector<int> free;  // a stack
    int in_use = 0;
  };

  std::size_t index(int layer, int expert) const noexcept {
    assert(layer >= 0 && layer < layers_ && expert >= 0 && expert < experts_);
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(experts_) + static_cast<std::size_t>(expert);
  }
  Slot& at(int slot) noexcept { return slots_[static_cast<std::size_t>(slot)]; }
  const Slot& at(int slot) const noexcept { return slots_[static_cast<std::size_t>(slot)]; }
  Class& class_of_slot(int slot) noexcept { return classes_[static_cast<std::size_t>(at(slot).cls)]; }
  Class& class_of_layer(int layer) noexcept {
    return classes_[static_cast<std::size_t>(class_of_layer_[static_cast<std::size_t>(layer)])];
  }

  double gain() const noexcept { return std::exp2(age_); }  // what a pick counts now
  // What a pick somewhere in the last `tokens` counts, beside one now: the mean of 2^(-t / half_life).
  static double mean_weight(double tokens) noexcept { return -std::expm1(-tokens / window) * window / tokens; }
  void age(double tokens);

  // Whether a's expert goes before b's.
  bool before(int a, int b) const noexcept {
    const std::int32_t x = at(a).key, y = at(b).key;
    const double p = scores_[static_cast<std::size_t>(x)], q = scores_[static_cast<std::size_t>(y)];
    return p != q ? p < q : x < y;
  }
  void put(Class& c, int place, int slot) noexcept {
    c.heap[static_cast<std::size_t>(place)] = slot;
    at(slot).place = place;
  }
  void rise(Class& c, int place) noexcept;
  void sink(Class& c, int place) noexcept;
  void order() noexcept;
  void enter(int slot) noexcept;
  void leave(int slot) noexcept;
  void evict(int slot) noexcept;
  static int pop_free(Class& c) noexcept;
  int occupy(int slot, std::size_t key) noexcept;

  int layers_, experts_;
  std::vector<int> class_of_layer_;
  std::vector<Class> classes_;
  std::vector<Slot> slots_;
  std::vector<int> slot_of_;    // [layers, E]
  std::vector<double> scores_;  // [layers, E], times 2^age
  double every_token_ = 0;      // the score of an expert that every token picked
  double age_ = 0;              // half-lives since the scores were last rescaled
  ExpertProfile picks_;
};

inline ExpertCache::ExpertCache(int layers, int experts, std::vector<int> class_of_layer,
                                std::vector<int> slots_of_class)
    : layers_(layers),
      experts_(experts),
      class_of_layer_(std::move(class_of_layer)),
      classes_(slots_of_class.size()),
      slot_of_(static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts), none),
      scores_(slot_of_.size()),
      picks_(layers, experts) {
  assert(class_of_layer_.size() == static_cast<std::size_t>(layers));
  for (std::size_t c = 0; c < classes_.size(); ++c) {
    const int first = slots(), count = slots_of_class[c];
    slots_.resize(slots_.size() + static_cast<std::size_t>(count));
    classes_[c].heap.reserve(static_cast<std::size_t>(count));
    classes_[c].free.reserve(static_cast<std::size_t>(count));
    classes_[c].in_use = count;
    for (int slot = slots() - 1; slot >= first; --slot) {  // the first is taken first
      at(slot).cls = static_cast<int>(c);
      classes_[c].free.push_back(slot);
    }
  }
}

inline void ExpertCache::record(int layer, std::span<const std::int32_t> ids, std::span<const std::int32_t> counts,
                                int tokens) {
  assert(ids.size() == counts.size() && tokens > 0);
  picks_.add(layer, ids, counts, tokens);
  const double weighed = std::min<double>(tokens, longest_pass);
  if (layer == 0) age(weighed);
  const double each = gain() * mean_weight(weighed) * (weighed / tokens);
  if (layer == 0) every_token_ += tokens * each;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    scores_[index(layer, ids[i])] += counts[i] * each;
    const int slot = slot_of(layer, ids[i]);
    if (slot != none && at(slot).place != none) sink(class_of_slot(slot), at(slot).place);
  }
}

inline void ExpertCache::age(double tokens) {
  age_ += tokens / half_life;
  if (age_ < rescale_at) return;
  const double factor = std::exp2(-age_);
  for (double& score : scores_) score *= factor;
  every_token_ *= factor;
  age_ = 0;
}

inline void ExpertCache::warm(const ExpertProfile& profile) {
  profile.expect_shape(layers_, experts_, "warming the cache of experts");
  double tokens = 0, picks = 0;
  for (int layer = 0; layer < layers_; ++layer) {
    tokens += static_cast<double>(profile.tokens(layer));
    picks += static_cast<double>(profile.picks(layer));
  }
  if (picks == 0) return;
  const double enough = experts_ * tokens / picks;  // tokens in which as many experts are picked as there are
  every_token_ += gain() * std::min(enough, tokens / layers_);
  for (int layer = 0; layer < layers_; ++layer) {
    if (profile.tokens(layer) == 0) continue;
    const double each = gain() * std::min(1.0, enough / static_cast<double>(profile.tokens(layer)));
    const std::span<const std::int64_t> counts = profile.counts(layer);
    for (int e = 0; e < experts_; ++e) {
      scores_[index(layer, e)] += static_cast<double>(counts[static_cast<std::size_t>(e)]) * each;
    }
  }
  order();
}

inline std::vector<ExpertCache::Key> ExpertCache::wanted() const {
  std::vector<Key> best;
  for (std::size_t c = 0; c < classes_.size(); ++c) {
    std::vector<std::size_t> absent;
    for (std::size_t i = 0; i < scores_.size(); ++i) {
      const std::size_t layer = i / static_cast<std::size_t>(experts_);
      if (class_of_layer_[layer] == static_cast<int>(c) && slot_of_[i] == none && scores_[i] > 0) absent.push_back(i);
    }
    std::ranges::stable_sort(absent, [&](std::size_t a, std::size_t b) { return scores_[a] > scores_[b]; });
    absent.resize(std::min(absent.size(), classes_[c].free.size()));
    for (const std::size_t i : absent) {
      best.push_back({static_cast<int>(i) / experts_, static_cast<int>(i) % experts_});
    }
  }
  return best;
}

inline int ExpertCache::insert(int layer, int expert) {
  Class& c = class_of_layer(layer);
  if (!c.free.empty()) return occupy(pop_free(c), index(layer, expert));
  if (c.heap.empty()) return none;
  const int slot = c.heap.front();
  evict(slot);
  return occupy(slot, index(layer, expert));
}

inline int ExpertCache::insert_if_better(int layer, int expert, double probability) {
  Class& c = class_of_layer(layer);
  if (c.free.empty()) {
    if (c.heap.empty()) return none;
    const double least = scores_[static_cast<std::size_t>(at(c.heap.front()).key)];
    if (least >= std::max(scores_[index(layer, expert)], probability * every_token_)) return none;
  }
  return insert(layer, expert);
}

inline void ExpertCache::pin(int slot) noexcept {
  assert(at(slot).key != none);
  if (at(slot).pins++ == 0) leave(slot);
}

inline void ExpertCache::unpin(int slot) noexcept {
  assert(at(slot).pins > 0);
  if (--at(slot).pins == 0) enter(slot);
}

inline void ExpertCache::erase(int slot) {
  assert(at(slot).key != none && !pinned(slot));
  evict(slot);
  class_of_slot(slot).free.push_back(slot);
}

inline int ExpertCache::retire(int cls) {
  Class& c = classes_[static_cast<std::size_t>(cls)];
  int slot = none;
  if (!c.free.empty()) {
    slot = pop_free(c);
  } else if (!c.heap.empty()) {
    slot = c.heap.front();
    evict(slot);
  } else {
    return none;
  }
  at(slot).retired = true;
  --c.in_use;
  return slot;
}

inline void ExpertCache::retire_free(int slot) {
  Class& c = class_of_slot(slot);
  assert(at(slot).key == none && !at(slot).retired);
  std::erase(c.free, slot);
  at(slot).retired = true;
  --c.in_use;
}

inline void ExpertCache::restore(int slot) {
  assert(at(slot).retired);
  at(slot).retired = false;
  Class& c = class_of_slot(slot);
  ++c.in_use;
  c.free.push_back(slot);
}

inline int ExpertCache::pop_free(Class& c) noexcept {
  const int slot = c.free.back();
  c.free.pop_back();
  return slot;
}

inline int ExpertCache::occupy(int slot, std::size_t key) noexcept {
  assert(slot_of_[key] == none && at(slot).key == none && at(slot).pins == 0);
  at(slot).key = static_cast<std::int32_t>(key);
  at(slot).pins = 1;
  slot_of_[key] = slot;
  return slot;
}

inline void ExpertCache::evict(int slot) noexcept {
  leave(slot);
  slot_of_[static_cast<std::size_t>(at(slot).key)] = none;
  at(slot).key = none;
}

inline void ExpertCache::enter(int slot) noexcept {
  Class& c = class_of_slot(slot);
  c.heap.push_back(slot);  // never more than was reserved
  at(slot).place = static_cast<int>(c.heap.size()) - 1;
  rise(c, at(slot).place);
}

inline void ExpertCache::leave(int slot) noexcept {
  Class& c = class_of_slot(slot);
  const int place = std::exchange(at(slot).place, none), last = c.heap.back();
  c.heap.pop_back();
  if (last == slot) return;
  put(c, place, last);
  rise(c, place);
  sink(c, at(last).place);
}

inline void ExpertCache::rise(Class& c, int place) noexcept {
  const int slot = c.heap[static_cast<std::size_t>(place)];
  while (place > 0) {
    const int parent = (place - 1) / 4, above = c.heap[static_cast<std::size_t>(parent)];
    if (!before(slot, above)) break;
    put(c, place, above);
    place = parent;
  }
  put(c, place, slot);
}

inline void ExpertCache::sink(Class& c, int place) noexcept {
  const int slot = c.heap[static_cast<std::size_t>(place)], size = static_cast<int>(c.heap.size());
  for (int child = 4 * place + 1; child < size; child = 4 * place + 1) {
    int least = c.heap[static_cast<std::size_t>(child)];
    for (int i = child + 1; i < std::min(child + 4, size); ++i) {
      if (const int other = c.heap[static_cast<std::size_t>(i)]; before(other, least)) least = other;
    }
    if (!before(least, slot)) break;
    const int from = at(least).place;
    put(c, place, least);
    place = from;
  }
  put(c, place, slot);
}

inline void ExpertCache::order() noexcept {
  for (Class& c : classes_) {
    for (int place = static_cast<int>(c.heap.size()) / 4; place >= 0; --place) {
      if (place < static_cast<int>(c.heap.size())) sink(c, place);
    }
  }
}

}  // namespace qwen3next
