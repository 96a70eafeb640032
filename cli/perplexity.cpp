// perplexity: how well the model foresees a text.

#include <bit>
#include <cmath>
#include <vector>

#include "cli/commands.hpp"
#include "cli/common.hpp"
#include "cli/progress.hpp"

namespace qwen3next::cli {

namespace {

struct PerplexityOptions {
  ModelOptions model;
  std::string file;
  bool quiet = false;
};

// -log softmax(logits)[token]
double surprise(std::span<const float> logits, std::int32_t token) {
  const float best = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += static_cast<double>(std::exp(x - best));
  return std::log(sum) + static_cast<double>(best) - static_cast<double>(logits[static_cast<std::size_t>(token)]);
}

// How the surprise falls as more of the text has been read: tokens of a window from the 1st, 2nd, 4th, 8th.. on,
// counted from 0 (which is not scored).
class ByPosition {
 public:
  void add(std::size_t position, double nats) {
    const auto bucket = static_cast<std::size_t>(std::bit_width(position)) - 1;
    if (bucket >= buckets_.size()) buckets_.resize(bucket + 1);
    buckets_[bucket].nats += nats;
    ++buckets_[bucket].tokens;
  }
  ordered_json json() const {
    ordered_json list = ordered_json::array();
    for (std::size_t i = 0; i < buckets_.size(); ++i) {
      const double nll = buckets_[i].nats / static_cast<double>(buckets_[i].tokens);
      list.push_back(
          {{"from", std::size_t{1} << i}, {"tokens", buckets_[i].tokens}, {"nll", nll}, {"ppl", std::exp(nll)}});
    }
    return list;
  }

 private:
  struct Bucket {
    double nats = 0;
    std::int64_t tokens = 0;
  };
  std::vector<Bucket> buckets_;  // none is empty: a window fills them in order
};

void perplexity(const PerplexityOptions& o) {
  const Model model = open_model(o.model);
  const std::vector<std::int32_t> tokens = model.tokenizer().encode(read_text(o.file, "a text"));
  if (tokens.size() < 2) throw Error(o.file + ": too short, expected a text of at least two tokens");
  SessionOptions options = session_options(o.model);
  options.context = window_length(o.model, model.config());
  if (options.context < 2) throw Error("--ctx is 1: a window needs at least two tokens");
  Session session = model.session(options);

  const Interruptible scope;
  const auto start = std::chrono::steady_clock::now();
  const auto window = static_cast<std::size_t>(options.context);
  Progress progress("perplexity", Progress::Unit::tokens, !o.quiet);
  double sum = 0, sum_of_squares = 0;
  std::int64_t scored = 0, windows = 0;
  ByPosition by_position;
  for (std::size_t begin = 0; begin + 1 < tokens.size(); begin += window, ++windows) {
    const auto piece = std::span(tokens).subspan(begin, std::min(window, tokens.size() - begin));
    session.reset();
    std::size_t row = 0;
    session.all_logits(piece, [&](std::span<const float> logits) {
      stop_if_interrupted();
      if (++row == piece.size()) return;  // what follows the window is not asked for
      if (!is_finite(logits)) {
        throw_error(o.model.path, ": the logits of token ", begin + row - 1,
                    " are not numbers: its weights are damaged");
      }
      const double nats = surprise(logits, piece[row]);
      sum += nats, sum_of_squares += nats * nats, ++scored;
      by_position.add(row, nats);
      progress.update(static_cast<std::int64_t>(begin + row), static_cast<std::int64_t>(tokens.size()));
    });
  }
  const auto n = static_cast<double>(scored);
  const double nll = sum / n, seconds = seconds_since(start);
  const double variance = std::max(0., sum_of_squares / n - nll * nll);
  progress.clear();
  ordered_json result{{"nll", nll},
                      {"ppl", std::exp(nll)},
                      {"tokens", scored},
                      {"nll_error", std::sqrt(variance / n)},
                      {"windows", windows},
                      {"ctx", options.context},
                      {"seconds", seconds},
                      {"tokens_per_second", static_cast<double>(tokens.size()) / seconds},
                      {"by_position", by_position.json()}};
  std::cout << result.dump() << "\n";
}

}  // namespace

void add_perplexity(CLI::App& app) {
  auto o = std::make_shared<PerplexityOptions>();
  CLI::App& command = *app.add_subcommand("perplexity", "Measure how well the model foresees a text");
  add_model_options(command, o->model);
  command.add_option("FILE", o->file, "The text; '-' is standard input")->required()->option_text(" ");
  add_window_options(command, o->model, o->quiet);
  add_example(
      command,
      "qwen3next perplexity model.gguf text.txt --ctx 4096\n\n"
      "The text is cut into windows of --ctx tokens; in each the model starts anew, and each token but the first is\n"
      "scored.  Prints JSON: nll (mean, in nats per token), ppl = exp(nll), tokens (scored), nll_error (standard\n"
      "error of nll), windows, ctx, seconds, tokens_per_second; by_position: from, tokens, nll and ppl of the tokens\n"
      "of all windows that stand at from..2 from - 1 of theirs, for from = 1, 2, 4, 8..: the first of a window is 0.");
  command.callback([o] { perplexity(*o); });
}

}  // namespace qwen3next::cli
