// Guessing ahead with the MTP head never changes a text: not at any temperature, depth or moment.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "qwen3next.hpp"
#include "tests/support/open.hpp"
#include "tests/support/temp_folder.hpp"

using namespace qwen3next;

namespace {

const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";
const char* const story = "Once upon a time there was a little dog who";

const Model& model() {
  static const Model m = test::open(tiny, {.threads = 2});
  return m;
}

GenerateOptions options(float temperature, int drafts, int n = 80) {
  GenerateOptions o{.sampling = {.temperature = temperature, .top_k = 20, .top_p = 0.95f, .seed = 3}};
  o.max_tokens = n;
  o.drafts = drafts;
  return o;
}

Generated generated(const Model& m, const GenerateOptions& o, const SessionOptions& s = {.context = 512}) {
  Session session = m.session(s);
  return session.generate(story, {}, o);
}

// The same tokens with every number of guesses as with none.
void check_same(const Model& m, GenerateOptions o, const SessionOptions& s = {.context = 512}) {
  o.drafts = 0;
  const Generated plain = generated(m, o, s);
  CHECK(plain.mtp.passes == 0);
  for (const int drafts : {1, 2, 4, auto_drafts}) {
    CAPTURE(drafts);
    o.drafts = drafts;
    const Generated guessing = generated(m, o, s);
    CHECK(guessing.tokens == plain.tokens);
    CHECK(guessing.text == plain.text);
    CHECK(guessing.reason == plain.reason);
    if (drafts > 0 && plain.tokens.size() >= 40) CHECK(guessing.mtp.tokens_per_pass() > 1.2);
  }
}

}  // namespace

TEST_CASE("the same text with guesses and without, at any temperature") {
  for (const float temperature : {0.f, 0.7f, 1.2f}) {
    CAPTURE(temperature);
    check_same(model(), options(temperature, 0));
  }
}

TEST_CASE("the same text with penalties, stop strings, stop tokens and a context that ends") {
  GenerateOptions penalised = options(0.8f, 0);
  penalised.sampling.presence_penalty = 0.5f;
  penalised.sampling.frequency_penalty = 0.3f;
  penalised.sampling.repetition_penalty = 1.1f;
  check_same(model(), penalised);

  GenerateOptions stopped = options(0, 0, 300);
  stopped.stop = {"said"};
  check_same(model(), stopped);
  GenerateOptions ended = options(0, 0, 300);
  ended.stop_tokens = model().stop_tokens();
  check_same(model(), ended);

  const auto prompt = static_cast<std::int64_t>(model().tokenizer().encode(story).size());
  for (const std::int64_t room : {1, 2, 3, 7, 20}) check_same(model(), options(0, 0, -1), {.context = prompt + room});
}

TEST_CASE("the same text on every backend, kind of cache and size of pass") {
  for (const KvType kv : {KvType::f32, KvType::q8_0}) check_same(model(), options(0.5f, 0), {.context = 256, .kv = kv});
  check_same(model(), options(0.5f, 0), {.context = 256, .batch = 5});
  for (const std::string_view isa : available_isas()) {
    CAPTURE(isa);
    check_same(Model::open(tiny, {.isa = std::string(isa), .threads = 1}), options(0.5f, 0, 40), {.context = 256});
  }
#ifdef QWEN3NEXT_REFERENCE
  check_same(Model::open(tiny, {.backend = Backend::reference}), options(0, 0, 12), {.context = 256});
#endif
}

// On a card the processor computes those that are not there, from int8 activations: tests/cuda/test_offload.cpp.
#ifndef QWEN3NEXT_TEST_ON_CUDA
TEST_CASE("the same text with experts that are streamed") {
  const Model small = test::open(tiny, {.threads = 2, .memory = std::uint64_t{64} << 20});
  GenerateOptions o = options(0.7f, 0);
  const Generated plain = generated(model(), o);
  for (const int drafts : {0, 2, 4}) {
    o.drafts = drafts;
    CHECK(generated(small, o, {.context = 512, .batch = 64}).tokens == plain.tokens);
  }
}
#endif

