#pragma once
// From logits to the next token.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/error.hpp"
#include "text/generation_defaults.hpp"

namespace qwen3next {

// How the next token is chosen from the logits.  Qwen's advice: Instruct temperature 0.7, top_p 0.8, top_k 20; Thinking
// 0.6, 0.95, 20.
struct Sampling {
  float temperature = 0.7f;      // 0: always the most probable token
  int top_k = 20;                // keep the k most probable; 0: all
  float top_p = 0.8f;            // keep the fewest tokens that hold this probability; 1: all
  float min_p = 0;               // drop tokens less probable than min_p times the best
  float presence_penalty = 0;    // subtracted from the logit of every token generated before, -2..2
  float frequency_penalty = 0;   // the same, times how often it was generated, -2..2
  float repetition_penalty = 1;  // divides positive and multiplies negative logits of tokens seen, prompt included
  std::uint64_t seed = 0;        // the same seed, prompt and options give the same text

  // Throws Error naming a value out of range.
  void validate() const {
    auto check = [](bool ok, const char* name, auto value, const char* range) {
      if (!ok) throw Error(std::string(name) + " is " + std::to_string(value) + ", expected " + range);
    };
    check(temperature >= 0 && temperature <= 100, "temperature", temperature, "0..100 (0: most probable token)");
    check(top_k >= 0, "top_k", top_k, "0 (all) or more");
    check(top_p > 0 && top_p <= 1, "top_p", top_p, "more than 0, at most 1");
    check(min_p >= 0 && min_p <= 1, "min_p", min_p, "0..1");
    check(std::abs(presence_penalty) <= 2, "presence_penalty", presence_penalty, "-2..2");
    check(std::abs(frequency_penalty) <= 2, "frequency_penalty", frequency_penalty, "-2..2");
    check(repetition_penalty > 0 && repetition_penalty <= 10, "repetition_penalty", repetition_penalty,
          "more than 0, at most 10 (1: none)");
  }
};

// What a model's authors advise, where they say something.
inline Sampling advised(const GenerationDefaults& d) {
  Sampling s;
  const auto take = [](float& value, const std::optional<double>& advice) {
    if (advice) value = static_cast<float>(*advice);
  };
  take(s.temperature, d.temperature);
  take(s.top_p, d.top_p);
  take(s.min_p, d.min_p);
  take(s.presence_penalty, d.presence_penalty);
  take(s.frequency_penalty, d.frequency_penalty);
  take(s.repetition_penalty, d.repetition_penalty);
  if (d.top_k) s.top_k = *d.top_k;
  return s;
}

// Whether all logits are numbers; those of damaged weights are not.
inline bool is_finite(std::span<const float> logits) noexcept {
  bool good = true;
  for (const float x : logits) good &= std::fabs(x) <= std::numeric_limits<float>::max();  // false for NaN
  return good;
}

// One stream of choices: penalties, temperature, top-k, top-p, min-p, then a draw.  Allocates only while it meets
// tokens for the first time.
//
// A draw is the largest of logit / temperature + noise over the tokens that are left, the noise of a token being
// Gumbel's, -log(-log(u)): that is a draw from the softmax.  u depends on the seed, the number of the draw and the
// token alone.  So two distributions that are alike mostly give the same token at the same draw, which is what makes
// guesses come true at any temperature, and whether there were guesses changes nothing of the text.
class Sampler {
 public:
  // Throws Error naming an option out of range.
  explicit Sampler(const Sampling& sampling) : s_(sampling) { s_.validate(); }

  // A token of the prompt: counts for the repetition penalty alone.
  void observe_prompt(std::int32_t token) { seen_.try_emplace(token, 0); }

  // Chooses from logits [V]; the choice counts for later penalties.  Throws Error if they are not numbers.
  std::int32_t sample(std::span<const float> logits) {
    if (!is_finite(logits)) throw Error("the model's logits are not numbers: its weights are damaged");
    const std::int32_t token = choose(logits, draws_++);
    ++seen_[token];
    return token;
  }

