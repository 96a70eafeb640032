// The cache of experts against a model that keeps lists and searches them, and what its policy promises.

#include "weights/expert_cache.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

using namespace qwen3next;

namespace {

constexpr int none = ExpertCache::none;

// What the cache must do, by search: each slot's contents, each expert's score from all passes ever recorded.
class NaiveCache {
 public:
  NaiveCache(std::vector<int> class_of_layer, const std::vector<int>& slots_of_class)
      : class_of_layer_(std::move(class_of_layer)) {
    for (std::size_t c = 0; c < slots_of_class.size(); ++c) {
      for (int i = 0; i < slots_of_class[c]; ++i) slots_.push_back({static_cast<int>(c), none, none, 0, false});
    }
  }
  struct Slot {
    int cls, layer, expert, pins;
    bool retired;
  };
  std::vector<Slot>& slots() { return slots_; }
  Slot& slot(int i) { return slots_[static_cast<std::size_t>(i)]; }
  int class_of_layer(int layer) const { return class_of_layer_[static_cast<std::size_t>(layer)]; }

  int find(int layer, int expert) const {
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].layer == layer && slots_[i].expert == expert) return static_cast<int>(i);
    }
    return none;
  }
  bool has_free(int cls) const {
    return std::ranges::any_of(slots_, [&](const Slot& s) { return s.cls == cls && s.layer == none && !s.retired; });
  }
  // The lowest score of all experts of a class that may be evicted; infinite if there is none.
  double least(int cls) const {
    double least = INFINITY;
    for (const Slot& s : slots_) {
      if (s.cls == cls && s.layer != none && s.pins == 0) least = std::min(least, score(s.layer, s.expert));
    }
    return least;
  }

  // sum over passes of count * (mean of 2^(-age / half_life) over the pass), in tokens
  double score(int layer, int expert) const {
    double sum = 0;
    for (const Pass& p : passes_) {
      if (p.layer == layer && p.counts.contains(expert)) sum += p.counts.at(expert) * weight(p);
    }
    return sum;
  }
  // The same of an expert that every token picked.
  double score_of_all() const {
    double sum = 0;
    for (const Pass& p : passes_) sum += p.layer == 0 ? p.tokens * weight(p) : 0;
    return sum;
  }
  void record(int layer, const std::vector<std::int32_t>& ids, const std::vector<std::int32_t>& counts, int tokens) {
    const double weighed = std::min<double>(tokens, ExpertCache::longest_pass);
    if (layer == 0) now_ += weighed;
    Pass pass{layer, tokens, weighed, now_, {}};
    for (std::size_t i = 0; i < ids.size(); ++i) pass.counts[ids[i]] = counts[i];
    passes_.push_back(std::move(pass));
  }

 private:
  struct Pass {
    int layer, tokens;
    double weighed, end;
    std::map<int, int> counts;
  };
  double weight(const Pass& p) const {
    double mean = 0;  // over the pass, by a midpoint rule
    const int steps = 1000;
    for (int i = 0; i < steps; ++i) mean += std::exp2(-(i + 0.5) / steps * p.weighed / ExpertCache::half_life) / steps;
    return (p.weighed / p.tokens) * mean * std::exp2((p.end - now_) / ExpertCache::half_life);
  }
  std::vector<int> class_of_layer_;
  std::vector<Slot> slots_;
  std::vector<Pass> passes_;
  double now_ = 0;
};

void check_same(const ExpertCache& cache, NaiveCache& naive) {
  std::set<std::pair<int, int>> keys;
  std::map<int, std::pair<int, int>> by_class;  // free, in use
  for (int i = 0; i < cache.slots(); ++i) {
    const NaiveCache::Slot& slot = naive.slot(i);
    REQUIRE(cache.key_of(i) == ExpertCache::Key{slot.layer, slot.expert});
    REQUIRE(cache.pinned(i) == (slot.pins > 0));
    REQUIRE(cache.class_of(i) == slot.cls);
    by_class[slot.cls].second += slot.retired ? 0 : 1;
    if (slot.layer == none) {
      by_class[slot.cls].first += slot.retired ? 0 : 1;
    } else {
      REQUIRE(keys.insert({slot.layer, slot.expert}).second);  // one slot per expert
      REQUIRE(cache.slot_of(slot.layer, slot.expert) == i);
    }
  }
  int present = 0;
  for (int layer = 0; layer < cache.layers(); ++layer) {
    for (int e = 0; e < cache.experts(); ++e) present += cache.slot_of(layer, e) != none;
  }
  REQUIRE(present == static_cast<int>(keys.size()));
  for (const auto& [cls, counts] : by_class) {
    REQUIRE(cache.free_slots(cls) == counts.first);
    REQUIRE(cache.slots_in_use(cls) == counts.second);
  }
}

