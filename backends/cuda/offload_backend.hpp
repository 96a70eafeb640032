#pragma once
// The CUDA backend of a card that holds some of the experts.  The others come to the rows in one of three ways, see
// OffloadWay; what lies on the card is computed there at the same time.
//
// What was copied is computed bit for bit as if it had been on the card.  What the processor computes is the CPU
// backend's, whose activations are quantised to int8: of these experts' part of a layer's sum the NMSE is about 1e-4,
// so rows agree with those of another pass, in which other experts were on the card, to that bound and not bit for bit.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "backends/cuda/card_experts.hpp"
#include "backends/cuda/cuda_backend.hpp"
#include "backends/cuda/processor_experts.hpp"

namespace qwen3next {

namespace cuda {

// The experts of a layer as products of many rows take them: first those on the card, then those that a supply has,
// in as many waves as the transit memory needs.
class SuppliedWaves final : public ExpertWaves {
 public:
  // `picks`: those to be supplied.  They are brought anew each time that the waves begin.
  SuppliedWaves(CardExperts& experts, int layer, ExpertSupply& supply, std::span<const ExpertSupply::Pick> picks,
                int tokens)
      : experts_(experts),
        transit_(experts.transit()),
        layer_(experts.layer(layer, false)),
        supply_(supply),
        picks_(picks),
        tokens_(tokens) {}

  const std::byte* const* next() override {
    if (!begun_) {
      begun_ = true;
      supply_.begin(picks_, tokens_);
      arrived_ = {};
      return layer_.matrices.slots;
    }
    gather();
    if (batch_.empty()) {
      begun_ = false;
      return nullptr;
    }
    const std::byte* const* const slots = transit_.bring(nullptr, layer_.matrices, batch_);
    const Clock::time_point now = Clock::now();
    if (first_sent_ == Clock::time_point())
      first_sent_ = now;
    else
      followed_ += batch_.size(), seconds_ = now - first_sent_;
    return slots;
  }

  // How many came behind the first wave, and how long they took to send.  Until the first is sent the card may be busy
  // with whatever was launched before; from then on staging memory is full, and it empties as fast as experts arrive.
  double followed() const noexcept { return static_cast<double>(followed_); }
  double seconds() const noexcept { return seconds_.count(); }

 private:
  using Clock = std::chrono::steady_clock;

  // As many as come before the supply wants some back, and fit.
  void gather() {
    batch_.clear();
    while (batch_.size() < static_cast<std::size_t>(transit_.slots())) {
      if (arrived_.empty()) arrived_ = supply_.arrived();
      if (arrived_.empty()) {
        if (!batch_.empty()) return;
        const ExpertSupply::Range wave = supply_.next_wave();
        if (wave.begin == wave.end) return;
        continue;
      }
      const std::int32_t i = arrived_.front();
      arrived_ = arrived_.subspan(1);
      const ExpertView& view = supply_.view(i);
      batch_.push_back({picks_[static_cast<std::size_t>(i)].expert, view, experts_.shared(view)});
    }
  }

  const CardExperts& experts_;
  Transit& transit_;
  const CudaExperts& layer_;
  ExpertSupply& supply_;
  std::span<const ExpertSupply::Pick> picks_;
  int tokens_;
  std::span<const std::int32_t> arrived_;
  std::vector<Transit::Expert> batch_;
  bool begun_ = false;
  Clock::time_point first_sent_;
  std::size_t followed_ = 0;
  std::chrono::duration<double> seconds_{};
};

}  // namespace cuda

class OffloadCudaBackend : public CudaBackend {
 public:
  struct Experts {
    int layer = -1;
  };

