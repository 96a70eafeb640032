#pragma once
// An Engine over any backend: its weights, and timelines on it.

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "generate/backend_timeline.hpp"

namespace qwen3next {

// Views of the files, or of where they were read to, as a backend holds them; experts that are streamed learn which
// layer they belong to, the MTP layer being the last.
template <BackendOps B>
void take_weights(const ModelWeights<Views>& views, ModelWeights<B>& mine) {
  zip(views, mine, [](const auto& view, auto& weight) { weight = view; });
  if constexpr (requires(typename B::Experts experts) { experts.layer; }) {
    for (std::size_t i = 0; i < mine.layers.size(); ++i) mine.layers[i].mlp.experts.layer = static_cast<int>(i);
    if (mine.mtp) mine.mtp->layer.mlp.experts.layer = static_cast<int>(mine.layers.size());
  }
}

// `make_backend(KvType)` gives each timeline a backend instance of its own.
template <BackendOps B, class MakeBackend>
class BackendEngine final : public Engine {
 public:
  BackendEngine(const Config& config, const ModelWeights<Views>& views, KvType default_kv, MakeBackend make_backend,
                std::string description, std::shared_ptr<Streaming> streaming)
      : config_(config),
        default_kv_(default_kv),
        make_backend_(std::move(make_backend)),
        description_(std::move(description)),
        streaming_(std::move(streaming)) {
    if (!streaming_) take(views);
  }
  std::unique_ptr<Timeline> timeline(const TimelineOptions& options) const override {
    if (options.batch < 1) throw Error("batch is " + std::to_string(options.batch) + ", expected at least 1");
    const KvType kv = options.kv.value_or(default_kv_);
    std::unique_ptr<Streaming::Charge> charge;
    if (streaming_) {
      charge = std::make_unique<Streaming::Charge>(*streaming_);
      charge->at_least(session_bytes(config_, kv, 1, 1));
      const std::lock_guard lock(loading_);
      if (!loaded_) take(streaming_->load());
      loaded_ = true;
    }
    return std::make_unique<BackendTimeline<B>>(make_backend_(kv), config_, weights_, kv, options.batch, options.mtp,
                                                streaming_.get(), std::move(charge));
  }
  std::string description() const override { return description_; }
  KvType default_kv() const override { return default_kv_; }
  std::uint64_t state_bytes() const override {
    return plan_session(config_, default_kv_, 1, 1).delta_state + sizeof(float) * hidden_size();
  }
  std::uint64_t kv_bytes(KvType kv, std::int64_t position, std::int64_t mtp_position) const override {
    Config trunk = config_;
    trunk.has_mtp = false;
    const std::uint64_t row =
        2 * static_cast<std::uint64_t>(config_.num_key_value_heads) * row_bytes(stored_type(kv), config_.head_dim);
    return plan_session(trunk, kv, position, 1).kv_cache + static_cast<std::uint64_t>(mtp_position) * row;
  }
  std::shared_ptr<const TimelineSnapshot> blank_snapshot(KvType kv, std::int64_t position, std::int64_t mtp_position,
                                                         const TimelineSnapshot* longer) const override {
    if constexpr (KeepsStatesElsewhere<B>) {
      return blank<typename B::Host>(B::host_backend(kv), kv, position, mtp_position, longer);
    } else {
      return blank<B>(make_backend_(kv), kv, position, mtp_position, longer);
    }
  }
  // Of the hidden state in a snapshot.
  std::size_t hidden_size() const { return config_.has_mtp ? static_cast<std::size_t>(config_.hidden_size) : 0; }

  std::optional<ExpertStatistics> expert_statistics() const override {
    if constexpr (requires { make_backend_.statistics(); })
      return make_backend_.statistics();
    else
      return streaming_ ? streaming_->statistics() : std::nullopt;
  }
  void add_to([[maybe_unused]] MemoryPlan& plan) const override {
    if constexpr (requires { make_backend_.add_to(plan); }) make_backend_.add_to(plan);
  }

 private:
  void take(const ModelWeights<Views>& views) const {
    if constexpr (requires { make_backend_.take(views, weights_); })
      make_backend_.take(views, weights_);
    else
      take_weights<B>(views, weights_);
  }

  // In this machine's memory, as H keeps states.
  template <BackendOps H>
  std::shared_ptr<const TimelineSnapshot> blank(H backend, KvType kv, std::int64_t position, std::int64_t mtp_position,
                                                const TimelineSnapshot* longer) const {
    SequenceState<H> state(backend, config_);
    state.position = position, state.mtp_position = mtp_position;
    state.hidden.resize(hidden_size());
    const auto* whole = longer ? &dynamic_cast<const BackendSnapshot<H>&>(*longer).state : nullptr;
    const auto make_room = [&](auto& kv_cache, const auto* of_whole, std::int64_t length) {
      if (of_whole) {
        kv_cache = *of_whole;
        kv_cache->truncate(length);
      } else if (kv_cache) {
        kv_cache->extend(static_cast<int>(length));
      }
    };
    for (std::size_t i = 0; i < state.layers.size(); ++i)
      if (state.layers[i].kv) make_room(state.layers[i].kv, whole ? &whole->layers[i].kv : nullptr, position);
    if (state.mtp.kv) make_room(state.mtp.kv, whole ? &whole->mtp.kv : nullptr, mtp_position);
    return std::make_shared<BackendSnapshot<H>>(&weights_, kv, std::move(state));
  }

  Config config_;
  KvType default_kv_;
  MakeBackend make_backend_;
  std::string description_;
  std::shared_ptr<Streaming> streaming_;
  mutable std::mutex loading_;  // streamed weights are read for the first timeline
  mutable bool loaded_ = false;
  mutable ModelWeights<B> weights_;
};

}  // namespace qwen3next
