#pragma once
// How large a model is, in the numbers that its name counts: "80B-A3B".

#include <cstdint>

#include "blocks/weight_view.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"

namespace qwen3next {

// Numbers of weights.  What serves twice counts once: a head that is the embedding, and what MTP shares with the model.
struct ParameterCount {
  std::int64_t total = 0;    // all of them
  std::int64_t experts = 0;  // of these, the routed experts'
  std::int64_t mtp = 0;      // of these, the MTP head's, its experts included
  std::int64_t active = 0;  // that one token is computed with: a row of the embedding, mixers, routers, shared experts,
                            // the experts that are picked, norms, the head; without MTP
};

namespace detail {

// Sums up what zip() visits.
struct CountParameters {
  std::int64_t dense = 0, experts = 0;

  static std::int64_t of(const WeightView& w) noexcept { return std::int64_t{w.rows} * w.cols; }
  void operator()(const WeightView& w, NoWeights::Nothing) noexcept { dense += of(w); }
  void operator()(const VectorView& v, NoWeights::Nothing) noexcept { dense += v.size; }
  void operator()(const ExpertViews& views, NoWeights::Nothing) noexcept {
    for (const ExpertView& e : views) experts += of(e.gate) + of(e.up) + of(e.down);
  }
};

}  // namespace detail

inline ParameterCount count_parameters(const Config& c, const ModelWeights<Views>& w) {
  const auto size = detail::CountParameters::of;
  detail::CountParameters all, mtp;
  ModelWeights<NoWeights> nothing;
  zip(w, nothing, all);
  std::int64_t shared = 0;  // of the MTP head with the model
  if (w.mtp) {
    MtpWeights<NoWeights> head;
    zip(*w.mtp, head, mtp);
    if (w.mtp->embed_tokens.data == w.embed_tokens.data) shared += size(w.mtp->embed_tokens);
    if (w.mtp->lm_head.data == w.lm_head.data) shared += size(w.mtp->lm_head);
    if (w.mtp->norm.data == w.norm.data) shared += w.mtp->norm.size;
  }
  const std::int64_t embedding = size(w.embed_tokens);
  ParameterCount count;
  count.experts = all.experts;
  count.mtp = mtp.dense + mtp.experts - shared;
  count.total = all.dense + all.experts - shared - (w.lm_head.data == w.embed_tokens.data ? embedding : 0);
  count.active = all.dense - mtp.dense - embedding + c.hidden_size +
                 (all.experts - mtp.experts) / c.num_experts * c.num_experts_per_tok;
  return count;
}

}  // namespace qwen3next
