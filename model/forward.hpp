#pragma once
// The forward pass of Qwen3-Next, once, for every backend: T tokens of S sequences at a time.
//
// Prefill, decode, verification of drafts and batches of sequences are the same call with other row counts.  Source of
// the equations: Hugging Face transformers, models/qwen3_next; Gated DeltaNet arXiv:2412.06464.

#include <functional>
#include <span>

#include "backends/backend.hpp"
#include "model/config.hpp"
#include "model/state.hpp"
#include "model/weights.hpp"

namespace qwen3next {

// A pass of few rows is many short operations: a backend may gather them, from begin_pass() to end_pass(), and start
// them together.
template <BackendOps B>
class Pass {
 public:
  Pass(B& be, std::span<const SequenceRows<B>> sequences) : be_(be) {
    if constexpr (gathers) {
      bool few = sequences.size() <= most_sequences;
      for (const SequenceRows<B>& s : sequences) few = few && s.count <= few_rows && s.kept.empty();
      under_way_ = few && be_.begin_pass();
    }
  }
  Pass(const Pass&) = delete;
  ~Pass() {
    if constexpr (gathers) {
      if (under_way_) be_.give_up_pass();
    }
  }
  void end() {
    if constexpr (gathers) {
      if (under_way_) be_.end_pass();
    }
    under_way_ = false;
  }

 private:
  static constexpr bool gathers = requires(B & be) { be.begin_pass(); };
  static constexpr std::size_t most_sequences = 64;
  static constexpr int few_rows = 8;

