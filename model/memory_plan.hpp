#pragma once
// What a session will take, computed from the shape alone.

#include <algorithm>
#include <cstdint>

#include "backends/backend.hpp"
#include "blocks/dtype.hpp"
#include "model/config.hpp"

namespace qwen3next {

// Final hidden states that may wait for the MTP layer; fed many at a time, they cost next to nothing.
inline constexpr int max_unseen_states = 64;

// What a model and a session on it take, in bytes.
struct MemoryPlan {
  std::uint64_t weights_mapped = 0;  // bytes of the files; the system pages them in and out
  std::uint64_t weights_copied = 0;  // small tensors that can't be used in place
  std::uint64_t kv_cache = 0;        // at the full context; grows with the text
  std::uint64_t delta_state = 0;     // DeltaNet states and convolution windows, independent of the length
  std::uint64_t scratch = 0;         // activations of the longest step; shorter ones take less
  // What a session allocates in the end.
  std::uint64_t session() const noexcept { return kv_cache + delta_state + scratch; }

  // Where experts are streamed (all 0 elsewhere): what there is, and what this session's full context leaves of it.
  std::uint64_t budget = 0;            // for all that follows and the session
  std::uint64_t weights_resident = 0;  // dense weights
  std::uint64_t experts_resident = 0;  // the slots of experts that are left
  std::uint64_t state_copy = 0;        // what a pass that fails goes back to
  std::uint64_t needed = 0;            // the least budget for this session
  std::int64_t experts_held = 0;       // in the slots
  std::int64_t experts = 0;            // of all layers, the MTP layer's included
  double hit_rate = 0;                 // expected of decoding: by the profile, else for picks at random
  double missed_bytes_per_token = 0;   // to be read for each token
  bool streamed() const noexcept { return budget > 0; }

  // Where a graphics card holds some of the experts (all 0 elsewhere).
  std::uint64_t card_budget = 0;       // all that may be taken of its memory
  std::uint64_t card_dense = 0;        // weights but the routed experts
  std::uint64_t card_experts = 0;      // the slots of experts
  std::int64_t card_experts_held = 0;  // in them; of `experts`
  std::uint64_t host_experts = 0;      // the others in this machine's memory; 0: mapped or streamed as everything

  // What decoding can reach at most, if experts are read at this rate.  Bytes per second -> tokens per second.
  double tokens_per_second(double read_bandwidth) const noexcept {
    return missed_bytes_per_token > 0 ? read_bandwidth / missed_bytes_per_token : 0;
  }
};

// `context` positions, `batch` tokens at a time.  Weights are left 0: they are the checkpoint's to say.
inline MemoryPlan plan_session(const Config& c, KvType kv, std::int64_t context, int batch) {
  MemoryPlan plan;
  const auto u = [](auto x) { return static_cast<std::uint64_t>(x); };
  const auto attention_layers = u(std::count(c.layer_types.begin(), c.layer_types.end(), LayerType::full_attention));
  const std::uint64_t delta_layers = c.layer_types.size() - attention_layers;

  const std::uint64_t kv_row = 2 * u(c.num_key_value_heads) * row_bytes(stored_type(kv), c.head_dim);
  plan.kv_cache = u(context) * kv_row * (attention_layers + (c.has_mtp ? 1 : 0));
  plan.delta_state = delta_layers * sizeof(float) *
                     (u(c.linear_num_value_heads) * u(c.linear_key_head_dim) * u(c.linear_value_head_dim) +
                      u(c.linear_conv_kernel_dim - 1) * u(c.conv_dim()));
  // As model/state.hpp's Activations, and inside of the backend: the hidden values of the experts, as floats and
  // quantised, and a quantised copy of an operation's input.
  const std::uint64_t inside =
      2 * u(c.num_experts_per_tok) * u(c.moe_intermediate_size) + std::max(u(c.attention_dim()), u(c.value_dim()));
  const std::uint64_t row = 4 * u(c.hidden_size) + 2 * u(c.rotary_pairs()) + 3 * u(c.attention_dim()) +
                            2 * u(c.kv_dim()) + 2 * u(c.conv_dim()) + 2 * u(c.value_dim()) +
                            4 * u(c.linear_num_value_heads) + u(c.num_experts) + 2 * u(c.num_experts_per_tok) +
                            2 * u(c.shared_expert_intermediate_size) + 1 + (c.has_mtp ? 2 * u(c.hidden_size) : 0);
  const std::uint64_t rows = std::min(u(batch), u(context));
  plan.scratch = sizeof(float) * (rows * (row + inside) + std::min<std::uint64_t>(rows, 16) * u(c.vocab_size));
  if (c.has_mtp) {  // rows of DeltaNet layers that are guesses, and hidden states that the MTP layer has not seen
    const std::uint64_t guess = delta_layers * 2 * (u(c.conv_dim()) + u(c.linear_num_value_heads));
    plan.scratch += sizeof(float) * (u(max_tentative_rows) * guess + u(max_unseen_states) * u(c.hidden_size));
  }
  return plan;
}

}  // namespace qwen3next
