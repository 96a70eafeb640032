#pragma once
// What a GGUF written here will hold: llama.cpp's names and layouts, a type for each tensor, and the rows of the source
// that go there.  The inverse of bind.hpp.
//
// A part of quantize.hpp, which includes it after what both use.

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <regex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "blocks/dtype.hpp"
#include "blocks/weight_view.hpp"
#include "core/message.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"
#include "weights/gguf_writer.hpp"
#include "weights/tensor_record.hpp"

namespace qwen3next {

// What a tensor does, as far as its precision depends on it.
enum class Role : std::uint8_t {
  exact,      // small and sensitive: norms, convolution, decay, router; always F32
  embedding,  // of tokens
  output,     // the head; the embedding if tied
  value,      // attn_v, attn_qkv: their errors go straight to the residual stream
  down,       // ffn_down*: the same
  gates,      // ssm_ba: beta and decay of every DeltaNet head, 0.1 % of the model
  mtp_input,  // nextn.eh_proj
  other,
};

// A file type: which type each role gets.  They are llama.cpp's mixtures, with two exceptions: `gates`, and the MTP
// block, 2 % of the model, whose drafts are accepted less often long before the text suffers.
struct Mix {
  // Where `value` and `down` get the first of their two types.
  enum class More : std::uint8_t {
    half,   // of the layers: the first and the last eighth, and every third between
    early,  // the first eighth
  };

  std::string_view name;
  std::uint32_t file_type;  // general.file_type, llama.cpp's LLAMA_FTYPE_MOSTLY_*
  DType base, output, gates;
  More more;
  std::array<DType, 2> value, down;
  DType mtp_base, mtp_sensitive;
  std::optional<DType> experts = {};  // for all stacked experts, but the MTP block's
};

inline constexpr std::array<Mix, 11> mixes = [] {
  using enum DType;
  using enum Mix::More;
  return std::array<Mix, 11>{{
      {"F32", 0, f32, f32, f32, half, {f32, f32}, {f32, f32}, f32, f32},
      {"F16", 1, f16, f16, f16, half, {f16, f16}, {f16, f16}, f16, f16},
      {"BF16", 32, bf16, bf16, bf16, half, {bf16, bf16}, {bf16, bf16}, bf16, bf16},
      {"Q8_0", 7, q8_0, q8_0, q8_0, half, {q8_0, q8_0}, {q8_0, q8_0}, q8_0, q8_0},
      {"Q6_K", 18, q6_k, q6_k, q8_0, half, {q6_k, q6_k}, {q6_k, q6_k}, q6_k, q6_k},
      {"Q5_K_M", 17, q5_k, q6_k, q8_0, half, {q6_k, q5_k}, {q6_k, q5_k}, q5_k, q6_k},
      {"Q4_K_M", 15, q4_k, q6_k, q8_0, half, {q6_k, q4_k}, {q6_k, q4_k}, q5_k, q6_k},
      {"Q3_K_M", 12, q3_k, q6_k, q8_0, half, {q4_k, q4_k}, {q4_k, q4_k}, q5_k, q6_k},
      {"Q4_0", 2, q4_0, q6_k, q8_0, early, {q4_0, q4_0}, {q4_1, q4_0}, q5_k, q6_k},
      {"IQ4_NL", 25, iq4_nl, q6_k, q8_0, early, {q5_k, q5_k}, {q5_k, iq4_nl}, q5_k, q6_k},
      {"MXFP4", 38, q8_0, q8_0, q8_0, half, {q8_0, q8_0}, {q8_0, q8_0}, q5_k, q6_k, mxfp4},
  }};
}();

inline const Mix& find_mix(std::string_view name) {
  std::string known;
  for (const Mix& mix : mixes) {
    if (mix.name == name) return mix;
    known += (known.empty() ? "" : ", ") + std::string(mix.name);
  }
  throw_error("unknown type '", printable(name), "'; expected one of ", known);
}

// A type of GGUF.
inline std::optional<DType> find_dtype(std::string_view name) noexcept {
  for (const DTypeInfo& type : dtype_table) {
    if (type.name == name && type.ggml_id != no_ggml_id) return type.type;
  }
  return {};
}

// Rows [first, first + rows) of a view.
struct Piece {
  WeightView view;
  int first = 0, rows = 0;
};

struct PlannedTensor {
  std::string name;
  Shape shape;
  Role role = Role::other;
  DType type = DType::f32;
  std::vector<Piece> pieces;  // in the order of the tensor's rows

