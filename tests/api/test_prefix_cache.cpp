// What sessions go back to: states of prefixes, forks, and what sync() says of it.

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <thread>
#include <vector>

#include "qwen3next.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/open.hpp"

using namespace qwen3next;

namespace {

const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";

using Tokens = std::vector<std::int32_t>;

Tokens random_tokens(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  Tokens tokens(n);
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random() % 8000);
  return tokens;
}
Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
std::vector<float> copy(std::span<const float> logits) { return {logits.begin(), logits.end()}; }

// What a session computes that reads these pieces one after the other.
std::vector<float> straight(const Model& model, const SessionOptions& options, const std::vector<Tokens>& pieces) {
  Session session = model.session(options);
  std::span<const float> logits;
  for (const Tokens& piece : pieces) logits = session.prefill(piece);
  return copy(logits);
}

struct Setting {
  const char* name;
  Options options;
  std::optional<KvType> kv;
  double bound;  // of states kept inside of a pass, whose products have other numbers of rows
};

const std::vector<Setting>& settings() {
  static const std::vector<Setting> all{{"cpu, f16", {}, KvType::f16, 1e-3},
                                        {"cpu, f32", {}, KvType::f32, 1e-3},
                                        {"cpu, q8_0", {}, KvType::q8_0, 1e-3},
                                        {"reference", {.backend = Backend::reference}, {}, 1e-9},
                                        {"streamed", {.memory = 40u << 20}, KvType::f16, 1e-3}};
  return all;
}

}  // namespace

TEST_CASE("a state kept in the middle of a pass is that of the tokens before it, and the pass is not disturbed") {
  for (const Setting& s : settings()) {
    CAPTURE(s.name);
    const Model model = test::open(tiny, s.options);
    const SessionOptions options{.context = 1024, .kv = s.kv};
    const Tokens first = random_tokens(75, 1), second = random_tokens(35, 2), other = random_tokens(20, 3);
    Session session = model.session(options);
    const std::int64_t turns[] = {75};
    const auto whole = copy(session.sync(first + second, turns).logits);
    CHECK(test::nmse(whole, straight(model, options, {first + second})) <= s.bound);
    // Back to the place, and on with something else, as after reading what was before it alone.
    const Session::Synced synced = session.sync(first + other, turns);
    CHECK(synced.reused == 75);
    CHECK(synced.how.source == Reuse::Source::memory);
    const auto found = copy(synced.logits);
    CHECK(test::nmse(found, straight(model, options, {first, other})) <= s.bound);
    // However often, and in whatever session: bit for bit the same.
    Session another = model.session(options);
    CHECK(copy(another.sync(first + other, turns).logits) == found);
  }
}

TEST_CASE("what was restored is bit for bit what was kept") {
  for (const Setting& s : settings()) {
    CAPTURE(s.name);
    const Model model = test::open(tiny, s.options);
    const SessionOptions options{.context = 2048, .kv = s.kv, .batch = 64, .snapshot_spacing = 1024};
    const Tokens history = random_tokens(130, 5), question = random_tokens(40, 6), aside = random_tokens(33, 7);
    const std::int64_t one_turn[] = {0};
    Session session = model.session(options);
    session.sync(history, one_turn);
    session.sync(aside, one_turn);  // the timeline goes, its state is kept
    const Session::Synced back = session.sync(history + question, one_turn);
    CHECK(back.reused == 130);
    CHECK(copy(back.logits) == straight(model, options, {history, question}));  // the same splits: the same bits
    const Session::Synced again = session.sync(history, one_turn);
    CHECK(again.reused == 130);
    CHECK(copy(again.logits) == straight(model, options, {history}));
  }
}

TEST_CASE("a conversation whose template drops old reasoning costs its changed tail only") {
  const Model model = test::open(tiny);
  Session session = model.session({.context = 4096});
  Tokens history = random_tokens(600, 8);
  std::vector<std::int64_t> turns{0};
  for (unsigned i = 0; i < 5; ++i) {
    CAPTURE(i);
    turns.push_back(static_cast<std::int64_t>(history.size()));
    history = history + random_tokens(50, 20 + i);  // the user's turn
    turns.push_back(static_cast<std::int64_t>(history.size()));
    const Session::Synced synced =
        session.sync(history + Tokens{1, 2, 3}, turns);  // the answer's, "<think>" at its end
    if (i > 0) {
      // Read again: the answer as it is now, without the 60 tokens of thinking, and the user's turn.
      CHECK(synced.reused == turns[turns.size() - 3]);
      CHECK(synced.how.diverged());
      CHECK(synced.how.known == synced.reused + 2);
      CHECK(synced.how.was == 3);
      CHECK(synced.how.is == 4);
    }
    for (std::int32_t token : random_tokens(60, 40 + i)) session.decode(token);
    history = history + Tokens{1, 2, 4} + random_tokens(30, 60 + i);
  }
}