// Distinct, ascending.
std::vector<std::int32_t> some_experts(std::mt19937& random, int experts, int count) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(experts));
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), random);
  all.resize(static_cast<std::size_t>(count));
  std::ranges::sort(all);
  return all;
}

// What a store does for a layer of a pass: counts, and brings in what is absent, as many at a time as there are slots.
// Returns how many of the experts were present.
int use(ExpertCache& cache, int layer, const std::vector<std::int32_t>& ids, const std::vector<std::int32_t>& counts,
        int tokens) {
  cache.record(layer, ids, counts, tokens);
  int hits = 0;
  std::vector<std::int32_t> absent;
  for (const std::int32_t id : ids) {
    if (cache.slot_of(layer, id) != none) {
      ++hits;
    } else {
      absent.push_back(id);
    }
  }
  for (const std::int32_t id : absent) {
    const int slot = cache.insert(layer, id);
    REQUIRE(slot != none);
    cache.unpin(slot);
  }
  return hits;
}
int use(ExpertCache& cache, int layer, const std::vector<std::int32_t>& ids) {
  return use(cache, layer, ids, std::vector<std::int32_t>(ids.size(), 1), 1);
}

}  // namespace

TEST_CASE("a cache of experts does what a search would do, whatever is asked of it") {
  for (unsigned seed = 0; seed < 12; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    const int layers = 1 + below(4), experts = 4 + below(12);
    std::vector<int> class_of_layer;
    const int classes = 1 + below(2);
    for (int l = 0; l < layers; ++l) class_of_layer.push_back(below(classes));
    std::vector<int> slots_of_class;
    for (int c = 0; c < classes; ++c) slots_of_class.push_back(1 + below(2 * experts));
    ExpertCache cache(layers, experts, class_of_layer, slots_of_class);
    NaiveCache naive(class_of_layer, slots_of_class);
    std::vector<std::int64_t> picked(static_cast<std::size_t>(layers)), tokens_seen = picked;

    for (int step = 0; step < 600; ++step) {
      CAPTURE(step);
      const int layer = below(layers), expert = below(experts), slot = below(cache.slots());
      const int cls = naive.class_of_layer(layer);
      NaiveCache::Slot& at = naive.slot(slot);
      switch (below(10)) {
        case 0:
        case 1:
        case 2: {  // a pass; now and then one so long that scores are rescaled
          const int tokens = below(3) ? 1 : 1 + below(below(4) ? 8 : 5000);
          const std::vector<std::int32_t> ids = some_experts(random, experts, 1 + below(experts));
          std::vector<std::int32_t> counts;
          for (std::size_t i = 0; i < ids.size(); ++i) {
            counts.push_back(1 + below(tokens));
            picked[static_cast<std::size_t>(layer)] += counts.back();
          }
          tokens_seen[static_cast<std::size_t>(layer)] += tokens;
          cache.record(layer, ids, counts, tokens);
          naive.record(layer, ids, counts, tokens);
          break;
        }
        case 3:
        case 4:
        case 5: {
          if (naive.find(layer, expert) != none) break;
          const bool guess = below(3) == 0;
          const double probability = below(2) ? 0 : below(100) / 100.0;
          const double least = naive.least(cls), own = naive.score(layer, expert);
          const double worth = std::max(own, probability * naive.score_of_all());
          const int found = guess ? cache.insert_if_better(layer, expert, probability) : cache.insert(layer, expert);
          if (naive.has_free(cls)) {
            REQUIRE(found != none);
            REQUIRE(naive.slot(found).layer == none);
            REQUIRE(!naive.slot(found).retired);
          } else if (std::isinf(least) || (guess && least > worth * (1 + 1e-6))) {
            REQUIRE(found == none);
          } else if (found == none) {
            REQUIRE(guess);
            REQUIRE(least >= worth * (1 - 1e-6));
          } else {
            const NaiveCache::Slot& victim = naive.slot(found);
            REQUIRE(victim.pins == 0);
            REQUIRE(naive.score(victim.layer, victim.expert) <= least * (1 + 1e-6));
          }
          if (found == none) break;
          REQUIRE(naive.slot(found).cls == cls);
          naive.slot(found) = {cls, layer, expert, 1, false};
          break;
        }
        case 6:
          if (at.layer == none) break;
          cache.pin(slot);
          ++at.pins;
          break;
        case 7:
          if (at.pins == 0) break;
          cache.unpin(slot);
          --at.pins;
          break;
        case 8:
          if (at.layer == none || at.pins > 0) break;
          cache.erase(slot);
          at.layer = at.expert = none;
          break;
        case 9:
          if (at.retired) {
            cache.restore(slot);
            at.retired = false;
          } else if (below(4) == 0) {
            const double least = naive.least(cls);
            const bool free = naive.has_free(cls);
            const int found = cache.retire(cls);
            REQUIRE((found != none) == (free || !std::isinf(least)));
            if (found == none) break;
            NaiveCache::Slot& gone = naive.slot(found);
            REQUIRE(gone.cls == cls);
            if (free) REQUIRE(gone.layer == none);
            if (!free) REQUIRE(naive.score(gone.layer, gone.expert) <= least * (1 + 1e-6));
            gone = {cls, none, none, 0, true};
          }
          break;
      }
      check_same(cache, naive);
    }
    for (int l = 0; l < layers; ++l) {
      CHECK(cache.picks().tokens(l) == tokens_seen[static_cast<std::size_t>(l)]);
      CHECK(cache.picks().picks(l) == picked[static_cast<std::size_t>(l)]);
    }
  }
}

