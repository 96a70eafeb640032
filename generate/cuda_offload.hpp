#pragma once
// A model on a card that does not hold all of it: dense weights, states and as many experts as fit are there, the other
// experts in this machine's memory, mapped or streamed.

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "backends/cuda/host_experts.hpp"
#include "backends/cuda/offload_backend.hpp"
#include "core/message.hpp"
#include "generate/backend_engine.hpp"
#include "generate/streaming.hpp"
#include "model/memory_plan.hpp"
#include "weights/expert_placement.hpp"

namespace qwen3next::detail {

// What lies where, in bytes of the card's memory.
struct CardPlan {
  std::uint64_t budget = 0;    // all that may be taken
  std::uint64_t dense = 0;     // weights but the routed experts
  std::uint64_t sessions = 0;  // kept free for states and scratch memory
  std::uint64_t transit = 0;   // for experts that pass through; 0 if all are on the card
  std::uint64_t experts = 0;   // in slots
  std::uint64_t all_experts = 0;
  std::vector<int> slots;  // of each class
  int transit_slots = 0;
  bool complete() const noexcept { return transit == 0; }
  std::uint64_t least() const noexcept { return dense + sessions + transit; }
  std::string text(const SlotClasses& classes) const {
    int held = 0, all = 0;
    for (int cls = 0; cls < classes.count(); ++cls)
      held += slots[static_cast<std::size_t>(cls)], all += classes.all_of(cls);
    return concat("of ", mebibytes(budget), " on the GPU: dense weights ", mebibytes(dense), ", sessions and scratch ",
                  mebibytes(sessions), ", experts that pass through ", mebibytes(transit), ", ", held, " of ", all,
                  " experts ", mebibytes(experts));
  }
  static std::string mebibytes(std::uint64_t bytes) { return concat((bytes + (1 << 20) - 1) >> 20, " MiB"); }
};

// Sessions of the first so many positions have room beside the experts; what longer ones take more is theirs to find.
inline constexpr std::int64_t planned_context = 16384;
inline constexpr std::uint64_t card_slack = std::uint64_t{512} << 20;  // kernels, tables, staging memory

inline std::uint64_t card_session_bytes(const Config& c, KvType kv, std::int64_t context, int batch) {
  const MemoryPlan plan = plan_session(c, kv, context, batch);
  // Activations have an f16 image, products of experts a row for each pick.
  const std::uint64_t parts = sizeof(float) * static_cast<std::uint64_t>(std::min<std::int64_t>(batch, context)) *
                              static_cast<std::uint64_t>(c.num_experts_per_tok) *
                              static_cast<std::uint64_t>(c.hidden_size + c.moe_intermediate_size);
  return plan.kv_cache + 2 * plan.delta_state + plan.scratch * 3 / 2 + parts;
}

// Of a budget.  Throws Error if it is too small for the model without any expert.
inline CardPlan plan_card(std::uint64_t budget, std::uint64_t dense, std::uint64_t session, const SlotClasses& classes,
                          int picks_of_few_rows) {
  CardPlan plan;
  plan.budget = budget, plan.dense = dense, plan.sessions = session + card_slack;
  plan.all_experts = classes.all_bytes();
  if (dense + plan.sessions + plan.all_experts <= budget) {
    plan.experts = plan.all_experts;
    for (int cls = 0; cls < classes.count(); ++cls) plan.slots.push_back(classes.all_of(cls));
    return plan;
  }
  plan.transit_slots = std::min(picks_of_few_rows, classes.experts);
  plan.transit = cuda::Transit::bytes(plan.transit_slots, std::ranges::max(classes.slot_bytes), classes.experts);
  if (budget < plan.least()) {
    throw_error("--gpu-memory: ", CardPlan::mebibytes(budget), " is too small: dense weights take ",
                CardPlan::mebibytes(dense), ", sessions and scratch memory ", CardPlan::mebibytes(plan.sessions),
                ", experts that pass through ", CardPlan::mebibytes(plan.transit), "; give ",
                CardPlan::mebibytes(plan.least()), " or more, or use cpu");
  }
  plan.slots = classes.slots(budget - plan.least());
  plan.experts = classes.bytes(plan.slots);
  return plan;
}

// Where the experts of all layers are.
class PlacedExperts final : public cuda::CardExperts {
 public:
  PlacedExperts(std::shared_ptr<cuda::Device> device, const ModelWeights<Views>& weights, int picks_per_token,
                const SlotClasses& classes, const CardPlan& plan, cuda::OffloadWay way)
      : device_(std::move(device)),
        k_(picks_per_token),
        forced_(way),
        slots_(device_, slot_counts(classes, plan), static_cast<int>(classes.of_layer.size()), classes.experts),
        transit_(device_, plan.transit_slots, std::ranges::max(classes.slot_bytes), classes.experts),
        placement_(classes, plan.slots),
        trunk_(static_cast<int>(weights.layers.size())),
        counts_(device_, classes.of_layer.size() * static_cast<std::size_t>(classes.experts) * sizeof(std::int32_t),
                "counts of picks"),
        counted_(counts_.size()),
        counted_tokens_(classes.of_layer.size()) {
    device_->clear(counts_.data(), counts_.size());
    for (const LayerWeights<Views>& layer : weights.layers) views_.push_back(layer.mlp.experts);
    if (weights.mtp) views_.push_back(weights.mtp->layer.mlp.experts);
    for (std::size_t i = 0; i < views_.size(); ++i) {
      cuda::CudaExperts& layer = layers_.emplace_back();
      layer.matrices = cuda::expert_matrices(views_[i]);
      layer.matrices.slots = slots_.table(static_cast<int>(i));
      layer.complete = false;
      take_scales(layer, views_[i]);
      layers_of_few_.push_back(layer);
      layers_of_few_.back().matrices.slots = slots_.table_with_zeros(static_cast<int>(i));
      double bytes = 0;
      for (const ExpertView& e : views_[i]) bytes += static_cast<double>(bytes_of(e));
      expert_bytes_.push_back(bytes / static_cast<double>(views_[i].size()));
    }
    statistics_.experts = views_.size() * static_cast<std::uint64_t>(classes.experts);
    statistics_.slots = static_cast<std::uint64_t>(placement_.slots());
  }