  // `supply`: two, where experts are streamed from files; null: they are mapped.
  OffloadCudaBackend(std::shared_ptr<cuda::Device> device, KvType kv, std::shared_ptr<cuda::CardExperts> experts,
                     const CpuOptions& cpu, std::unique_ptr<StreamedExperts> processor_supply = {},
                     std::unique_ptr<StreamedExperts> card_supply = {})
      : CudaBackend(device, kv),
        card_(experts),
        processor_(
            std::make_unique<cuda::ProcessorExperts>(device, std::move(experts), cpu, std::move(processor_supply))),
        streamed_(std::move(card_supply)),
        found_(std::make_unique<cuda::FoundExperts>(*card_)),
        scratch_(std::move(device)) {}

  void experts_add(Tensor x, Tensor h, Tensor logits, Routing& routing, const Experts& experts,
                   const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) {
    if (card_->complete(experts.layer)) {
      const cuda::HeldExperts held(*card_);
      if (card_->complete(experts.layer))
        return add_on_card(x, h, logits, routing, card_->layer(experts.layer, few(x)), shared, k, normalise);
    }
    switch (card_->way(experts.layer, x.n_rows)) {
      case cuda::OffloadWay::processor:
        return add_with_processor(x, h, logits, routing, experts.layer, shared, k, normalise);
      case cuda::OffloadWay::copy:
        return add_with_copies(x, h, logits, routing, experts.layer, shared, k, normalise);
      default:
        return add_streamed(x, h, logits, routing, experts.layer, shared, k, normalise);
    }
  }

  void experts(Tensor out, Tensor x, const Experts& experts, const Routing& routing) {
    with_missing(experts.layer, x.n_rows, [&](cuda::ExpertWaves& waves) {
      const cuda::CudaExperts& all = card_->layer(experts.layer, false);
      cuda::experts_many(device(), scratch_,
                         {.out = out, .x = x, .experts = &all, .routing = &routing, .waves = &waves});
    });
  }

  // Nothing is gathered: experts must not come or go between a launch's choice of them and its start, and the processor
  // must know of what the card waits for.
  bool begin_pass() const noexcept { return false; }

  std::span<const float> host(Tensor row) {
    processor_->drain();
    card_->between_passes();  // the card computes the head
    return CudaBackend::host(row);
  }

  // After a pass that failed or was cancelled: what was launched goes on to its end, and is of no interest.
  void give_up() noexcept {
    try {
      processor_->drain();
    } catch (...) {
    }
  }

 private:
  using Pick = ExpertSupply::Pick;

  static bool few(const Tensor& x) noexcept { return x.n_rows <= cuda::max_few_rows; }

  // Picks of experts that are not there count for nothing.
  void add_on_card(Tensor x, Tensor h, Tensor logits, Routing& routing, const cuda::CudaExperts& experts,
                   const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) {
    CudaBackend::experts_add(x, h, logits, routing, experts, shared, k, normalise);
  }

  // The card goes on at once with what it has; the processor's part is added when it is there.
  void add_with_processor(Tensor x, Tensor h, Tensor logits, Routing& routing, int layer,
                          const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) {
    processor_->reserve(h.n_rows, k, h.n_cols);
    cuda::RowExchange& exchange = processor_->exchange();
    const cuda::CudaExperts& experts = card_->layer(layer, few(h));
    {
      const cuda::HeldExperts held(*card_);
      router(routing, logits, k, normalise);
      exchange.send(device(), h, routing, card_->table(layer));
      processor_->take({layer, h.n_rows, k, h.n_cols});
      add_on_card(x, h, logits, routing, experts, shared, k, normalise);
    }
    exchange.add_answer(device(), x);
    // What files throw is for the pass, whose caller goes back then.
    if (streamed_ && !streamed_->complete()) processor_->drain();
  }