TEST_CASE("the least worth goes first among hundreds") {
  constexpr int layers = 2, E = 400, slots = 500;
  ExpertCache cache(layers, E, {0, 0}, {slots});
  std::mt19937 random(3);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<int> pinned;
  for (int step = 0; step < 4000; ++step) {
    const int layer = below(layers);
    std::vector<std::int32_t> ids = some_experts(random, E, 1 + below(8));
    cache.record(layer, ids, std::vector<std::int32_t>(ids.size(), 1), 1);
    for (const std::int32_t id : ids) {
      if (const int slot = cache.slot_of(layer, id); slot != none) {
        cache.pin(slot);
        pinned.push_back(slot);
        continue;
      }
      const bool full = cache.free_slots(0) == 0;
      double least = INFINITY;
      std::vector<double> rates;
      for (int slot = 0; slot < slots; ++slot) {
        const ExpertCache::Key key = cache.key_of(slot);
        rates.push_back(key.layer == none || cache.pinned(slot) ? INFINITY : cache.rate(key.layer, key.expert));
        least = std::min(least, rates.back());
      }
      const int slot = cache.insert(layer, id);
      REQUIRE(slot != none);
      if (full) REQUIRE(rates[static_cast<std::size_t>(slot)] == least);
      pinned.push_back(slot);
    }
    while (!pinned.empty() && below(60) != 0) {  // in any order; some stay for a while
      std::swap(pinned[random() % pinned.size()], pinned.back());
      cache.unpin(pinned.back());
      if (below(40) == 0 && !cache.pinned(pinned.back())) cache.erase(pinned.back());
      pinned.pop_back();
    }
  }
}