  ~PlacedExperts() override { device_->on_full(nullptr); }

  static std::uint64_t bytes_of(const ExpertView& e) noexcept { return e.gate.bytes() + e.up.bytes() + e.down.bytes(); }

  // Takes the first experts to the card, in the order of the file.  `progress` is told of bytes.
  // With a team, the others to large pages of this machine's memory.
  template <class F>
  void fill(const ExpertProfile* profile, const cpu::Team* team, F progress) {
    std::vector<ExpertPlacement::Placed> placed = placement_.fill(trunk_, profile);
    const auto view = [&](const ExpertPlacement::Placed& p) -> const ExpertView& { return view_of(p.key); };
    std::ranges::sort(placed, {}, [&](const auto& p) { return view(p).gate.data; });
    in_file_ = views_;
    {
      cuda::Uploader uploader(device_);
      for (const ExpertPlacement::Placed& p : placed) {
        uploader.expert(view(p), layers_[static_cast<std::size_t>(p.key.layer)].matrices, slots_.slot(p.slot));
        progress(bytes_of(view(p)));
      }
      uploader.finish();
      device_->wait();
    }
    std::vector<std::vector<cuda::SlotEntry>> tables(views_.size());
    for (const ExpertPlacement::Placed& p : placed)
      tables[static_cast<std::size_t>(p.key.layer)].push_back({p.key.expert, slots_.slot(p.slot)});
    for (std::size_t i = 0; i < tables.size(); ++i) slots_.set(static_cast<int>(i), tables[i]);
    if (team) {
      team_ = *team;
      std::vector<ExpertView*> others;
      for (int layer = 0; layer < placement_.layers(); ++layer) {
        for (int e = 0; e < placement_.experts(); ++e) {
          if (!placement_.is_there(layer, e))
            others.push_back(&views_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(e)]);
        }
      }
      host_.take(others, *team);
    }
    measure_link();
    device_->on_full([this] { return give_back(); });
    missed_share_ = 1 - static_cast<double>(placed.size()) / static_cast<double>(statistics_.experts);
  }

