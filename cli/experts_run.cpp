// experts: a model over a text, on a backend that shows what its routers pick.

#include <list>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/cpu/streaming_backend.hpp"
#include "backends/observed_routing.hpp"
#include "backends/reference/reference_backend.hpp"
#include "cli/experts.hpp"
#include "cli/progress.hpp"
#include "generate/backend_engine.hpp"
#include "generate/streaming.hpp"
#include "model/forward.hpp"
#include "model/mtp.hpp"
#include "weights/atomic_file.hpp"

namespace qwen3next::cli {

namespace {

constexpr std::size_t most_windows = 16;  // in a pass: each has states, 75 MiB with the 80B's shape
constexpr double cache_shares[] = {0.1, 0.25, 0.5, 0.75};

// A line of JSON, then the experts of each token in the text's order: u16 [layers, experts per token], ascending.
class TraceWriter {
 public:
  TraceWriter(const std::string& path, int layers, int experts, int per_token) : file_(file_path(path)) {
    const ordered_json header{{"format", "qwen3next routing trace"},
                              {"version", 1},
                              {"layers", layers},
                              {"experts", experts},
                              {"experts_per_token", per_token}};
    const std::string line = header.dump() + "\n";
    file_.write(std::as_bytes(std::span(line)));
  }
  void add(std::span<const std::int32_t> ids) {
    bytes_.clear();
    for (const std::int32_t id : ids) {
      bytes_.push_back(static_cast<std::byte>(id & 0xff));
      bytes_.push_back(static_cast<std::byte>(id >> 8 & 0xff));
    }
    file_.write(bytes_);
  }
  void commit() { file_.commit(); }

 private:
  AtomicFile file_;
  std::vector<std::byte> bytes_;
};

// Takes picks as passes bring them, layer by layer of many tokens, and counts them in the text's order.
class Collector {
 public:
  Collector(const Config& c, std::int64_t total, const std::string& trace)
      : layers_(c.num_hidden_layers + (c.has_mtp ? 1 : 0)),
        k_(c.num_experts_per_tok),
        total_(total),
        picks_(static_cast<std::size_t>(layers_)) {
    results_.per_token = k_;
    results_.first = results_.second = ExpertProfile(layers_, c.num_experts);
    if (!trace.empty()) trace_.emplace(trace, layers_, c.num_experts, k_);
    for (const double share : cache_shares) {
      const int slots = std::max(k_, static_cast<int>(std::lround(share * layers_ * c.num_experts)));
      caches_.push_back({share, ReplayedCache(layers_, c.num_experts, slots), 0});
    }
  }
  int layers() const { return layers_; }

  void add(int layer, const HostRouting& routing) {
    std::vector<std::int32_t>& mine = picks_[static_cast<std::size_t>(layer)];
    mine.assign(routing.ids.begin(), routing.ids.begin() + std::ptrdiff_t{routing.rows} * k_);
    for (int t = 0; t < routing.rows; ++t) std::sort(mine.begin() + t * k_, mine.begin() + (t + 1) * k_);
  }

  // All layers of `tokens` tokens have been added.
  void finish_pass(int tokens) {
    const std::vector<std::int32_t> ones(static_cast<std::size_t>(k_), 1);
    for (int t = 0; t < tokens; ++t, ++results_.tokens) {
      const bool second = results_.tokens >= (total_ + 1) / 2;
      for (int layer = 0; layer < layers_; ++layer) {
        const auto ids = std::span<const std::int32_t>(picks_[static_cast<std::size_t>(layer)])
                             .subspan(static_cast<std::size_t>(t * k_), static_cast<std::size_t>(k_));
        (second ? results_.second : results_.first).add(layer, ids, ones, 1);
        for (Cache& cache : caches_) {
          const int hits = cache.replayed.use(layer, ids);
          if (second) cache.hits += hits;
        }
        if (trace_) trace_->add(ids);
      }
    }
  }

  RoutingResults results() {
    if (trace_) trace_->commit();
    const auto picks = static_cast<double>(total_ / 2 * layers_ * k_);  // of the second half
    for (const Cache& cache : caches_) {
      const int slots = cache.replayed.slots();
      results_.caches.push_back({cache.share, slots, static_cast<double>(cache.hits) / picks,
                                 fixed_hit_rate(results_.second, results_.second, slots),
                                 fixed_hit_rate(results_.first, results_.second, slots)});
    }
    return std::move(results_);
  }

