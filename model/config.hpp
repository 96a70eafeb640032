#pragma once
// The shape of a Qwen3-Next model.  Names are those of Hugging Face's config.json.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.hpp"

namespace qwen3next {

// What mixes the tokens of a layer: a Gated DeltaNet or gated attention.
enum class LayerType : std::uint8_t { linear_attention, full_attention };

// YaRN context extension, arXiv:2309.00071; static, as Hugging Face applies it.
struct YarnScaling {
  double factor = 1;
  std::int64_t original_max_position_embeddings = 262144;
  double beta_fast = 32;
  double beta_slow = 1;
  std::optional<double> attention_factor{};  // of cos and sin; 0.1 ln(factor) + 1 unless given
};

// A model's shape, by the names of config.json.  Defaults are Qwen3-Next-80B-A3B's.
struct Config {
  int vocab_size = 151936;
  int hidden_size = 2048;
  int num_hidden_layers = 48;
  std::vector<LayerType> layer_types;  // one per layer
  double rms_norm_eps = 1e-6;
  std::int64_t max_position_embeddings = 262144;
  bool tie_word_embeddings = false;

  // Gated attention.
  int num_attention_heads = 16;
  int num_key_value_heads = 2;
  int head_dim = 256;
  double rope_theta = 1e7;
  int rotary_dim = 64;  // head_dim * partial_rotary_factor
  std::optional<YarnScaling> yarn{};

  // Gated DeltaNet.
  int linear_num_key_heads = 16;
  int linear_num_value_heads = 32;
  int linear_key_head_dim = 128;
  int linear_value_head_dim = 128;
  int linear_conv_kernel_dim = 4;

  // Mixture of experts.
  int num_experts = 512;
  int num_experts_per_tok = 10;
  int moe_intermediate_size = 512;
  int shared_expert_intermediate_size = 512;
  bool norm_topk_prob = true;

  bool has_mtp = false;  // not in config.json: the tensors say so

  // Widths [floats per token] of what the layers pass on: keys, values, the convolution's channels, queries of
  // attention, pairs of dims that rotary embedding turns, keys or values of attention.
  int key_dim() const noexcept { return linear_num_key_heads * linear_key_head_dim; }
  int value_dim() const noexcept { return linear_num_value_heads * linear_value_head_dim; }
  int conv_dim() const noexcept { return 2 * key_dim() + value_dim(); }
  int attention_dim() const noexcept { return num_attention_heads * head_dim; }
  int rotary_pairs() const noexcept { return (rotary_dim + 1) / 2; }  // dims i and i + pairs of a head turn together
  int kv_dim() const noexcept { return num_key_value_heads * head_dim; }

  // Whether layer 0..num_hidden_layers-1 is one of gated attention.
  bool full_attention(int layer) const noexcept {
    return layer_types[static_cast<std::size_t>(layer)] == LayerType::full_attention;
  }

  // Throws Error naming the first value that no Qwen3-Next can have.  Every size is bounded, so that products of any
  // three dimensions fit 64 bits and row counts fit an int.
  void validate(std::string_view source) const;

  // YaRN to `factor` times the length that the model was trained on, in place of what the files say.  Throws Error
  // unless it is 1..1024.
  void extend_context(double factor);