  const cuda::CudaExperts& layer(int layer, bool few) const noexcept override {
    return (few ? layers_of_few_ : layers_)[static_cast<std::size_t>(layer)];
  }
  const std::byte* const* table(int layer) const noexcept override { return slots_.table(layer); }
  int count() const noexcept override { return placement_.experts(); }
  double bytes_of_one(int layer) const noexcept override { return expert_bytes_[static_cast<std::size_t>(layer)]; }
  void find(int layer, std::span<const ExpertSupply::Pick> picks, std::vector<ExpertView>& views) const override {
    const std::lock_guard lock(mutex_);
    views.clear();
    for (const ExpertSupply::Pick& p : picks) views.push_back(view_of({layer, p.expert}));
  }
  bool shared(const ExpertView& view) const noexcept override { return host_.shares(view); }

  cuda::OffloadWay way(int layer, int rows) const override {
    if (forced_ != cuda::OffloadWay::measured) return forced_;
    const std::lock_guard lock(mutex_);
    return rates_.way(rows, k_ * missed_share_, placement_.missing(layer),
                      expert_bytes_[static_cast<std::size_t>(layer)]);
  }
  bool complete(int layer) const override {
    const std::lock_guard lock(mutex_);
    return placement_.missing(layer) == 0;
  }
  void missing(int layer, std::vector<std::int32_t>& ids) const override {
    const std::lock_guard lock(mutex_);
    ids.clear();
    for (int e = 0; e < placement_.experts(); ++e)
      if (!placement_.is_there(layer, e)) ids.push_back(e);
  }
  void hold() override {
    const std::lock_guard lock(mutex_);
    ++holds_;
  }
  void release() noexcept override {
    const std::lock_guard lock(mutex_);
    --holds_;
  }
  cuda::Transit& transit() noexcept override { return transit_; }

  void picked(int layer, std::span<const ExpertSupply::Pick> picks, std::span<const ExpertSupply::Pick> missed,
              int tokens) override {
    const std::lock_guard lock(mutex_);
    record(layer, picks, tokens);
    statistics_.hits += picks.size() - missed.size();
    statistics_.misses += missed.size();
    std::int64_t all = 0, absent = 0;
    for (const ExpertSupply::Pick& p : picks) all += p.tokens;
    for (const ExpertSupply::Pick& p : missed) {
      absent += p.tokens;
      statistics_.bytes_read += bytes_of(view_of({layer, p.expert}));
    }
    missed_share_ += 0.002 * (static_cast<double>(absent) / static_cast<double>(all) - missed_share_);
  }
  std::int32_t* counts(int layer, int tokens) override {
    const std::lock_guard lock(mutex_);
    counted_tokens_[static_cast<std::size_t>(layer)] += tokens;
    counting_ = true;
    return counts_.data<std::int32_t>() + static_cast<std::ptrdiff_t>(layer) * placement_.experts();
  }
  void processor_took(double seconds, double bytes, double products) override {
    const std::lock_guard lock(mutex_);
    rates_.processor_took(seconds, bytes, products);
    statistics_.read_seconds += seconds;
  }
  void link_took(double seconds, double bytes) override {
    const std::lock_guard lock(mutex_);
    rates_.link_took(seconds, bytes);
    statistics_.bytes_read += static_cast<std::uint64_t>(bytes);
    statistics_.read_seconds += seconds;
  }

