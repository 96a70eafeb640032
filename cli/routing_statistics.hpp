#pragma once
// What the picks of a text's experts say: how even the load is, whether it stays so, what a cache would make of it.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numbers>
#include <span>
#include <utility>
#include <vector>

#include "weights/expert_cache.hpp"
#include "weights/expert_profile.hpp"

namespace qwen3next::cli {

// The share that the largest `fraction` of the values has in their sum; between two values, in proportion.
inline double coverage(std::vector<std::int64_t> values, double fraction) {
  std::ranges::sort(values, std::greater());
  const double wanted = fraction * static_cast<double>(values.size());
  double sum = 0, most = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto v = static_cast<double>(values[i]);
    sum += v;
    most += v * std::clamp(wanted - static_cast<double>(i), 0., 1.);
  }
  return sum > 0 ? most / sum : 0;
}

// Of the picks of one layer, or of several together.
struct LoadStatistics {
  double least = 0, median = 0, most = 0;  // of the experts' loads; 1: an even share
  double entropy = 0;                      // -sum p log2 p, in bits; log2 E if all are even
  double top10 = 0, top25 = 0, top50 = 0;  // the share of picks that the most used 10, 25 and 50 % of experts take
};

inline LoadStatistics load_statistics(std::vector<std::int64_t> counts) {
  LoadStatistics s;
  std::ranges::sort(counts);
  double sum = 0;
  for (const std::int64_t c : counts) sum += static_cast<double>(c);
  if (sum == 0) return s;
  const std::size_t n = counts.size();
  const auto load = [&](std::size_t i) { return static_cast<double>(counts[i]) * static_cast<double>(n) / sum; };
  s.least = load(0), s.median = (load((n - 1) / 2) + load(n / 2)) / 2, s.most = load(n - 1);
  for (const std::int64_t c : counts) {
    const double p = static_cast<double>(c) / sum;
    if (p > 0) s.entropy -= p * std::log2(p);
  }
  s.top10 = coverage(counts, 0.1), s.top25 = coverage(counts, 0.25), s.top50 = coverage(counts, 0.5);
  return s;
}

// How much of a layer's load went to other experts in the second half of a text: half of sum |p - q|, from 0 to 1.
// `chance` is what to expect if nothing changed and tokens picked independently of each other:
//   E |p - q| = sqrt(2/pi) sigma,   sigma^2 = r (1 - r) (1/T + 1/T') / k^2,   r picks per token of an expert, k of all
struct Drift {
  double found = 0, chance = 0;
};

inline Drift drift(const ExpertProfile& first, const ExpertProfile& second, int layer) {
  const auto a = static_cast<double>(first.picks(layer)), b = static_cast<double>(second.picks(layer));
  if (a == 0 || b == 0) return {};
  const auto T = static_cast<double>(first.tokens(layer)), U = static_cast<double>(second.tokens(layer));
  const double k = (a + b) / (T + U);
  Drift d;
  for (std::size_t e = 0; e < first.counts(layer).size(); ++e) {
    const auto x = static_cast<double>(first.counts(layer)[e]), y = static_cast<double>(second.counts(layer)[e]);
    const double r = (x + y) / (T + U);
    d.found += std::abs(x / a - y / b) / 2;
    d.chance += std::sqrt(2 / std::numbers::pi * r * (1 - r) * (1 / T + 1 / U)) / k / 2;
  }
  return d;
}

// A cache of experts, as a text's tokens would use it if they were decoded one by one.
class ReplayedCache {
 public:
  ReplayedCache(int layers, int experts, int slots)
      : cache_(layers, experts, std::vector<int>(static_cast<std::size_t>(layers), 0), {slots}), slots_(slots) {}

  // The experts that a token picks in a layer, ascending; returns how many of them were there.
  int use(int layer, std::span<const std::int32_t> ids) {
    ones_.assign(ids.size(), 1);
    cache_.record(layer, ids, ones_, 1);
    pinned_.clear(), absent_.clear();
    for (const std::int32_t id : ids) {
      const int slot = cache_.slot_of(layer, id);
      if (slot == ExpertCache::none) {
        absent_.push_back(id);
      } else {
        cache_.pin(slot);
        pinned_.push_back(slot);
      }
    }
    const auto hits = static_cast<int>(pinned_.size());
    for (const std::int32_t id : absent_) pinned_.push_back(cache_.insert(layer, id));
    for (const int slot : pinned_) cache_.unpin(slot);
    return hits;
  }
  int slots() const noexcept { return slots_; }

 private:
  ExpertCache cache_;
  int slots_;
  std::vector<std::int32_t> ones_, absent_;
  std::vector<int> pinned_;
};

// The share of `text`'s picks that fall on the `slots` experts, of all layers, that `chosen_by` picked most.
inline double fixed_hit_rate(const ExpertProfile& chosen_by, const ExpertProfile& text, int slots) {
  std::vector<std::pair<std::int64_t, std::int64_t>> experts;  // picks, picks in the text
  std::int64_t all = 0;
  for (int layer = 0; layer < text.layers(); ++layer) {
    for (std::size_t e = 0; e < text.counts(layer).size(); ++e) {
      experts.emplace_back(chosen_by.counts(layer)[e], text.counts(layer)[e]);
      all += experts.back().second;
    }
  }
  std::ranges::stable_sort(experts, std::greater(), &std::pair<std::int64_t, std::int64_t>::first);
  std::int64_t hits = 0;
  for (std::size_t i = 0; i < std::min(experts.size(), static_cast<std::size_t>(slots)); ++i) hits += experts[i].second;
  return all ? static_cast<double>(hits) / static_cast<double>(all) : 0;
}

}  // namespace qwen3next::cli
