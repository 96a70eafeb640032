#pragma once
// What a sequence keeps between calls, and the memory that one call works in.

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "model/config.hpp"

namespace qwen3next {

inline DeltaShape delta_shape(const Config& c) {
  return {c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim,
          c.linear_conv_kernel_dim};
}
inline AttentionShape attention_shape(const Config& c) {
  return {c.num_attention_heads, c.num_key_value_heads, c.head_dim};
}

template <BackendOps B>
struct LayerState {  // the one that the layer's mixer uses
  std::optional<typename B::DeltaState> delta;
  std::optional<typename B::KvCache> kv;
};

// One sequence.  A value: a copy is an exact snapshot (KV blocks are shared until one side writes).
template <BackendOps B>
struct SequenceState {
  SequenceState(B& be, const Config& c) : layers(static_cast<std::size_t>(c.num_hidden_layers)) {
    for (int i = 0; i < c.num_hidden_layers; ++i) {
      LayerState<B>& layer = layers[static_cast<std::size_t>(i)];
      if (c.full_attention(i))
        layer.kv = be.kv_cache(attention_shape(c));
      else
        layer.delta = be.delta_state(delta_shape(c));
    }
    if (c.has_mtp) mtp.kv = be.kv_cache(attention_shape(c));
  }
  // What a pass will fill in: see KeptState.
  explicit SequenceState(std::size_t count) : layers(count) {}

  // The model's in order, then the MTP layer's.
  std::vector<const LayerState<B>*> all_layers() const {
    std::vector<const LayerState<B>*> all;
    for (const LayerState<B>& layer : layers) all.push_back(&layer);
    all.push_back(&mtp);
    return all;
  }

  // After a tentative pass of `count` rows: the first n stay.
  void accept(int count, int n) {
    position -= count - n;
    for (LayerState<B>& layer : layers) {
      if (layer.delta) layer.delta->accept(n);
      if (layer.kv) layer.kv->truncate(position);
    }
  }

  // Folds in what a backend put off: what is kept or copied from here on is S and conv alone.
  void settle(B& be, const Config& c) {
    for (LayerState<B>& layer : layers) {
      if (layer.delta) be.settle(*layer.delta, delta_shape(c));
    }
  }

  std::vector<LayerState<B>> layers;
  LayerState<B> mtp;
  std::int64_t position = 0;      // tokens seen by the trunk
  std::int64_t mtp_position = 0;  // rows seen by the MTP layer
  // In snapshots: the final hidden state [H] of the last token, which the MTP layer has not seen, since it takes the
  // next one along.
  std::vector<float> hidden{};
};

// A sequence as it is before a pass that may fail in the middle.  Copies the DeltaNet states; KV caches, which only
// grow, are cut.  Keeps its memory for the next time.
template <BackendOps B>
class SequenceGuard {
 public:
  void keep(const SequenceState<B>& s) {
    deltas_.resize(s.layers.size());
    for (std::size_t i = 0; i < s.layers.size(); ++i) deltas_[i] = s.layers[i].delta;
    position_ = s.position, mtp_position_ = s.mtp_position;
  }
  void put_back(SequenceState<B>& s) const {
    for (std::size_t i = 0; i < s.layers.size(); ++i) {
      s.layers[i].delta = deltas_[i];
      if (s.layers[i].kv) s.layers[i].kv->truncate(position_);
    }
    if (s.mtp.kv) s.mtp.kv->truncate(mtp_position_);
    s.position = position_, s.mtp_position = mtp_position_;
  }

