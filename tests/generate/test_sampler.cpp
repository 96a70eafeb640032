// The sampler draws from exactly the distribution that its options describe.

#include <doctest/doctest.h>

#include <cmath>
#include <map>
#include <vector>

#include "generate/sampler.hpp"

using namespace qwen3next;

namespace {

const std::vector<float> logits{1.0f, 3.0f, 2.0f, -1.0f, 2.5f, 0.0f};

Sampling plain() { return {.temperature = 1, .top_k = 0, .top_p = 1}; }

std::map<std::int32_t, double> frequencies(const Sampling& sampling, int draws = 20000) {
  Sampler sampler(sampling);
  std::map<std::int32_t, double> f;
  for (int i = 0; i < draws; ++i) f[sampler.sample(logits)] += 1.0 / draws;
  return f;
}

// What the draws should look like, straight from the definition, over the tokens `kept`.
std::map<std::int32_t, double> softmax(const std::vector<std::int32_t>& kept, double temperature) {
  std::map<std::int32_t, double> p;
  double sum = 0;
  for (std::int32_t t : kept)
    sum += p[t] = std::exp(static_cast<double>(logits[static_cast<std::size_t>(t)]) / temperature);
  for (auto& [t, x] : p) x /= sum;
  return p;
}

void check_close(const std::map<std::int32_t, double>& found, const std::map<std::int32_t, double>& expected) {
  for (const auto& [token, f] : found) CHECK_MESSAGE(expected.count(token) == 1, "drew token ", token);
  for (const auto& [token, p] : expected) {
    CAPTURE(token);
    const double f = found.count(token) ? found.at(token) : 0;
    CHECK(std::abs(f - p) < 4.5 * std::sqrt(p * (1 - p) / 20000) + 1e-4);  // 4.5 standard deviations
  }
}

}  // namespace

TEST_CASE("temperature 0 takes the most probable token, the first of equals") {
  Sampler sampler({.temperature = 0});
  CHECK(sampler.sample(logits) == 1);
  CHECK(sampler.sample(std::vector<float>{1, 2, 2}) == 1);
}

TEST_CASE("temperature scales the distribution") {
  for (float temperature : {0.5f, 1.0f, 2.0f}) {
    Sampling s = plain();
    s.temperature = temperature;
    check_close(frequencies(s), softmax({0, 1, 2, 3, 4, 5}, temperature));
  }
}

TEST_CASE("top_k keeps the k most probable") {
  Sampling s = plain();
  s.top_k = 3;
  check_close(frequencies(s), softmax({1, 4, 2}, 1));
  s.top_k = 1;
  check_close(frequencies(s), softmax({1}, 1));
  s.top_k = 100;
  check_close(frequencies(s), softmax({0, 1, 2, 3, 4, 5}, 1));
}

TEST_CASE("top_p keeps the fewest tokens that hold the mass") {
  // Probabilities, sorted: 1: .453, 4: .275, 2: .167, 0: .061, 5: .023, 3: .008 (rounded).
  Sampling s = plain();
  s.top_p = 0.44f;
  check_close(frequencies(s), softmax({1}, 1));
  s.top_p = 0.5f;
  check_close(frequencies(s), softmax({1, 4}, 1));
  s.top_p = 0.93f;
  check_close(frequencies(s), softmax({1, 4, 2, 0}, 1));
}

TEST_CASE("min_p drops what is much less probable than the best") {
  Sampling s = plain();
  s.min_p = 0.3f;  // of the best: 4 has e^-0.5 = .61, 2 has e^-1 = .37, 0 has e^-2 = .14
  check_close(frequencies(s), softmax({1, 4, 2}, 1));
}

TEST_CASE("the same seed gives the same draws, another seed others") {
  Sampling s = plain();
  s.seed = 7;
  auto draw = [](const Sampling& sampling) {
    Sampler sampler(sampling);
    std::vector<std::int32_t> tokens;
    for (int i = 0; i < 50; ++i) tokens.push_back(sampler.sample(logits));
    return tokens;
  };
  CHECK(draw(s) == draw(s));
  Sampling other = s;
  other.seed = 8;
  CHECK(draw(s) != draw(other));
}

TEST_CASE("penalties lower what was said") {
  SUBCASE("presence: once, however often") {
    Sampler sampler({.temperature = 0, .presence_penalty = 0.75f});
    CHECK(sampler.sample(logits) == 1);  // 3 -> 2.25
    CHECK(sampler.sample(logits) == 4);  // 2.5 -> 1.75
    CHECK(sampler.sample(logits) == 1);  // still 2.25
    CHECK(sampler.sample(logits) == 1);
  }
  SUBCASE("frequency: every time") {
    Sampler sampler({.temperature = 0, .frequency_penalty = 0.75f});
    CHECK(sampler.sample(logits) == 1);  // 3 -> 2.25
    CHECK(sampler.sample(logits) == 4);  // 2.5 -> 1.75
    CHECK(sampler.sample(logits) == 1);  // 2.25 -> 1.5
    CHECK(sampler.sample(logits) == 2);  // 2 -> 1.25
  }
  SUBCASE("presence and frequency leave the prompt alone, repetition does not") {
    Sampler presence({.temperature = 0, .presence_penalty = 2});
    presence.observe_prompt(1);
    CHECK(presence.sample(logits) == 1);
    Sampler repetition({.temperature = 0, .repetition_penalty = 2});
    repetition.observe_prompt(1);
    CHECK(repetition.sample(logits) == 4);
  }
  SUBCASE("repetition pushes negative logits down, too") {
    Sampler sampler({.temperature = 0, .repetition_penalty = 2});
    sampler.observe_prompt(0);
    CHECK(sampler.sample(std::vector<float>{-1.0f, -1.5f}) == 1);
  }
}

TEST_CASE("values out of range are refused by name") {
  CHECK_THROWS_WITH_AS(Sampler({.temperature = -1}), doctest::Contains("temperature"), Error);
  CHECK_THROWS_WITH_AS(Sampler({.top_k = -1}), doctest::Contains("top_k"), Error);
  CHECK_THROWS_WITH_AS(Sampler({.top_p = 0}), doctest::Contains("top_p"), Error);
  CHECK_THROWS_WITH_AS(Sampler({.min_p = 2}), doctest::Contains("min_p"), Error);
  CHECK_THROWS_WITH_AS(Sampler({.presence_penalty = 3}), doctest::Contains("presence_penalty"), Error);
  CHECK_THROWS_WITH_AS(Sampler({.repetition_penalty = 0}), doctest::Contains("repetition_penalty"), Error);
}

TEST_CASE("logits that are no numbers are an error, not a choice") {
  Sampler sampler{Sampling()};
  CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{1, std::nanf(""), 2}), doctest::Contains("not numbers"), Error);
  CHECK_THROWS_AS(sampler.sample(std::vector<float>{1, INFINITY}), Error);
}