TEST_CASE("scores stay finite and in order over millions of tokens") {
  ExpertCache cache(1, 4, {0}, {2});
  for (int i = 0; i < 100000; ++i) {
    cache.record(0, std::vector<std::int32_t>{0}, std::vector<std::int32_t>{64}, 64);
    if (i % 4 == 0) cache.record(0, std::vector<std::int32_t>{1}, std::vector<std::int32_t>{16}, 64);
  }
  CHECK(cache.rate(0, 0) > 0.5);
  CHECK(cache.rate(0, 0) < 1);
  CHECK(cache.rate(0, 0) > cache.rate(0, 1));
  CHECK(cache.rate(0, 1) > cache.rate(0, 2));
  CHECK(cache.rate(0, 2) == 0);
  cache.record(0, std::vector<std::int32_t>{2}, std::vector<std::int32_t>{1 << 30}, 1 << 30);  // as long as int allows
  CHECK(cache.rate(0, 2) > cache.rate(0, 1));
  CHECK(cache.rate(0, 2) <= 1);
}

TEST_CASE("slots go to the layers where they serve most") {
  // Three layers of 64 experts that pick 4 of a token: always the same four; by Zipf's law; any, evenly.
  constexpr int E = 64, k = 4;
  std::mt19937 random(1);
  std::vector<double> zipf(E);
  for (std::size_t e = 0; e < E; ++e) zipf[e] = 1 / std::pow(static_cast<double>(e + 1), 1.2);
  const auto pick = [&](auto& distribution) {
    std::set<std::int32_t> ids;
    while (ids.size() < k) ids.insert(static_cast<std::int32_t>(distribution(random)));
    return std::vector<std::int32_t>(ids.begin(), ids.end());
  };
  std::discrete_distribution<int> skewed(zipf.begin(), zipf.end());
  std::uniform_int_distribution<int> even(0, E - 1);
  ExpertCache cache(3, E, {0, 0, 0}, {48});
  int hits[3] = {}, tokens = 0;
  for (int t = 0; t < 6000; ++t) {
    const int a = use(cache, 0, {3, 17, 18, 60}), b = use(cache, 1, pick(skewed)), c = use(cache, 2, pick(even));
    if (t < 1000) continue;
    hits[0] += a, hits[1] += b, hits[2] += c, ++tokens;
  }
  int share[3] = {};
  for (int slot = 0; slot < cache.slots(); ++slot) ++share[cache.key_of(slot).layer];
  CHECK(share[0] == 4);
  CHECK(share[1] >= 8);  // the 13 that a token picks with more than a 16th, give or take
  CHECK(share[1] <= 18);
  CHECK(hits[0] == tokens * k);
  // All that this many slots can give: the experts picked most often by what the layers are, not by what they did.
  // Even shares of 16 slots would leave twelve of the first layer's idle.
  std::vector<double> rates;
  for (int layer = 0; layer < 3; ++layer) {
    for (int e = 0; e < E; ++e) {
      const std::span<const std::int64_t> counts = cache.picks().counts(layer);
      rates.push_back(static_cast<double>(counts[static_cast<std::size_t>(e)]) / (6000.0 * k));
    }
  }
  std::ranges::sort(rates, std::greater());
  const double best = std::accumulate(rates.begin(), rates.begin() + 48, 0.0) / 3;
  const double found = (hits[0] + hits[1] + hits[2]) / (3.0 * tokens * k);
  CAPTURE(best);
  CAPTURE(found);
  CHECK(found > 0.93 * best);
}

TEST_CASE("a prompt that needs every expert leaves those of the text before it in place") {
  constexpr int layers = 6, E = 32;
  ExpertCache cache(layers, E, std::vector<int>(layers, 0), {layers * 8});
  for (int t = 0; t < 400; ++t) {
    for (int l = 0; l < layers; ++l) use(cache, l, {l, l + 5, l + 9, l + 20});
  }
  std::vector<std::int32_t> all(E);
  std::iota(all.begin(), all.end(), 0);
  for (int l = 0; l < layers; ++l) use(cache, l, all, std::vector<std::int32_t>(E, 2048 * 4 / E), 2048);
  for (int l = 0; l < layers; ++l) {
    for (const int e : {l, l + 5, l + 9, l + 20}) CHECK(cache.slot_of(l, e) != none);
  }
}

