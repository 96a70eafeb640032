#pragma once
// What the parts of `experts` share.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cli/common.hpp"
#include "cli/routing_statistics.hpp"

namespace qwen3next::cli {

struct ExpertsOptions {
  ModelOptions model;
  std::string file, save, trace;
  bool json = false, quiet = false;
};

// A size of cache and what the second half of the text found in it, as a share of its picks.
struct CacheResult {
  double share;  // of the experts of all layers
  int slots;
  double hit_rate;             // of ExpertCache, after the first half
  double best_fixed;           // if it held what the second half picked most
  double fixed_by_first_half;  // if it held what the first half picked most
};

struct RoutingResults {
  std::int64_t tokens = 0, windows = 0, window = 0;
  double seconds = 0;
  int per_token = 0;
  ExpertProfile first, second;  // halves of the text
  std::vector<CacheResult> caches;

  ExpertProfile whole() const {
    ExpertProfile sum = first;
    return sum += second;
  }
};

// Runs the model over the tokens (experts_run.cpp); writes the trace, if one is asked for.
RoutingResults observe_routing(const Model& model, std::span<const std::int32_t> tokens, const ExpertsOptions& o);

}  // namespace qwen3next::cli
