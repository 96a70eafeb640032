#pragma once
// The experts of one pass of one layer, as ExpertStore has them or reads them.

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "backends/expert_supply.hpp"
#include "weights/expert_store.hpp"

namespace qwen3next {

// One for each backend instance; the store outlives it.
//
// Picks get their slots in order, and are pinned from then until their wave is over.  While a wave computes, the picks
// behind it are read already: at most half of a class's slots belong to one reader, so that two can always go on, and
// whoever waits for slots holds none.
class ExpertReader final : public StreamedExperts {
 public:
  explicit ExpertReader(ExpertStore& store) : store_(store) {}
  ~ExpertReader() override {
    end();
    give_up();
  }
  ExpertReader(const ExpertReader&) = delete;

  void choose(int layer) noexcept override { layer_ = layer; }
  int count() const noexcept override { return store_.layout_.experts(); }
  const ExpertView& view(int i) const noexcept override { return views_[static_cast<std::size_t>(i)]; }

  bool complete() const noexcept override { return store_.complete(); }

  void expect(int layer, std::span<const std::int32_t> experts) override {
    Guess& guess = guesses_[layer % 2];
    guess.layer = layer;
    guess.experts.assign(experts.begin(), experts.end());
    guess.missing.clear();
  }

  void begin(std::span<const Pick> picks, int tokens) override {
    const auto n = picks.size();
    picks_ = picks;
    views_.resize(n), slots_.resize(n);
    given_.assign(n, 0);
    ids_.clear(), counts_.clear();
    const ExpertViews& views = store_.layout_.views(layer_);
    for (std::size_t i = 0; i < n; ++i) {
      ids_.push_back(picks[i].expert), counts_.push_back(picks[i].tokens);
      views_[i] = views[static_cast<std::size_t>(picks[i].expert)];
      for (WeightView* w : {&views_[i].gate, &views_[i].up, &views_[i].down}) {
        w->data = nullptr;
        store_.dense_.adopt_factors(*w);
      }
    }
    wave_ = {0, 0};
    taken_ = 0;
    requests_.clear();
    {
      const std::lock_guard lock(store_.mutex_);
      // More ahead if the disk has nothing to do by now; less if it still has, which costs little: most guesses are
      // right.
      if (std::exchange(looked_ahead_, false) && layer_ > 0)  // between tokens is the head
        at_once_ahead_ = std::clamp(at_once_ahead_ + (store_.in_flight_ == 0 ? 0.1 : -0.02), 1.0, double{most_ahead});
      store_.cache_->record(layer_, ids_, counts_, tokens);
      judge_guess();
      take_more();
      release_ahead(layer_);
    }
    store_.submit(requests_);
  }

  Range next_wave() override {
    const int n = static_cast<int>(picks_.size());
    requests_.clear();
    {
      std::unique_lock lock(store_.mutex_);
      release(wave_.begin, wave_.end);
      wave_ = {wave_.end, wave_.end};
      if (wave_.begin == n) return wave_;
      for (take_more(); taken_ == wave_.begin; take_more()) {
        if (!ahead_.empty())
          release_ahead(none);
        else
          wait(lock);
      }
      wave_.end = std::min(taken_, wave_.begin + most_at_once());
    }
    store_.submit(requests_);
    return wave_;
  }

  std::span<const std::int32_t> arrived() override {
    std::unique_lock lock(store_.mutex_);
    for (;;) {
      arrived_.clear();
      int missing = 0;
      for (int i = wave_.begin; i < wave_.end; ++i) {
        const auto at = static_cast<std::size_t>(i);
        if (given_[at]) continue;
        const ExpertStore::Slot& slot = store_.slots_[static_cast<std::size_t>(slots_[at])];
        if (slot.pending == 0 && slot.error != 0) store_.fail(slots_[at]);
        if (slot.ready()) {
          given_[at] = 1;
          arrived_.push_back(i);
        } else {
          ++missing;
        }
      }
      // Disks serve what they have all at once: a guess that is sent earlier delays what is waited for.
      if (missing <= 1 && taken_ == static_cast<int>(picks_.size()) && !std::exchange(looked_ahead_, true)) {
        requests_.clear();
        read_ahead();
        lock.unlock();
        store_.submit(requests_);
        lock.lock();
      }
      if (!arrived_.empty() || missing == 0) return arrived_;
      wait(lock);
    }
  }

  void give_up() noexcept override {
    const std::lock_guard lock(store_.mutex_);
    release_ahead(none);
  }

