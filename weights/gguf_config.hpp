#pragma once
// GGUF metadata <-> Config.  Keys are those that llama.cpp reads for the architecture "qwen3next".

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "model/config.hpp"
#include "weights/gguf.hpp"
#include "weights/gguf_writer.hpp"

namespace qwen3next {

inline constexpr std::string_view gguf_architecture = "qwen3next";

namespace detail {

inline void refuse_foreign_gguf(const GgufMetadata& metadata) {
  const std::string& source = metadata.source();
  const auto type = metadata.find<std::string_view>("general.type").value_or("model");
  if (type != "model") {
    throw_error(source, ": general.type is '", printable(type), "', expected 'model': this file holds no model");
  }
  const auto architecture = metadata.get<std::string_view>("general.architecture");
  if (metadata.find<bool>(concat(architecture, ".ssm.v_head_reordered")).value_or(false)) {
    throw_error(source, ": its value heads are reordered (ssm.v_head_reordered, an Ollama conversion); use a GGUF ",
                "that llama.cpp converted as 'qwen3next', or the Hugging Face folder");
  }
  if (architecture == "qwen35moe" || architecture == "qwen35") {
    throw_error(source, ": architecture '", architecture, "' orders its value heads differently (Qwen3.5, or an ",
                "Ollama conversion of Qwen3-Next); use a GGUF that llama.cpp converted as 'qwen3next', or the ",
                "Hugging Face folder");
  }
  if (architecture != gguf_architecture) {
    throw_error(source, ": architecture is '", printable(architecture), "', expected '", gguf_architecture,
                "': this program runs Qwen3-Next only");
  }
}

// The metadata of one architecture, by key without prefix.
class GgufFields {
 public:
  explicit GgufFields(const GgufMetadata& metadata) : metadata_(metadata) {}

  static std::string full(std::string_view key) { return concat(gguf_architecture, ".", key); }

  template <class T>
  std::optional<T> find(std::string_view key) const {
    return metadata_.find<T>(full(key));
  }
  bool is_array(std::string_view key) const {
    const GgufKv* kv = metadata_.find_kv(full(key));
    return kv && kv->type == GgufType::array;
  }
  int small(std::string_view key) const { return fit(key, metadata_.get<std::int64_t>(full(key))); }
  int small(std::string_view key, int otherwise) const { return fit(key, find<std::int64_t>(key).value_or(otherwise)); }
  int fit(std::string_view key, std::int64_t value) const {
    if (value < 0 || value > std::numeric_limits<int>::max()) {
      throw_error(metadata_.source(), ": metadata key ", full(key), " is ", value, ", which no model has");
    }
    return static_cast<int>(value);
  }