  B& be_;
  bool under_way_ = false;
};

// The boxes that follow are written in the operations that every backend has.  Some backends have more of a box as one
// operation, for fewer passes over memory; it must mean the same, and a test holds it to that.

// h = norm(x);  y = W h for several W.
template <BackendOps B>
void norm_linear(B& be, typename B::Tensor h, typename B::Tensor x, const typename B::Vector& norm, float eps,
                 std::initializer_list<Projection<typename B::Weight, typename B::Tensor>> projections) {
  if constexpr (requires { be.norm_linear(h, x, norm, eps, projections); }) {
    be.norm_linear(h, x, norm, eps, projections);
  } else {
    be.rms_norm(h, x, norm, eps);
    be.linear(h, projections);
  }
}

// x += W in;  `y` [T, H] is scratch.
template <BackendOps B>
void linear_add(B& be, typename B::Tensor x, typename B::Tensor in, const typename B::Weight& w, typename B::Tensor y) {
  if constexpr (requires { be.linear_add(x, in, w, y); }) {
    be.linear_add(x, in, w, y);
  } else {
    be.linear(in, {{w, y}});
    be.add(x, y);
  }
}

// Softmax attention with an output gate and partial rotary embedding, of h = norm(x):
//   q, k = rope(norm(q_proj h)), rope(norm(k_proj h));   x += o_proj (sigmoid(gate) * attention(q, k, v))
template <BackendOps B>
void gated_attention(B& be, const Config& c, const AttentionWeights<B>& w, const typename B::Vector& norm,
                     Activations<B>& a, int T) {
  auto x = a.x.rows(0, T), h = a.h.rows(0, T), mix = a.mix.rows(0, T);
  auto q = a.q.rows(0, T), gate = a.gate.rows(0, T), k = a.k.rows(0, T), v = a.v.rows(0, T);
  auto heads = a.heads.rows(0, T), angles = a.angles.rows(0, T);
  const float eps = static_cast<float>(c.rms_norm_eps);
  const std::span<const Segment<typename B::KvCache>> segments = a.kv_segments;

  norm_linear(be, h, x, norm, eps, {{w.q_proj, q}, {w.gate_proj, gate}, {w.k_proj, k}, {w.v_proj, v}});
  if constexpr (requires {
                  be.gated_attention(heads, q, gate, k, v, w.q_norm, w.k_norm, eps, angles, attention_shape(c),
                                     segments);
                }) {
    be.gated_attention(heads, q, gate, k, v, w.q_norm, w.k_norm, eps, angles, attention_shape(c), segments);
  } else {
    be.rms_norm(q, q, w.q_norm, eps);  // per head, before the rotation
    be.rms_norm(k, k, w.k_norm, eps);
    be.rope(q, angles, c.head_dim);
    be.rope(k, angles, c.head_dim);
    be.attention(heads, q, k, v, attention_shape(c), segments);
    be.sigmoid_gate(heads, gate);
  }
  linear_add(be, x, heads, w.o_proj, mix);
}

// The rows of a pass in pieces that end where a DeltaNet state is to be kept; mostly all in one.
//   work(begin, count, segments of these rows)
template <BackendOps B, class Work>
void up_to_kept_states(Activations<B>& a, int T, Work work) {
  if (a.kept_deltas.empty()) return work(0, T, std::span<const Segment<typename B::DeltaState>>(a.delta_segments));
  const Segment<typename B::DeltaState> all = a.delta_segments.front();
  int begin = 0;
  const auto piece = [&](int end) {
    Segment<typename B::DeltaState> rows = all;
    rows.begin = 0, rows.count = end - begin, rows.position = all.position + begin;
    if (end > begin) work(begin, end - begin, std::span<const Segment<typename B::DeltaState>>(&rows, 1));
    begin = end;
  };
  for (const auto& [row, into] : a.kept_deltas) {
    piece(row);
    *into = *all.state;
  }
  piece(T);
}

// Gated DeltaNet: a linear attention whose state S [Dk, Dv] per value head forgets by exp(g) and writes by the delta
// rule.  For each token, q and k scaled to unit length, q by 1/sqrt(Dk) on top:
//   S = exp(g) S;   S += k (beta (v - S^T k))^T;   o = S^T q
template <BackendOps B>
void gated_delta_net(B& be, const Config& c, const DeltaNetWeights<B>& w, const typename B::Vector& norm,
                     Activations<B>& a, int T) {
  auto x = a.x.rows(0, T), h = a.h.rows(0, T), mix = a.mix.rows(0, T);
  auto qkv = a.qkv.rows(0, T), conv = a.conv.rows(0, T), z = a.z.rows(0, T), o = a.o.rows(0, T);
  auto b_in = a.b.rows(0, T), a_in = a.a.rows(0, T), beta = a.beta.rows(0, T), g = a.g.rows(0, T);
  const float eps = static_cast<float>(c.rms_norm_eps);
  const DeltaShape shape = delta_shape(c);

  norm_linear(be, h, x, norm, eps,
              {{w.in_proj_q, qkv.columns(0, c.key_dim())},
               {w.in_proj_k, qkv.columns(c.key_dim(), c.key_dim())},
               {w.in_proj_v, qkv.columns(2 * c.key_dim(), c.value_dim())},
               {w.in_proj_z, z},
               {w.in_proj_b, b_in},
               {w.in_proj_a, a_in}});
  up_to_kept_states(a, T, [&](int i, int n, std::span<const Segment<typename B::DeltaState>> segments) {
    auto in = qkv.rows(i, n), mixed = conv.rows(i, n), out = o.rows(i, n);
    auto b_n = b_in.rows(i, n), a_n = a_in.rows(i, n), beta_n = beta.rows(i, n), g_n = g.rows(i, n);
    if constexpr (requires {
                    be.delta_net(out, mixed, in, b_n, a_n, beta_n, g_n, w.conv1d, w.A, w.dt_bias, shape, segments);
                  }) {
      be.delta_net(out, mixed, in, b_n, a_n, beta_n, g_n, w.conv1d, w.A, w.dt_bias, shape, segments);
    } else {
      be.delta_gates(beta_n, g_n, b_n, a_n, w.A, w.dt_bias);
      be.causal_conv1d(mixed, in, w.conv1d, segments);
      be.gated_delta_rule(out, mixed, beta_n, g_n, shape, segments);
    }
  });
  if constexpr (requires { be.gated_norm_linear_add(x, o, z, w.norm, eps, w.out_proj, mix); }) {
    be.gated_norm_linear_add(x, o, z, w.norm, eps, w.out_proj, mix);
  } else {
    be.gated_rms_norm(o, o, z, w.norm, eps);
    linear_add(be, x, o, w.out_proj, mix);
  }
}

// The experts that the router picks for each token, plus one that serves all tokens through a gate of its own, of
// h = norm(x); added to x.  `next` is the next layer's, for a backend that looks ahead; null if there is none.
template <BackendOps B>
void sparse_moe(B& be, const Config& c, const MoeWeights<B>& w, const typename B::Vector& norm,
                const MoeWeights<B>* next, Activations<B>& a, int T) {
  auto x = a.x.rows(0, T), h = a.h.rows(0, T), mix = a.mix.rows(0, T), logits = a.router_logits.rows(0, T);
  auto gate = a.shared_gate.rows(0, T), up = a.shared_up.rows(0, T), shared = a.shared.rows(0, T);
  auto shared_expert_gate = a.shared_expert_gate.rows(0, T);
  const float eps = static_cast<float>(c.rms_norm_eps);
  const int k = c.num_experts_per_tok;

  const SharedExpert<typename B::Weight, typename B::Tensor> shared_expert{
      w.shared_gate_proj, w.shared_up_proj, w.shared_down_proj, shared_expert_gate, gate, up, shared};
  if constexpr (requires { be.experts_add(x, h, logits, a.routing, w.experts, shared_expert, k, true); }) {
    norm_linear(be, h, x, norm, eps, {{w.gate, logits}, {w.shared_expert_gate, shared_expert_gate}});
    be.experts_add(x, h, logits, a.routing, w.experts, shared_expert, k, c.norm_topk_prob);
    return;
  }
  norm_linear(be, h, x, norm, eps,
              {{w.gate, logits},
               {w.shared_expert_gate, shared_expert_gate},
               {w.shared_gate_proj, gate},
               {w.shared_up_proj, up}});
  be.router(a.routing, logits, k, c.norm_topk_prob);
  if constexpr (requires { be.look_ahead(h, w.gate, w.experts, T); }) {
    if (next) be.look_ahead(h, next->gate, next->experts, k);
  }
  be.experts(mix, h, w.experts, a.routing);
  be.swiglu(gate, gate, up);
  be.linear(gate, {{w.shared_down_proj, shared}});
  be.add_gated(mix, shared, shared_expert_gate);
  be.add(x, mix);
}

template <BackendOps B>
void decoder_layer(B& be, const Config& c, const LayerWeights<B>& w, const MoeWeights<B>* next, Activations<B>& a,
                   int T) {
  if (w.self_attn)
    gated_attention(be, c, *w.self_attn, w.input_layernorm, a, T);
  else
    gated_delta_net(be, c, *w.linear_attn, w.input_layernorm, a, T);
  sparse_moe(be, c, w.mlp, w.post_attention_layernorm, next, a, T);
}

// Points the layer's segments at what each sequence keeps there.
template <BackendOps B, class StateOf>
void enter_layer(Activations<B>& a, std::span<const SequenceRows<B>> sequences, StateOf state_of) {
  a.delta_segments.clear();
  a.kept_deltas.clear();
  a.kv_segments.clear();
  for (const SequenceRows<B>& s : sequences) {
    LayerState<B>& layer = state_of(*s.state);
    for (const KeptState<B>& kept : s.kept) {
      if (layer.delta) a.kept_deltas.push_back({kept.row, &state_of(*kept.into).delta});
    }
    if (layer.delta) a.delta_segments.push_back({s.begin, s.count, s.position, &*layer.delta, s.tentative});
    if (layer.kv) a.kv_segments.push_back({s.begin, s.count, s.position, &*layer.kv, s.tentative});
  }
}

// cos and sin of every row's position, for all attention layers of a call.
template <BackendOps B>
void position_angles(B& be, Activations<B>& a, std::span<const SequenceRows<B>> sequences, int T) {
  a.kv_segments.clear();
  for (const SequenceRows<B>& s : sequences) a.kv_segments.push_back({s.begin, s.count, s.position, nullptr});
  be.rope_angles(a.angles.rows(0, T), a.rope.frequency, a.rope.scale, a.kv_segments);
}

// Runs `tokens`, T <= a.max_rows of them, through all layers and advances the sequences that own the rows.  Leaves the
// final, normed hidden states in a.h [T, H]: the input of the head, and of the MTP layer.  If `after_layer` or an
// operation throws, the sequences are neither as before nor as after.
template <BackendOps B>
void forward(B& be, const Config& c, const ModelWeights<B>& w, std::span<const std::int32_t> tokens,
             std::span<const SequenceRows<B>> sequences, Activations<B>& a,
             const std::function<void(int layer)>& after_layer = {}) {
  const int T = static_cast<int>(tokens.size());
  auto x = a.x.rows(0, T);

  Pass<B> pass(be, sequences);
  position_angles(be, a, sequences, T);
  be.embed(x, tokens, w.embed_tokens);
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    const auto layer = static_cast<std::size_t>(i);
    enter_layer(a, sequences, [&](SequenceState<B>& s) -> LayerState<B>& { return s.layers[layer]; });
    decoder_layer(be, c, w.layers[layer], layer + 1 < w.layers.size() ? &w.layers[layer + 1].mlp : nullptr, a, T);
    if constexpr (requires { be.observe(i, x); }) be.observe(i, x);  // tracing wraps the backend
    if (after_layer) after_layer(i);
  }
  be.rms_norm(a.h.rows(0, T), x, w.norm, static_cast<float>(c.rms_norm_eps));
  pass.end();
  for (const SequenceRows<B>& s : sequences) s.state->position += s.count;
}

// Logits [n, V], by `lm_head`, of rows [begin, begin + n) of the hidden states in a.h; n <= a.max_logit_rows.
template <BackendOps B>
typename B::Tensor head(B& be, const typename B::Weight& lm_head, Activations<B>& a, int begin, int n) {
  auto logits = a.logits.rows(0, n);
  be.linear(a.h.rows(begin, n), {{lm_head, logits}});
  return logits;
}

}  // namespace qwen3next
