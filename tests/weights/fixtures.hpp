#pragma once
// Small checkpoints made in memory, written as either container, and their views read back as floats.

#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "blocks/codec.hpp"
#include "blocks/weight_view.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"
#include "tests/support/temp_folder.hpp"
#include "weights/gguf_config.hpp"
#include "weights/gguf_writer.hpp"

namespace qwen3next::test {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;

inline void write_text(const fs::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  REQUIRE(file.good());
}

inline std::string read_text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The message of the Error that f throws; the test fails if it throws none or one of several lines.
template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    const std::string message = e.what();
    CHECK(message.find('\n') == std::string::npos);
    return message;
  }
  FAIL("no Error");
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) MESSAGE(text << " <- lacks: " << part);
  return found;
}

// ---- containers ----

struct Tensor {
  Shape shape;
  std::vector<float> values;
};
using Tensors = std::map<std::string, Tensor>;

inline std::string packed(DType type, const std::vector<float>& values) {
  std::string bytes(row_bytes(type, static_cast<std::int64_t>(values.size())), '\0');
  quantize_row(type, values.data(), reinterpret_cast<std::byte*>(bytes.data()),
               static_cast<std::int64_t>(values.size()));
  return bytes;
}

inline std::string raw_u64(std::uint64_t n) { return {reinterpret_cast<const char*>(&n), sizeof n}; }

inline std::string safetensors_text(const std::string& header, const std::string& data) {
  return raw_u64(header.size()) + header + data;
}