  // What the draw `ahead` from now (1: the next) would be, were these the logits [up to V]: a guess for what sample()
  // will choose from better ones.  Counts for nothing.
  std::int32_t guess(std::span<const float> logits, int ahead) {
    return is_finite(logits) ? choose(logits, draws_ + static_cast<std::uint64_t>(ahead) - 1) : 0;
  }

 private:
  struct Candidate {
    float logit;
    std::int32_t token;
  };
  static bool better(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  }

  bool penalised() const { return s_.presence_penalty != 0 || s_.frequency_penalty != 0 || s_.repetition_penalty != 1; }

  std::span<const float> apply_penalties(std::span<const float> logits) {
    penalised_logits_.assign(logits.begin(), logits.end());
    for (const auto& [token, count] : seen_) {
      if (static_cast<std::size_t>(token) >= logits.size()) continue;
      float& x = penalised_logits_[static_cast<std::size_t>(token)];
      x = x > 0 ? x / s_.repetition_penalty : x * s_.repetition_penalty;
      if (count > 0) x -= s_.presence_penalty + static_cast<float>(count) * s_.frequency_penalty;
    }
    return penalised_logits_;
  }

  std::int32_t choose(std::span<const float> logits, std::uint64_t draw) {
    if (penalised()) logits = apply_penalties(logits);
    if (s_.temperature == 0) {
      return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    }
    collect(logits);
    if (s_.top_p < 1 || s_.min_p > 0) cut();
    const Candidate* chosen = nullptr;
    double top = 0;
    for (const Candidate& c : candidates_) {
      const double score = c.logit / s_.temperature + gumbel(draw, c.token);
      if (!chosen || score > top) top = score, chosen = &c;
    }
    return chosen->token;
  }

  // -log(-log(u)), u uniform in (0, 1) by the mixing function of splitmix64 (Steele et al., OOPSLA 2014).
  double gumbel(std::uint64_t draw, std::int32_t token) const {
    const auto mix = [](std::uint64_t x) {
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
      x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
      return x ^ (x >> 31);
    };
    constexpr std::uint64_t step = 0x9e3779b97f4a7c15u;
    const std::uint64_t stream = mix(mix(s_.seed + step) + (draw + 1) * step);
    const std::uint64_t x = mix(stream + (static_cast<std::uint64_t>(token) + 1) * step);
    return -std::log(-std::log((static_cast<double>(x >> 11) + 0.5) * 0x1p-53));
  }

  // The top_k candidates.  With top_k = 0 all but the tail that temperature makes negligible (e^-30).
  void collect(std::span<const float> logits) {
    const float floor = s_.top_k > 0 ? -std::numeric_limits<float>::infinity()
                                     : *std::max_element(logits.begin(), logits.end()) - 30 * s_.temperature;
    candidates_.clear();
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (logits[i] >= floor) candidates_.push_back({logits[i], static_cast<std::int32_t>(i)});
    }
    if (s_.top_k == 0 || static_cast<std::size_t>(s_.top_k) >= candidates_.size()) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + s_.top_k, candidates_.end(), better);
    candidates_.resize(static_cast<std::size_t>(s_.top_k));
  }

  // Leaves the fewest candidates that hold top_p of the mass, cut where min_p cuts; never none.
  void cut() {
    std::sort(candidates_.begin(), candidates_.end(), better);
    const float best = candidates_.front().logit;
    double total = 0, mass = 0;
    weights_.clear();  // probabilities, unnormalised: best = 1
    for (const Candidate& c : candidates_) total += weights_.emplace_back(std::exp((c.logit - best) / s_.temperature));
    std::size_t kept = 0;
    while (kept < weights_.size() && (kept == 0 || (mass < s_.top_p * total && weights_[kept] >= s_.min_p))) {
      mass += weights_[kept++];
    }
    candidates_.resize(kept);
  }

  Sampling s_;
  std::uint64_t draws_ = 0;
  std::unordered_map<std::int32_t, int> seen_;  // times generated; 0: in the prompt only
  std::vector<float> penalised_logits_;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
};

}  // namespace qwen3next
