#pragma once
// The experts of a model of which some are on the card, as the backends of its sessions see them; how they are placed
// is for others to say (generate/cuda_offload.hpp).

#include <cstdint>
#include <span>
#include <vector>

#include "backends/cuda/expert_slots.hpp"
#include "backends/cuda/offload_rates.hpp"
#include "backends/expert_supply.hpp"

namespace qwen3next::cuda {

// For any number of threads at the same time.
class CardExperts {
 public:
  virtual ~CardExperts() = default;

  // The layer's experts, with the table of their slots.
  virtual const CudaExperts& layer(int layer) const noexcept = 0;
  virtual const ExpertViews& views(int layer) const noexcept = 0;

  // How rows are brought together with experts that are missing; as long as held, nothing comes or goes.
  virtual OffloadWay way(int layer, int rows) const = 0;
  virtual bool complete(int layer) const = 0;
  virtual void missing(int layer, std::vector<std::int32_t>& ids) const = 0;
  virtual void hold() = 0;
  virtual void release() noexcept = 0;

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
