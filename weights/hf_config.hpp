#pragma once
// config.json of a Hugging Face folder -> Config.  Defaults are those of transformers' Qwen3NextConfig.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "blocks/weight_view.hpp"
#include "core/json.hpp"
#include "model/config.hpp"
#include "weights/mapped_file.hpp"

namespace qwen3next {

namespace detail {

// Typed look-ups in one JSON object; null counts as absent.
class JsonFields {
 public:
  JsonFields(const Json& object, std::string_view source) : object_(object), source_(source) {}

  const Json* find(std::string_view key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  std::int64_t integer(std::string_view key, std::int64_t otherwise) const {
    const Json* value = find(key);
    if (!value) return otherwise;
    if (!value->is_number_integer()) wrong(key, *value, "an integer");
    if (value->is_number_unsigned() && value->get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max()) {
      throw_error(source_, ": ", key, " is ", value->get<std::uint64_t>(), ", which no model has");
    }
    return value->get<std::int64_t>();
  }

  // For the fields of Config that are int; their bounds are Config::validate's.
  int small(std::string_view key, int otherwise) const {
    const std::int64_t value = integer(key, otherwise);
    if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
      throw_error(source_, ": ", key, " is ", value, ", which no model has");
    }
    return static_cast<int>(value);
  }

  std::optional<double> number(std::string_view key) const {
    const Json* value = find(key);
    if (!value) return {};
    if (!value->is_number()) wrong(key, *value, "a number");
    return value->get<double>();
  }

  bool boolean(std::string_view key, bool otherwise) const {
    const Json* value = find(key);
    if (!value) return otherwise;
    if (!value->is_boolean()) wrong(key, *value, "true or false");
    return value->get<bool>();
  }

  std::string string(std::string_view key, std::string_view otherwise) const {
    const Json* value = find(key);
    if (!value) return std::string(otherwise);
    if (!value->is_string()) wrong(key, *value, "a string");
    return value->get<std::string>();
  }

  [[noreturn]] void wrong(std::string_view key, const Json& found, std::string_view expected) const {
    throw_error(source_, ": ", key, " is ", json_kind(found), ", expected ", expected);
  }