  void between_passes() override {
    const std::unique_lock transit(transit_.mutex, std::try_to_lock);
    const std::lock_guard lock(mutex_);
    take_counts();
    settle();
    if (!transit || holds_ > 0) return;
    const std::optional<ExpertPlacement::Exchange> exchange = placement_.exchange();
    if (!exchange) return;
    // All in the order of the stream: passes before it find the one, passes after it the other.
    const ExpertPlacement::Key in = exchange->in, out = exchange->out;
    std::byte* const slot = slots_.slot(exchange->slot);
    if (out.layer != ExpertPlacement::none) slots_.set(out.layer, out.expert, nullptr);
    transit_.bring(slot, layer(in.layer, false).matrices, {in.expert, view_of(in), shared(view_of(in))});
    slots_.set(in.layer, in.expert, slot);
    placement_.arrived(exchange->slot);
    statistics_.bytes_read += bytes_of(view_of(in));
    leave_home(in, out);
  }

  ExpertStatistics statistics() const {
    const std::lock_guard lock(mutex_);
    ExpertStatistics s = statistics_;
    s.slots_filled = s.slots;
    return s;
  }

 private:
  // A place in this machine's memory whose expert has gone to the card; free when what was launched before has passed.
  struct Home {
    ExpertView place;
    ExpertPlacement::Key next;  // who moves in
    cuda::StreamEvent free;
  };

  void leave_home(ExpertPlacement::Key in, ExpertPlacement::Key out) {
    const ExpertView place = std::exchange(view_of(in), view_in_file(in));
    if (out.layer == ExpertPlacement::none || !host_.replaceable(place, view_in_file(out))) return;
    homes_.push_back({place, out, {}});
    homes_.back().free.record(*device_);
  }
  void settle() {
    std::erase_if(homes_, [&](const Home& home) {
      if (!home.free.passed()) return false;
      if (!placement_.is_there(home.next.layer, home.next.expert))
        view_of(home.next) = host_.replace(home.place, view_in_file(home.next), *team_);
      return true;
    });
  }

  ExpertView& view_of(ExpertPlacement::Key key) noexcept {
    return views_[static_cast<std::size_t>(key.layer)][static_cast<std::size_t>(key.expert)];
  }
  const ExpertView& view_of(ExpertPlacement::Key key) const noexcept {
    return views_[static_cast<std::size_t>(key.layer)][static_cast<std::size_t>(key.expert)];
  }
  const ExpertView& view_in_file(ExpertPlacement::Key key) const noexcept {
    return in_file_[static_cast<std::size_t>(key.layer)][static_cast<std::size_t>(key.expert)];
  }

  static std::vector<cuda::ExpertSlots::Class> slot_counts(const SlotClasses& classes, const CardPlan& plan) {
    std::vector<cuda::ExpertSlots::Class> counts;
    for (std::size_t cls = 0; cls < plan.slots.size(); ++cls)
      counts.push_back({plan.slots[cls], classes.slot_bytes[cls]});
    return counts;
  }

  void take_scales(cuda::CudaExperts& layer, const ExpertViews& views) {
    std::vector<float> scales;
    for (const ExpertView& e : views) scales.insert(scales.end(), {e.gate.scale, e.up.scale, e.down.scale});
    if (std::ranges::all_of(scales, [](float s) { return s == 1; })) return;
    const std::size_t bytes = scales.size() * sizeof(float);
    layer.tables = std::make_shared<const cuda::DeviceBytes>(device_, bytes, "scales of experts");
    device_->copy_to_device(layer.tables->data(), scales.data(), bytes);
    layer.matrices.scales = layer.tables->data<float>();
  }