 private:
  std::vector<std::optional<typename B::DeltaState>> deltas_;
  std::int64_t position_ = 0, mtp_position_ = 0;
};

// A state to be kept of a sequence in the middle of its rows: after the first `row` of them, 0 < row <= count.  The
// pass fills in the DeltaNet states, which are gone afterwards.  KV caches only grow: whoever ordered it cuts copies.
template <BackendOps B>
struct KeptState {
  int row;
  SequenceState<B>* into;
};

// Which rows of a batch belong to which sequence; `tentative` ones until SequenceState::accept().  Only a sequence that
// is alone in its batch can have `kept` states, in the order of their rows.
template <BackendOps B>
struct SequenceRows {
  int begin, count;
  std::int64_t position;
  SequenceState<B>* state;
  bool tentative = false;
  std::span<const KeptState<B>> kept{};
};

// Scratch for up to `rows` tokens at a time, allocated once.  T rows, other letters as in model/weights.hpp.
template <BackendOps B>
struct Activations {
  using Tensor = typename B::Tensor;

  Activations(B& be, const Config& c, int rows, int logit_rows, int sequences)
      : max_rows(rows),
        max_logit_rows(logit_rows),
        x(be.tensor(rows, c.hidden_size)),
        h(be.tensor(rows, c.hidden_size)),
        mix(be.tensor(rows, c.hidden_size)),
        angles(be.tensor(rows, 2 * c.rotary_pairs())),
        q(be.tensor(rows, c.attention_dim())),
        gate(be.tensor(rows, c.attention_dim())),
        k(be.tensor(rows, c.kv_dim())),
        v(be.tensor(rows, c.kv_dim())),
        heads(be.tensor(rows, c.attention_dim())),
        qkv(be.tensor(rows, c.conv_dim())),
        conv(be.tensor(rows, c.conv_dim())),
        z(be.tensor(rows, c.value_dim())),
        b(be.tensor(rows, c.linear_num_value_heads)),
        a(be.tensor(rows, c.linear_num_value_heads)),
        beta(be.tensor(rows, c.linear_num_value_heads)),
        g(be.tensor(rows, c.linear_num_value_heads)),
        o(be.tensor(rows, c.value_dim())),
        router_logits(be.tensor(rows, c.num_experts)),
        routing(be.routing(rows, c.num_experts_per_tok)),
        shared_gate(be.tensor(rows, c.shared_expert_intermediate_size)),
        shared_up(be.tensor(rows, c.shared_expert_intermediate_size)),
        shared(be.tensor(rows, c.hidden_size)),
        shared_expert_gate(be.tensor(rows, 1)),
        logits(be.tensor(logit_rows, c.vocab_size)),
        rope(make_rope(c)) {
    if (c.has_mtp) mtp_in = be.tensor(rows, 2 * c.hidden_size);
    delta_segments.reserve(static_cast<std::size_t>(sequences));
    kv_segments.reserve(static_cast<std::size_t>(sequences));
  }

  int max_rows, max_logit_rows;
  Tensor x;                               // [T, H] residual stream
  Tensor h;                               // [T, H] normed input of a block; at the end the final hidden state
  Tensor mix;                             // [T, H] output of a block
  Tensor angles;                          // [T, 2 rotary pairs] cos, sin
  Tensor q, gate, k, v, heads;            // attention: [T, Hq D] x2, [T, Hkv D] x2, [T, Hq D]
  Tensor qkv, conv, z, b, a, beta, g, o;  // DeltaNet: [T, 2 Hk Dk + Hv Dv] x2, [T, Hv Dv], [T, Hv] x4, [T, Hv Dv]
  Tensor router_logits;                   // [T, E]
  typename B::Routing routing;            // [T, experts per token]
  Tensor shared_gate, shared_up, shared;  // [T, Is] x2, [T, H]
  Tensor shared_expert_gate;              // [T, 1]
  Tensor logits;                          // [up to max_logit_rows, V]
  std::optional<Tensor> mtp_in;           // [T, 2 H] embedding, hidden
  Rope rope;
  std::vector<Segment<typename B::DeltaState>> delta_segments;
  std::vector<std::pair<int, std::optional<typename B::DeltaState>*>> kept_deltas;  // of the layer: rows, into
  std::vector<Segment<typename B::KvCache>> kv_segments;
};

}  // namespace qwen3next
