// bench --ops: where the time of a forward pass goes, operation by operation, beside what the machine could do.

#include "backends/cpu/cpu_backend.hpp"
#include "bench/peak.hpp"
#include "cli/traced_model.hpp"

namespace qwen3next::cli {

using nlohmann::ordered_json;

namespace {

void name_products(Trace& trace, const ModelWeights<Views>& w) {
  for (const LayerWeights<Views>& layer : w.layers) {
    if (layer.self_attn) {
      trace.name_product(layer.self_attn->q_proj, "linear q,gate,k,v_proj");
      trace.name_product(layer.self_attn->o_proj, "linear o_proj");
    }
    if (layer.linear_attn) {
      trace.name_product(layer.linear_attn->in_proj_q, "linear in_proj_qkvzba");
      trace.name_product(layer.linear_attn->out_proj, "linear out_proj");
    }
    trace.name_product(layer.mlp.gate, "linear router,shared");
    trace.name_product(layer.mlp.shared_down_proj, "linear shared_down");
  }
  trace.name_product(w.lm_head, "linear lm_head");
}

class TracedBench {
 public:
  TracedBench(const Model& model, const BenchOptions& o, KvType kv)
      : o_(o), model_(traced_model(model, o, kv)), random_tokens_(model.config()) {
    name_products(trace_, model.checkpoint().weights);
  }

  TracedResults run() {
    TracedResults results;
    const auto timeline = model_->timeline(o_.model.batch);
    for (const std::int64_t depth : o_.depths) {
      timeline->reset();
      if (depth > 0) read(*timeline, random_tokens_(depth));
      const auto at_depth = timeline->snapshot();
      if (o_.ops && o_.prefill > 0) results.ops.push_back(prefill(*timeline, *at_depth));
      if (o_.ops && o_.decode > 0) results.ops.push_back(decode(*timeline, *at_depth, 1).second);
      for (const std::int64_t count : o_.parallel) {
        auto [result, ops] = decode(*timeline, *at_depth, count);
        results.parallel.push_back(std::move(result));
        if (o_.ops) results.ops.push_back(std::move(ops));
      }
    }
    return results;
  }

 private:
  static void read(Timeline& timeline, std::span<const std::int32_t> tokens) {
    timeline.append(tokens, [](std::int64_t, std::int64_t) { return !interrupted(); });
  }

  // Runs whose time counts, o_.repeats of them.  A backend that measuring slows is measured in one more.
  template <class Run>
  void repeat(Run run) {
    trace_.clear();
    trace_.on = !model_->is_slowed();
    for (int i = 0; i < o_.repeats; ++i) run(true);
    if (trace_.on) return;
    trace_.on = true;
    run(false);
  }
  int traced_runs() const { return model_->is_slowed() ? 1 : o_.repeats; }
  // Of all runs that counted, as much as was traced.
  double traced_share() const { return static_cast<double>(traced_runs()) / o_.repeats; }

  OpsResult prefill(Timeline& timeline, const TimelineSnapshot& from) {
    const std::int64_t depth = timeline.position(), batch = std::min<std::int64_t>(o_.prefill, o_.model.batch);
    read(timeline, random_tokens_(batch));  // the first pass allocates
    OpsResult result{"prefill", o_.prefill, depth, 1, 0, 0, {}};
    repeat([&](bool counts) {
      timeline.restore(from);
      const std::vector<std::int32_t> input = random_tokens_(o_.prefill);
      const auto start = std::chrono::steady_clock::now();
      read(timeline, input);
      if (counts) result.seconds += seconds_since(start);
    });
    timeline.restore(from);
    result.passes = static_cast<int>((o_.prefill + batch - 1) / batch) * traced_runs();
    result.seconds *= traced_share();
    result.ops = trace_.ops();
    return result;
  }

  // A step of all sequences at a time, each with tokens of its own after the same context.
  std::pair<BenchResult, OpsResult> decode(Timeline& first, const TimelineSnapshot& from, std::int64_t count) {
    first.restore(from);
    const auto S = static_cast<std::size_t>(count), n = static_cast<std::size_t>(o_.decode);
    BenchResult result{"parallel", o_.decode, first.position(), count, {}, 0};
    OpsResult ops{"decode", o_.decode, first.position(), count, 0, 0, {}};
    std::vector<std::unique_ptr<Timeline>> others;
    std::vector<TimelineTurn> turns{{&first, {}}};
    for (std::size_t s = 1; s < S; ++s) turns.push_back({others.emplace_back(model_->timeline(1)).get(), {}});
    const TurnSink sink = [](std::size_t, std::span<const float>) {};
    auto step = [&](std::span<const std::int32_t> tokens) {
      if (interrupted()) throw Cancelled();
      for (std::size_t s = 0; s < S; ++s) turns[s].tokens = tokens.subspan(s, 1);
      first.append_together(turns, sink);
    };
    step(random_tokens_(count));  // the first pass allocates
    repeat([&](bool counts) {
      for (const TimelineTurn& turn : turns) turn.timeline->restore(from);
      const std::vector<std::int32_t> input = random_tokens_(count * o_.decode);
      const auto start = std::chrono::steady_clock::now();
      for (std::size_t t = 0; t < n; ++t) step(std::span(input).subspan(t * S, S));
      if (!counts) return;
      const double seconds = seconds_since(start);
      result.samples.push_back(static_cast<double>(S * n) / seconds);
      ops.seconds += seconds;
    });
    result.bytes_per_token = trace_.total().memory / static_cast<double>(S * n) / traced_runs();
    ops.passes = static_cast<int>(n) * traced_runs();
    ops.seconds *= traced_share();
    ops.ops = trace_.ops();
    return {std::move(result), std::move(ops)};
  }

