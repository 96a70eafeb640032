#pragma once
// The one place where tensors get their meaning: names and layouts of both containers -> ModelWeights<Views>.
//
// Each tensor has a line with Hugging Face's name and llama.cpp's.  Matrices are strided views of the file; where the
// containers interleave rows differently, the views differ and the model does not notice.

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "model/config.hpp"
#include "model/weights.hpp"
#include "weights/binder.hpp"

namespace qwen3next {

namespace detail {

// A norm that computes rms(x) * (1 + w).  Hugging Face stores w, llama.cpp's converter 1 + w.
inline VectorView bind_norm(Binder& b, std::string_view prefix, TensorName name, int size) {
  return b.vector(prefix, name, {size}, b.gguf() ? Binder::Transform::none : Binder::Transform::add_one);
}

inline AttentionWeights<Views> bind_attention(Binder& b, const Config& c, std::string_view p) {
  const int H = c.hidden_size, D = c.head_dim;
  AttentionWeights<Views> w;
  // Per head D rows of query, then D of gate.
  if (const WeightView q = b.matrix(p, {"self_attn.q_proj.weight", "attn_q.weight"}, 2 * c.attention_dim(), H);
      q.data) {
    w.q_proj = q.every(2 * D, 0, D);
    w.gate_proj = q.every(2 * D, D, D);
  }
  w.k_proj = b.matrix(p, {"self_attn.k_proj.weight", "attn_k.weight"}, c.kv_dim(), H);
  w.v_proj = b.matrix(p, {"self_attn.v_proj.weight", "attn_v.weight"}, c.kv_dim(), H);
  w.o_proj = b.matrix(p, {"self_attn.o_proj.weight", "attn_output.weight"}, H, c.attention_dim());
  w.q_norm = bind_norm(b, p, {"self_attn.q_norm.weight", "attn_q_norm.weight"}, D);
  w.k_norm = bind_norm(b, p, {"self_attn.k_norm.weight", "attn_k_norm.weight"}, D);
  return w;
}

// q, k, v, z and b, a in one of three layouts.
inline void bind_delta_net_inputs(Binder& b, const Config& c, std::string_view p, DeltaNetWeights<Views>& w) {
  const int H = c.hidden_size, Hv = c.linear_num_value_heads;
  const int key = c.key_dim(), value = c.value_dim();
  constexpr TensorName qkv{"linear_attn.in_proj_qkv.weight", "attn_qkv.weight"};
  constexpr TensorName z{"linear_attn.in_proj_z.weight", "attn_gate.weight"};
  constexpr TensorName qkvz{"linear_attn.in_proj_qkvz.weight", "ssm_in.weight"};
  const bool grouped = b.has(p, qkvz) || (!b.gguf() && !b.has(p, qkv));
  if (!grouped) {  // all q, all k, all v; z apart
    if (const WeightView m = b.matrix(p, qkv, 2 * key + value, H); m.data) {
      w.in_proj_q = m.slice(0, key);
      w.in_proj_k = m.slice(key, key);
      w.in_proj_v = m.slice(2 * key, value);
    }
    w.in_proj_z = b.matrix(p, z, value, H);
  } else if (const WeightView m = b.matrix(p, qkvz, 2 * key + 2 * value, H); m.data) {
    // Per key head: Dk rows of q, Dk of k, then v and z of its value heads.
    const int Dk = c.linear_key_head_dim, V = value / c.linear_num_key_heads, group = 2 * Dk + 2 * V;
    w.in_proj_q = m.every(group, 0, Dk);
    w.in_proj_k = m.every(group, Dk, Dk);
    w.in_proj_v = m.every(group, 2 * Dk, V);
    w.in_proj_z = m.every(group, 2 * Dk + V, V);
  }

  constexpr TensorName ba{"linear_attn.in_proj_ba.weight", "ssm_ba.weight"};
  constexpr TensorName beta{"linear_attn.in_proj_b.weight", ""}, alpha{"linear_attn.in_proj_a.weight", ""};
  if (!b.gguf() && !b.has(p, ba) && (b.has(p, beta) || b.has(p, alpha))) {
    w.in_proj_b = b.matrix(p, beta, Hv, H);
    w.in_proj_a = b.matrix(p, alpha, Hv, H);
  } else if (const WeightView m = b.matrix(p, ba, 2 * Hv, H); m.data) {
    const int ratio = Hv / c.linear_num_key_heads;  // per key head: b of its value heads, then a; in GGUF, too
    w.in_proj_b = m.every(2 * ratio, 0, ratio);
    w.in_proj_a = m.every(2 * ratio, ratio, ratio);
  }
}

inline DeltaNetWeights<Views> bind_delta_net(Binder& b, const Config& c, std::string_view p) {
  using Transform = Binder::Transform;
  const int Hv = c.linear_num_value_heads, K = c.linear_conv_kernel_dim;
  DeltaNetWeights<Views> w;
  bind_delta_net_inputs(b, c, p, w);
  const Shape conv = b.gguf() ? Shape{c.conv_dim(), K} : Shape{c.conv_dim(), 1, K};
  w.conv1d = b.vector(p, {"linear_attn.conv1d.weight", "ssm_conv1d.weight"}, conv, Transform::none);
  w.A = b.vector(p, {"linear_attn.A_log", "ssm_a"}, {Hv}, b.gguf() ? Transform::none : Transform::minus_exp);
  w.dt_bias = b.vector(p, {"linear_attn.dt_bias", "ssm_dt.bias"}, {Hv}, Transform::none);
  w.norm = b.vector(p, {"linear_attn.norm.weight", "ssm_norm.weight"}, {c.linear_value_head_dim}, Transform::none);
  w.out_proj = b.matrix(p, {"linear_attn.out_proj.weight", "ssm_out.weight"}, c.hidden_size, c.value_dim());
  return w;
}

inline ExpertViews bind_experts(Binder& b, const Config& c, std::string_view p) {
  const int E = c.num_experts, H = c.hidden_size, I = c.moe_intermediate_size;
  constexpr TensorName gate_up_name{"mlp.experts.gate_up_proj", "ffn_gate_up_exps.weight"};
  constexpr TensorName down_name{"mlp.experts.down_proj", "ffn_down_exps.weight"};
  ExpertViews experts;
  const auto fill = [&](WeightView ExpertView::*member, const std::vector<WeightView>& stack) {
    experts.resize(stack.size());
    for (std::size_t e = 0; e < experts.size(); ++e) experts[e].*member = stack[e];
  };
  if (b.has(p, gate_up_name)) {  // fused: gate rows, then up rows
    for (const WeightView& gate_up : b.stack(p, gate_up_name, E, 2 * I, H)) {
      experts.push_back({gate_up.slice(0, I), gate_up.slice(I, I), {}});
    }
    fill(&ExpertView::down, b.stack(p, down_name, E, H, I));
  } else if (b.gguf()) {
    fill(&ExpertView::gate, b.stack(p, {"", "ffn_gate_exps.weight"}, E, I, H));
    fill(&ExpertView::up, b.stack(p, {"", "ffn_up_exps.weight"}, E, I, H));
    fill(&ExpertView::down, b.stack(p, down_name, E, H, I));
  } else {  // Hugging Face, a tensor per matrix
    std::string prefix;
    for (int e = 0; e < E; ++e) {
      prefix.assign(p).append("mlp.experts.").append(std::to_string(e)).append(".");
      ExpertView& expert = experts.emplace_back();
      expert.gate = b.matrix(prefix, {"gate_proj.weight", ""}, I, H);
      expert.up = b.matrix(prefix, {"up_proj.weight", ""}, I, H);
      expert.down = b.matrix(prefix, {"down_proj.weight", ""}, H, I);
    }
  }
  return experts;
}

inline MoeWeights<Views> bind_moe(Binder& b, const Config& c, std::string_view p) {
  const int H = c.hidden_size, S = c.shared_expert_intermediate_size;
  MoeWeights<Views> w;
  w.gate = b.matrix(p, {"mlp.gate.weight", "ffn_gate_inp.weight"}, c.num_experts, H);
  w.experts = bind_experts(b, c, p);
  w.shared_gate_proj = b.matrix(p, {"mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight"}, S, H);
  w.shared_up_proj = b.matrix(p, {"mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight"}, S, H);
  w.shared_down_proj = b.matrix(p, {"mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight"}, H, S);
  w.shared_expert_gate = b.matrix(p, {"mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"}, 1, H);
  return w;
}

inline LayerWeights<Views> bind_layer(Binder& b, const Config& c, std::string_view p, LayerType type) {
  LayerWeights<Views> w;
  w.input_layernorm = bind_norm(b, p, {"input_layernorm.weight", "attn_norm.weight"}, c.hidden_size);
  if (type == LayerType::full_attention) {
    w.self_attn = bind_attention(b, c, p);
  } else {
    w.linear_attn = bind_delta_net(b, c, p);
  }
  w.post_attention_layernorm =
      bind_norm(b, p, {"post_attention_layernorm.weight", "post_attention_norm.weight"}, c.hidden_size);
  w.mlp = bind_moe(b, c, p);
  return w;
}

// The block of Hugging Face's mtp.* or of llama.cpp's last blk.*.  What it shares with the model `w` may be there for
// it alone.
inline MtpWeights<Views> bind_mtp(Binder& b, const Config& c, const ModelWeights<Views>& model) {
  const int H = c.hidden_size, V = c.vocab_size;
  const std::string p = b.gguf() ? concat("blk.", c.num_hidden_layers, ".") : "mtp.";
  MtpWeights<Views> w;
  w.pre_fc_norm_embedding = bind_norm(b, p, {"pre_fc_norm_embedding.weight", "nextn.enorm.weight"}, H);
  w.pre_fc_norm_hidden = bind_norm(b, p, {"pre_fc_norm_hidden.weight", "nextn.hnorm.weight"}, H);
  w.fc = b.matrix(p, {"fc.weight", "nextn.eh_proj.weight"}, H, 2 * H);
  w.layer = bind_layer(b, c, b.gguf() ? p : p + "layers.0.", LayerType::full_attention);
  if (constexpr TensorName norm{"norm.weight", "nextn.shared_head_norm.weight"}; b.has(p, norm) || !b.gguf()) {
    w.norm = bind_norm(b, p, norm, H);
  } else {  // llama.cpp's rule
    w.norm = model.norm;
  }
  const auto own = [&](std::string_view name, const WeightView& shared) {
    return b.gguf() && b.has(p, {"", name}) ? b.matrix(p, {"", name}, V, H) : shared;
  };
  w.embed_tokens = own("nextn.embed_tokens.weight", model.embed_tokens);
  w.lm_head = own("nextn.shared_head_head.weight", model.lm_head);
  return w;
}

inline bool is_mtp_tensor(std::string_view name) {
  return name.find(".nextn.") != name.npos || name.starts_with("mtp.");
}
inline bool is_trunk_tensor(std::string_view name) {
  return name.starts_with("blk.0.") || name.starts_with("model.layers.0.");
}

// Layouts that look like Qwen3-Next's and are not, by a tensor that only they have.
inline void refuse_foreign_tensors(const std::vector<TensorRecord>& records, std::string_view source, Format format) {
  for (const TensorRecord& record : records) {
    const std::string_view name = record.name;
    const Shape& shape = record.shape;
    if (format == Format::gguf) {
      if (name.ends_with(".ssm_beta.weight") || name.ends_with(".ssm_alpha.weight") || name.ends_with(".ssm_dt")) {
        throw_error(source, ": has ", printable(name), ", which only conversions with another order of value heads ",
                    "have (Ollama's, or Qwen3.5); use one by llama.cpp for 'qwen3next'");
      }
      continue;
    }
    const bool conv_of_mlx = name.ends_with(".conv1d.weight") && shape.rank == 3 && shape[2] == 1 && shape[1] != 1;
    if (conv_of_mlx || name.find(".switch_mlp.") != name.npos || name.ends_with(".scales") ||
        name.ends_with(".biases")) {
      throw_error(source, ": has ", printable(name), " ", shape.text(), ", so it is an MLX conversion, which is laid ",
                  "out differently (norms, too); use the original Hugging Face folder or a GGUF");
    }
    if (name.ends_with(".qweight") || name.ends_with(".weight_packed") || name.ends_with(".weight_scale")) {
      throw_error(source, ": has ", printable(name), ": quantised safetensors (GPTQ, AWQ, compressed-tensors) are not ",
                  "supported; use the BF16 release or a GGUF");
    }
  }
}

}  // namespace detail

struct BoundWeights {
  ModelWeights<Views> weights;
  std::vector<VectorCopy> copies;  // what could not be used in place; `weights` points into it
};

// Binds every tensor of `records`; throws if one is missing, left over, of the wrong shape or of an unsupported type.
// Settles what only the tensors say: config.has_mtp and config.tie_word_embeddings.  `source` names the checkpoint.
inline BoundWeights bind_weights(Format format, const std::vector<TensorRecord>& records,
                                 const std::vector<MappedFile>& files, const std::string& source, Config& config) {
  detail::refuse_foreign_tensors(records, source, format);
  const auto any = [&](bool (*is)(std::string_view)) {
    return std::any_of(records.begin(), records.end(), [&](const TensorRecord& r) { return is(r.name); });
  };
  const bool has_mtp_tensors = any(detail::is_mtp_tensor);
  if (has_mtp_tensors && !any(detail::is_trunk_tensor)) {
    throw_error(source, ": holds only the MTP block; open the model itself, and give this as its companion ",
                "(Options::mtp_path, --mtp-file)");
  }
  BoundWeights bound;
  Binder b(format, records, files, source, bound.copies);
  ModelWeights<Views>& w = bound.weights;
  const Config& c = config;
  const int H = c.hidden_size, V = c.vocab_size;
  const auto layer_prefix = [&](int i) { return (b.gguf() ? "blk." : "model.layers.") + std::to_string(i) + "."; };

  w.embed_tokens = b.matrix("", {"model.embed_tokens.weight", "token_embd.weight"}, V, H);
  w.layers.reserve(c.layer_types.size());
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    w.layers.push_back(detail::bind_layer(b, c, layer_prefix(i), c.layer_types[static_cast<std::size_t>(i)]));
    if (!b.gguf()) b.ignore(layer_prefix(i), {"self_attn.rotary_emb.inv_freq", ""});  // a table, in old saves
  }
  w.norm = detail::bind_norm(b, "", {"model.norm.weight", "output_norm.weight"}, H);