inline void write_safetensors(const fs::path& path, const Tensors& tensors, DType type) {
  json header;
  header["__metadata__"] = {{"format", "pt"}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t begin = data.size();
    data += packed(type, tensor.values);
    std::vector<std::int64_t> shape(tensor.shape.span().begin(), tensor.shape.span().end());
    header[name] = {{"dtype", info(type).name}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  write_text(path, safetensors_text(header.dump(), data));
}

// A tensor as it will lie in a file.
struct StoredTensor {
  std::string dtype;
  Shape shape;
  std::string bytes;
};
using StoredTensors = std::map<std::string, StoredTensor>;

inline void write_safetensors(const fs::path& path, const StoredTensors& tensors) {
  json header;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    std::vector<std::int64_t> shape(tensor.shape.span().begin(), tensor.shape.span().end());
    header[name] = {
        {"dtype", tensor.dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  write_text(path, safetensors_text(header.dump(), data));
}

inline void write_gguf(const fs::path& path, const Config& c, const Tensors& tensors, DType type = DType::f32) {
  GgufWriter out(path);
  set_gguf_config(out, c);
  for (const auto& [name, tensor] : tensors) out.add_tensor(name, tensor.shape, type);
  out.begin();
  for (const auto& [name, tensor] : tensors) {
    const std::string bytes = packed(type, tensor.values);
    out.write(std::as_bytes(std::span(bytes)));
  }
  out.finish();
}

// ---- a model ----

// Odd on purpose: three value heads per key head, Dk != Dv, a row width that no block divides.
inline Config small_config() {
  Config c;
  c.vocab_size = 50, c.hidden_size = 20, c.num_hidden_layers = 4, c.layer_types = interval_layer_types(4, 4);
  c.max_position_embeddings = 4096;
  c.num_attention_heads = 4, c.num_key_value_heads = 2, c.head_dim = 12, c.rope_theta = 1e6, c.rotary_dim = 6;
  c.linear_num_key_heads = 2, c.linear_num_value_heads = 6, c.linear_key_head_dim = 4, c.linear_value_head_dim = 5;
  c.linear_conv_kernel_dim = 3;
  c.num_experts = 3, c.num_experts_per_tok = 2, c.moe_intermediate_size = 7, c.shared_expert_intermediate_size = 9;
  c.has_mtp = true;
  return c;
}

inline json hf_config_json(const Config& c) {
  json types = json::array();
  for (LayerType t : c.layer_types)
    types.push_back(t == LayerType::full_attention ? "full_attention" : "linear_attention");
  return {{"model_type", "qwen3_next"},
          {"architectures", {"Qwen3NextForCausalLM"}},
          {"hidden_act", "silu"},
          {"attention_bias", false},
          {"mlp_only_layers", json::array()},
          {"decoder_sparse_step", 1},
          {"rope_scaling", nullptr},
          {"vocab_size", c.vocab_size},
          {"hidden_size", c.hidden_size},
          {"num_hidden_layers", c.num_hidden_layers},
          {"layer_types", types},
          {"rms_norm_eps", c.rms_norm_eps},
          {"max_position_embeddings", c.max_position_embeddings},
          {"tie_word_embeddings", c.tie_word_embeddings},
          {"num_attention_heads", c.num_attention_heads},
          {"num_key_value_heads", c.num_key_value_heads},
          {"head_dim", c.head_dim},
          {"rope_theta", c.rope_theta},
          {"partial_rotary_factor", static_cast<double>(c.rotary_dim) / c.head_dim},
          {"linear_num_key_heads", c.linear_num_key_heads},
          {"linear_num_value_heads", c.linear_num_value_heads},
          {"linear_key_head_dim", c.linear_key_head_dim},
          {"linear_value_head_dim", c.linear_value_head_dim},
          {"linear_conv_kernel_dim", c.linear_conv_kernel_dim},
          {"num_experts", c.num_experts},
          {"num_experts_per_tok", c.num_experts_per_tok},
          {"moe_intermediate_size", c.moe_intermediate_size},
          {"shared_expert_intermediate_size", c.shared_expert_intermediate_size},
          {"norm_topk_prob", c.norm_topk_prob}};
}

// Random tensors under Hugging Face's names, one per expert.
inline Tensors hf_tensors(const Config& c, unsigned seed = 1) {
  std::mt19937 rng(seed);
  Tensors all;
  const auto add = [&](const std::string& name, const Shape& shape) {
    Tensor t{shape, {}};
    for (std::int64_t i = *shape.elements(); i-- > 0;) t.values.push_back(static_cast<float>(rng() % 2048) / 512 - 2);
    all[name] = t;
  };
  const int H = c.hidden_size, Hv = c.linear_num_value_heads;
  const auto layer = [&](const std::string& p, bool full) {
    add(p + "input_layernorm.weight", {H});
    add(p + "post_attention_layernorm.weight", {H});
    if (full) {
      add(p + "self_attn.q_proj.weight", {2 * c.attention_dim(), H});
      add(p + "self_attn.k_proj.weight", {c.kv_dim(), H});
      add(p + "self_attn.v_proj.weight", {c.kv_dim(), H});
      add(p + "self_attn.o_proj.weight", {H, c.attention_dim()});
      add(p + "self_attn.q_norm.weight", {c.head_dim});
      add(p + "self_attn.k_norm.weight", {c.head_dim});
    } else {
      add(p + "linear_attn.in_proj_qkvz.weight", {2 * c.key_dim() + 2 * c.value_dim(), H});
      add(p + "linear_attn.in_proj_ba.weight", {2 * Hv, H});
      add(p + "linear_attn.conv1d.weight", {c.conv_dim(), 1, c.linear_conv_kernel_dim});
      add(p + "linear_attn.A_log", {Hv});
      add(p + "linear_attn.dt_bias", {Hv});
      add(p + "linear_attn.norm.weight", {c.linear_value_head_dim});
      add(p + "linear_attn.out_proj.weight", {H, c.value_dim()});
    }
    add(p + "mlp.gate.weight", {c.num_experts, H});
    const auto expert = [&](const std::string& e, int width) {
      add(e + "gate_proj.weight", {width, H});
      add(e + "up_proj.weight", {width, H});
      add(e + "down_proj.weight", {H, width});
    };
    for (int e = 0; e < c.num_experts; ++e) {
      expert(p + "mlp.experts." + std::to_string(e) + ".", c.moe_intermediate_size);
    }
    expert(p + "mlp.shared_expert.", c.shared_expert_intermediate_size);
    add(p + "mlp.shared_expert_gate.weight", {1, H});
  };
  add("model.embed_tokens.weight", {c.vocab_size, H});
  for (int i = 0; i < c.num_hidden_layers; ++i) layer("model.layers." + std::to_string(i) + ".", c.full_attention(i));
  add("model.norm.weight", {H});
  if (!c.tie_word_embeddings) add("lm_head.weight", {c.vocab_size, H});
  if (c.has_mtp) {
    add("mtp.fc.weight", {H, 2 * H});
    for (const char* norm : {"pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"}) {
      add(std::string("mtp.") + norm + ".weight", {H});
    }
    layer("mtp.layers.0.", true);
  }
  return all;
}

// Rows `which` of a matrix, copied one by one: what the strided views must agree with.
inline Tensor rows_of(const Tensor& t, const std::vector<int>& which) {
  const auto width = static_cast<std::ptrdiff_t>(t.shape[t.shape.rank - 1]);
  Tensor out{{static_cast<std::int64_t>(which.size()), width}, {}};
  for (const int r : which) {
    const auto row = t.values.begin() + r * width;
    out.values.insert(out.values.end(), row, row + width);
  }
  return out;
}

// Rows of in_proj_qkvz in the order all q, all k, all v, all z.
struct QkvzRows {
  std::vector<int> q, k, v, z;
};
inline QkvzRows qkvz_rows(const Config& c) {
  QkvzRows rows;
  int r = 0;
  const int Dk = c.linear_key_head_dim, V = c.value_dim() / c.linear_num_key_heads;
  for (int g = 0; g < c.linear_num_key_heads; ++g) {
    for (int i = 0; i < Dk; ++i) rows.q.push_back(r++);
    for (int i = 0; i < Dk; ++i) rows.k.push_back(r++);
    for (int i = 0; i < V; ++i) rows.v.push_back(r++);
    for (int i = 0; i < V; ++i) rows.z.push_back(r++);
  }
  return rows;
}
template <class T>
std::vector<T> joined(std::vector<T> a, const std::vector<T>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline void rename(Tensors& all, const std::string& from, const std::string& to, const Shape& shape) {
  auto node = all.extract(from);
  if (node.empty()) return;
  node.key() = to;
  node.mapped().shape = shape;
  all.insert(std::move(node));
}

// The experts of the layer `p` in two tensors.
inline void fuse_experts(Tensors& all, const Config& c, const std::string& p) {
  const int E = c.num_experts, H = c.hidden_size, I = c.moe_intermediate_size;
  Tensor gate_up{{E, 2 * I, H}, {}}, down{{E, H, I}, {}};
  for (int e = 0; e < E; ++e) {
    const std::string q = p + "mlp.experts." + std::to_string(e) + ".";
    const auto take = [&](const char* name, Tensor& into) {
      into.values = joined(std::move(into.values), all.at(q + name + "_proj.weight").values);
      all.erase(q + name + "_proj.weight");
    };
    take("gate", gate_up), take("up", gate_up), take("down", down);
  }
  all[p + "mlp.experts.gate_up_proj"] = gate_up;
  all[p + "mlp.experts.down_proj"] = down;
}

// The DeltaNet inputs of the layer `p` as later models of the family have them.
inline void split_inputs(Tensors& all, const Config& c, const std::string& p) {
  const QkvzRows rows = qkvz_rows(c);
  const Tensor qkvz = all.at(p + "linear_attn.in_proj_qkvz.weight"), ba = all.at(p + "linear_attn.in_proj_ba.weight");
  all.erase(p + "linear_attn.in_proj_qkvz.weight"), all.erase(p + "linear_attn.in_proj_ba.weight");
  all[p + "linear_attn.in_proj_qkv.weight"] = rows_of(qkvz, joined(joined(rows.q, rows.k), rows.v));
  all[p + "linear_attn.in_proj_z.weight"] = rows_of(qkvz, rows.z);
  std::vector<int> b, a;
  const int ratio = c.linear_num_value_heads / c.linear_num_key_heads;
  for (int r = 0; r < 2 * c.linear_num_value_heads; ++r) (r / ratio % 2 == 0 ? b : a).push_back(r);
  all[p + "linear_attn.in_proj_b.weight"] = rows_of(ba, b);
  all[p + "linear_attn.in_proj_a.weight"] = rows_of(ba, a);
}

// What llama.cpp's converter makes of hf_tensors.
inline Tensors gguf_tensors(const Config& c, Tensors all) {
  const int H = c.hidden_size, E = c.num_experts, I = c.moe_intermediate_size, K = c.linear_conv_kernel_dim;
  for (auto& [name, tensor] : all) {
    const bool norm = name.ends_with("norm.weight") || name.find("pre_fc_norm") != name.npos;
    for (float& x : tensor.values) {
      if (norm && !name.ends_with("linear_attn.norm.weight")) x += 1;
      if (name.ends_with("A_log")) x = -std::exp(x);
    }
  }
  const auto keep = [&](const std::string& from, const std::string& to) {
    if (all.contains(from)) rename(all, from, to, all.at(from).shape);
  };
  const auto layer = [&](const std::string& p, const std::string& g) {
    keep(p + "input_layernorm.weight", g + "attn_norm.weight");
    keep(p + "post_attention_layernorm.weight", g + "post_attention_norm.weight");
    for (const auto& [from, to] : {std::pair("q_proj", "attn_q"),
                                   {"k_proj", "attn_k"},
                                   {"v_proj", "attn_v"},
                                   {"o_proj", "attn_output"},
                                   {"q_norm", "attn_q_norm"},
                                   {"k_norm", "attn_k_norm"}}) {
      keep(p + "self_attn." + from + ".weight", g + to + ".weight");
    }
    if (all.contains(p + "linear_attn.A_log")) {
      const QkvzRows rows = qkvz_rows(c);
      const Tensor& qkvz = all.at(p + "linear_attn.in_proj_qkvz.weight");
      all[g + "attn_qkv.weight"] = rows_of(qkvz, joined(joined(rows.q, rows.k), rows.v));
      all[g + "attn_gate.weight"] = rows_of(qkvz, rows.z);
      all.erase(p + "linear_attn.in_proj_qkvz.weight");
      keep(p + "linear_attn.in_proj_ba.weight", g + "ssm_ba.weight");
      rename(all, p + "linear_attn.conv1d.weight", g + "ssm_conv1d.weight", {c.conv_dim(), K});
      keep(p + "linear_attn.A_log", g + "ssm_a");
      keep(p + "linear_attn.dt_bias", g + "ssm_dt.bias");
      keep(p + "linear_attn.norm.weight", g + "ssm_norm.weight");
      keep(p + "linear_attn.out_proj.weight", g + "ssm_out.weight");
    }
    keep(p + "mlp.gate.weight", g + "ffn_gate_inp.weight");
    for (const std::string kind : {"gate", "up", "down"}) {
      const bool down = kind == "down";
      Tensor stack{down ? Shape{E, H, I} : Shape{E, I, H}, {}};
      for (int e = 0; e < E; ++e) {
        const std::string name = p + "mlp.experts." + std::to_string(e) + "." + kind + "_proj.weight";
        stack.values = joined(std::move(stack.values), all.at(name).values);
        all.erase(name);
      }
      all[g + "ffn_" + kind + "_exps.weight"] = stack;
      keep(p + "mlp.shared_expert." + kind + "_proj.weight", g + "ffn_" + kind + "_shexp.weight");
    }
    rename(all, p + "mlp.shared_expert_gate.weight", g + "ffn_gate_inp_shexp.weight", {H});
  };
  keep("model.embed_tokens.weight", "token_embd.weight");
  keep("lm_head.weight", "output.weight");
  keep("model.norm.weight", "output_norm.weight");
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    layer("model.layers." + std::to_string(i) + ".", "blk." + std::to_string(i) + ".");
  }
  if (c.has_mtp) {
    const std::string g = "blk." + std::to_string(c.num_hidden_layers) + ".";
    layer("mtp.layers.0.", g);
    keep("mtp.fc.weight", g + "nextn.eh_proj.weight");
    keep("mtp.pre_fc_norm_embedding.weight", g + "nextn.enorm.weight");
    keep("mtp.pre_fc_norm_hidden.weight", g + "nextn.hnorm.weight");
    keep("mtp.norm.weight", g + "nextn.shared_head_norm.weight");
  }
  return all;
}

// A folder as a release has it.
inline void write_hf(const fs::path& folder, const Config& c, const Tensors& tensors, DType type = DType::f32) {
  fs::create_directories(folder);
  write_text(folder / "config.json", hf_config_json(c).dump(2));
  write_safetensors(folder / "model.safetensors", tensors, type);
}

// ---- views ----

inline std::vector<float> floats(const WeightView& w) {
  std::vector<float> out(static_cast<std::size_t>(w.rows) * static_cast<std::size_t>(w.cols));
  for (int r = 0; r < w.rows; ++r) {
    dequantize(w, r, out.data() + static_cast<std::ptrdiff_t>(r) * w.cols);
  }
  return out;
}
inline std::vector<float> floats(const VectorView& v) { return {v.data, v.data + v.size}; }
inline std::vector<float> floats(const ExpertViews& experts) {
  std::vector<float> out;
  for (const ExpertView& e : experts) {
    for (const WeightView* w : {&e.gate, &e.up, &e.down}) out = joined(std::move(out), floats(*w));
  }
  return out;
}

// A "backend" whose weights are floats in the model's own order.
struct Floats {
  using Weight = std::vector<float>;
  using Vector = std::vector<float>;
  using Experts = std::vector<float>;
};

// Every value of the model, in the order of model/weights.hpp.
inline std::vector<std::vector<float>> all_values(const ModelWeights<Views>& weights) {
  std::vector<std::vector<float>> values;
  ModelWeights<Floats> out;
  zip(weights, out, [&](const auto& from, std::vector<float>&) { values.push_back(floats(from)); });
  return values;
}

inline bool same_config(const Config& a, const Config& b) {
  const auto key = [](const Config& c) {
    json j = hf_config_json(c);
    j["rotary_dim"] = c.rotary_dim, j["mtp"] = c.has_mtp;
    if (c.yarn) {
      j["yarn"] = {c.yarn->factor, c.yarn->original_max_position_embeddings, c.yarn->beta_fast, c.yarn->beta_slow,
                   c.yarn->attention_factor.value_or(-1)};
    }
    return j;
  };
  const bool same = key(a) == key(b);
  if (!same) MESSAGE(key(a).dump() << " is not " << key(b).dump());
  return same;
}

}  // namespace qwen3next::test
