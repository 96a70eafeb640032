// bench: speed, beside what the machine's memory would allow.

#include "bench/bandwidth.hpp"

#include <random>

#include "cli/commands.hpp"
#include "cli/common.hpp"
#include "cli/progress.hpp"
#include "model/traffic.hpp"

namespace qwen3next::cli {

namespace {

struct BenchOptions {
  ModelOptions model;
  std::int64_t prefill = 512, decode = 128;
  std::vector<std::int64_t> depths{0};
  int repeats = 3;
  bool json = false;
};

struct Result {
  std::string kind;
  std::int64_t tokens, depth;
  std::vector<double> samples;  // tokens per second
  double bytes_per_token;

  double median() const {
    std::vector<double> s = samples;
    std::sort(s.begin(), s.end());
    const std::size_t middle = s.size() / 2;
    return s.size() % 2 ? s[middle] : (s[middle - 1] + s[middle]) / 2;
  }
};

class Bench {
 public:
  Bench(const Model& model, const BenchOptions& o)
      : o_(o),
        session_(model.session(options_for(model, o))),
        kv_(kv_type(o.model.kv).value_or(o.model.backend == "reference" ? KvType::f32 : KvType::f16)) {}

  std::vector<Result> run() {
    const Interruptible scope;
    warm_up();
    std::vector<Result> results;
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
    return results;
  }

 private:
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

  std::vector<std::int32_t> random_tokens(std::int64_t n) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
    const auto vocabulary = static_cast<std::uint64_t>(session_.model().config().vocab_size);
    for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random_() % vocabulary);
    return tokens;
  }

  void read(std::span<const std::int32_t> tokens) {
    session_.prefill(tokens, [](std::int64_t, std::int64_t) { return !interrupted(); });
  }

  // Maps the pages, starts the threads.
  void warm_up() {
    read(random_tokens(std::clamp<std::int64_t>(o_.prefill, 1, std::min<std::int64_t>(64, session_.context()))));
    session_.reset();
  }

  void go_to(std::int64_t depth) {
    const std::int64_t missing = depth - static_cast<std::int64_t>(session_.tokens().size());
    if (missing == 0) return;
    Progress progress("reading up to depth " + count_text(depth), Progress::Unit::tokens);
    session_.prefill(random_tokens(missing), [&](std::int64_t done, std::int64_t total) {
      progress.update(done, total);
      return !interrupted();
    });
  }

  template <class Work>
  std::vector<double> measure(const Snapshot& from, std::int64_t tokens, Work work) {
    std::vector<double> samples;
    for (int i = 0; i < o_.repeats; ++i) {
      session_.restore(from);
      const std::vector<std::int32_t> input = random_tokens(tokens);
      const auto start = std::chrono::steady_clock::now();
      work(input);
      samples.push_back(static_cast<double>(tokens) / seconds_since(start));
    }
    return samples;
  }

  Result prefill(const Snapshot& from) {
    const std::int64_t n = o_.prefill, depth = from.position(), batch = o_.model.batch;
    double bytes = 0;
    for (std::int64_t done = 0; done < n; done += batch)
      bytes += traffic(std::min(batch, n - done), static_cast<double>(depth + done));
    return {"prefill", n, depth, measure(from, n, [&](const auto& input) { read(input); }),
            bytes / static_cast<double>(n)};
  }

  Result decode(const Snapshot& from) {
    const std::int64_t n = o_.decode, depth = from.position();
    auto steps = [&](const auto& input) {
      for (const std::int32_t token : input) {
        stop_if_interrupted();
        session_.decode(token);
      }
    };
    const double middle = static_cast<double>(depth) + static_cast<double>(n - 1) / 2;  // traffic is linear in depth
    return {"decode", n, depth, measure(from, n, steps), traffic(1, middle)};
  }

  double traffic(std::int64_t tokens, double depth) const {
    const Checkpoint& c = session_.model().checkpoint();
    return pass_traffic(c.config, c.weights, kv_, static_cast<double>(tokens), depth).total();
  }

  const BenchOptions& o_;
  Session session_;
  KvType kv_;
  std::mt19937_64 random_{1};  // the same tokens every time
};

void print_json(const Model& model, const BenchOptions& o, double bandwidth, const std::vector<Result>& results) {
  ordered_json json{{"read_bandwidth_gb_s", bandwidth / 1e9},
                    {"model", o.model.path},
                    {"backend", model.backend_description()},
                    {"repeats", o.repeats},
                    {"results", ordered_json::array()}};
  for (const Result& r : results) {
    json["results"].push_back({{"kind", r.kind},
                               {"tokens", r.tokens},
                               {"depth", r.depth},
                               {"tokens_per_second", r.median()},
                               {"bytes_per_token", r.bytes_per_token},
                               {"percent_of_roof", 100 * r.median() * r.bytes_per_token / bandwidth},
                               {"samples", r.samples}});
  }
  std::cout << json.dump(2) << "\n";
}

void print_table(const Model& model, double bandwidth, const std::vector<Result>& results) {
  const Style style(stdout);
  std::cout << model.backend_description() << "; memory read at " << format("%.1f GB/s", bandwidth / 1e9) << "\n"
            << style.bold() << format("%-14s %8s %10s %12s %8s", "what", "depth", "tokens/s", "MB/token", "% roof")
            << style.reset() << "\n";
  for (const Result& r : results) {
    const std::string what = r.kind + " " + std::to_string(r.tokens);
    std::cout << format("%-14s %8lld %10s %12.3f %8.1f\n", what.c_str(), static_cast<long long>(r.depth),
                        rate_text(r.median()).c_str(), r.bytes_per_token / 1e6,
                        100 * r.median() * r.bytes_per_token / bandwidth);
  }
}

void bench(const BenchOptions& o) {
  if (o.prefill == 0 && o.decode == 0) throw CLI::ValidationError("-p and -n", "both are 0: nothing to measure");
  const Model model = open_model(o.model);
  Bench bench(model, o);
  const double bandwidth = measure_read_bandwidth();
  const std::vector<Result> results = bench.run();
  o.json ? print_json(model, o, bandwidth, results) : print_table(model, bandwidth, results);
}

}  // namespace

void add_bench(CLI::App& app) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App& command = *app.add_subcommand("bench", "Measure speed, and memory bandwidth as its roof");
  add_model_options(command, o->model);
  add_session_options(command, o->model);
  command.get_option("--ctx")->description("Most tokens of a session [what -d, -p and -n need]");
  add_mtp_option(command, o->model);
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
  command.add_flag("--json", o->json, "JSON instead of a table, with every run");
  add_example(
      command,
      "qwen3next bench model.gguf -p 512 -n 128 -d 0,32768 --json\n\n"
      "Tokens are random, from a fixed seed; a file needs no tokenizer for this.  bytes_per_token counts what must be\n"
      "moved at least: every weight that serves all tokens, the routed experts of each token, the KV cache up to\n"
      "that depth, the DeltaNet states twice.  In prefill the weights are counted once per batch of tokens, and as\n"
      "many experts as uniform routing would touch: E (1 - (1 - k/E)^batch).  % of roof is tokens/s times\n"
      "bytes_per_token over the read bandwidth, measured on the spot with all processors; prefill computes more\n"
      "than it reads, so there it is low.");
  command.callback([o] { bench(*o); });
}

}  // namespace qwen3next::cli