  void end() noexcept override {
    const std::lock_guard lock(store_.mutex_);
    release(wave_.begin, taken_);
    wave_ = {0, 0};
    taken_ = 0;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int none = ExpertCache::none;
  static constexpr int most_ahead = 64;

  // What a layer may need, most probable first; and what of it was not in memory, whether it was read or not.
  struct Guess {
    int layer = none;
    std::vector<std::int32_t> experts, missing;
  };
  struct Ahead {  // pinned until its layer comes
    int layer, slot;
  };

  int slots_in_use(int layer) const {
    return store_.cache_->slots_in_use(store_.layout_.class_of_layer()[static_cast<std::size_t>(layer)]);
  }
  int most_at_once() const { return std::clamp(slots_in_use(layer_) / 4, 1, 256); }

  void wait(std::unique_lock<std::mutex>& lock) {
    const Clock::time_point start = Clock::now();
    store_.changed_.wait(lock);
    store_.statistics_.stall_seconds += std::chrono::duration<double>(Clock::now() - start).count();
  }

  // Slots for this wave and the next, as far as there are some.
  void take_more() {
    ExpertCache& cache = *store_.cache_;
    ExpertStatistics& count = store_.statistics_;
    const int end = std::min(static_cast<int>(picks_.size()), wave_.begin + 2 * most_at_once());
    for (; taken_ < end; ++taken_) {
      const auto i = static_cast<std::size_t>(taken_);
      const int expert = picks_[i].expert;
      int slot = cache.slot_of(layer_, expert);
      if (slot != none) {
        cache.pin(slot);
        ExpertStore::Slot& s = store_.slots_[static_cast<std::size_t>(slot)];
        ++(s.ready() ? count.hits : count.awaited);
        if (std::exchange(s.guessed, false)) ++count.read_ahead_right;
      } else {
        slot = cache.insert(layer_, expert);
        if (slot == none) return;
        ++count.misses;
        store_.add_reads(slot, requests_);
      }
      slots_[i] = slot;
      const ExpertLayout::Place& place = store_.layout_.place(layer_, expert);
      const std::byte* memory = store_.slots_[static_cast<std::size_t>(slot)].memory;
      views_[i].gate.data = memory + place.data[0];
      views_[i].up.data = memory + place.data[1];
      views_[i].down.data = memory + place.data[2];
    }
  }

  // As much of the guess as can be read until the next layer begins: a wrong read costs little then, many more would
  // delay that layer.  A pass of many tokens needs it all.
  void read_ahead() {
    Guess& guess = guesses_[(layer_ + 1) % 2];
    if (guess.layer != layer_ + 1) return;
    ExpertCache& cache = *store_.cache_;
    const bool certain = guess.experts.size() == static_cast<std::size_t>(count());
    int most = std::min(most_ahead, slots_in_use(guess.layer) / 8);
    if (!certain) most = std::min(most, static_cast<int>(at_once_ahead_));
    for (const std::int32_t expert : guess.experts) {
      if (static_cast<int>(guess.missing.size()) >= most) break;
      if (cache.slot_of(guess.layer, expert) != none) continue;
      guess.missing.push_back(expert);
      if (!certain && ahead_precision_ < 0.25) continue;  // goes on judging, since texts change
      const int slot = cache.insert(guess.layer, expert);
      if (slot == none) break;
      store_.add_reads(slot, requests_);
      store_.slots_[static_cast<std::size_t>(slot)].guessed = true;
      ++store_.statistics_.read_ahead;
      ahead_.push_back({guess.layer, slot});
    }
  }

  void judge_guess() {
    Guess& guess = guesses_[layer_ % 2];
    if (std::exchange(guess.layer, none) != layer_ || guess.experts.size() == static_cast<std::size_t>(count())) return;
    const auto picked = [&](std::int32_t expert) { return std::binary_search(ids_.begin(), ids_.end(), expert); };
    const auto right = std::count_if(guess.experts.begin(), guess.experts.end(), picked);
    store_.statistics_.guessed += guess.experts.size();
    store_.statistics_.guessed_right += static_cast<std::uint64_t>(right);
    store_.statistics_.could_guess += ids_.size();
    for (const std::int32_t expert : guess.missing)
      ahead_precision_ += 0.02 * ((picked(expert) ? 1 : 0) - ahead_precision_);
  }

  // What was read ahead for `layer`, or (none) for any.
  void release_ahead(int layer) {
    bool any = false;
    std::erase_if(ahead_, [&](const Ahead& a) {
      if (layer != none && a.layer != layer) return false;
      store_.slots_[static_cast<std::size_t>(a.slot)].guessed = false;
      store_.unpin(a.slot);
      return any = true;
    });
    if (any) store_.changed_.notify_all();
  }

  void release(int begin, int end) {
    for (int i = begin; i < end; ++i) store_.unpin(slots_[static_cast<std::size_t>(i)]);
    if (begin < end) store_.changed_.notify_all();
  }

  ExpertStore& store_;
  int layer_ = 0;
  std::span<const Pick> picks_;
  std::vector<std::int32_t> ids_, counts_;  // of picks_
  std::vector<ExpertView> views_;
  std::vector<int> slots_;   // of picks [wave_.begin, taken_)
  std::vector<char> given_;  // by arrived()
  Range wave_{0, 0};
  int taken_ = 0;
  bool looked_ahead_ = false;
  std::vector<std::int32_t> arrived_;
  std::vector<ReadRequest> requests_;
  Guess guesses_[2];  // of this layer and the next
  std::vector<Ahead> ahead_;
  double ahead_precision_ = 1;  // of what was missing: a mean that forgets
  double at_once_ahead_ = 2;    // how many are read ahead: as many as keep the disk busy until the next layer begins
};

inline std::unique_ptr<StreamedExperts> ExpertStore::reader() { return std::make_unique<ExpertReader>(*this); }

}  // namespace qwen3next
