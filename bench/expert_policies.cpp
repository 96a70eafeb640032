// Which experts should stay in memory?  Replays routing through caches of several policies and sizes, and prints the
// share of a decoded token's experts that each finds in memory.
//
//   qwen3next experts MODEL TEXT --trace TRACE
//   bench_expert_policies TRACE..       of one model
//   bench_expert_policies               generated routing of the 80B's shape
//
// Routing comes in passes: one token (decode) or the tokens of a prompt.  A pass needs each of its experts in each
// layer; what is absent is brought in.  `best` knows the future (Belady's algorithm: evict what is needed last).

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/json.hpp"
#include "weights/expert_cache.hpp"

namespace {

using namespace qwen3next;

// The experts of every token in every layer, [tokens, layers, k], and how many tokens each pass takes.
struct Trace {
  std::string name;
  int layers, experts, k;
  std::vector<std::uint16_t> picks;
  std::vector<int> passes;

  std::size_t tokens() const { return picks.size() / (static_cast<std::size_t>(layers) * static_cast<std::size_t>(k)); }
  const std::uint16_t* pick(std::size_t token, int layer) const {
    return picks.data() +
           (token * static_cast<std::size_t>(layers) + static_cast<std::size_t>(layer)) * static_cast<std::size_t>(k);
  }
  void decode_all() { passes.assign(tokens(), 1); }
  // Prompts and answers by turns.
  void converse(int prompt, int answer) {
    passes.clear();
    for (std::size_t left = tokens(); left > 0;) {
      const auto p = std::min(left, static_cast<std::size_t>(prompt));
      passes.push_back(static_cast<int>(p));
      left -= p;
      for (int i = 0; i < answer && left > 0; ++i, --left) passes.push_back(1);
    }
  }
};

Trace read_trace(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string line;
  if (!std::getline(file, line)) throw_error("cannot read ", path);
  const Json head = read_json(line, path, 4);
  if (head.value("format", "") != "qwen3next routing trace" || head.value("version", 0) != 1)
    throw_error(path, ": not a routing trace, version 1");
  Trace trace{
      path.substr(path.rfind('/') + 1), head.at("layers"), head.at("experts"), head.at("experts_per_token"), {}, {}};
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  for (std::size_t i = 0; i + 1 < bytes.size(); i += 2) {
    trace.picks.push_back(static_cast<std::uint16_t>(static_cast<unsigned char>(bytes[i]) |
                                                     static_cast<unsigned char>(bytes[i + 1]) << 8));
    if (trace.picks.back() >= trace.experts) throw_error(path, ": expert ", trace.picks.back(), " of ", trace.experts);
  }
  if (trace.tokens() == 0) throw_error(path, ": no tokens");
  trace.decode_all();
  return trace;
}

// Routing of the 80B's shape.  An expert's share in its layer falls by Zipf's law with `exponent` (0: even), in an
// order of its own in each layer.  Every `phase` tokens, `moved` of the experts change places.
Trace generate(const std::string& name, double exponent, int tokens, int phase = 0, double moved = 0) {
  Trace trace{name, 48, 512, 10, {}, {}};
  std::mt19937 random(7);
  std::vector<std::vector<int>> ranks(static_cast<std::size_t>(trace.layers));
  for (auto& order : ranks) {
    order.resize(static_cast<std::size_t>(trace.experts));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
  }
  std::vector<double> share(static_cast<std::size_t>(trace.experts));
  for (std::size_t e = 0; e < share.size(); ++e) share[e] = std::pow(static_cast<double>(e + 1), -exponent);
  std::discrete_distribution<int> rank(share.begin(), share.end());
  std::uniform_int_distribution<std::size_t> any(0, share.size() - 1);
  for (int t = 0; t < tokens; ++t) {
    for (auto& order : ranks) {
      if (phase > 0 && t > 0 && t % phase == 0) {
        for (int i = 0; i < static_cast<int>(moved / 2 * trace.experts); ++i)
          std::swap(order[any(random)], order[any(random)]);
      }
      std::set<int> ids;
      while (static_cast<int>(ids.size()) < trace.k) ids.insert(order[static_cast<std::size_t>(rank(random))]);
      for (const int id : ids) trace.picks.push_back(static_cast<std::uint16_t>(id));
    }
  }
  trace.decode_all();
  return trace;
}

// --- what passes need ------------------------------------------------------------------------------------------------

constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();

struct Need {
  std::int32_t expert, count;
  std::int64_t next;  // when the expert is needed again: the index of that step
};
struct Step {  // a layer of a pass
  int layer, tokens;
  std::size_t begin, end;  // of the needs
};
struct Needs {
  std::vector<Need> needs;
  std::vector<Step> steps;
};

Needs needs_of(const Trace& trace) {
  Needs n;
  std::size_t token = 0;
  std::vector<std::int32_t> counts(static_cast<std::size_t>(trace.experts));
  for (const int pass : trace.passes) {
    for (int layer = 0; layer < trace.layers; ++layer) {
      std::ranges::fill(counts, 0);
      for (int t = 0; t < pass; ++t) {
        const std::uint16_t* ids = trace.pick(token + static_cast<std::size_t>(t), layer);
        for (int i = 0; i < trace.k; ++i) ++counts[ids[i]];
      }
      const std::size_t begin = n.needs.size();
      for (std::int32_t e = 0; e < trace.experts; ++e) {
        if (const std::int32_t count = counts[static_cast<std::size_t>(e)]) n.needs.push_back({e, count, never});
      }
      n.steps.push_back({layer, pass, begin, n.needs.size()});
    }
    token += static_cast<std::size_t>(pass);
  }
  std::vector<std::int64_t> next(static_cast<std::size_t>(trace.layers * trace.experts), never);
  for (std::size_t s = n.steps.size(); s-- > 0;) {
    for (std::size_t i = n.steps[s].begin; i < n.steps[s].end; ++i) {
      std::int64_t& at = next[static_cast<std::size_t>(n.steps[s].layer * trace.experts + n.needs[i].expert)];
      n.needs[i].next = std::exchange(at, static_cast<std::int64_t>(s));
    }
  }
  return n;
}

// --- policies --------------------------------------------------------------------------------------------------------

// What a policy may know when an expert is needed.
struct Moment {
  double count, tokens;     // tokens of the pass that need it, and of the pass
  double now;               // in tokens
  std::int64_t step, next;  // when it is needed next
  double evicted;           // the score that went last
};
// An expert's new score; the lowest goes first.
using Rule = std::function<double(double score, const Moment&)>;

// Keeps all scores, of absent experts too, and the present ones in order.
class RuleCache {
 public:
  RuleCache(const Trace& trace, int slots, Rule rule)
      : experts_(trace.experts),
        slots_(static_cast<std::size_t>(slots)),
        rule_(std::move(rule)),
        scores_(static_cast<std::size_t>(trace.layers * trace.experts)),
        present_(scores_.size()) {}