 private:
  const GgufMetadata& metadata_;
};

// A head count may be one number, or one per layer with 0 for layers without attention.
inline int gguf_head_count(const GgufFields& fields, std::string_view key, const Config& c, std::string_view source) {
  if (!fields.is_array(key)) return fields.small(key);
  const auto counts = *fields.find<std::vector<std::int64_t>>(key);
  if (counts.size() < c.layer_types.size()) {
    throw_error(source, ": metadata key ", GgufFields::full(key), " has ", counts.size(), " elements, expected ",
                c.layer_types.size());
  }
  std::int64_t count = 0;
  for (std::size_t i = 0; i < c.layer_types.size(); ++i) {
    if (c.layer_types[i] != LayerType::full_attention) continue;
    if (count != 0 && counts[i] != count) {
      throw_error(source, ": metadata key ", GgufFields::full(key), " differs between layers, which is not supported");
    }
    count = counts[i];
  }
  return count == 0 ? 1 : fields.fit(key, count);  // 0: no attention layers
}

inline std::vector<LayerType> gguf_layer_types(const GgufFields& fields, int layers, std::string_view source) {
  if (const auto recurrent = fields.find<std::vector<std::int64_t>>("attention.recurrent_layers")) {
    if (recurrent->size() < static_cast<std::size_t>(layers)) {
      throw_error(source, ": metadata key ", GgufFields::full("attention.recurrent_layers"), " has ", recurrent->size(),
                  " elements, expected one for each of ", layers, " layers");
    }
    std::vector<LayerType> types;
    for (int i = 0; i < layers; ++i) {
      const bool linear = (*recurrent)[static_cast<std::size_t>(i)] != 0;
      types.push_back(linear ? LayerType::linear_attention : LayerType::full_attention);
    }
    return types;
  }
  const int interval = fields.small("full_attention_interval", 4);
  if (interval < 1) throw_error(source, ": full_attention_interval is ", interval, ", expected at least 1");
  return interval_layer_types(layers, std::min(interval, layers + 1));
}

inline std::optional<YarnScaling> gguf_yarn(const GgufFields& fields, const Config& c, std::string_view source) {
  const auto type = fields.find<std::string_view>("rope.scaling.type").value_or("none");
  if (type == "none") return {};
  if (type != "yarn") throw_error(source, ": rope.scaling.type is '", printable(type), "', expected 'yarn'");
  YarnScaling yarn;
  yarn.original_max_position_embeddings =
      fields.find<std::int64_t>("rope.scaling.original_context_length").value_or(c.max_position_embeddings);
  yarn.factor = fields.find<double>("rope.scaling.factor").value_or(1);
  yarn.beta_fast = fields.find<double>("rope.scaling.yarn_beta_fast").value_or(32);
  yarn.beta_slow = fields.find<double>("rope.scaling.yarn_beta_slow").value_or(1);
  // yarn_attn_factor is Hugging Face's attention_factor, as the converter copies it; attn_factor is what llama.cpp
  // multiplies the usual factor with.
  yarn.attention_factor = fields.find<double>("rope.scaling.yarn_attn_factor");
  if (const auto factor = fields.find<double>("rope.scaling.attn_factor"); factor && !yarn.attention_factor) {
    yarn.attention_factor = *factor * (0.1 * std::log(std::max(yarn.factor, 1.0)) + 1);
  }
  if (yarn.attention_factor && !(*yarn.attention_factor > 0 && *yarn.attention_factor < 1024)) {
    throw_error(source, ": the attention factor of rope.scaling is ", *yarn.attention_factor, ", expected 0..1024");
  }
  return yarn;
}

}  // namespace detail

// The shape that the metadata describes.  `has_mtp` is what it promises; whether the embeddings are tied, only the
// tensors say.
inline Config read_gguf_config(const Gguf& gguf) {
  const GgufMetadata& metadata = gguf.metadata;
  const std::string& source = metadata.source();
  detail::refuse_foreign_gguf(metadata);
  const detail::GgufFields fields(metadata);

  Config c;
  const int blocks = fields.small("block_count"), mtp_blocks = fields.small("nextn_predict_layers", 0);
  if (mtp_blocks > 1) throw_error(source, ": ", mtp_blocks, " MTP blocks, expected at most 1");
  c.has_mtp = mtp_blocks == 1;
  c.num_hidden_layers = blocks - mtp_blocks;
  if (c.num_hidden_layers < 1 || c.num_hidden_layers > 4096) {
    throw_error(source, ": block_count is ", blocks, ", expected 1..4096 beside the MTP block");
  }
  c.layer_types = detail::gguf_layer_types(fields, c.num_hidden_layers, source);
  c.hidden_size = fields.small("embedding_length");
  const auto embeddings = std::find_if(gguf.records.begin(), gguf.records.end(),
                                       [](const TensorRecord& r) { return r.name == "token_embd.weight"; });
  if (embeddings == gguf.records.end() || embeddings->shape.rank != 2) {
    throw_error(source, ": no matrix token_embd.weight, so the size of the vocabulary is unknown");
  }
  c.vocab_size = fields.fit("vocab_size", embeddings->shape[0]);
  c.rms_norm_eps = metadata.get<double>(fields.full("attention.layer_norm_rms_epsilon"));
  c.max_position_embeddings = metadata.get<std::int64_t>(fields.full("context_length"));

  c.num_attention_heads = detail::gguf_head_count(fields, "attention.head_count", c, source);
  c.num_key_value_heads = detail::gguf_head_count(fields, "attention.head_count_kv", c, source);
  c.head_dim = fields.small("attention.key_length");
  if (const int value = fields.small("attention.value_length", c.head_dim); value != c.head_dim) {
    throw_error(source, ": attention.value_length is ", value, ", expected key_length = ", c.head_dim);
  }
  c.rope_theta = metadata.get<double>(fields.full("rope.freq_base"));
  c.rotary_dim = fields.small("rope.dimension_count");
  c.yarn = detail::gguf_yarn(fields, c, source);

  c.linear_num_key_heads = fields.small("ssm.group_count");
  c.linear_num_value_heads = fields.small("ssm.time_step_rank");
  c.linear_key_head_dim = fields.small("ssm.state_size");
  c.linear_conv_kernel_dim = fields.small("ssm.conv_kernel");
  const int inner = fields.small("ssm.inner_size");
  if (c.linear_num_value_heads == 0 || inner % c.linear_num_value_heads != 0) {
    throw_error(source, ": ssm.inner_size is ", inner,
                ", expected a multiple of ssm.time_step_rank = ", c.linear_num_value_heads);
  }
  c.linear_value_head_dim = inner / c.linear_num_value_heads;

  c.num_experts = fields.small("expert_count");
  c.num_experts_per_tok = fields.small("expert_used_count");
  c.moe_intermediate_size = fields.small("expert_feed_forward_length");
  c.shared_expert_intermediate_size = fields.small("expert_shared_feed_forward_length", c.moe_intermediate_size);
  c.norm_topk_prob = fields.find<bool>("expert_weights_norm").value_or(true);

  c.validate(source);
  return c;
}

// The keys that read_gguf_config and llama.cpp read, and general.architecture.
inline void set_gguf_config(GgufWriter& out, const Config& c) {
  const auto key = [](std::string_view name) { return detail::GgufFields::full(name); };
  const auto u32 = [&](std::string_view name, std::int64_t value) {
    out.set_u32(key(name), static_cast<std::uint32_t>(value));
  };
  const auto f32 = [&](std::string_view name, double value) { out.set_f32(key(name), static_cast<float>(value)); };

  out.set_string("general.architecture", gguf_architecture);
  u32("block_count", c.num_hidden_layers + (c.has_mtp ? 1 : 0));
  u32("context_length", c.max_position_embeddings);
  u32("embedding_length", c.hidden_size);
  u32("attention.head_count", c.num_attention_heads);
  u32("attention.head_count_kv", c.num_key_value_heads);
  u32("attention.key_length", c.head_dim);
  u32("attention.value_length", c.head_dim);
  f32("attention.layer_norm_rms_epsilon", c.rms_norm_eps);
  f32("rope.freq_base", c.rope_theta);
  u32("rope.dimension_count", c.rotary_dim);
  if (c.yarn) {
    out.set_string(key("rope.scaling.type"), "yarn");
    f32("rope.scaling.factor", c.yarn->factor);
    u32("rope.scaling.original_context_length", c.yarn->original_max_position_embeddings);
    f32("rope.scaling.yarn_beta_fast", c.yarn->beta_fast);
    f32("rope.scaling.yarn_beta_slow", c.yarn->beta_slow);
    if (c.yarn->attention_factor) {
      f32("rope.scaling.yarn_attn_factor", *c.yarn->attention_factor);
      f32("rope.scaling.attn_factor",  // llama.cpp's: of the usual factor
          *c.yarn->attention_factor / (0.1 * std::log(std::max(c.yarn->factor, 1.0)) + 1));
    }
  }
  u32("expert_count", c.num_experts);
  u32("expert_used_count", c.num_experts_per_tok);
  u32("expert_feed_forward_length", c.moe_intermediate_size);
  u32("expert_shared_feed_forward_length", c.shared_expert_intermediate_size);
  if (!c.norm_topk_prob) out.set_bool(key("expert_weights_norm"), false);
  u32("ssm.conv_kernel", c.linear_conv_kernel_dim);
  u32("ssm.state_size", c.linear_key_head_dim);
  u32("ssm.group_count", c.linear_num_key_heads);
  u32("ssm.time_step_rank", c.linear_num_value_heads);
  u32("ssm.inner_size", c.value_dim());
  if (c.has_mtp) u32("nextn_predict_layers", 1);

  // The interval where one describes the layers; it has to be at most their number to leave a trace in them.
  for (int interval = 1; interval <= c.num_hidden_layers + 1; ++interval) {
    if (interval_layer_types(c.num_hidden_layers, interval) == c.layer_types) {
      u32("full_attention_interval", interval);
      return;
    }
  }
  std::vector<bool> recurrent;
  for (const LayerType type : c.layer_types) recurrent.push_back(type == LayerType::linear_attention);
  if (c.has_mtp) recurrent.push_back(false);
  out.set_bools(key("attention.recurrent_layers"), recurrent);
}

}  // namespace qwen3next
