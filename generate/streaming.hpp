#pragma once
// A model under a memory budget: dense weights first, then sessions; what is left is the experts'.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/available_memory.hpp"
#include "core/message.hpp"
#include "model/config.hpp"
#include "model/memory_plan.hpp"
#include "model/weights.hpp"
#include "weights/checkpoint.hpp"
#include "weights/expert_reader.hpp"
#include "weights/expert_store.hpp"

namespace qwen3next {

class Streaming {
 public:
  // `checkpoint` outlives it.  `memory` is for all of it, in bytes; `profile`, if not empty, a file that `qwen3next
  // experts --save` wrote.
  Streaming(const Checkpoint& checkpoint, std::uint64_t memory, std::filesystem::path profile = {},
            ExpertStore::MakeQueue make_queue = {})
      : checkpoint_(checkpoint), memory_(memory), profile_(std::move(profile)), make_queue_(std::move(make_queue)) {}

  // What a session takes, as long as it lives, or the cache of prefixes.
  class Charge {
   public:
    explicit Charge(Streaming& budget) : budget_(&budget) {}
    Charge(const Charge&) = delete;
    ~Charge() { budget_->add(0 - bytes_); }
    // From now on.  Throws Error if the budget does not hold it beside the fewest experts.
    void set(std::uint64_t bytes) {
      if (bytes == bytes_) return;
      budget_->add(bytes - bytes_);
      bytes_ = bytes;
    }
    void at_least(std::uint64_t bytes) { set(std::max(bytes, bytes_)); }

   private:
    Streaming* budget_;
    std::uint64_t bytes_ = 0;
  };

  // Reads the dense weights, and gives the weights with these where they are now.  Once, when the first session is
  // charged; again only after it threw.
  ModelWeights<Views> load() {
    const std::lock_guard lock(mutex_);
    ModelWeights<Views> weights = checkpoint_.weights;
    auto store = std::make_unique<ExpertStore>(checkpoint_, make_queue_);
    store->load(weights, experts_memory(*store));
    if (!profile_.empty()) store->warm(ExpertProfile::load(profile_));
    store_ = std::move(store);
    return weights;
  }

  std::unique_ptr<StreamedExperts> reader() { return store_->reader(); }

  // Adds to a session's plan what the budget leaves for experts.  Reads the profile, if there is one, no weights.
  void add_to(MemoryPlan& plan, const Config& c) const;

  // Whether a pass can fail any more because of a file.
  bool complete() const { return store_->complete(); }

  std::optional<ExpertStatistics> statistics() const {
    const std::lock_guard lock(mutex_);
    if (!store_) return {};
    return store_->statistics();
  }

 private:
  // What the experts may take, beside all that is charged.
  std::uint64_t experts_memory(const ExpertStore& store) const {
    const std::uint64_t fixed = store.dense_bytes() + checkpoint_.copied_bytes();
    const std::uint64_t least = store.layout().slot_memory(store.layout().slots(0, ExpertStore::least_slots));
    if (fixed + charged_ + least > memory_) {
      throw_error(display(checkpoint_.path), ": a budget of ", mebibytes(memory_), " is too small: dense weights take ",
                  mebibytes(fixed), ", sessions ", mebibytes(charged_), ", the fewest experts ", mebibytes(least),
                  "; give ", mebibytes(fixed + charged_ + least), " or more, or open shorter sessions");
    }
    // Nothing is taken before it is used, so that too much would be noticed by whoever is killed for it.
    const std::uint64_t all = std::min(memory_, fixed + charged_ + store.layout().bytes());
    const std::optional<AvailableMemory> available = store_ ? std::nullopt : available_memory();
    if (available && all > available->bytes) {
      throw_error(display(checkpoint_.path), ": a budget of ", mebibytes(memory_),
                  " is more than there is: ", available->limit, " leaves ", mebibytes(available->bytes),
                  "; give less, or auto");
    }
    return memory_ - fixed - charged_;
  }
  static std::string mebibytes(std::uint64_t bytes) { return concat((bytes + (1 << 20) - 1) >> 20, " MiB"); }

  void add(std::uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    charged_ += bytes;
    if (!store_) return;
    try {
      store_->resize(experts_memory(*store_));
    } catch (...) {
      charged_ -= bytes;
      throw;
    }
  }

  const Checkpoint& checkpoint_;
  std::uint64_t memory_;
  std::filesystem::path profile_;
  ExpertStore::MakeQueue make_queue_;
  mutable std::mutex mutex_;
  std::uint64_t charged_ = 0;
  std::unique_ptr<ExpertStore> store_;
};

inline void Streaming::add_to(MemoryPlan& plan, const Config& c) const {
  const ExpertStore store(checkpoint_);
  const ExpertLayout& layout = store.layout();
  plan.budget = memory_;
  plan.weights_mapped = 0;
  plan.weights_resident = store.dense_bytes();
  plan.state_copy = plan.delta_state;
  plan.experts = std::int64_t{layout.layers()} * layout.experts();
  const std::uint64_t fixed = plan.weights_resident + plan.weights_copied + plan.session() + plan.state_copy;
  plan.needed = fixed + layout.slot_memory(layout.slots(0, ExpertStore::least_slots));
  const std::vector<int> slots = layout.slots(memory_ > fixed ? memory_ - fixed : 0, ExpertStore::least_slots);
  plan.experts_resident = layout.slot_memory(slots);
  for (const int n : slots) plan.experts_held += n;

  // Of each class, those that are picked most stay.  The MTP layer takes no part in plain decoding.
  ExpertCache cache(layout.layers(), layout.experts(), layout.class_of_layer(), slots);
  if (!profile_.empty()) cache.warm(ExpertProfile::load(profile_));
  std::vector<std::vector<std::pair<double, double>>> picks(slots.size());  // of each class: rate, bytes
  double all = 0, hit = 0, bytes = 0;
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
    const int cls = layout.class_of_layer()[static_cast<std::size_t>(layer)];
    for (int expert = 0; expert < layout.experts(); ++expert) {
      const double rate =
          profile_.empty() ? static_cast<double>(c.num_experts_per_tok) / layout.experts() : cache.rate(layer, expert);
      picks[static_cast<std::size_t>(cls)].push_back({rate, static_cast<double>(layout.place(layer, expert).bytes())});
    }
  }
  for (std::size_t cls = 0; cls < picks.size(); ++cls) {
    std::sort(picks[cls].begin(), picks[cls].end(), std::greater<>());
    for (std::size_t i = 0; i < picks[cls].size(); ++i) {
      all += picks[cls][i].first;
      if (i < static_cast<std::size_t>(slots[cls]))
        hit += picks[cls][i].first;
      else
        bytes += picks[cls][i].first * picks[cls][i].second;
    }
  }
  plan.hit_rate = all > 0 ? hit / all : 0;
  plan.missed_bytes_per_token = bytes;
}

// What this process may take and leave the system room to work.  Nothing: this system does not say.
inline std::optional<std::uint64_t> spare_memory() {
  constexpr std::uint64_t least_left = std::uint64_t{512} << 20;
  const std::optional<AvailableMemory> available = available_memory();
  if (!available) return {};
  const std::uint64_t left = std::max(least_left, available->bytes / 16);
  return available->bytes > left ? available->bytes - left : 1;
}

}  // namespace qwen3next
