#pragma once
// How far to guess ahead with the MTP head, from what guessing costs and how often it is right.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "backends/backend.hpp"

namespace qwen3next {

inline constexpr int most_drafts = max_tentative_rows - 1;
inline constexpr int frequent_tokens = 32768;  // of a large vocabulary; ids follow byte pair merges, the frequent first
inline constexpr int auto_drafts = -1;         // as many as pay, by what is measured on the way

// What drafting did.  A pass appends one token, and those guessed ahead that were right.
struct MtpStatistics {
  std::int64_t passes = 0;                          // of the model, with guesses to check or without
  std::int64_t tokens = 0;                          // that they gave
  std::array<std::int64_t, most_drafts> drafted{};  // first guesses, second ones ...
  std::array<std::int64_t, most_drafts> accepted{};

  double tokens_per_pass() const noexcept {
    return passes > 0 ? static_cast<double>(tokens) / static_cast<double>(passes) : 0;
  }
  // How many of the guesses at this depth (0: the first) were right, of those whose predecessors were.
  double acceptance(std::size_t depth) const noexcept {
    const std::int64_t reached = depth == 0 ? drafted[0] : std::min(drafted[depth], accepted[depth - 1]);
    return reached > 0 ? static_cast<double>(accepted[depth]) / static_cast<double>(reached) : 0;
  }
  // A pass with so many guesses, of which the first ones were right.
  void add(std::size_t guesses, std::size_t right) noexcept {
    ++passes, tokens += static_cast<std::int64_t>(right) + 1;
    for (std::size_t i = 0; i < guesses; ++i) ++drafted[i];
    for (std::size_t i = 0; i < right; ++i) ++accepted[i];
  }
  MtpStatistics operator-(const MtpStatistics& before) const noexcept {
    MtpStatistics d = *this;
    d.passes -= before.passes, d.tokens -= before.tokens;
    for (std::size_t i = 0; i < drafted.size(); ++i)
      d.drafted[i] -= before.drafted[i], d.accepted[i] -= before.accepted[i];
    return d;
  }
};

// Chooses the number of guesses that gives most tokens per second: (1 + a1 + a1 a2 + ...) / seconds of such a round,
// all by running averages.  Tries a neighbour now and then, seldom enough that a useless head costs less than 2 %.
class DraftDepth {
 public:
  // For the next round.
  int choose(int most) {
    most = std::min(most, most_drafts);
    ++round_;
    if (most == 0) return 0;
    const int best = std::min(best_, most);
    const int unknown = first_unknown(most);
    if (unknown >= 0) return unknown;
    if (round_ < next_trial_) return best;
    trial_up_ = !trial_up_;
    next_trial_ = round_ + wait_;
    return std::clamp(best + (trial_up_ || best == 0 ? 1 : -1), 0, most);
  }

  // A round took so many seconds, with `drafts` guesses of which `right` were.
  void note(int drafts, int right, double seconds) {
    seconds_[static_cast<std::size_t>(drafts)].add(seconds);
    const bool trial = best_ == 0 && drafts > 0;  // rare: counts for more
    for (int i = 0; i < std::min(right + 1, drafts); ++i)
      acceptance_[static_cast<std::size_t>(i)].add(i < right, trial ? 8 : 64);
    if (trial) {  // the less comes of trials, the rarer they get
      wait_ = right > 0 ? often : std::min(2 * wait_, seldom);
      const bool close = seconds_[0].count > 0 && seconds_[1].count > 0 && rate(1) > 0.95 * rate(0);
      next_trial_ = round_ + (right > 0 && close ? soon : wait_);
    }
    decide();
    if (best_ > 0) wait_ = often;
  }

 private:
  static constexpr std::int64_t often = 64, seldom = 512, soon = 8;  // rounds between trials
  static constexpr int first_rounds = 2;                             // of each depth, before its time is believed

  struct Seconds {
    double value = 0;
    int count = 0;
    void add(double x) {
      if (count++ < first_rounds)  // the first time may fetch what was not in memory yet
        value = count == 1 ? x : std::min(x, value);
      else
        value += (std::min(x, 4 * value) - value) / 16;  // what took much longer was disturbed by something else
    }
  };
  struct Share {
    double value = 0.7;
    int count = 4;  // so many observations is this worth
    void add(bool right, int memory) { value += ((right ? 1. : 0.) - value) / std::min(++count, memory); }
  };

  double tokens(int drafts) const {
    double sum = 1, all_right = 1;
    for (int i = 0; i < drafts; ++i) sum += all_right *= acceptance_[static_cast<std::size_t>(i)].value;
    return sum;
  }
  double rate(int drafts) const { return tokens(drafts) / seconds_[static_cast<std::size_t>(drafts)].value; }

  // The next depth to be measured: none and one at first, deeper ones while the last one paid.
  int first_unknown(int most) const {
    for (int drafts = 0; drafts <= most; ++drafts) {
      if (seconds_[static_cast<std::size_t>(drafts)].count >= first_rounds) continue;
      return drafts < 2 || best_ == drafts - 1 ? drafts : -1;
    }
    return -1;
  }

  void decide() {
    int best = 0;
    for (int drafts = 1; drafts <= most_drafts; ++drafts) {
      if (seconds_[static_cast<std::size_t>(drafts)].count >= first_rounds && rate(drafts) > rate(best)) best = drafts;
    }
    if (seconds_[0].count >= first_rounds) best_ = best;
  }

  std::array<Seconds, most_drafts + 1> seconds_;
  std::array<Share, most_drafts> acceptance_;
  int best_ = 1;
  bool trial_up_ = false;
  std::int64_t round_ = 0, wait_ = often, next_trial_ = often;
};

}  // namespace qwen3next