TEST_CASE("most first guesses are right on a story") {
  const Generated g = generated(model(), options(0, 3, 400), {.context = 1024});
  CHECK(g.mtp.acceptance(0) > 0.6);
  CHECK(g.mtp.acceptance(1) > 0.5);
  CHECK(g.mtp.tokens_per_pass() > 2);
}

TEST_CASE("a loop of one's own: what is foreseen needs no pass, and its logits are those of one") {
  Session guessing = model().session({.context = 512}), plain = model().session({.context = 512});
  const std::vector<std::int32_t> prompt = model().tokenizer().encode(story);
  guessing.prefill(prompt), plain.prefill(prompt);
  Sampler sampler({.temperature = 0});
  guessing.speculate(&sampler, 3);
  int foreseen = 0;
  std::span<const float> logits = plain.decode(7);
  CHECK(std::ranges::equal(guessing.decode(7), logits));
  for (int i = 0; i < 60; ++i) {
    const std::int32_t token = sampler.sample(logits);
    const std::int32_t given = i % 7 == 6 ? 40 : token;  // now and then not what the sampler chose
    if (guessing.foresees(given)) ++foreseen;
    logits = plain.decode(given);
    CHECK(std::ranges::equal(guessing.decode(given), logits));
    CHECK(std::ranges::equal(guessing.tokens(), plain.tokens()));
    if (i == 20) {  // everything else forgets the guesses, and goes on from what was taken
      const Snapshot snapshot = guessing.snapshot();
      CHECK(std::ranges::equal(guessing.decode(5), plain.decode(5)));
      guessing.restore(snapshot);
      plain.restore(snapshot);
      logits = plain.decode(11);
      CHECK(std::ranges::equal(guessing.decode(11), logits));
    }
    if (i == 30) {
      logits = plain.prefill(prompt);
      CHECK(std::ranges::equal(guessing.prefill(prompt), logits));
    }
    if (i == 45) {
      guessing.speculate(nullptr);
      CHECK(!guessing.foresees(given));
      logits = plain.decode(12);
      CHECK(std::ranges::equal(guessing.decode(12), logits));
      guessing.speculate(&sampler, 2);
    }
  }
  CHECK(foreseen > 20);
  CHECK(guessing.mtp_statistics().passes > 10);
}

// As many rows as a pass of one sequence may have: then rounding is the same, too.
TEST_CASE("sessions that guess ahead together say what each says alone") {
  constexpr std::size_t S = 2;
  std::vector<std::vector<std::int32_t>> alone;
  for (std::size_t i = 0; i < S; ++i) {
    GenerateOptions o = options(i % 2 ? 0.8f : 0.f, 0, 50);
    o.sampling.seed = i;
    Session session = model().session({.context = 256});
    alone.push_back(session.generate(std::string(story) + std::string(i, '.'), {}, o).tokens);
  }
  std::vector<Session> sessions;
  std::vector<Sampler> samplers;
  std::vector<std::vector<std::int32_t>> said(S);
  for (std::size_t i = 0; i < S; ++i) {
    sessions.push_back(model().session({.context = 256}));
    samplers.emplace_back(Sampling{.temperature = i % 2 ? 0.8f : 0.f, .top_k = 20, .top_p = 0.95f, .seed = i});
  }
  std::vector<std::span<const float>> logits(S);
  for (std::size_t i = 0; i < S; ++i) {
    logits[i] = sessions[i].prefill(model().tokenizer().encode(std::string(story) + std::string(i, '.')));
    sessions[i].speculate(&samplers[i], static_cast<int>(i) + 1);
  }
  int passes = 0;
  while (true) {
    std::vector<std::int32_t> tokens(S);
    std::vector<Turn> turns;
    for (std::size_t i = 0; i < S; ++i) {
      while (said[i].size() < 50) {
        tokens[i] = samplers[i].sample(logits[i]);
        said[i].push_back(tokens[i]);
        if (said[i].size() == 50) break;
        if (!sessions[i].foresees(tokens[i])) {
          turns.push_back({&sessions[i], {&tokens[i], 1}});
          break;
        }
        logits[i] = sessions[i].decode(tokens[i]);
      }
    }
    if (turns.empty()) break;
    decode_together(turns);
    ++passes;
    for (const Turn& turn : turns) logits[static_cast<std::size_t>(turn.session - sessions.data())] = turn.logits;
  }
  for (std::size_t i = 0; i < S; ++i) CHECK(said[i] == alone[i]);
  CHECK(passes < 45);
  for (const Session& session : sessions) CHECK(session.mtp_statistics().tokens_per_pass() > 1.3);
}