  int cols() const noexcept { return pieces.front().view.cols; }
  std::uint64_t bytes() const noexcept {
    return static_cast<std::uint64_t>(*shape.elements() / cols()) * row_bytes(type, cols());
  }
};

struct QuantizePlan {
  std::vector<PlannedTensor> tensors;  // in the order of the file
  std::vector<Fallback> fallbacks;
};

namespace detail {

class QuantizePlanner {
 public:
  QuantizePlanner(const Config& config, const Mix& mix, const std::vector<std::pair<std::string, DType>>& overrides)
      : c_(config), mix_(mix) {
    for (const auto& [pattern, type] : overrides) {
      if (pattern.size() > 1000) {  // std::regex recurses over it
        throw_error("tensor type pattern '", printable(pattern, 20), "' has ", pattern.size(),
                    " characters, expected at most 1000");
      }
      if (longest_number(pattern) > 9) {  // std::regex adds its digits up in a long
        throw_error("tensor type pattern '", printable(pattern), "' has a number of more than 9 digits");
      }
      try {
        overrides_.push_back({pattern, std::regex(pattern), type, false});
      } catch (const std::regex_error& e) {
        throw_error("tensor type pattern '", printable(pattern), "' is no regular expression: ", e.what());
      }
    }
  }

  QuantizePlan plan(const ModelWeights<Views>& w) && {
    matrix("token_embd.weight", c_.tie_word_embeddings ? Role::output : Role::embedding, w.embed_tokens);
    for (std::size_t i = 0; i < w.layers.size(); ++i) layer(static_cast<int>(i), w.layers[i]);
    vector("output_norm.weight", w.norm);
    if (!c_.tie_word_embeddings) matrix("output.weight", Role::output, w.lm_head);
    if (w.mtp) mtp(*w.mtp, w);
    for (const Override& o : overrides_) {
      if (!o.used) throw_error("tensor type pattern '", printable(o.pattern), "' matches no matrix of the model");
    }
    // Those that keep their successor aligned first, so that they, stacked experts above all, are aligned themselves.
    std::stable_partition(plan_.tensors.begin(), plan_.tensors.end(),
                          [](const PlannedTensor& t) { return t.bytes() % GgufWriter::data_alignment == 0; });
    return std::move(plan_);
  }

 private:
  static std::size_t longest_number(std::string_view text) noexcept {
    std::size_t longest = 0, digits = 0;
    for (const char c : text) longest = std::max(longest, digits = c >= '0' && c <= '9' ? digits + 1 : 0);
    return longest;
  }

  struct Override {
    std::string pattern;
    std::regex regex;
    DType type;
    bool used;
  };

  void layer(int i, const LayerWeights<Views>& w) {
    layer_ = i;
    prefix_ = concat("blk.", i, ".");
    vector("attn_norm.weight", w.input_layernorm);
    if (w.self_attn) attention(*w.self_attn);
    if (w.linear_attn) delta_net(*w.linear_attn);
    vector("post_attention_norm.weight", w.post_attention_layernorm);
    moe(w.mlp);
    prefix_.clear();
  }

  void attention(const AttentionWeights<Views>& w) {
    matrix("attn_q.weight", Role::other, alternate({w.q_proj, w.gate_proj}, c_.num_attention_heads));
    matrix("attn_k.weight", Role::other, w.k_proj);
    matrix("attn_v.weight", Role::value, w.v_proj);
    matrix("attn_output.weight", Role::other, w.o_proj);
    vector("attn_q_norm.weight", w.q_norm);
    vector("attn_k_norm.weight", w.k_norm);
  }

  void delta_net(const DeltaNetWeights<Views>& w) {
    matrix("attn_qkv.weight", Role::value, stack({w.in_proj_q, w.in_proj_k, w.in_proj_v}));
    matrix("attn_gate.weight", Role::other, w.in_proj_z);
    matrix("ssm_ba.weight", Role::gates, alternate({w.in_proj_b, w.in_proj_a}, c_.linear_num_key_heads));
    vector("ssm_conv1d.weight", w.conv1d);
    vector("ssm_a", w.A);
    vector("ssm_dt.bias", w.dt_bias);
    vector("ssm_norm.weight", w.norm);
    matrix("ssm_out.weight", Role::other, w.out_proj);
  }

  void moe(const MoeWeights<Views>& w) {
    matrix("ffn_gate_inp.weight", Role::exact, w.gate);
    experts("ffn_gate_exps.weight", Role::other, w.experts, &ExpertView::gate);
    experts("ffn_up_exps.weight", Role::other, w.experts, &ExpertView::up);
    experts("ffn_down_exps.weight", Role::down, w.experts, &ExpertView::down);
    matrix("ffn_gate_shexp.weight", Role::other, w.shared_gate_proj);
    matrix("ffn_up_shexp.weight", Role::other, w.shared_up_proj);
    matrix("ffn_down_shexp.weight", Role::down, w.shared_down_proj);
    add("ffn_gate_inp_shexp.weight", Role::exact, {c_.hidden_size}, {whole(w.shared_expert_gate)});
  }

  void mtp(const MtpWeights<Views>& w, const ModelWeights<Views>& model) {
    mtp_ = true;
    layer(c_.num_hidden_layers, w.layer);
    prefix_ = concat("blk.", c_.num_hidden_layers, ".nextn.");
    matrix("eh_proj.weight", Role::mtp_input, w.fc);
    vector("enorm.weight", w.pre_fc_norm_embedding);
    vector("hnorm.weight", w.pre_fc_norm_hidden);
    vector("shared_head_norm.weight", w.norm);
    if (w.embed_tokens.data != model.embed_tokens.data) matrix("embed_tokens.weight", Role::other, w.embed_tokens);
    if (w.lm_head.data != model.lm_head.data) matrix("shared_head_head.weight", Role::output, w.lm_head);
  }

