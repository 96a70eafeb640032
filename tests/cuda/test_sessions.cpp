// Sessions that move between the card and the CPU; and the suite `sanitizer`, which runs every kernel once or twice,
// for compute-sanitizer.

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "qwen3next.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/temp_folder.hpp"

using namespace qwen3next;

namespace {

const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";
const std::string goldens = QWEN3NEXT_SOURCE_DIR "/tests/golden/model/";

Model open_on(Backend backend, const std::string& path) { return Model::open(path, {.backend = backend}); }

std::vector<std::int32_t> random_tokens(const Model& model, std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(n);
  for (std::int32_t& token : tokens)
    token = static_cast<std::int32_t>(random() % static_cast<unsigned>(model.config().vocab_size));
  return tokens;
}

// Logits of every token: of `prompt` in one pass, of `then` one by one.
std::vector<float> all_logits(Session& session, std::span<const std::int32_t> prompt,
                              std::span<const std::int32_t> then) {
  std::vector<float> rows;
  const auto keep = [&](std::span<const float> row) { rows.insert(rows.end(), row.begin(), row.end()); };
  session.all_logits(prompt, keep);
  for (const std::int32_t token : then) keep(session.decode(token));
  return rows;
}

}  // namespace

TEST_CASE("a session saved on one backend goes on with the other") {
  const Model cuda = open_on(Backend::cuda, tiny), cpu = open_on(Backend::cpu, tiny);
  const auto prompt = random_tokens(cuda, 100, 3), then = random_tokens(cuda, 20, 4);
  const test::TempFolder folder;
  for (const auto& [first, second] : {std::pair(&cuda, &cpu), std::pair(&cpu, &cuda)}) {
    const SessionOptions options{.context = 256, .kv = KvType::f16};
    Session begun = first->session(options), gone_on = second->session(options);
    begun.prefill(prompt);
    begun.save(folder / "state");
    gone_on.load(folder / "state");
    CHECK(std::ranges::equal(gone_on.tokens(), prompt));
    CHECK(test::nmse(all_logits(gone_on, then, {}), all_logits(begun, then, {})) <= 1e-3);
  }
}

TEST_SUITE("sanitizer") {
  TEST_CASE("every kernel: a prompt, tokens one by one, sequences together, guesses, copies of states") {
    const Model model = open_on(Backend::cuda, tiny);
    for (const KvType kv : {KvType::f16, KvType::q8_0}) {
      const SessionOptions options{.context = 128, .kv = kv, .batch = 48};
      Session one = model.session(options), other = model.session(options);
      one.prefill(random_tokens(model, 70, 1));  // a long pass, a short one
      const Snapshot before = one.snapshot();
      one.decode(5);
      one.restore(before);
      other.prefill(random_tokens(model, 5, 2));
      const auto more = random_tokens(model, 9, 3);
      std::vector<Turn> turns{{&one, std::span(more).first(1)}, {&other, more}};
      decode_together(turns);
      GenerateOptions guessing = one.default_options();
      guessing.max_tokens = 6;
      guessing.drafts = 3;
      one.generate(" and", {}, guessing);
      CHECK(one.tokens().size() > other.tokens().size());
    }
  }

  TEST_CASE("every kernel, odd shapes") {
    for (const char* name : {"release", "fp8"}) {
      const Model model = open_on(Backend::cuda, goldens + name);
      Session session = model.session({.context = 64});
      const auto tokens = random_tokens(model, 12, 1);
      CHECK(session.prefill(tokens).size() == static_cast<std::size_t>(model.config().vocab_size));
      session.decode(tokens[0]);
    }
  }
}