TEST_CASE("many sessions, some of which guess, some read a prompt, in the same passes") {
  constexpr std::size_t S = 6;
  std::vector<Session> sessions;
  std::vector<Sampler> samplers(S, Sampler({.temperature = 0}));
  for (std::size_t i = 0; i < S; ++i) {
    sessions.push_back(model().session({.context = 256, .batch = 24}));
    sessions[i].prefill(model().tokenizer().encode(story));
    if (i != 2) sessions[i].speculate(&samplers[i], i == 3 ? auto_drafts : 4);
  }
  const std::vector<std::int32_t> prompt = model().tokenizer().encode("The cat was not sure. She asked the old owl.");
  std::vector<std::int32_t> tokens(S, 40);
  for (int round = 0; round < 20; ++round) {
    std::vector<Turn> turns;
    for (std::size_t i = 0; i < S; ++i) turns.push_back({&sessions[i], {&tokens[i], 1}});
    if (round % 5 == 4) turns[static_cast<std::size_t>(round / 5)].tokens = prompt;
    decode_together(turns);
    for (std::size_t i = 0; i < S; ++i) tokens[i] = samplers[i].sample(turns[i].logits);
  }
  for (std::size_t i = 0; i < S; ++i) {  // whatever was guessed, a session is what its tokens make it
    Session again = model().session({.context = 256});
    const std::span<const float> expected = again.prefill(sessions[i].tokens());
    const std::span<const float> found = sessions[i].decode(41);
    const std::span<const float> next = again.decode(41);
    double error = 0, power = 0;
    for (std::size_t j = 0; j < next.size(); ++j)
      error += std::pow(found[j] - next[j], 2), power += std::pow(next[j], 2);
    CHECK(error < 1e-3 * power);
    CHECK(expected.size() == found.size());
    CHECK(std::ssize(sessions[i].tokens()) == std::ssize(again.tokens()));
  }
  CHECK(sessions[0].mtp_statistics().passes > 0);
}

TEST_CASE("guessing where it is not possible is an error, or left out if nobody insisted") {
  Session session = model().session({.context = 256, .mtp = false});
  CHECK_THROWS_WITH_AS(session.generate(story, {}, options(0, 2, 5)), doctest::Contains("without the MTP head"), Error);
  const Generated g = session.generate(" and", {}, options(0, auto_drafts, 5));
  CHECK(g.tokens.size() == 5);
  CHECK(g.mtp.drafted[0] == 0);
  CHECK_THROWS_WITH_AS(session.generate(" and", {}, options(0, 5, 5)), doctest::Contains("expected 0..4"), Error);
}

TEST_CASE("a session that goes on from another's snapshot or file guesses as well as that one") {
  Session first = model().session({.context = 1024});
  first.generate(story, {}, options(0, 0, 100));
  const Snapshot snapshot = first.snapshot();
  Session second = model().session({.context = 1024});
  second.restore(snapshot);
  const test::TempFolder folder;
  first.save(folder.path() / "first.state");
  Session third = model().session({.context = 1024});
  third.load(folder.path() / "first.state");
  const Generated a = first.generate("", {}, options(0, 2, 100)), b = second.generate("", {}, options(0, 2, 100)),
                  c = third.generate("", {}, options(0, 2, 100));
  CHECK(a.tokens == b.tokens);
  CHECK(a.tokens == c.tokens);
  CHECK(a.mtp.accepted == b.mtp.accepted);
  CHECK(a.mtp.accepted == c.mtp.accepted);
}