  int step(const Needs& n, std::size_t s) {
    const Step& step = n.steps[s];
    if (step.layer == 0) now_ += step.tokens;
    int hits = 0;
    absent_.clear();
    for (std::size_t i = step.begin; i < step.end; ++i) {
      const Need& need = n.needs[i];
      const auto key = static_cast<std::size_t>(step.layer * experts_ + need.expert);
      const double score = rule_(scores_[key], {static_cast<double>(need.count), static_cast<double>(step.tokens), now_,
                                                static_cast<std::int64_t>(s), need.next, evicted_});
      if (present_[key]) order_.erase({scores_[key], key}), order_.insert({score, key});
      scores_[key] = score;
      present_[key] ? void(++hits) : absent_.push_back(key);
    }
    const auto needed_now = [&](std::size_t key) {
      const auto e = static_cast<std::int32_t>(key) - step.layer * experts_;
      if (step.tokens > 1 || e < 0 || e >= experts_) return false;
      return std::any_of(n.needs.begin() + static_cast<std::ptrdiff_t>(step.begin),
                         n.needs.begin() + static_cast<std::ptrdiff_t>(step.end),
                         [&](const Need& need) { return need.expert == e; });
    };
    for (const std::size_t key : absent_) {
      if (order_.size() == slots_) {
        auto victim = order_.begin();
        while (needed_now(victim->second)) ++victim;
        evicted_ = victim->first;
        present_[victim->second] = false;
        order_.erase(victim);
      }
      order_.insert({scores_[key], key});
      present_[key] = true;
    }
    return hits;
  }

 private:
  int experts_;
  std::size_t slots_;
  Rule rule_;
  std::vector<double> scores_;
  std::vector<bool> present_;
  std::set<std::pair<double, std::size_t>> order_;
  std::vector<std::size_t> absent_;
  double now_ = 0, evicted_ = 0;
};

// The library's.
class OurCache {
 public:
  OurCache(const Trace& trace, int slots)
      : cache_(trace.layers, trace.experts, std::vector<int>(static_cast<std::size_t>(trace.layers), 0), {slots}) {}