  // The transit memory, twice: the first time a file may have to be read.
  void measure_link() {
    std::vector<cuda::Transit::Expert> some;
    const ExpertViews& views = views_.front();
    double bytes = 0;
    // From the end: of what is not on the card, if there is something.
    for (std::size_t e = views.size() - std::min(views.size(), static_cast<std::size_t>(transit_.slots()));
         e < views.size(); ++e) {
      some.push_back({static_cast<std::int32_t>(e), views[e], shared(views[e])});
      bytes += static_cast<double>(bytes_of(views[e]));
    }
    transit_.bring(nullptr, layers_.front().matrices, some);
    device_->wait();
    const auto start = std::chrono::steady_clock::now();
    transit_.bring(nullptr, layers_.front().matrices, some);
    device_->wait();
    rates_ =
        cuda::OffloadRates(bytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }

  // A session needs more memory than was planned for: it is worth more than the last experts.
  bool give_back() {
    const std::lock_guard lock(mutex_);
    if (holds_ > 0) return false;
    const cuda::ExpertSlots::Chunk chunk = slots_.last_chunk();
    if (chunk.count == 0) return false;
    for (int slot = chunk.first; slot < chunk.first + chunk.count; ++slot) {
      const ExpertPlacement::Key key = placement_.retire(slot);
      if (key.layer != ExpertPlacement::none) slots_.set(key.layer, key.expert, nullptr);
    }
    slots_.give_back(chunk);
    statistics_.slots -= static_cast<std::uint64_t>(chunk.count);
    return true;
  }

  void record(int layer, std::span<const ExpertSupply::Pick> picks, int tokens) {
    ids_.clear(), tokens_of_.clear();
    for (const ExpertSupply::Pick& p : picks) ids_.push_back(p.expert), tokens_of_.push_back(p.tokens);
    placement_.record(layer, ids_, tokens_of_, tokens);
  }

  // What the card counted of passes that nobody waited for: asked for once, taken when it has come.
  void take_counts() {
    if (!counting_) return;
    if (!downloading_) {
      cuda::download(*device_, counted_.data(), counts_.data(), counts_.size());
      device_->clear(counts_.data(), counts_.size());
      counts_came_.record(*device_);
      downloaded_tokens_ = std::exchange(counted_tokens_, std::vector<int>(counted_tokens_.size()));
      downloading_ = true;
    } else if (counts_came_.passed()) {
      const auto* counts = counted_.data<std::int32_t>();
      const int E = placement_.experts();
      for (int layer = 0; layer < placement_.layers(); ++layer, counts += E) {
        const int tokens = downloaded_tokens_[static_cast<std::size_t>(layer)];
        if (tokens == 0) continue;
        ids_.clear(), tokens_of_.clear();
        for (int e = 0; e < E; ++e) {
          if (counts[e] == 0) continue;
          ids_.push_back(e), tokens_of_.push_back(counts[e]);
          ++(placement_.is_there(layer, e) ? statistics_.hits : statistics_.misses);
        }
        placement_.record(layer, ids_, tokens_of_, tokens);
      }
      downloading_ = false;
      counting_ = std::ranges::any_of(counted_tokens_, [](int n) { return n > 0; });
    }
  }

  std::shared_ptr<cuda::Device> device_;
  int k_;
  cuda::OffloadWay forced_;
  std::vector<ExpertViews> in_file_;                       // of all layers, the MTP layer's last
  std::vector<cuda::CudaExperts> layers_, layers_of_few_;  // for many rows, for few
  std::vector<double> expert_bytes_;                       // of a layer's, in the file, on average
  cuda::ExpertSlots slots_;
  cuda::Transit transit_;

  mutable std::mutex mutex_;        // guards what follows, and the order in which tables change
  std::vector<ExpertViews> views_;  // where they are now, if not on the card
  cuda::HostExperts host_;
  std::optional<cpu::Team> team_;
  std::vector<Home> homes_;
  ExpertPlacement placement_;
  int trunk_;
  int holds_ = 0;
  cuda::OffloadRates rates_{20e9};
  double missed_share_ = 0;  // of picks
  ExpertStatistics statistics_;
  std::vector<std::int32_t> ids_, tokens_of_;
  cuda::DeviceBytes counts_;  // [layers, experts]
  cuda::PinnedBytes counted_;
  cuda::StreamEvent counts_came_;
  std::vector<int> counted_tokens_, downloaded_tokens_;  // of each layer
  bool counting_ = false, downloading_ = false;
};

// Makes the backends of a model, and takes its weights.
class CudaOffload {
 public:
  struct Options {
    cuda::OffloadWay way = cuda::OffloadWay::measured;
    std::filesystem::path profile{};
    Progress on_load{};
    std::shared_ptr<Streaming> streaming{};
    bool copy_to_host = false;  // experts that are not on the card, in large pages
  };

