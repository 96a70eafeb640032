#pragma once
// The experts of a model of which some are on the card, as the backends of its sessions see them; how they are placed
// is for others to say (generate/cuda_offload.hpp).

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "backends/cuda/expert_slots.hpp"
#include "backends/cuda/offload_rates.hpp"
#include "backends/expert_supply.hpp"

namespace qwen3next::cuda {

// For any number of threads at the same time.
class CardExperts {
 public:
  virtual ~CardExperts() = default;

  // The layer's experts, with the table of their slots for few rows or many.
  virtual const CudaExperts& layer(int layer, bool few) const noexcept = 0;
  virtual const std::byte* const* table(int layer) const noexcept = 0;  // null: not on the card
  virtual int count() const noexcept = 0;                               // of each layer
  virtual double bytes_of_one(int layer) const noexcept = 0;            // in the file, on average

  // How rows are brought together with experts that are missing; as long as held, nothing comes or goes.
  virtual OffloadWay way(int layer, int rows) const = 0;
  virtual bool complete(int layer) const = 0;
  virtual void missing(int layer, std::vector<std::int32_t>& ids) const = 0;
  virtual void hold() = 0;
  virtual void release() noexcept = 0;

  // Where these experts are now in this machine's memory; and whether the card can read there.
  virtual void find(int layer, std::span<const ExpertSupply::Pick> picks, std::vector<ExpertView>& views) const = 0;
  virtual bool shared(const ExpertView& view) const noexcept = 0;

  virtual Transit& transit() noexcept = 0;

  // What was picked in a pass of `tokens` tokens, ascending, and of that what was missing; for passes that nobody waits
  // for: where the card counts it, [experts].
  virtual void picked(int layer, std::span<const ExpertSupply::Pick> picks, std::span<const ExpertSupply::Pick> missed,
                      int tokens) = 0;
  virtual std::int32_t* counts(int layer, int tokens) = 0;
  virtual void processor_took(double seconds, double bytes, double products) = 0;
  virtual void link_took(double seconds, double bytes) = 0;

  // The card has something else to do: a good time for experts to move.
  virtual void between_passes() = 0;
};

// Experts in this machine's memory: one wave.
class FoundExperts final : public ExpertSupply {
 public:
  explicit FoundExperts(const CardExperts& experts) : experts_(experts) {}
  void choose(int layer) noexcept { layer_ = layer; }

  int count() const noexcept override { return experts_.count(); }
  void begin(std::span<const Pick> picks, int) override {
    experts_.find(layer_, picks, views_);
    for (std::size_t i = all_.size(); i < picks.size(); ++i) all_.push_back(static_cast<std::int32_t>(i));
    wave_given_ = picks_given_ = false;
  }
  const ExpertView& view(int i) const noexcept override { return views_[static_cast<std::size_t>(i)]; }
  Range next_wave() override {
    const int end = static_cast<int>(views_.size());
    return std::exchange(wave_given_, true) ? Range{end, end} : Range{0, end};
  }
  std::span<const std::int32_t> arrived() override {
    return std::exchange(picks_given_, true) ? std::span<const std::int32_t>() : std::span(all_).first(views_.size());
  }

 private:
  const CardExperts& experts_;
  int layer_ = 0;
  std::vector<ExpertView> views_;  // of the picks
  std::vector<std::int32_t> all_;
  bool wave_given_ = false, picks_given_ = false;
};

// Nothing comes or goes while it lives.
class HeldExperts {
 public:
  explicit HeldExperts(CardExperts& experts) : experts_(experts) { experts_.hold(); }
  ~HeldExperts() { experts_.release(); }
  HeldExperts(const HeldExperts&) = delete;

 private:
  CardExperts& experts_;
};

}  // namespace qwen3next::cuda