  const BenchOptions& o_;
  std::unique_ptr<TracedModel> model_;
  Trace& trace_ = model_->trace;
  RandomTokens random_tokens_;
};

}  // namespace

TracedResults run_traced(const Model& model, const BenchOptions& o, KvType kv) {
  const Interruptible scope;
  return TracedBench(model, o, kv).run();
}

void measure_peaks(Roofs& roofs, const BenchOptions& o) {
#ifdef QWEN3NEXT_CUDA
  if (o.model.backend == "cuda") {
    roofs.integer_macs = roofs.floating_macs = cuda_roofs(true).floating_macs;
    return;
  }
#endif
  const CpuOptions cpu = resolve_cpu_options(o.model.isa, o.model.threads);
  roofs.integer_macs = measure_peak(cpu.kernels->integer_peak, cpu.threads);
  roofs.floating_macs = measure_peak(cpu.kernels->floating_peak, cpu.threads);
}

namespace {

// By time, the longest first; what lies between operations last.
std::vector<Trace::Op> sorted(const OpsResult& r) {
  std::vector<Trace::Op> ops = r.ops;
  std::stable_sort(ops.begin(), ops.end(), [](const auto& a, const auto& b) { return a.seconds > b.seconds; });
  Trace::Op rest{"between", 0, r.seconds, {}};
  for (const Trace::Op& op : ops) rest.seconds -= op.seconds;
  ops.push_back(rest);
  return ops;
}

}  // namespace

void print_operations(const std::vector<OpsResult>& results, const BenchOptions& o, const Roofs& roofs) {
  const Style style(stdout);
  std::cout << format("\nroofs: %.1f GB/s, ", roofs.bandwidth / 1e9)
            << (o.model.backend == "cuda" ? format("%.0f Gmac/s in f16\n", roofs.floating_macs / 1e9)
                                          : format("%.0f Gmac/s in int8, %.1f in float\n", roofs.integer_macs / 1e9,
                                                   roofs.floating_macs / 1e9));
  for (const OpsResult& r : results) {
    const std::string title =
        r.kind + (r.sequences > 1 ? " x" + std::to_string(r.sequences) : "") + " at depth " + count_text(r.depth);
    std::cout << "\n"
              << style.bold()
              << format("%-24s %6s %10s %6s %10s %8s %9s %7s", title.c_str(), "calls", "us", "%", "MB", "GB/s",
                        "Gmac/s", "% roof")
              << style.reset() << "\n";
    const double passes = r.passes;
    OpCost total;
    auto line = [&](const std::string& name, double calls, double seconds, const OpCost& c) {
      std::cout << format("%-24s %6.0f %10.1f %6.1f %10.3f %8.1f %9.1f %7.1f\n", name.c_str(), calls / passes,
                          seconds / passes * 1e6, 100 * seconds / r.seconds, c.bytes() / passes / 1e6,
                          c.bytes() / seconds / 1e9, (c.integer_macs + c.floating_macs) / seconds / 1e9,
                          100 * roofs.seconds(c) / seconds);
    };
    double calls = 0, roof = 0;
    for (const Trace::Op& op : sorted(r)) {
      line(op.name, static_cast<double>(op.calls), op.seconds, op.cost);
      total += op.cost;
      calls += static_cast<double>(op.calls);
      roof += roofs.seconds(op.cost);
    }
    line("a pass", calls, r.seconds, total);
    std::cout << format("every operation at its roof: %.1f %% of this time\n", 100 * roof / r.seconds);
  }
}

ordered_json operations_json(const std::vector<OpsResult>& results, const Roofs& roofs) {
  ordered_json list = ordered_json::array();
  for (const OpsResult& r : results) {
    ordered_json ops = ordered_json::array();
    for (const Trace::Op& op : sorted(r)) {
      ops.push_back({{"name", op.name},
                     {"calls", op.calls},
                     {"seconds", op.seconds},
                     {"memory_bytes", op.cost.memory},
                     {"activation_bytes", op.cost.activations},
                     {"integer_multiply_adds", op.cost.integer_macs},
                     {"floating_multiply_adds", op.cost.floating_macs},
                     {"percent_of_roof", 100 * roofs.seconds(op.cost) / op.seconds}});
    }
    list.push_back({{"kind", r.kind},
                    {"tokens", r.tokens},
                    {"depth", r.depth},
                    {"sequences", r.sequences},
                    {"passes", r.passes},
                    {"seconds", r.seconds},
                    {"operations", std::move(ops)}});
  }
  return list;
}

}  // namespace qwen3next::cli
