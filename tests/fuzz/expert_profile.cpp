// Any text as an expert profile: what is accepted warms a cache, and reads the same when written again.

#include "weights/expert_profile.hpp"

#include <algorithm>
#include <limits>

#include "target.hpp"
#include "weights/expert_cache.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

FUZZ_TARGET(expert_profile) {
  const ExpertProfile profile = ExpertProfile::parse(input, "profile.json");
  const ExpertProfile again = ExpertProfile::parse(profile.json(), "again");
  expect(again.layers() == profile.layers() && again.experts() == profile.experts(), "the same shape again");
  for (int l = 0; l < profile.layers(); ++l) {
    expect(again.tokens(l) == profile.tokens(l), "the same tokens again");
    expect(std::ranges::equal(again.counts(l), profile.counts(l)), "the same counts again");
  }
  const int layers = profile.layers(), experts = profile.experts();
  ExpertCache cache(layers, experts, std::vector<int>(static_cast<std::size_t>(layers), 0), {3});
  cache.warm(profile);
  double last = std::numeric_limits<double>::max();
  for (const ExpertCache::Key& key : cache.wanted()) {
    const double rate = cache.rate(key.layer, key.expert);
    expect(rate > 0 && rate <= last, "rates that sink");
    last = rate;
    expect(cache.insert(key.layer, key.expert) != ExpertCache::none, "a free slot");
  }
}
