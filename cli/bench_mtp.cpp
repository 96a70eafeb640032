// bench --mtp: what guessing ahead gains, beside what it could gain by the bytes that it moves.

#include "cli/traced_model.hpp"

namespace qwen3next::cli {

using nlohmann::ordered_json;

namespace {

std::int32_t best(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

class MtpBench {
 public:
  MtpBench(const Model& model, const BenchOptions& o, KvType kv)
      : o_(o),
        vocabulary_(model.config().vocab_size),
        model_(traced_model(model, o, kv)),
        random_tokens_(model.config()) {}

  std::vector<MtpResult> run() {
    std::vector<MtpResult> results;
    timeline_ = model_->timeline(o_.model.batch, true);
    for (const std::int64_t depth : o_.depths) {
      timeline_->reset();
      const std::vector<std::int32_t> context = random_tokens_(std::max<std::int64_t>(depth, 1));
      timeline_->append(context, [](std::int64_t, std::int64_t) { return !interrupted(); });
      const auto at_depth = timeline_->snapshot();
      MtpResult result{drafts(o_.model), o_.accept, o_.decode, depth};
      // The first time fetches and allocates; what it moves is what each run moves.
      const double n = static_cast<double>(o_.decode);
      model_->trace.on = true;
      result.plain_bytes = decode(*at_depth, 0).bytes / n;
      result.bytes = decode(*at_depth, drafts(o_.model)).bytes / n;
      model_->trace.on = !model_->is_slowed();
      for (int i = 0; i < o_.repeats; ++i) {
        const Run plain = decode(*at_depth, 0), guessing = decode(*at_depth, drafts(o_.model));
        result.plain.push_back(n / plain.seconds);
        result.guessing.push_back(n / guessing.seconds);
        result.statistics = guessing.statistics;
      }
      results.push_back(std::move(result));
    }
    return results;
  }

 private:
  struct Run {
    double seconds = 0, bytes = 0;
    MtpStatistics statistics{};
  };

  // o_.decode tokens; `wanted` guesses in each pass.  What follows is the model's choice, or with --accept P random
  // tokens, of which a guess foresees each with probability P.
  Run decode(const TimelineSnapshot& from, int wanted) {
    timeline_->restore(from);
    const bool forced = o_.accept >= 0;
    const std::vector<std::int32_t> text = RandomTokens(vocabulary_, 2)(forced ? o_.decode + most_drafts + 1 : 1);
    std::mt19937_64 random(3);
    std::size_t done = 0;  // tokens appended
    const ChooseDraft choose = [&](int ahead, std::span<const float> logits) {
      if (!forced) return best(logits);
      const std::int32_t right = text[done + static_cast<std::size_t>(ahead)];
      const bool foreseen = static_cast<double>(random() >> 11) * 0x1p-53 < o_.accept;
      return foreseen ? right : (right + 1) % static_cast<std::int32_t>(logits.size());
    };
    const int draft_vocabulary = vocabulary_ > 2 * frequent_tokens ? frequent_tokens : vocabulary_;
    DraftDepth depth;
    Run run;
    const double bytes_before = model_->trace.total().memory;
    const auto start = std::chrono::steady_clock::now();
    std::int32_t next = text[0];
    std::vector<std::int32_t> tokens, follow;
    while (done < static_cast<std::size_t>(o_.decode)) {
      stop_if_interrupted();
      const auto round = std::chrono::steady_clock::now();
      tokens.assign(1, next), follow.clear();
      const int count = wanted == auto_drafts ? depth.choose(timeline_->most_drafts()) : wanted;
      const DraftTurn draft{timeline_.get(), next, count, draft_vocabulary, &choose, &tokens};
      if (count > 0) timeline_->draft_together({&draft, 1});
      const TimelineTurn turn{timeline_.get(), tokens, count > 0};
      timeline_->append_together({&turn, 1}, [&](std::size_t, std::span<const float> logits) {
        follow.push_back(forced ? text[done + follow.size() + 1] : best(logits));
      });
      std::size_t taken = 1;
      while (taken < tokens.size() && tokens[taken] == follow[taken - 1]) timeline_->take(), ++taken;
      next = follow[taken - 1];
      done += taken;
      run.statistics.add(tokens.size() - 1, taken - 1);
      depth.note(count, static_cast<int>(taken) - 1, seconds_since(round));
    }
    // The last pass may have given more than was asked for.
    const double share = static_cast<double>(o_.decode) / static_cast<double>(done);
    run.seconds = share * seconds_since(start);
    run.bytes = share * (model_->trace.total().memory - bytes_before);
    return run;
  }

  const BenchOptions& o_;
  int vocabulary_;
  std::unique_ptr<TracedModel> model_;
  RandomTokens random_tokens_;
  std::unique_ptr<Timeline> timeline_;
};

}  // namespace

std::vector<MtpResult> run_mtp(const Model& model, const BenchOptions& o, KvType kv) {
  const Interruptible scope;
  return MtpBench(model, o, kv).run();
}

void print_mtp(const std::vector<MtpResult>& results) {
  const Style style(stdout);
  std::cout << "\n"
            << style.bold()
            << format("%-18s %8s %10s %10s %12s %8s %10s %6s  %s", "mtp", "depth", "tokens/s", "without", "MB/token",
                      "gain", "possible", "%", "tokens a pass, guesses right")
            << style.reset() << "\n";
  for (const MtpResult& r : results) {
    std::string what = (r.drafts == auto_drafts ? "auto" : std::to_string(r.drafts)) + " x " + std::to_string(r.tokens);
    std::string right = format("%.2f ", r.statistics.tokens_per_pass());
    for (std::size_t i = 0; i < r.statistics.drafted.size() && r.statistics.drafted[i] > 0; ++i)
      right += format(" %.0f %%", 100 * r.statistics.acceptance(i));
    std::cout << format("%-18s %8lld %10s %10s %12.3f %8.3f %10.3f %6.1f  %s\n", what.c_str(),
                        static_cast<long long>(r.depth), rate_text(median(r.guessing)).c_str(),
                        rate_text(median(r.plain)).c_str(), r.bytes / 1e6, r.gain(), r.possible_gain(),
                        100 * r.gain() / r.possible_gain(), right.c_str());
  }
}

ordered_json mtp_json(const std::vector<MtpResult>& results) {
  ordered_json list = ordered_json::array();
  for (const MtpResult& r : results) {
    ordered_json acceptance = ordered_json::array();
    for (std::size_t i = 0; i < r.statistics.drafted.size() && r.statistics.drafted[i] > 0; ++i)
      acceptance.push_back(r.statistics.acceptance(i));
    ordered_json accept, drafts = "auto";
    if (r.accept >= 0) accept = r.accept;
    if (r.drafts != auto_drafts) drafts = r.drafts;
    list.push_back({{"kind", "mtp"},
                    {"drafts", std::move(drafts)},
                    {"accept", std::move(accept)},
                    {"tokens", r.tokens},
                    {"depth", r.depth},
                    {"tokens_per_second", median(r.guessing)},
                    {"plain_tokens_per_second", median(r.plain)},
                    {"bytes_per_token", r.bytes},
                    {"plain_bytes_per_token", r.plain_bytes},
                    {"gain", r.gain()},
                    {"possible_gain", r.possible_gain()},
                    {"tokens_per_pass", r.statistics.tokens_per_pass()},
                    {"acceptance", std::move(acceptance)},
                    {"samples", r.guessing},
                    {"plain_samples", r.plain}});
  }
  return list;
}

}  // namespace qwen3next::cli