  // So many routed experts of a token instead of the model's.  Throws Error unless it is 1 to the model's number.
  void use_experts(int count) {
    if (count < 1 || count > num_experts_per_tok) {
      throw Error("experts_used is " + std::to_string(count) + ", expected 1.." + std::to_string(num_experts_per_tok) +
                  ", as many as this model was made for");
    }
    num_experts_per_tok = count;
  }
};

// Every `interval`-th layer attends fully, the others are Gated DeltaNets.
inline std::vector<LayerType> interval_layer_types(int layers, int interval) {
  std::vector<LayerType> types(static_cast<std::size_t>(layers), LayerType::linear_attention);
  for (int i = interval - 1; i < layers; i += interval) types[static_cast<std::size_t>(i)] = LayerType::full_attention;
  return types;
}

inline void Config::validate(std::string_view source) const {
  auto fail = [&](std::string_view field, auto value, std::string_view expected) {
    throw Error(std::string(source) + ": " + std::string(field) + " is " + std::to_string(value) + ", expected " +
                std::string(expected));
  };
  auto in_range = [&](std::string_view field, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high) fail(field, value, std::to_string(low) + ".." + std::to_string(high));
  };
  auto multiple = [&](std::string_view field, int value, std::string_view of, int divisor) {
    if (value % divisor != 0) fail(field, value, "a multiple of " + std::string(of) + " = " + std::to_string(divisor));
  };
  constexpr int wide = 1 << 20;
  in_range("vocab_size", vocab_size, 1, 1 << 24);
  in_range("hidden_size", hidden_size, 1, wide);
  in_range("num_hidden_layers", num_hidden_layers, 1, 4096);
  in_range("number of layer_types", static_cast<std::int64_t>(layer_types.size()), num_hidden_layers,
           num_hidden_layers);
  in_range("max_position_embeddings", max_position_embeddings, 1, std::int64_t{1} << 30);
  in_range("num_attention_heads", num_attention_heads, 1, 4096);
  in_range("num_key_value_heads", num_key_value_heads, 1, num_attention_heads);
  multiple("num_attention_heads", num_attention_heads, "num_key_value_heads", num_key_value_heads);
  in_range("head_dim", head_dim, 1, 4096);
  in_range("rotary dimensions (head_dim * partial_rotary_factor)", rotary_dim, 0, head_dim - head_dim % 2);
  in_range("linear_num_key_heads", linear_num_key_heads, 1, 4096);
  in_range("linear_num_value_heads", linear_num_value_heads, 1, 4096);
  multiple("linear_num_value_heads", linear_num_value_heads, "linear_num_key_heads", linear_num_key_heads);
  in_range("linear_key_head_dim", linear_key_head_dim, 1, 4096);
  in_range("linear_value_head_dim", linear_value_head_dim, 1, 4096);
  in_range("linear_conv_kernel_dim", linear_conv_kernel_dim, 1, 64);
  in_range("num_experts", num_experts, 1, 1 << 16);
  in_range("num_experts_per_tok", num_experts_per_tok, 1, num_experts);
  in_range("moe_intermediate_size", moe_intermediate_size, 1, wide);
  in_range("shared_expert_intermediate_size", shared_expert_intermediate_size, 1, wide);
  if (!(rms_norm_eps >= 0 && rms_norm_eps < 1)) fail("rms_norm_eps", rms_norm_eps, "0..1");
  if (!(rope_theta > 1 && rope_theta < 1e15)) fail("rope_theta", rope_theta, "more than 1");
  if (yarn) {
    if (!(yarn->factor >= 1 && yarn->factor <= 1024)) fail("rope_scaling factor", yarn->factor, "1..1024");
    in_range("original_max_position_embeddings", yarn->original_max_position_embeddings, 1, std::int64_t{1} << 30);
    if (!(yarn->beta_fast > 0 && yarn->beta_slow > 0)) fail("rope_scaling beta_fast", yarn->beta_fast, "more than 0");
  }
}

inline void Config::extend_context(double factor) {
  if (yarn) max_position_embeddings = yarn->original_max_position_embeddings;
  yarn = YarnScaling{.factor = factor, .original_max_position_embeddings = max_position_embeddings};
  validate("yarn_factor");
  max_position_embeddings = static_cast<std::int64_t>(static_cast<double>(max_position_embeddings) * factor);
}

// The angles of rotary embedding: dims i and i + rotary_pairs of a head turn by position * frequency[i].
struct Rope {
  std::vector<double> frequency;  // radians per position, one per pair
  float scale = 1;                // YaRN's factor of cos and sin
};

// f_i = theta^(-2i/dim).  YaRN slows the frequencies that turn less than beta_slow times within the original context
// by `factor`, keeps those that turn more than beta_fast times, and ramps linearly in between.
inline Rope make_rope(const Config& c) {
  Rope rope;
  const double dim = c.rotary_dim;
  for (int i = 0; i < c.rotary_pairs(); ++i) rope.frequency.push_back(std::pow(c.rope_theta, -2.0 * i / dim));
  if (!c.yarn) return rope;
  const YarnScaling& y = *c.yarn;
  auto turns_to_dim = [&](double turns) {  // the (fractional) pair that turns this often within the original context
    return dim * std::log(static_cast<double>(y.original_max_position_embeddings) / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(c.rope_theta));
  };
  const double low = std::max(std::floor(turns_to_dim(y.beta_fast)), 0.0);
  double high = std::min(std::ceil(turns_to_dim(y.beta_slow)), dim - 1);
  if (low == high) high += 0.001;  // as Hugging Face: no division by zero
  for (int i = 0; i < c.rotary_pairs(); ++i) {
    const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
    double& f = rope.frequency[static_cast<std::size_t>(i)];
    f = f * (1 - ramp) + f / y.factor * ramp;
  }
  rope.scale = static_cast<float>(y.attention_factor.value_or(y.factor > 1 ? 0.1 * std::log(y.factor) + 1 : 1));
  return rope;
}

}  // namespace qwen3next