 private:
  const Json& object_;
  std::string_view source_;
};

// quantization_config: FP8 as Qwen releases it.  Which tensors are, the tensors say.
inline void expect_fp8_blocks(const JsonFields& all, const Json& quantization, std::string_view source) {
  if (!quantization.is_object()) all.wrong("quantization_config", quantization, "an object");
  const JsonFields fields(quantization, source);
  const auto refuse = [&](std::string_view key, std::string_view found, std::string_view expected) {
    throw_error(source, ": quantization_config has ", key, " ", found, ", expected ", expected,
                "; use the BF16 or FP8 release, or a GGUF");
  };
  const auto text = [&](std::string_view key, std::string_view otherwise, std::string_view expected) {
    const std::string found = fields.string(key, otherwise);
    if (found != expected) refuse(key, concat("'", printable(found, 40), "'"), concat("'", expected, "'"));
  };
  text("quant_method", "", "fp8");
  text("fmt", "e4m3", "e4m3");
  text("activation_scheme", "dynamic", "dynamic");  // static: scales of activations, which are not used here
  const auto size = quantization.find("weight_block_size");
  if (size != quantization.end() && *size != Json::array({ScaleGrid::block, ScaleGrid::block})) {
    refuse("weight_block_size", printable(size->dump(-1, ' ', true, Json::error_handler_t::replace), 40), "[128,128]");
  }
}

// What Hugging Face's config can ask for and this runtime does not do.
inline void refuse_foreign_hf_config(const JsonFields& fields, std::string_view source) {
  const std::string type = fields.string("model_type", "");
  if (type != "qwen3_next") {
    throw_error(source, ": model_type is '", printable(type), "', expected 'qwen3_next': this program runs ",
                "Qwen3-Next only");
  }
  if (const Json* quantization = fields.find("quantization_config")) expect_fp8_blocks(fields, *quantization, source);
  if (fields.find("quantization")) {
    throw_error(source, ": an MLX conversion (it has \"quantization\"), which is laid out differently; use the ",
                "original Hugging Face folder or a GGUF");
  }
  if (const std::string act = fields.string("hidden_act", "silu"); act != "silu") {
    throw_error(source, ": hidden_act is '", printable(act), "', expected 'silu'");
  }
  if (fields.boolean("attention_bias", false)) {
    throw_error(source, ": attention_bias is true, expected false: no Qwen3-Next has attention biases");
  }
  if (const Json* dense = fields.find("mlp_only_layers"); dense && !(dense->is_array() && dense->empty())) {
    throw_error(source, ": mlp_only_layers is not empty; layers without experts are not supported");
  }
  if (const std::int64_t step = fields.integer("decoder_sparse_step", 1); step != 1) {
    throw_error(source, ": decoder_sparse_step is ", step, ", expected 1; layers without experts are not supported");
  }
}

// `all` is the whole config, `rope` the object with rope_type, factor, ...
inline std::optional<YarnScaling> read_yarn(const JsonFields& all, const JsonFields& rope, std::string_view source) {
  const std::string type = rope.string("rope_type", rope.string("type", "default"));
  if (type == "default") return {};
  if (type != "yarn") {
    throw_error(source, ": rope_type is '", printable(type), "', expected 'default' or 'yarn'");
  }
  if (!rope.boolean("truncate", true)) throw_error(source, ": rope_scaling with truncate false is not supported");
  YarnScaling yarn;
  const std::int64_t length = all.integer("max_position_embeddings", 32768);
  yarn.original_max_position_embeddings =
      all.integer("original_max_position_embeddings", rope.integer("original_max_position_embeddings", length));
  yarn.factor = rope.number("factor").value_or(static_cast<double>(length) /
                                               static_cast<double>(yarn.original_max_position_embeddings));
  const auto unless_zero = [](std::optional<double> value, double otherwise) {  // Python's `or`
    return value && *value != 0 ? *value : otherwise;
  };
  yarn.beta_fast = unless_zero(rope.number("beta_fast"), 32);
  yarn.beta_slow = unless_zero(rope.number("beta_slow"), 1);
  yarn.attention_factor = rope.number("attention_factor");
  const double mscale = unless_zero(rope.number("mscale"), 0), all_dim = unless_zero(rope.number("mscale_all_dim"), 0);
  if (!yarn.attention_factor && mscale != 0 && all_dim != 0 && yarn.factor > 1) {
    const double log = 0.1 * std::log(yarn.factor);
    yarn.attention_factor = (mscale * log + 1) / (all_dim * log + 1);
  }
  if (yarn.attention_factor && !(*yarn.attention_factor > 0 && *yarn.attention_factor < 1024)) {
    throw_error(source, ": the attention_factor of rope_scaling is ", *yarn.attention_factor, ", expected 0..1024");
  }
  return yarn;
}

}  // namespace detail

// `json` is the text of config.json, `source` its name in errors.
inline Config read_hf_config(std::string_view json, std::string_view source) {
  const Json document = read_json(json, source);
  if (!document.is_object()) throw_error(source, ": is ", json_kind(document), ", expected an object");
  const detail::JsonFields fields(document, source);
  detail::refuse_foreign_hf_config(fields, source);

  Config c;
  c.vocab_size = fields.small("vocab_size", 151936);
  c.hidden_size = fields.small("hidden_size", 2048);
  c.num_hidden_layers = fields.small("num_hidden_layers", 48);
  c.rms_norm_eps = fields.number("rms_norm_eps").value_or(1e-6);
  c.max_position_embeddings = fields.integer("max_position_embeddings", 32768);
  c.tie_word_embeddings = fields.boolean("tie_word_embeddings", false);
  c.num_attention_heads = fields.small("num_attention_heads", 16);
  c.num_key_value_heads = fields.small("num_key_value_heads", 2);
  c.head_dim = fields.small("head_dim", 256);
  c.linear_num_key_heads = fields.small("linear_num_key_heads", 16);
  c.linear_num_value_heads = fields.small("linear_num_value_heads", 32);
  c.linear_key_head_dim = fields.small("linear_key_head_dim", 128);
  c.linear_value_head_dim = fields.small("linear_value_head_dim", 128);
  c.linear_conv_kernel_dim = fields.small("linear_conv_kernel_dim", 4);
  c.num_experts = fields.small("num_experts", 512);
  c.num_experts_per_tok = fields.small("num_experts_per_tok", 10);
  c.moe_intermediate_size = fields.small("moe_intermediate_size", 512);
  c.shared_expert_intermediate_size = fields.small("shared_expert_intermediate_size", 512);
  c.norm_topk_prob = fields.boolean("norm_topk_prob", true);

  if (const Json* types = fields.find("layer_types")) {
    if (!types->is_array()) fields.wrong("layer_types", *types, "an array");
    for (const Json& type : *types) {
      const bool full = type == "full_attention";
      if (!full && type != "linear_attention") {
        throw_error(source, ": layer_types has ",
                    printable(type.dump(-1, ' ', true, Json::error_handler_t::replace), 60),
                    ", expected \"linear_attention\" or \"full_attention\"");
      }
      c.layer_types.push_back(full ? LayerType::full_attention : LayerType::linear_attention);
    }
  } else {
    const int interval = fields.small("full_attention_interval", 4);
    if (interval < 1 || c.num_hidden_layers < 1 || c.num_hidden_layers > 4096) {
      throw_error(source, ": full_attention_interval is ", interval, " and num_hidden_layers ", c.num_hidden_layers,
                  ", expected both from 1, layers to 4096");
    }
    c.layer_types = interval_layer_types(c.num_hidden_layers, std::min(interval, c.num_hidden_layers + 1));
  }

  // Old files have rope_theta, partial_rotary_factor and rope_scaling at top level; newer ones all in rope_parameters,
  // which may in turn be one object per layer type.
  static const Json nothing = Json::object();
  const Json* scaling = &nothing;
  for (const std::string_view key : {"rope_parameters", "rope_scaling"}) {  // the later wins
    if (const Json* value = fields.find(key)) {
      if (!value->is_object()) fields.wrong(key, *value, "an object");
      if (!value->empty()) scaling = value;
    }
  }
  if (const Json* nested = detail::JsonFields(*scaling, source).find("full_attention")) {
    if (!nested->is_object()) fields.wrong("rope_parameters.full_attention", *nested, "an object");
    scaling = nested;
  }
  const detail::JsonFields rope(*scaling, source);
  c.rope_theta = rope.number("rope_theta").value_or(fields.number("rope_theta").value_or(10000));
  const double partial =
      rope.number("partial_rotary_factor").value_or(fields.number("partial_rotary_factor").value_or(0.25));
  if (!(partial >= 0 && partial <= 1)) throw_error(source, ": partial_rotary_factor is ", partial, ", expected 0..1");
  c.rotary_dim = static_cast<int>(c.head_dim * partial);
  c.yarn = detail::read_yarn(fields, rope, source);

  c.validate(source);
  return c;
}

inline Config read_hf_config(const std::filesystem::path& folder) {
  const MappedFile file = MappedFile::open(folder / "config.json");
  if (file.size() > (1u << 24)) throw_error(file.name(), ": ", file.size(), " bytes are too many for a config.json");
  return read_hf_config(file.text(), file.name());
}

}  // namespace qwen3next