 private:
  struct Cache {
    double share;
    ReplayedCache replayed;
    std::int64_t hits;
  };
  int layers_, k_;
  std::int64_t total_;
  std::vector<std::vector<std::int32_t>> picks_;  // of the pass at hand: [layers][T, k]
  std::vector<Cache> caches_;
  std::optional<TraceWriter> trace_;
  RoutingResults results_;
};

// Windows of the text one after the other, several in a pass where they are short, and long ones in several passes. The
// last token is only the one that comes next, for the MTP layer.
template <BackendOps Base>
RoutingResults observe_on(Base base, const Model& model, const ModelWeights<Views>& views,
                          std::span<const std::int32_t> tokens, const ExpertsOptions& o) {
  using B = ObservedRouting<Base>;
  const Config& c = model.config();
  ModelWeights<B> weights;
  take_weights<B>(views, weights);

  const auto total = static_cast<std::int64_t>(tokens.size()) - 1;
  Collector collector(c, total, o.trace);
  const Interruptible scope;
  Progress progress("experts", Progress::Unit::tokens, !o.quiet);
  std::int64_t done = 0;
  int layer = 0, coming = 0;
  B be(std::move(base), [&](const HostRouting& routing) {
    stop_if_interrupted();
    collector.add(layer++, routing);
    progress.update(done + std::int64_t{coming} * layer / collector.layers(), total);
  });

  const std::int64_t window = std::min(o.model.context, total);
  const auto rows = static_cast<int>(std::min<std::int64_t>(o.model.batch, total));
  Activations<B> a(be, c, rows, 1, most_windows);
  std::list<SequenceState<B>> states;
  std::vector<SequenceRows<B>> sequences;
  std::int64_t windows = 0;
  while (done < total) {
    sequences.clear();
    for (coming = 0; coming < rows && done + coming < total;) {
      if (states.empty() || states.back().position + (sequences.empty() ? 0 : sequences.back().count) == window) {
        if (sequences.size() == most_windows) break;
        states.emplace_back(be, c), ++windows;
      }
      SequenceState<B>& state = states.back();
      const std::int64_t left = std::min({window - state.position, total - done - coming, std::int64_t{rows} - coming});
      sequences.push_back({coming, static_cast<int>(left), state.position, &state});
      coming += static_cast<int>(left);
    }
    const auto begin = static_cast<std::size_t>(done), count = static_cast<std::size_t>(coming);
    layer = 0;
    forward<B>(be, c, weights, tokens.subspan(begin, count), sequences, a);
    if (weights.mtp)
      mtp_forward<B>(be, c, *weights.mtp, tokens.subspan(begin + 1, count), a.h.rows(0, static_cast<int>(count)),
                     sequences, a);
    collector.finish_pass(coming);
    done += coming;
    while (states.size() > 1) states.pop_front();  // the last may go on
  }
  RoutingResults results = collector.results();
  results.windows = windows, results.window = window, results.seconds = progress.seconds();
  return results;
}

}  // namespace

RoutingResults observe_routing(const Model& model, std::span<const std::int32_t> tokens, const ExpertsOptions& o) {
  const Checkpoint& checkpoint = model.checkpoint();
  if (o.model.backend == "reference") return observe_on(ReferenceBackend(), model, checkpoint.weights, tokens, o);
  CpuOptions cpu = resolve_cpu_options(o.model.isa, o.model.threads);
  cpu.kv = kv_type(o.model.kv).value_or(KvType::f16);
  const MemoryPlan plan = model.plan({.context = o.model.context, .kv = cpu.kv, .batch = o.model.batch});
  if (!plan.streamed()) return observe_on(CpuBackend(cpu), model, checkpoint.weights, tokens, o);
  Streaming streaming(checkpoint, plan.budget, file_path(o.model.expert_profile));
  Streaming::Charge charge(streaming);
  const auto windows =
      std::min<std::uint64_t>(most_windows, tokens.size() / static_cast<std::size_t>(o.model.context) + 1);
  charge.at_least(plan.scratch + (windows + 1) * (plan.kv_cache + plan.delta_state));
  const ModelWeights<Views> views = streaming.load();
  return observe_on(StreamingCpuBackend(cpu, streaming.reader()), model, views, tokens, o);
}

}  // namespace qwen3next::cli
