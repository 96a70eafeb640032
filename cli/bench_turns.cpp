// bench --turns: a conversation whose template drops the reasoning of earlier answers.

#include "cli/bench.hpp"
#include "cli/progress.hpp"

namespace qwen3next::cli {

namespace {

// Tokens and where turns begin.  Random tokens stand for text: no tokenizer is needed.
struct Chat {
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> turns;

  void turn() { turns.push_back(static_cast<std::int64_t>(tokens.size())); }
  void add(const std::vector<std::int32_t>& more) { tokens.insert(tokens.end(), more.begin(), more.end()); }
};

constexpr std::int64_t opening = 3;       // tokens of <|im_start|>assistant and a line break
constexpr std::int64_t past_turn = 400;   // of the history
constexpr std::int64_t thought_part = 4;  // three quarters of an answer are reasoning

}  // namespace

std::int64_t turns_context(const BenchOptions& o) {
  const std::int64_t longest_depth = *std::max_element(o.depths.begin(), o.depths.end());
  return longest_depth + o.turns * (o.prefill + o.decode + 2 * opening) + o.prefill + 1;
}

std::vector<TurnResult> run_turns(const Model& model, const BenchOptions& o) {
  SessionOptions options = session_options(o.model);
  if (options.context == 0) options.context = turns_context(o);
  Session session = model.session(options);
  RandomTokens random(model.config());
  const Interruptible scope;
  const auto keep_on = [](std::int64_t, std::int64_t) { return !interrupted(); };
  std::vector<TurnResult> results;
  for (const std::int64_t depth : o.depths) {
    Chat chat;
    while (static_cast<std::int64_t>(chat.tokens.size()) < depth) {
      chat.turn();
      chat.add(random(std::min(past_turn, depth - static_cast<std::int64_t>(chat.tokens.size()))));
    }
    const std::vector<std::int32_t> answer_opening = random(opening), think = random(2), plain = random(2);
    for (int i = 0; i < o.turns; ++i) {
      chat.turn();
      chat.add(random(o.prefill));
      chat.turn();
      chat.add(answer_opening);
      std::vector<std::int32_t> prompt = chat.tokens;
      prompt.insert(prompt.end(), think.begin(), think.end());
      Progress progress("turn " + std::to_string(i + 1), Progress::Unit::tokens);
      const auto start = std::chrono::steady_clock::now();
      const Session::Synced synced = session.sync(prompt, chat.turns, [&](std::int64_t done, std::int64_t total) {
        progress.update(done, total);
        return !interrupted();
      });
      TurnResult r{depth, i + 1, synced.how.tokens, synced.reused, synced.how.known, seconds_since(start), 0};
      progress.clear();
      // As many tokens at that depth, read without more ado.
      const std::int64_t read = r.tokens - r.reused;
      if (i > 0 && r.tokens + read <= session.context()) {
        const Snapshot here = session.snapshot();
        const std::vector<std::int32_t> others = random(read);
        const auto plainly = std::chrono::steady_clock::now();
        session.prefill(others, keep_on);
        r.plain_seconds = seconds_since(plainly);
        session.restore(here);
      }
      results.push_back(r);
      // The answer: what was thought does not come back.
      for (const std::int32_t token : random(o.decode)) {
        stop_if_interrupted();
        session.decode(token);
      }
      chat.add(plain);
      chat.add(random(o.decode / thought_part));
    }
    session.reset();
  }
  return results;
}

void print_turns(const std::vector<TurnResult>& results) {
  const Style style(stdout);
  std::cout << style.bold()
            << format("%-8s %8s %10s %10s %10s %12s %12s", "turn", "depth", "prompt", "reused", "read", "first token",
                      "plain read")
            << style.reset() << "\n";
  for (const TurnResult& r : results) {
    std::cout << format("%-8d %8lld %10lld %10lld %10lld %10.3f s ", r.turn, static_cast<long long>(r.depth),
                        static_cast<long long>(r.tokens), static_cast<long long>(r.reused),
                        static_cast<long long>(r.tokens - r.reused), r.seconds)
              << (r.plain_seconds > 0 ? format("%10.3f s", r.plain_seconds) : "") << "\n";
  }
}

nlohmann::ordered_json turns_json(const std::vector<TurnResult>& results) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const TurnResult& r : results) {
    json.push_back({{"kind", "turn"},
                    {"turn", r.turn},
                    {"depth", r.depth},
                    {"tokens", r.tokens},
                    {"reused", r.reused},
                    {"known", r.known},
                    {"seconds", r.seconds},
                    {"tokens_per_second", static_cast<double>(r.tokens - r.reused) / r.seconds}});
    if (r.plain_seconds > 0) json.back()["plain_seconds"] = r.plain_seconds;
  }
  return json;
}

}  // namespace qwen3next::cli