  static Piece whole(const WeightView& view) { return {view, 0, view.rows}; }

  // The matrices one below the other.
  static std::vector<Piece> stack(std::initializer_list<WeightView> matrices) {
    std::vector<Piece> pieces;
    for (const WeightView& m : matrices) pieces.push_back(whole(m));
    return pieces;
  }

  // Equal shares of each matrix in turn: [a0 b0 a1 b1 ..], the order of Hugging Face's q_proj and in_proj_ba.
  static std::vector<Piece> alternate(std::initializer_list<WeightView> matrices, int shares) {
    std::vector<Piece> pieces;
    for (int i = 0; i < shares; ++i) {
      for (const WeightView& m : matrices) pieces.push_back({m, i * (m.rows / shares), m.rows / shares});
    }
    return pieces;
  }

  void matrix(std::string_view name, Role role, const WeightView& view) { matrix(name, role, stack({view})); }
  void matrix(std::string_view name, Role role, std::vector<Piece> pieces) {
    Shape shape{0, pieces.front().view.cols};
    for (const Piece& piece : pieces) shape.dims[0] += piece.rows;
    add(name, role, shape, std::move(pieces));
  }

  void experts(std::string_view name, Role role, const ExpertViews& experts, WeightView ExpertView::*member) {
    std::vector<Piece> pieces;
    pieces.reserve(experts.size());
    for (const ExpertView& expert : experts) pieces.push_back(whole(expert.*member));
    const Shape shape{static_cast<std::int64_t>(experts.size()), pieces[0].view.rows, pieces[0].view.cols};
    add(name, role, shape, std::move(pieces));
  }

  void vector(std::string_view name, const VectorView& v) {
    const bool flat = v.cols == 1 && name != "ssm_conv1d.weight";
    const int rows = flat ? 1 : v.size / v.cols, cols = flat ? v.size : v.cols;
    const auto* data = reinterpret_cast<const std::byte*>(v.data);
    add(name, Role::exact, flat ? Shape{cols} : Shape{rows, cols},
        {whole(WeightView::contiguous(data, DType::f32, rows, cols))});
  }

  void add(std::string_view name, Role role, const Shape& shape, std::vector<Piece> pieces) {
    PlannedTensor t{prefix_ + std::string(name), shape, role, DType::f32, std::move(pieces)};
    t.type = choose(t);
    plan_.tensors.push_back(std::move(t));
  }

  DType choose(const PlannedTensor& t) {
    if (t.role == Role::exact) return DType::f32;
    for (Override& o : overrides_) {
      if (!std::regex_search(t.name, o.regex)) continue;
      o.used = true;
      if (!fits_blocks(o.type, t.cols())) {
        throw_error("tensor ", t.name, " cannot be ", info(o.type).name, " as '", printable(o.pattern),
                    "' asks: its rows of ", t.cols(), " are not whole blocks of ", info(o.type).elements,
                    "; use F16 or BF16 for it");
      }
      return o.type;
    }
    const DType wanted = rule(t.role, t.shape.rank == 3);
    if (fits_blocks(wanted, t.cols())) return wanted;
    const DType used = fits_blocks(DType::q8_0, t.cols()) ? DType::q8_0 : DType::f16;
    plan_.fallbacks.push_back({t.name, wanted, used});
    return used;
  }

  DType rule(Role role, bool stacked) const {
    if (role == Role::exact) return DType::f32;
    if (role == Role::gates) return mix_.gates;
    if (mtp_) return role == Role::other ? mix_.mtp_base : mix_.mtp_sensitive;
    if (stacked && mix_.experts) return *mix_.experts;
    const std::size_t less = more() ? 0 : 1;
    switch (role) {
      case Role::output:
        return mix_.output;
      case Role::value:
        return mix_.value[less];
      case Role::down:
        return mix_.down[less];
      default:
        return mix_.base;
    }
  }

  bool more() const {
    const int n = c_.num_hidden_layers, i = layer_;
    if (mix_.more == Mix::More::early) return i < n / 8;
    return i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
  }

  const Config& c_;
  const Mix& mix_;
  std::vector<Override> overrides_;
  QuantizePlan plan_;
  std::string prefix_;
  int layer_ = 0;
  bool mtp_ = false;
};

}  // namespace detail

// `overrides`: regular expression and type; the first that is found in a matrix's name decides.
inline QuantizePlan plan_quantization(const Config& config, const ModelWeights<Views>& weights, const Mix& mix,
                                      const std::vector<std::pair<std::string, DType>>& overrides) {
  return detail::QuantizePlanner(config, mix, overrides).plan(weights);
}

}  // namespace qwen3next