TEST_CASE("a side request does not cost the conversation, in this session or another one") {
  const Model model = test::open(tiny);
  Session session = model.session({.context = 4096}), side = model.session({.context = 4096});
  const Tokens chat = random_tokens(3000, 9);
  const std::int64_t turns[] = {0, 2900};
  session.sync(chat, turns);
  for (unsigned i = 0; i < 12; ++i) {
    side.sync(random_tokens(300, 100 + i), std::span<const std::int64_t>());
    session.sync(random_tokens(300, 200 + i), std::span<const std::int64_t>());
  }
  // Its end was near to the answer's turn: no state of its own.
  CHECK(session.sync(chat + random_tokens(10, 10), turns).reused == 2900);
}

TEST_CASE("a cancelled prompt is gone on with, even after something else was read") {
  const Model model = test::open(tiny);
  Session session = model.session({.context = 4096, .batch = 256, .snapshot_spacing = 512});
  const Tokens prompt = random_tokens(2048, 11);
  const auto stop = [](std::int64_t done, std::int64_t) { return done < 1536; };
  CHECK_THROWS_AS(session.sync(prompt, std::span<const std::int64_t>(), stop), Cancelled);
  CHECK(session.tokens().size() == 1536);
  Session other = model.session({.context = 4096});
  CHECK(other.sync(prompt, std::span<const std::int64_t>()).reused == 1536 - 512 * (1536 % 512 == 0 ? 0 : 1));
  session.sync(random_tokens(40, 12), std::span<const std::int64_t>());
  CHECK(session.sync(prompt, std::span<const std::int64_t>()).reused >= 1536);
}

TEST_CASE("a fork goes on by itself, from the same state") {
  const Model model = test::open(tiny);
  Session session = model.session({.context = 1024, .kv = KvType::q8_0, .batch = 64});
  session.prefill(random_tokens(200, 13));
  Session fork = session.fork();
  CHECK(std::ranges::equal(fork.tokens(), session.tokens()));
  CHECK(fork.context() == 1024);
  const auto one = copy(fork.decode(5)), two = copy(session.decode(6));
  CHECK(one != two);
  CHECK(copy(session.decode(7)) != copy(fork.decode(7)));
  const Tokens read = random_tokens(200, 13);
  CHECK(one == straight(model, {.context = 1024, .kv = KvType::q8_0, .batch = 64}, {read, {5}}));
  fork = session.fork();  // and may be replaced
  CHECK(copy(fork.decode(8)) == copy(session.decode(8)));
}

TEST_CASE("states stay within their budget, which counts what they share once; 0 keeps none") {
  const std::uint64_t budget = 24u << 20;
  const Model model = test::open(tiny, {.prefix_cache = budget});
  {
    Session session = model.session({.context = 4096, .snapshot_spacing = 128});
    session.sync(random_tokens(4000, 14), std::span<const std::int64_t>());
    const PrefixStatistics s = model.prefix_statistics();
    CHECK(s.snapshots > 4);
    CHECK(s.bytes <= budget);
    // States of a prefix share its keys and values: so many of the longest one would not fit.
    CHECK(s.snapshots * model.plan({.context = 2000}).kv_cache > budget / 2);
    CHECK(session.sync(random_tokens(4000, 14), std::span<const std::int64_t>()).reused == 4000);
  }
  CHECK(model.prefix_statistics().bytes <= budget);  // the session's part is theirs now
  const Model none = test::open(tiny, {.prefix_cache = 0});
  Session session = none.session({.context = 1024});
  const Tokens tokens = random_tokens(500, 15);
  session.sync(tokens);
  CHECK(none.prefix_statistics().snapshots == 0);
  CHECK(session.sync(std::span(tokens).first(400)).reused == 0);
}

TEST_CASE("sessions in several threads share what they read") {
  const Model model = test::open(tiny, {.threads = 1, .prefix_cache = 24u << 20});
  const Tokens system = random_tokens(600, 16);
  const std::int64_t turns[] = {0, 600};
  const auto expected = [&] {
    Session session = model.session({.context = 2048});
    return copy(session.sync(system + random_tokens(30, 17), turns).logits);
  }();
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (std::size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (unsigned i = 0; i < 6; ++i) {
        Session session = model.session({.context = 2048});
        session.sync(system + random_tokens(40, 300 + 10 * static_cast<unsigned>(t) + i), turns);
        const auto found = copy(session.sync(system + random_tokens(30, 17), turns).logits);
        if (!(test::nmse(found, expected) <= 1e-3)) ++wrong[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4));
  CHECK(model.prefix_statistics().bytes <= 24u << 20);
}

TEST_CASE("under a memory budget states are charged to it") {
  const Model model = Model::open(tiny, {.memory = 26u << 20, .prefix_cache = 4u << 20});
  Session session = model.session({.context = 2048, .batch = 64, .snapshot_spacing = 256});
  session.sync(random_tokens(64, 18), std::span<const std::int64_t>());
  const auto before = model.expert_statistics()->slots;
  session.sync(random_tokens(1500, 19), std::span<const std::int64_t>());
  session.reset();
  CHECK(model.prefix_statistics().bytes > 2u << 20);
  CHECK(model.prefix_statistics().bytes <= 4u << 20);
  CHECK(before < model.expert_statistics()->experts);
  CHECK(model.expert_statistics()->slots < before);
}
