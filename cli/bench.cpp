// bench: speed, beside what the machine's memory would allow.

#include "cli/bench.hpp"

#include "bench/bandwidth.hpp"
#include "cli/commands.hpp"
#include "cli/expert_bandwidth.hpp"
#include "cli/generating.hpp"
#include "cli/progress.hpp"
#include "model/traffic.hpp"

namespace qwen3next::cli {

using nlohmann::ordered_json;

namespace {

class Bench {
 public:
  Bench(const Model& model, const BenchOptions& o)
      : o_(o),
        session_(model.session(options_for(model, o))),
        kv_(kv_type(o.model.kv).value_or(o.model.backend == "reference" ? KvType::f32 : KvType::f16)),
        random_tokens_(model.config()) {}

  KvType kv() const noexcept { return kv_; }

  // Ctrl-C ends it with what has been measured: a great depth takes long.
  std::vector<BenchResult> run() {
    const Interruptible scope;
    std::vector<BenchResult> results;
    try {
      measure(results);
    } catch (const Cancelled&) {
      if (results.empty()) throw;
    }
    return results;
  }

 private:
  void measure(std::vector<BenchResult>& results) {
    warm_up();
    Snapshot at_depth = session_.snapshot();
    for (const std::int64_t depth : o_.depths) {
      if (depth < at_depth.position()) {
        session_.reset();
      } else {
        session_.restore(at_depth);
      }
      go_to(depth);
      at_depth = session_.snapshot();
      if (o_.prefill > 0) results.push_back(prefill(at_depth));
      if (o_.decode > 0) results.push_back(decode(at_depth));
    }
  }

  static SessionOptions options_for(const Model& model, const BenchOptions& o) {
    const std::int64_t needed =
        *std::max_element(o.depths.begin(), o.depths.end()) + std::max({o.prefill, o.decode, std::int64_t{1}});
    const std::int64_t longest = o.model.context ? o.model.context : model.config().max_position_embeddings;
    if (needed > longest) {
      throw_error("the largest -d and -p or -n make ", needed, " tokens, but the context holds ", longest,
                  o.model.context ? ": raise --ctx" : ": this model's length; --yarn extends it");
    }
    SessionOptions options = session_options(o.model);
    if (options.context == 0) options.context = needed;
    return options;
  }

  void read(std::span<const std::int32_t> tokens) {
    session_.prefill(tokens, [](std::int64_t, std::int64_t) { return !interrupted(); });
  }

  // Maps the pages, starts the threads.
  void warm_up() {
    read(random_tokens_(std::clamp<std::int64_t>(o_.prefill, 1, std::min<std::int64_t>(64, session_.context()))));
    session_.reset();
  }

  void go_to(std::int64_t depth) {
    const std::int64_t missing = depth - static_cast<std::int64_t>(session_.tokens().size());
    if (missing == 0) return;
    Progress progress("reading up to depth " + count_text(depth), Progress::Unit::tokens);
    session_.prefill(random_tokens_(missing), [&](std::int64_t done, std::int64_t total) {
      progress.update(done, total);
      return !interrupted();
    });
  }

  template <class Work>
  BenchResult result(const char* kind, std::int64_t tokens, const Snapshot& from, Work work, double bytes_per_token) {
    BenchResult r{kind, tokens, from.position(), 1, {}, bytes_per_token};
    const ExpertStatistics before = experts();
    for (int i = 0; i < o_.repeats; ++i) {
      session_.restore(from);
      const std::vector<std::int32_t> input = random_tokens_(tokens);
      const auto start = std::chrono::steady_clock::now();
      work(input);
      r.samples.push_back(static_cast<double>(tokens) / seconds_since(start));
    }
    const ExpertStatistics after = experts();
    const auto picks = static_cast<double>(after.picks() - before.picks());
    r.read_per_token =
        static_cast<double>(after.bytes_read - before.bytes_read) / static_cast<double>(tokens * o_.repeats);
    r.hit_rate = picks > 0 ? static_cast<double>(after.hits - before.hits) / picks : 0;
    return r;
  }

