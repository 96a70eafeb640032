#pragma once
// Every tensor of the model: one line each, with Hugging Face's name and its shape.
//
// `B` names the types: Views (as in the file) or a backend (as that backend holds them).  Two conventions are settled
// by the loader, so that the layers need not know the container:
//   - zero-centred norm weights are held as 1 + w, so every norm is rms(x) * weight;
//   - A is held as -exp(A_log);
//   - matrices that a file interleaves (q|k|v|z, b|a, query|gate) are separate strided views of it.
//
// H hidden_size, V vocab_size, E num_experts, I moe_intermediate_size, K conv kernel; Hk, Hv key and value heads of
// Dk, Dv dims (DeltaNet); Hq, Hkv query and key-value heads of D dims (attention).

#include <optional>
#include <vector>

namespace qwen3next {

template <class B>
struct AttentionWeights {        // self_attn.
  typename B::Weight q_proj;     // q_proj      [Hq D, H]   rows of q_proj: per head [query, gate]
  typename B::Weight gate_proj;  // q_proj      [Hq D, H]
  typename B::Weight k_proj;     // k_proj      [Hkv D, H]
  typename B::Weight v_proj;     // v_proj      [Hkv D, H]
  typename B::Weight o_proj;     // o_proj      [H, Hq D]
  typename B::Vector q_norm;     // q_norm      [D]   1 + w
  typename B::Vector k_norm;     // k_norm      [D]   1 + w
};

template <class B>
struct DeltaNetWeights {         // linear_attn.
  typename B::Weight in_proj_q;  // in_proj_qkvz [Hk Dk, H]   its rows: per key head [q, k, v.., z..]
  typename B::Weight in_proj_k;  // in_proj_qkvz [Hk Dk, H]
  typename B::Weight in_proj_v;  // in_proj_qkvz [Hv Dv, H]
  typename B::Weight in_proj_z;  // in_proj_qkvz [Hv Dv, H]
  typename B::Weight in_proj_b;  // in_proj_ba   [Hv, H]      its rows: per key head [b.., a..]
  typename B::Weight in_proj_a;  // in_proj_ba   [Hv, H]
  typename B::Vector conv1d;     // conv1d       [2 Hk Dk + Hv Dv, K]   channels: all q, all k, all v
  typename B::Vector A;          // A_log        [Hv]   -exp(A_log)
  typename B::Vector dt_bias;    // dt_bias      [Hv]
  typename B::Vector norm;       // norm         [Dv]   plain w, not 1 + w
  typename B::Weight out_proj;   // out_proj     [H, Hv Dv]
};

template <class B>
struct MoeWeights {                       // mlp.
  typename B::Weight gate;                // gate               [E, H]   the router
  typename B::Experts experts;            // experts.{e}.       gate_proj, up_proj [I, H]  down_proj [H, I]
  typename B::Weight shared_gate_proj;    // shared_expert.     gate_proj [Is, H]
  typename B::Weight shared_up_proj;      // shared_expert.     up_proj [Is, H]
  typename B::Weight shared_down_proj;    // shared_expert.     down_proj [H, Is]
  typename B::Weight shared_expert_gate;  // shared_expert_gate [1, H]
};

template <class B>
struct LayerWeights {                            // model.layers.{i}.
  typename B::Vector input_layernorm;            // input_layernorm          [H]   1 + w
  std::optional<AttentionWeights<B>> self_attn;  // exactly one of the two mixers
  std::optional<DeltaNetWeights<B>> linear_attn;
  typename B::Vector post_attention_layernorm;  // post_attention_layernorm [H]   1 + w
  MoeWeights<B> mlp;
};

template <class B>
struct MtpWeights {                          // mtp.
  typename B::Vector pre_fc_norm_embedding;  // pre_fc_norm_embedding [H]   1 + w
  typename B::Vector pre_fc_norm_hidden;     // pre_fc_norm_hidden    [H]   1 + w
  typename B::Weight fc;                     // fc                    [H, 2 H]   columns: embedding, hidden
  LayerWeights<B> layer;                     // layers.0.             an attention layer
  typename B::Vector norm;                   // norm                  [H]   1 + w
  typename B::Weight embed_tokens;           // the model's, unless the file has one for this block; the same holds for
  typename B::Weight lm_head;                // the head
};

template <class B>
struct ModelWeights {
  typename B::Weight embed_tokens;  // model.embed_tokens [V, H]
  std::vector<LayerWeights<B>> layers;
  typename B::Vector norm;     // model.norm         [H]   1 + w
  typename B::Weight lm_head;  // lm_head            [V, H]   embed_tokens if tied
  std::optional<MtpWeights<B>> mtp;
};

// Visits the members of two weight structs of the same model side by side, in the order above: f(from.x, to.x).
// Optional parts and layers are created in `to` as `from` has them.  This is how a backend takes over a file's views.
template <class A, class B, class F>
void zip(const AttentionWeights<A>& from, AttentionWeights<B>& to, F&& f) {
  f(from.q_proj, to.q_proj), f(from.gate_proj, to.gate_proj), f(from.k_proj, to.k_proj), f(from.v_proj, to.v_proj);
  f(from.o_proj, to.o_proj), f(from.q_norm, to.q_norm), f(from.k_norm, to.k_norm);
}
template <class A, class B, class F>
void zip(const DeltaNetWeights<A>& from, DeltaNetWeights<B>& to, F&& f) {
  f(from.in_proj_q, to.in_proj_q), f(from.in_proj_k, to.in_proj_k), f(from.in_proj_v, to.in_proj_v);
  f(from.in_proj_z, to.in_proj_z), f(from.in_proj_b, to.in_proj_b), f(from.in_proj_a, to.in_proj_a);
  f(from.conv1d, to.conv1d), f(from.A, to.A), f(from.dt_bias, to.dt_bias), f(from.norm, to.norm);
  f(from.out_proj, to.out_proj);
}
template <class A, class B, class F>
void zip(const MoeWeights<A>& from, MoeWeights<B>& to, F&& f) {
  f(from.gate, to.gate), f(from.experts, to.experts), f(from.shared_gate_proj, to.shared_gate_proj);
  f(from.shared_up_proj, to.shared_up_proj), f(from.shared_down_proj, to.shared_down_proj);
  f(from.shared_expert_gate, to.shared_expert_gate);
}
template <class A, class B, class F>
void zip(const LayerWeights<A>& from, LayerWeights<B>& to, F&& f) {
  f(from.input_layernorm, to.input_layernorm);
  if (from.self_attn) zip(*from.self_attn, to.self_attn.emplace(), f);
  if (from.linear_attn) zip(*from.linear_attn, to.linear_attn.emplace(), f);
  f(from.post_attention_layernorm, to.post_attention_layernorm);
  zip(from.mlp, to.mlp, f);
}
template <class A, class B, class F>
void zip(const MtpWeights<A>& from, MtpWeights<B>& to, F&& f) {
  f(from.pre_fc_norm_embedding, to.pre_fc_norm_embedding), f(from.pre_fc_norm_hidden, to.pre_fc_norm_hidden);
  f(from.fc, to.fc);
  zip(from.layer, to.layer, f);
  f(from.norm, to.norm), f(from.embed_tokens, to.embed_tokens), f(from.lm_head, to.lm_head);
}
template <class A, class B, class F>
void zip(const ModelWeights<A>& from, ModelWeights<B>& to, F&& f) {
  f(from.embed_tokens, to.embed_tokens);
  to.layers.resize(from.layers.size());
  for (std::size_t i = 0; i < from.layers.size(); ++i) zip(from.layers[i], to.layers[i], f);
  f(from.norm, to.norm), f(from.lm_head, to.lm_head);
  if (from.mtp) zip(*from.mtp, to.mtp.emplace(), f);
}

// Weights without values: what zip() fills when only `from` is of interest.
struct NoWeights {
  struct Nothing {};
  using Weight = Nothing;
  using Vector = Nothing;
  using Experts = Nothing;
};

}  // namespace qwen3next