  // Waits to know what is picked, copies that.
  void add_with_copies(Tensor x, Tensor h, Tensor logits, Routing& routing, int layer,
                       const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) {
    processor_->reserve(h.n_rows, k, h.n_cols);
    cuda::RowExchange& exchange = processor_->exchange();
    const cuda::HeldExperts held(*card_);
    const cuda::CudaExperts& experts = card_->layer(layer, few(h));
    router(routing, logits, k, normalise);
    exchange.send(device(), h, routing, card_->table(layer));
    processor_->wait_for_rows(h.n_rows, k, h.n_cols, counter_);
    card_->picked(layer, counter_.all(), counter_.missed(), h.n_rows);
    if (counter_.missed().empty()) return add_on_card(x, h, logits, routing, experts, shared, k, normalise);

    const std::lock_guard lock(card_->transit().mutex);
    Supply supply(*this, layer);
    if (!few(h) || counter_.missed().size() > static_cast<std::size_t>(card_->transit().slots())) {
      cuda::SuppliedWaves waves(*card_, layer, *supply, counter_.missed(), h.n_rows);
      return add_routed(x, h, routing, card_->layer(layer, false), shared, &waves);
    }
    add_on_card(x, h, logits, routing, all_at_once(layer, *supply), shared, k, normalise);
  }

  // The experts on the card and those that are missed, in one table.
  cuda::CudaExperts all_at_once(int layer, ExpertSupply& supply) {
    cuda::CudaExperts all = card_->layer(layer, true);
    int brought = 0;
    supply.begin(counter_.missed(), 1);
    for (auto wave = supply.next_wave(); wave.begin < wave.end; wave = supply.next_wave()) {
      copies_.clear();
      for (auto arrived = supply.arrived(); !arrived.empty(); arrived = supply.arrived()) {
        for (const std::int32_t i : arrived) {
          const ExpertView& view = supply.view(i);
          copies_.push_back({counter_.missed()[static_cast<std::size_t>(i)].expert, view, card_->shared(view)});
        }
      }
      all.matrices.slots = card_->transit().bring(all.matrices.slots, all.matrices, copies_, brought);
      brought += static_cast<int>(copies_.size());
    }
    return all;
  }

  void add_streamed(Tensor x, Tensor h, Tensor logits, Routing& routing, int layer,
                    const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) {
    router(routing, logits, k, normalise);
    cuda::count_picks(device(), routing, card_->counts(layer, h.n_rows));
    with_missing(layer, h.n_rows, [&](cuda::ExpertWaves& waves) {
      add_routed(x, h, routing, card_->layer(layer, false), shared, &waves);
    });
  }

  // f(waves): all that the layer is missing.
  template <class F>
  void with_missing(int layer, int rows, F f) {
    const std::lock_guard lock(card_->transit().mutex);
    const cuda::HeldExperts held(*card_);
    card_->missing(layer, missing_);
    picks_.clear();
    for (const std::int32_t id : missing_) picks_.push_back({id, rows});
    Supply supply(*this, layer);
    cuda::SuppliedWaves waves(*card_, layer, *supply, picks_, rows);
    f(waves);
    if (waves.followed() > 0) card_->link_took(waves.seconds(), waves.followed() * card_->bytes_of_one(layer));
  }

  // Where the missing experts of a layer come from.
  class Supply {
   public:
    Supply(OffloadCudaBackend& be, int layer) : be_(be) {
      if (be.streamed_)
        be.streamed_->choose(layer);
      else
        be.found_->choose(layer);
    }
    ~Supply() {
      if (be_.streamed_) be_.streamed_->end();
    }
    Supply(const Supply&) = delete;
    ExpertSupply& operator*() const noexcept {
      return be_.streamed_ ? static_cast<ExpertSupply&>(*be_.streamed_) : *be_.found_;
    }

   private:
    OffloadCudaBackend& be_;
  };

  std::shared_ptr<cuda::CardExperts> card_;
  std::unique_ptr<cuda::ProcessorExperts> processor_;
  std::unique_ptr<StreamedExperts> streamed_;
  std::unique_ptr<cuda::FoundExperts> found_;
  cuda::DeviceScratch scratch_;
  cuda::PickCounter counter_;
  std::vector<std::int32_t> missing_;
  std::vector<Pick> picks_;
  std::vector<cuda::Transit::Expert> copies_;
};

}  // namespace qwen3next