  CudaOffload(std::shared_ptr<cuda::Device> device, const Config& config, CardPlan plan, SlotClasses classes,
              CpuOptions cpu, Options options)
      : device_(std::move(device)),
        k_(config.num_experts_per_tok),
        plan_(std::move(plan)),
        classes_(std::move(classes)),
        cpu_(std::move(cpu)),
        options_(std::move(options)) {}

  OffloadCudaBackend operator()(KvType kv) const {
    CpuOptions cpu = cpu_;
    cpu.kv = kv;
    if (!options_.streaming) return OffloadCudaBackend(device_, kv, *experts_, cpu);
    return OffloadCudaBackend(device_, kv, *experts_, cpu, options_.streaming->reader(), options_.streaming->reader());
  }

  void take(const ModelWeights<Views>& views, ModelWeights<OffloadCudaBackend>& mine) const {
    try {
      take_dense(views, mine);
      ExpertProfile profile;
      if (!options_.profile.empty()) profile = ExpertProfile::load(options_.profile);
      *experts_ = std::make_shared<PlacedExperts>(device_, views, k_, classes_, plan_, options_.way);
      (*experts_)->fill(options_.profile.empty() ? nullptr : &profile, options_.copy_to_host ? &*cpu_.team : nullptr,
                        [&](std::uint64_t bytes) { told_of(bytes); });
    } catch (const Cancelled&) {
      throw;
    } catch (const Error& e) {
      throw_error(e.what(), " (", plan_.text(classes_), ")");
    }
  }

  ExpertStatistics statistics() const { return *experts_ ? (*experts_)->statistics() : ExpertStatistics(); }
  void add_to(MemoryPlan& plan) const {
    plan.card_budget = plan_.budget;
    plan.card_dense = plan_.dense;
    plan.card_experts = plan_.experts;
    for (const int n : plan_.slots) plan.card_experts_held += n;
    if (options_.copy_to_host) plan.host_experts = plan_.all_experts - plan_.experts;
    plan.experts = static_cast<std::int64_t>(classes_.of_layer.size()) * classes_.experts;
  }

 private:
  // Matrices that share their bytes are copied once.
  void take_dense(const ModelWeights<Views>& views, ModelWeights<OffloadCudaBackend>& mine) const {
    cuda::Uploader uploader(device_);
    std::map<std::pair<const std::byte*, int>, cuda::CudaWeight> known;
    zip(views, mine, [&](const auto& view, auto& weight) {
      using View = std::remove_cvref_t<decltype(view)>;
      if constexpr (std::same_as<View, WeightView>) {
        const auto [place, is_new] = known.try_emplace({view.data, view.rows});
        if (is_new) place->second = uploader.weight(view), told_of(view.bytes());
        weight = place->second;
      } else if constexpr (std::same_as<View, VectorView>) {
        weight = uploader.vector(view);
      }
    });
    uploader.finish();
    device_->wait();
    for (std::size_t i = 0; i < mine.layers.size(); ++i) mine.layers[i].mlp.experts.layer = static_cast<int>(i);
    if (mine.mtp) mine.mtp->layer.mlp.experts.layer = static_cast<int>(mine.layers.size());
  }

  void told_of(std::uint64_t bytes) const {
    *loaded_ += bytes;
    const std::uint64_t all = std::max(*loaded_, plan_.dense + plan_.experts);  // about as many as in the file
    if (options_.on_load && !options_.on_load(static_cast<std::int64_t>(*loaded_), static_cast<std::int64_t>(all)))
      throw Cancelled();
  }