  ExpertStatistics experts() const { return session_.model().expert_statistics().value_or(ExpertStatistics{}); }

  BenchResult prefill(const Snapshot& from) {
    const std::int64_t n = o_.prefill, depth = from.position(), batch = o_.model.batch;
    double bytes = 0;
    for (std::int64_t done = 0; done < n; done += batch)
      bytes += traffic(std::min(batch, n - done), static_cast<double>(depth + done));
    return result(
        "prefill", n, from, [&](const auto& input) { read(input); }, bytes / static_cast<double>(n));
  }

  BenchResult decode(const Snapshot& from) {
    const std::int64_t n = o_.decode, depth = from.position();
    auto steps = [&](const auto& input) {
      for (const std::int32_t token : input) {
        stop_if_interrupted();
        session_.decode(token);
      }
    };
    const double middle = static_cast<double>(depth) + static_cast<double>(n - 1) / 2;  // traffic is linear in depth
    return result("decode", n, from, steps, traffic(1, middle));
  }

  double traffic(std::int64_t tokens, double depth) const {
    const Checkpoint& c = session_.model().checkpoint();
    return pass_traffic(c.config, c.weights, kv_, static_cast<double>(tokens), depth).total();
  }

  const BenchOptions& o_;
  Session session_;
  KvType kv_;
  RandomTokens random_tokens_;
};

void print_json(const Model& model, const BenchOptions& o, const Roofs& roofs, const std::vector<BenchResult>& results,
                const std::vector<MtpResult>& mtp, const std::vector<OpsResult>& ops) {
  ordered_json json{{"read_bandwidth_gb_s", roofs.bandwidth / 1e9}};
  if (roofs.experts > 0) json["expert_bandwidth_gb_s"] = roofs.experts / 1e9;
  if (o.ops) {
    json["integer_gmac_s"] = roofs.integer_macs / 1e9;
    json["floating_gmac_s"] = roofs.floating_macs / 1e9;
  }
  json.update({{"model", o.model.path},
               {"backend", model.backend_description()},
               {"repeats", o.repeats},
               {"results", ordered_json::array()}});
  for (const BenchResult& r : results) {
    json["results"].push_back({{"kind", r.kind},
                               {"sequences", r.sequences},
                               {"tokens", r.tokens},
                               {"depth", r.depth},
                               {"tokens_per_second", r.median()},
                               {"bytes_per_token", r.bytes_per_token},
                               {"percent_of_roof", 100 * r.median() * r.bytes_per_token / roofs.bandwidth},
                               {"samples", r.samples}});
    if (roofs.experts > 0) {
      json["results"].back().update({{"expert_bytes_read_per_token", r.read_per_token},
                                     {"expert_hit_rate", r.hit_rate},
                                     {"percent_of_disk", 100 * r.median() * r.read_per_token / roofs.experts}});
    }
  }
  for (ordered_json& r : mtp_json(mtp)) json["results"].push_back(std::move(r));
  if (o.ops) json["operations"] = operations_json(ops, roofs);
  std::cout << json.dump(2) << "\n";
}

void print_streaming(const Model& model, const Roofs& roofs, const std::vector<BenchResult>& results) {
  const Style style(stdout);
  std::cout << format("experts are streamed; the disk gives %.2f GB/s of them\n", roofs.experts / 1e9) << style.bold()
            << format("%-18s %8s %10s %12s %8s", "what", "depth", "hits %", "read MB/tok", "% disk") << style.reset()
            << "\n";
  for (const BenchResult& r : results) {
    std::cout << format("%-18s %8lld %10.1f %12.3f %8.1f\n", (r.kind + " " + std::to_string(r.tokens)).c_str(),
                        static_cast<long long>(r.depth), 100 * r.hit_rate, r.read_per_token / 1e6,
                        100 * r.median() * r.read_per_token / roofs.experts);
  }
  std::cout << experts_line(*model.expert_statistics()) << "\n";
}

void print_table(const Model& model, const BenchOptions& o, const Roofs& roofs, const std::vector<BenchResult>& results,
                 const std::vector<MtpResult>& mtp, const std::vector<OpsResult>& ops) {
  const Style style(stdout);
  std::cout << model.backend_description()
            << (o.model.backend == "cuda" ? "; its memory copied at " : "; memory read at ")
            << format("%.1f GB/s", roofs.bandwidth / 1e9) << "\n"
            << style.bold() << format("%-18s %8s %10s %12s %8s", "what", "depth", "tokens/s", "MB/token", "% roof")
            << style.reset() << "\n";
  for (const BenchResult& r : results) {
    std::string what = r.kind + " " + std::to_string(r.tokens);
    if (r.kind == "parallel") what = "decode " + std::to_string(r.sequences) + " x " + std::to_string(r.tokens);
    std::cout << format("%-18s %8lld %10s %12.3f %8.1f\n", what.c_str(), static_cast<long long>(r.depth),
                        rate_text(r.median()).c_str(), r.bytes_per_token / 1e6,
                        100 * r.median() * r.bytes_per_token / roofs.bandwidth);
  }
  if (roofs.experts > 0) print_streaming(model, roofs, results);
  if (!mtp.empty()) print_mtp(mtp);
  if (o.ops) print_operations(ops, o, roofs);
}

double measure_bandwidth([[maybe_unused]] const BenchOptions& o) {
#ifdef QWEN3NEXT_CUDA
  if (o.model.backend == "cuda") return cuda_roofs(false).bandwidth;
#endif
  return measure_read_bandwidth();
}

void bench(const BenchOptions& o) {
  if (o.prefill == 0 && o.decode == 0) throw CLI::ValidationError("-p and -n", "both are 0: nothing to measure");
  if (o.decode == 0 && !o.parallel.empty()) throw CLI::ValidationError("--parallel", "needs -n of at least 1");
  if (o.model.backend == "reference" && (o.ops || o.mtp || !o.parallel.empty()))
    throw CLI::ValidationError("--ops, --mtp and --parallel", "measure the cpu and cuda backends alone");
  const Model model = open_model(o.model);
  const bool guessing = o.mtp && o.model.mtp != "0";
  if (guessing && !model.config().has_mtp) throw Error(o.model.path + ": has no MTP head; leave --mtp out");
  if (o.turns > 0) {
    const std::vector<TurnResult> turns = run_turns(model, o);
    if (!o.json) return print_turns(turns);
    std::cout << ordered_json{{"model", o.model.path},
                              {"backend", model.backend_description()},
                              {"results", turns_json(turns)}}
                     .dump(2)
              << "\n";
    return;
  }
  const bool streamed = model.plan(session_options(o.model)).streamed();
  if (streamed && (o.ops || guessing || !o.parallel.empty()))
    throw CLI::ValidationError("--ops, --mtp and --parallel", "measure mapped weights; here experts would be streamed");
  Bench bench(model, o);
  Roofs roofs{.bandwidth = measure_bandwidth(o),
              .experts = streamed ? measure_expert_bandwidth(model.checkpoint()) : 0};
  std::vector<BenchResult> results = bench.run();
  TracedResults traced;
  if (!interrupted() && (o.ops || !o.parallel.empty())) traced = run_traced(model, o, bench.kv());
  results.insert(results.end(), traced.parallel.begin(), traced.parallel.end());
  const std::vector<MtpResult> mtp =
      guessing && !interrupted() ? run_mtp(model, o, bench.kv()) : std::vector<MtpResult>();
  if (o.ops) measure_peaks(roofs, o);
  (o.json ? print_json : print_table)(model, o, roofs, results, mtp, traced.ops);
  finish_output();
  stop_if_interrupted();
}

}  // namespace

void add_bench(CLI::App& app) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App& command = *app.add_subcommand("bench", "Measure speed, and memory bandwidth as its roof");
  add_model_options(command, o->model);
  add_session_options(command, o->model);
  command.get_option("--ctx")->description("Most tokens of a session [what -d, -p and -n need]");
  add_mtp_option(command, o->model);
  command.get_option("--mtp")
      ->description("Also decode with so many guesses of the MTP head, beside none, in turns")
      ->option_text("N|auto");
  const auto count = CLI::Range(std::int64_t{0}, std::int64_t{1} << 30);
  command.add_option("-p,--prefill", o->prefill, "Tokens to read at once; 0: leave it out")
      ->option_text("N [512]")
      ->check(count);
  command.add_option("-n,--decode", o->decode, "Tokens to generate one by one; 0: leave it out")
      ->option_text("N [128]")
      ->check(count);
  command.add_option("-d,--depth", o->depths, "Tokens already in the context; several with commas: 0,32768")
      ->option_text("N,N.. [0]")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(count);
  command.add_option("-r,--repeats", o->repeats, "Runs of each; the median counts")
      ->option_text("N [3]")
      ->check(CLI::Range(1, 1000));
  command
      .add_option("--parallel", o->parallel, "Also decode so many sequences together, -n tokens each; several: 1,4,16")
      ->option_text("N,N..")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{512}));
  command
      .add_option("--turns", o->turns,
                  "Instead: so many turns of a chat with -d tokens of history, -p asked and -n answered in each")
      ->option_text("N")
      ->check(CLI::Range(1, 1000));
  command
      .add_option("--accept", o->accept,
                  "With --mtp: each guess is right with this probability, whatever the model says")
      ->option_text("P")
      ->needs("--mtp")
      ->check(CLI::Range(0., 1.));
  command.add_flag("--ops", o->ops, "Also the time, bytes and multiply-adds of every operation of a pass");
  command.add_flag("--json", o->json, "JSON instead of a table, with every run");
  add_example(
      command,
      "qwen3next bench model.gguf -p 512 -n 128 -d 0,32768 --json\n\n"
      "Tokens are random, from a fixed seed; a file needs no tokenizer for this.  bytes_per_token counts what must be\n"
      "moved at least: every weight that serves all tokens, the routed experts of each token, the KV cache up to\n"
      "that depth, the DeltaNet states twice.  In prefill the weights are counted once per batch of tokens, and as\n"
      "many experts as uniform routing would touch: E (1 - (1 - k/E)^batch).  % of roof is tokens/s times\n"
      "bytes_per_token over the read bandwidth, measured on the spot with all processors; prefill computes more\n"
      "than it reads, so there it is low.  --parallel counts the experts that the router picked, each once a step,\n"
      "and the KV cache of each sequence (up to -d they share its memory).  --ops times the operations on the\n"
      "calling thread, averages over a pass; an operation's roof is bytes over bandwidth or multiply-adds (mac) over\n"
      "their measured peak, whichever takes longer; bytes that the caches hold may pass it.\n"
      "--backend cuda: the read bandwidth is that of the GPU's memory, measured by copying, both ways counted; --ops\n"
      "are timed by events, in a run of their own in which none overlaps the next: 'between' is less than nothing by\n"
      "what overlaps in a real pass.\n"
      "--turns: time to the first token, where the chat template drops the reasoning (three quarters) of earlier\n"
      "answers; beside it the time to read as many tokens as were not reused, at the same place, by prefill alone.\n"
      "--mtp gives tokens/s with and without guessing; gain is their ratio, possible what the bytes moved for a token\n"
      "would allow (experts as they were picked), by the model's own choices or with --accept for random tokens.\n"
      "With experts streamed (--memory): hits are picks that were in memory, % disk is what was read for a token "
      "times\n"
      "tokens/s over the rate at which the disk gives experts at random, as many at once as a layer picks.");
  command.callback([o, &command] {
    o->mtp = command.count("--mtp") > 0;
    bench(*o);
  });
}

}  // namespace qwen3next::cli
