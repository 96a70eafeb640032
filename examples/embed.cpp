// A sampling loop of one's own: tokens in, logits out.   embed MODEL
//
// Reads a beginning once, keeps a snapshot of what the model then knows, and continues it twice from there: once with
// the most probable token each time, once with a token drawn among the three best.

#include <algorithm>
#include <iostream>
#include <random>
#include <vector>

#include "qwen3next.hpp"

using namespace qwen3next;

namespace {

// The ids of the `k` largest logits, best first.
std::vector<std::int32_t> best_tokens(std::span<const float> logits, std::size_t k) {
  std::vector<std::int32_t> ids(logits.size());
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
  k = std::min(k, ids.size());
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(k), ids.end(),
                    [&](std::int32_t a, std::int32_t b) {
                      return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
                    });
  ids.resize(k);
  return ids;
}

// Continues the session by up to `count` tokens, each chosen by `choose` from the logits.
template <class Choose>
void continue_text(Session& session, std::span<const float> logits, int count, Choose choose) {
  const Tokenizer& tokenizer = session.model().tokenizer();
  const std::vector<std::int32_t> stop = session.model().stop_tokens();
  Utf8Stream characters(tokenizer);  // a token may hold half a character
  for (int i = 0; i < count; ++i) {
    const std::int32_t token = choose(logits);
    if (std::find(stop.begin(), stop.end(), token) != stop.end()) break;
    std::cout << characters.push(token) << std::flush;
    logits = session.decode(token);
  }
  std::cout << characters.flush() << "\n\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: embed MODEL\n";
    return 2;
  }
  try {
    const Model model = Model::open(argv[1]);
    Session session = model.session({.context = 1024});

    const std::vector<std::int32_t> prompt = model.tokenizer().encode("The little dog ran into the garden");
    const std::span<const float> after_prompt = session.prefill(prompt);
    const std::vector<float> logits(after_prompt.begin(), after_prompt.end());  // the span lasts until the next call
    const Snapshot beginning = session.snapshot();

    continue_text(session, logits, 60, [](std::span<const float> l) { return best_tokens(l, 1)[0]; });

    session.restore(beginning);  // bit for bit where we were
    std::mt19937 random(7);
    continue_text(session, logits, 60, [&](std::span<const float> l) {
      const std::vector<std::int32_t> best = best_tokens(l, 3);
      return best[random() % best.size()];
    });
    return 0;
  } catch (const Error& e) {  // says what, where, and what to do
    std::cerr << e.what() << "\n";
    return 1;
  }
}