  std::shared_ptr<cuda::Device> device_;
  int k_;
  CardPlan plan_;
  SlotClasses classes_;
  CpuOptions cpu_;
  Options options_;
  std::shared_ptr<std::shared_ptr<PlacedExperts>> experts_ = std::make_shared<std::shared_ptr<PlacedExperts>>();
  std::shared_ptr<std::uint64_t> loaded_ = std::make_shared<std::uint64_t>(0);
};

// Bytes of the card for all weights but the routed experts.
inline std::uint64_t dense_card_bytes(const ModelWeights<Views>& weights) {
  std::uint64_t bytes = 0;
  std::set<std::pair<const std::byte*, int>> known;
  ModelWeights<NoWeights> nothing;
  zip(weights, nothing, [&](const auto& view, auto&) {
    using View = std::remove_cvref_t<decltype(view)>;
    if constexpr (std::same_as<View, WeightView>) {
      if (known.insert({view.data, view.rows}).second) bytes += cuda::device_bytes(view);
    } else if constexpr (std::same_as<View, VectorView>) {
      bytes += sizeof(float) * static_cast<std::uint64_t>(view.size);
    }
  });
  return bytes;
}

inline SlotClasses card_classes(const ModelWeights<Views>& weights) {
  std::vector<std::size_t> bytes;
  const auto add = [&](const ExpertViews& views) { bytes.push_back(cuda::expert_matrices(views).slot_bytes()); };
  for (const LayerWeights<Views>& layer : weights.layers) add(layer.mlp.experts);
  if (weights.mtp) add(weights.mtp->layer.mlp.experts);
  return SlotClasses::of(bytes, static_cast<int>(weights.layers.front().mlp.experts.size()));
}

// Whether this machine's memory can hold the other experts a second time, beside the mapped file.
inline bool host_has_room(const CardPlan& plan) {
  const std::optional<std::uint64_t> spare = spare_memory();
  return spare && plan.all_experts - plan.experts < *spare;
}

// Null if the card holds the whole model.
inline std::unique_ptr<const Engine> make_offload_engine(const std::shared_ptr<cuda::Device>& device,
                                                         const Config& config, const ModelWeights<Views>& weights,
                                                         const EngineOptions& options) {
  const std::uint64_t free = device->free_memory(), budget = options.gpu_memory.value_or(free);
  if (budget > free) {
    throw_error("--gpu-memory: ", CardPlan::mebibytes(budget), " are more than there is: ", device->properties().name,
                " has ", CardPlan::mebibytes(free), " free; give less, or leave it out");
  }
  SlotClasses classes = card_classes(weights);
  const std::int64_t context = std::min<std::int64_t>(planned_context, config.max_position_embeddings);
  const CardPlan plan = plan_card(budget, dense_card_bytes(weights),
                                  card_session_bytes(config, KvType::f16, context, TimelineOptions{}.batch), classes,
                                  cuda::max_few_rows * config.num_experts_per_tok);
  if (plan.complete()) return nullptr;
  CpuOptions cpu = resolve_cpu_options("", options.threads);
  cpu.team.emplace(cpu.threads);  // one for all sessions
  std::string description = concat("cuda, ", device->properties().name, ", and cpu, ", cpu.kernels->name, ", ",
                                   cpu.threads, " threads", options.streaming ? ", experts streamed" : "");
  CudaOffload offload(device, config, plan, std::move(classes), std::move(cpu),
                      {.profile = options.expert_profile,
                       .on_load = options.on_load,
                       .streaming = options.streaming,
                       .copy_to_host = !options.streaming && host_has_room(plan)});
  return std::make_unique<BackendEngine<OffloadCudaBackend, CudaOffload>>(
      config, weights, KvType::f16, std::move(offload), std::move(description), options.streaming);
}

}  // namespace qwen3next::detail