TEST_CASE("what is pinned stays, and a cache of nothing else gives no slot") {
  ExpertCache cache(2, 8, {0, 1}, {2, 1});
  const int a = cache.insert(0, 1), b = cache.insert(0, 2);
  CHECK(cache.insert(0, 3) == none);
  CHECK(cache.insert_if_better(0, 3, 1) == none);
  CHECK(cache.retire(0) == none);
  cache.pin(a);
  cache.unpin(a);
  CHECK(cache.pinned(a));
  CHECK(cache.insert(0, 3) == none);  // pinned twice, unpinned once
  CHECK(cache.insert(1, 3) == 2);     // another class has its own
  cache.unpin(b);
  CHECK(cache.insert(0, 3) == b);
  CHECK(cache.slot_of(0, 2) == none);
  CHECK(cache.key_of(a) == ExpertCache::Key{0, 1});
}

TEST_CASE("a guess takes the slot of what is less probable, and of nothing else") {
  ExpertCache cache(1, 8, {0}, {2});
  for (int t = 0; t < 40; ++t) use(cache, 0, {0});
  for (int t = 0; t < 42; ++t) use(cache, 0, {1});
  CHECK(cache.rate(0, 0) == doctest::Approx(0.47).epsilon(0.02));
  CHECK(cache.insert_if_better(0, 5) == none);
  CHECK(cache.insert_if_better(0, 5, 0.4) == none);
  const int slot = cache.insert_if_better(0, 5, 0.5);
  REQUIRE(slot != none);
  CHECK(cache.slot_of(0, 0) == none);
  cache.unpin(slot);
  CHECK(cache.insert_if_better(0, 6, 0.01) == slot);  // of 5, nothing is known
}

TEST_CASE("a profile fills the cache with what it saw most, across layers") {
  ExpertProfile profile(3, 4);
  const std::vector<std::int32_t> ids{0, 1, 2, 3};
  profile.add(0, ids, std::vector<std::int32_t>{10, 400, 0, 90}, 1000);
  profile.add(1, ids, std::vector<std::int32_t>{5, 6, 7, 8}, 1000);
  profile.add(2, ids, std::vector<std::int32_t>{300, 0, 0, 0}, 500);
  ExpertCache cache(3, 4, {0, 0, 1}, {3, 2});
  CHECK(cache.wanted().empty());
  cache.warm(profile);
  const std::vector<ExpertCache::Key> wanted = cache.wanted();
  CHECK(wanted == std::vector<ExpertCache::Key>{{0, 1}, {0, 3}, {0, 0}, {2, 0}});
  for (const ExpertCache::Key& key : wanted) cache.unpin(cache.insert(key.layer, key.expert));
  CHECK(cache.wanted().empty());
  CHECK(cache.free_slots(1) == 1);
  use(cache, 1, {3});  // a pick now, and what the profile says of it, are more than (0, 0) had
  CHECK(cache.slot_of(0, 0) == none);
  CHECK(cache.slot_of(0, 3) != none);
  CHECK(cache.picks().picks(0) == 0);  // the profile's are not counted as the session's
  CHECK(cache.picks().picks(1) == 1);
  CHECK_THROWS_WITH_AS(cache.warm(ExpertProfile(3, 5)), doctest::Contains("3 layers of 5 experts, expected 3 of 4"),
                       Error);
}

TEST_CASE("a profile of another kind of text gives way soon") {
  ExpertProfile profile(1, 16);
  const std::vector<std::int32_t> theirs{0, 1, 2, 3, 4, 5, 6, 7};
  profile.add(0, theirs, std::vector<std::int32_t>(8, 50000), 100000);
  ExpertCache cache(1, 16, {0}, {8});
  cache.warm(profile);
  for (const ExpertCache::Key& key : cache.wanted()) cache.unpin(cache.insert(key.layer, key.expert));
  for (const int e : theirs) CHECK(cache.slot_of(0, e) != none);
  std::mt19937 random(1);
  for (int t = 0; t < 40; ++t) {
    std::vector<std::int32_t> ids = some_experts(random, 8, 4);
    for (std::int32_t& id : ids) id += 8;
    use(cache, 0, ids);
  }
  for (const int e : theirs) CHECK(cache.slot_of(0, e + 8) != none);
}