  void warm(const ExpertProfile& profile) {
    cache_.warm(profile);
    for (const ExpertCache::Key& key : cache_.wanted()) cache_.unpin(cache_.insert(key.layer, key.expert));
  }

  int step(const Needs& n, std::size_t s) {
    const Step& step = n.steps[s];
    ids_.clear(), counts_.clear(), pinned_.clear(), absent_.clear();
    for (std::size_t i = step.begin; i < step.end; ++i) {
      ids_.push_back(n.needs[i].expert), counts_.push_back(n.needs[i].count);
    }
    cache_.record(step.layer, ids_, counts_, step.tokens);
    int hits = 0;
    for (const std::int32_t id : ids_) {
      const int slot = cache_.slot_of(step.layer, id);
      if (slot == ExpertCache::none) {
        absent_.push_back(id);
      } else {
        ++hits;
        if (step.tokens == 1) cache_.pin(slot), pinned_.push_back(slot);
      }
    }
    for (const std::int32_t id : absent_) {
      const int slot = cache_.insert(step.layer, id);
      step.tokens == 1 ? pinned_.push_back(slot) : cache_.unpin(slot);
    }
    for (const int slot : pinned_) cache_.unpin(slot);
    return hits;
  }

 private:
  ExpertCache cache_;
  std::vector<std::int32_t> ids_, counts_, absent_;
  std::vector<int> pinned_;
};

// log2(2^score + count 2^(now / half_life)): decayed frequency; all of a pass counts as if it came at its end.
Rule decayed(double half_life) {
  return [half_life](double score, const Moment& m) {
    const double mine = std::log2(m.count) + m.now / half_life;
    if (score == 0) return mine;  // never needed before: now > 0
    return std::max(score, mine) + std::log2(1 + std::exp2(-std::abs(score - mine)));
  };
}

struct Policy {
  std::string name;
  Rule rule;  // none: ExpertCache
};

const std::vector<Policy>& policies() {
  static const std::vector<Policy> all{
      {"LRU", [](double, const Moment& m) { return static_cast<double>(m.step); }},
      {"LFU", [](double score, const Moment& m) { return score + m.count; }},
      {"LFU, halved every 256",
       [](double score, const Moment& m) { return score + m.count * std::exp2(std::floor(m.now / 256)); }},
      {"LFU, dynamic ageing", [](double score, const Moment& m) { return std::max(score, m.evicted) + m.count; }},
      {"decayed, 32 tokens", decayed(32)},
      {"decayed, 64", decayed(64)},
      {"decayed, 128", decayed(128)},
      {"decayed, 256", decayed(256)},
      {"decayed, 1024", decayed(1024)},
      {"ExpertCache", {}},
      {"best", [](double, const Moment& m) { return m.next == never ? -1e18 : -static_cast<double>(m.next); }},
  };
  return all;
}

// --- tables ----------------------------------------------------------------------------------------------------------

constexpr std::array shares{0.1, 0.2, 0.3, 0.4, 0.6, 0.8};

int slots_of(const Trace& trace, double share) {
  return std::max(trace.k, static_cast<int>(std::lround(share * trace.layers * trace.experts)));
}

// Of decoded tokens, the second half of the trace.
template <class Cache>
double hit_rate(Cache cache, const Needs& n) {
  double hits = 0, needed = 0;
  for (std::size_t s = 0; s < n.steps.size(); ++s) {
    const int found = cache.step(n, s);
    if (n.steps[s].tokens > 1 || s < n.steps.size() / 2) continue;
    hits += found;
    needed += static_cast<double>(n.steps[s].end - n.steps[s].begin);
  }
  return hits / needed;
}

void compare(const Trace& trace) {
  std::printf("\n%s: %zu tokens in %zu passes, %d layers, %d of %d experts\n\n| hits, %% |", trace.name.c_str(),
              trace.tokens(), trace.passes.size(), trace.layers, trace.k, trace.experts);
  for (const double share : shares) std::printf(" %.0f %% |", 100 * share);
  std::printf("\n|---|");
  for (std::size_t i = 0; i < shares.size(); ++i) std::printf("---|");
  std::printf("\n");
  const Needs n = needs_of(trace);
  for (const Policy& policy : policies()) {
    std::printf("| %s |", policy.name.c_str());
    for (const double share : shares) {
      const int slots = slots_of(trace, share);
      const double rate =
          policy.rule ? hit_rate(RuleCache(trace, slots, policy.rule), n) : hit_rate(OurCache(trace, slots), n);
      std::printf(" %.1f |", 100 * rate);
      std::fflush(stdout);
    }
    std::printf("\n");
  }
}

// A text's tokens [begin, end), decoded.
Trace part(const Trace& trace, std::size_t begin, std::size_t end) {
  Trace out{trace.name, trace.layers, trace.experts, trace.k, {}, {}};
  out.picks.assign(trace.pick(begin, 0), trace.pick(end, 0));
  out.decode_all();
  return out;
}

ExpertProfile profile_of(const Trace& trace) {
  ExpertProfile profile(trace.layers, trace.experts);
  for (std::size_t t = 0; t < trace.tokens(); ++t) {
    for (int layer = 0; layer < trace.layers; ++layer) {
      const std::vector<std::int32_t> ids(trace.pick(t, layer), trace.pick(t, layer) + trace.k);
      profile.add(layer, ids, std::vector<std::int32_t>(ids.size(), 1), 1);
    }
  }
  return profile;
}

// What the first tokens find in a cache that is empty, or filled by the profile of another text; from several starts in
// the second half of the trace.
void compare_starts(const Trace& trace, const std::vector<std::pair<std::string, ExpertProfile>>& profiles) {
  constexpr std::array<std::size_t, 4> lengths{16, 64, 256, 1024};
  constexpr std::size_t starts = 16;
  const std::size_t half = trace.tokens() / 2;
  if (half < lengths.back() + starts) return;
  std::printf(
      "\n%s: the first tokens of %zu starts\n\n| hits, %% | 20 %%: 16 | 64 | 256 | 1024 | 40 %%: 16 | 64 | 256 | 1024 "
      "|\n"
      "|---|---|---|---|---|---|---|---|---|\n",
      trace.name.c_str(), starts);
  const auto row = [&](const std::string& name, const ExpertProfile* profile) {
    std::printf("| %s |", name.c_str());
    for (const double share : {0.2, 0.4}) {
      std::array<double, lengths.size()> hits{};
      for (std::size_t i = 0; i < starts; ++i) {
        const std::size_t begin = half + i * (half - lengths.back()) / starts;
        const Trace text = part(trace, begin, begin + lengths.back());
        const Needs n = needs_of(text);
        OurCache cache(text, slots_of(text, share));
        if (profile) cache.warm(*profile);
        double found = 0;
        for (std::size_t s = 0, l = 0; s < n.steps.size(); ++s) {
          found += cache.step(n, s);
          if (s + 1 == lengths[l] * static_cast<std::size_t>(text.layers))
            hits[l] += found / static_cast<double>(n.steps[s].end), ++l;
        }
      }
      for (const double h : hits) std::printf(" %.1f |", 100 * h / starts);
    }
    std::printf("\n");
  };
  row("empty", nullptr);
  for (const auto& [name, profile] : profiles) row("profile of " + name, &profile);
}

void run(int argc, char** argv) {
  std::vector<Trace> recorded;
  std::vector<std::pair<std::string, ExpertProfile>> profiles;  // of the first halves
  for (int i = 1; i < argc; ++i) {
    recorded.push_back(read_trace(argv[i]));
    const Trace& trace = recorded.back();
    if (trace.layers != recorded[0].layers || trace.experts != recorded[0].experts || trace.k != recorded[0].k)
      throw_error(argv[i], ": of another model than ", argv[1]);
    profiles.emplace_back(trace.name + ", first half", profile_of(part(trace, 0, trace.tokens() / 2)));
  }
  for (const Trace& trace : recorded) {
    compare(trace);
    Trace turns = trace;
    turns.name += ", prompts of 1024 and answers of 256";
    turns.converse(1024, 256);
    compare(turns);
    compare_starts(trace, profiles);
  }
  if (!recorded.empty()) return;
  compare(generate("even", 0, 1500));
  compare(generate("Zipf 0.6", 0.6, 2000));
  const Trace moving = generate("Zipf 0.9, a tenth of the experts trade places every 100 tokens", 0.9, 4000, 100, 0.1);
  compare(moving);
  Trace turns = moving;
  turns.name += ", prompts of 512 and answers of 128";
  turns.converse(512, 128);
  compare(turns);
  compare(generate("Zipf 1.2, half of them every 500 tokens", 1.2, 2000, 500, 0.5));
  const Trace lasting = generate("Zipf 0.9", 0.9, 4000);
  compare_starts(lasting, {{"the text before", profile_of(part(lasting, 0, 2000))}});
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