  constexpr TensorName head{"lm_head.weight", "output.weight"};
  config.tie_word_embeddings = !b.has("", head) || (!b.gguf() && c.tie_word_embeddings);
  if (c.tie_word_embeddings) {
    b.ignore("", head);  // a duplicate that transformers ignores, too
    w.lm_head = w.embed_tokens;
  } else {
    w.lm_head = b.matrix("", head, V, H);
  }

  if (!b.gguf()) config.has_mtp = has_mtp_tensors;
  if (c.has_mtp) w.mtp = detail::bind_mtp(b, c, w);
  b.finish();
  return bound;
}

// Adds to `bound` the MTP block of another checkpoint, whose tensors `records` are.  What they hold beside it, copies
// of what the model has, is checked and not used.
inline void bind_companion(Format format, const std::vector<TensorRecord>& records,
                           const std::vector<MappedFile>& files, const std::string& source, const Config& c,
                           BoundWeights& bound) {
  detail::refuse_foreign_tensors(records, source, format);
  for (const TensorRecord& record : records) {
    if (!detail::is_trunk_tensor(record.name)) continue;
    throw_error(source, ": has ", printable(record.name), ", so it is a whole model, expected its MTP block alone (",
                format == Format::gguf ? "blk.N.nextn.*" : "mtp.*", ")");
  }
  Binder b(format, records, files, source, bound.copies);
  bound.weights.mtp = detail::bind_mtp(b, c, bound.weights);
  const int H = c.hidden_size, V = c.vocab_size;
  constexpr TensorName embeddings{"model.embed_tokens.weight", "token_embd.weight"};
  constexpr TensorName head{"lm_head.weight", "output.weight"}, norm{"model.norm.weight", "output_norm.weight"};
  for (const TensorName& name : {embeddings, head}) {
    if (b.has("", name)) b.matrix("", name, V, H);
  }
  if (b.has("", norm)) {  // the model's own, were they made of one checkpoint
    const VectorView theirs = detail::bind_norm(b, "", norm, H), &ours = bound.weights.norm;
    for (int i = 0; i < H; ++i) {
      if (std::fabs(theirs.data[i] - ours.data[i]) <= 0.01f * std::fabs(ours.data[i]) + 1e-3f) continue;
      throw_error(source, ": its ", b.pick(norm), " is not the model's, so it belongs to another model");
    }
  }
  b.finish();
}

}  // namespace qwen3next
