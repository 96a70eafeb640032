#pragma once
// The bytes that a forward pass cannot avoid to move: what its speed is limited by.

#include <cmath>
#include <cstdint>

#include "blocks/weight_view.hpp"
#include "model/config.hpp"
#include "model/memory_plan.hpp"
#include "model/weights.hpp"

namespace qwen3next {

// Of one pass, in bytes.
struct Traffic {
  double dense = 0;     // every weight that serves all tokens, once: mixers, shared experts, routers, norms, head
  double experts = 0;   // the routed experts that are expected to be picked, once
  double kv_cache = 0;  // keys and values of the positions before, read; those of the new ones, written
  double states = 0;    // DeltaNet states and convolution windows, read and written
  double total() const noexcept { return dense + experts + kv_cache + states; }
};

// How many of E experts T tokens pick, if each picks k of them and all are equally likely: E (1 - (1 - k/E)^T).
inline double expected_distinct_experts(int E, int k, double T) noexcept {
  return E * (1 - std::pow(1 - static_cast<double>(k) / E, T));
}

namespace detail {

struct LayerBytes {
  double dense = 0, expert = 0;  // of all that every token meets; of one expert, on average
};

inline LayerBytes layer_bytes(const LayerWeights<Views>& layer) {
  struct Count {
    LayerBytes sum;
    void operator()(const WeightView& w, NoWeights::Nothing) { sum.dense += static_cast<double>(w.bytes()); }
    void operator()(const VectorView& v, NoWeights::Nothing) {
      sum.dense += static_cast<double>(v.size) * sizeof(float);
    }
    void operator()(const ExpertViews& experts, NoWeights::Nothing) {
      double bytes = 0;
      for (const ExpertView& e : experts) bytes += static_cast<double>(e.gate.bytes() + e.up.bytes() + e.down.bytes());
      if (!experts.empty()) sum.expert = bytes / static_cast<double>(experts.size());
    }
  } count;
  LayerWeights<NoWeights> nothing;
  zip(layer, nothing, count);
  return count.sum;
}

}  // namespace detail

// A pass of `tokens` new tokens after `depth` others, of one sequence; logits are computed for one of them.  A mean
// over several passes may be asked for: everything is linear in `depth`.  The MTP head takes no part.
inline Traffic pass_traffic(const Config& c, const ModelWeights<Views>& w, KvType kv, double tokens, double depth) {
  Traffic t;
  t.dense = tokens * static_cast<double>(w.embed_tokens.row_bytes()) + static_cast<double>(w.lm_head.bytes()) +
            static_cast<double>(w.norm.size) * sizeof(float);
  const double picked = expected_distinct_experts(c.num_experts, c.num_experts_per_tok, tokens);
  for (const LayerWeights<Views>& layer : w.layers) {
    const detail::LayerBytes bytes = detail::layer_bytes(layer);
    t.dense += bytes.dense;
    t.experts += picked * bytes.expert;
  }
  Config trunk = c;
  trunk.has_mtp = false;
  const MemoryPlan position = plan_session(trunk, kv, 1, 1);
  t.kv_cache = (depth + tokens) * static_cast<double>(position.kv_cache);
  t.states = 2 * static_cast<double>(position.delta_state);
  return t;
}

}  // namespace qwen3next
