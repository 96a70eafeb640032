#include <doctest/doctest.h>

#include "tests/weights/fixtures.hpp"
#include "weights/gguf_config.hpp"
#include "weights/hf_config.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

json base() { return hf_config_json(small_config()); }
Config parse(const json& j) { return read_hf_config(j.dump(), "config.json"); }
json with(json j, const json& changes) {
  for (const auto& [key, value] : changes.items()) j[key] = value;
  return j;
}
json without(json j, const char* key) {
  j.erase(key);
  return j;
}
Config small() {  // as config.json says it: MTP is for the tensors to say
  Config c = small_config();
  c.has_mtp = false;
  return c;
}

Config through_gguf(const TempFolder& folder, const Config& c, auto change) {
  GgufWriter out(folder / "c.gguf");
  set_gguf_config(out, c);
  change(out);
  out.add_tensor("token_embd.weight", {c.vocab_size, c.hidden_size}, DType::f32);
  out.begin();
  out.write(std::vector<std::byte>(static_cast<std::size_t>(c.vocab_size * c.hidden_size) * 4));
  out.finish();
  return read_gguf_config(Gguf::open(folder / "c.gguf"));
}
Config through_gguf(const TempFolder& folder, const Config& c) {
  return through_gguf(folder, c, [](GgufWriter&) {});
}

}  // namespace

TEST_CASE("config.json: the release") {
  const Config c = parse({{"model_type", "qwen3_next"}, {"rope_theta", 10000000}, {"max_position_embeddings", 262144}});
  CHECK(same_config(c, [] {
    Config d;
    d.layer_types = interval_layer_types(48, 4);
    return d;
  }()));
  CHECK(c.full_attention(3));
  CHECK(!c.full_attention(44));
}

TEST_CASE("config.json: old and new style say the same") {
  const json old_style = base();
  CHECK(same_config(parse(old_style), small()));
  json fresh = without(without(without(old_style, "rope_theta"), "partial_rotary_factor"), "rope_scaling");
  const json rope = {{"rope_type", "default"}, {"rope_theta", 1e6}, {"partial_rotary_factor", 0.5}};
  CHECK(same_config(parse(with(fresh, {{"rope_parameters", rope}})), small()));
  CHECK(same_config(parse(with(fresh, {{"rope_parameters", {{"full_attention", rope}}}})), small()));
  // where both are, the new place counts
  CHECK(same_config(parse(with(old_style, {{"rope_theta", 5}, {"rope_parameters", rope}})), small()));
  // the interval instead of the list
  CHECK(same_config(parse(with(without(old_style, "layer_types"), {{"full_attention_interval", 4}})), small()));
  CHECK(same_config(parse(without(old_style, "layer_types")), small()));
  CHECK(parse(with(without(old_style, "layer_types"), {{"full_attention_interval", 1}})).full_attention(0));
  CHECK(!parse(with(without(old_style, "layer_types"), {{"full_attention_interval", 100}})).full_attention(3));
  // int(head_dim * partial_rotary_factor)
  CHECK(parse(with(old_style, {{"partial_rotary_factor", 0.4}})).rotary_dim == 4);
  CHECK(parse(with(old_style, {{"partial_rotary_factor", 0.25}})).rotary_dim == 3);
  CHECK(parse(without(old_style, "rope_theta")).rope_theta == 10000);
}

TEST_CASE("config.json: YaRN") {
  const auto yarn = [](const json& scaling) { return parse(with(base(), {{"rope_scaling", scaling}})).yarn.value(); };
  const YarnScaling plain = yarn({{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 1024}});
  CHECK(plain.factor == 4);
  CHECK(plain.original_max_position_embeddings == 1024);
  CHECK(plain.beta_fast == 32);
  CHECK(plain.beta_slow == 1);
  CHECK(!plain.attention_factor);
  const YarnScaling full = yarn({{"type", "yarn"},
                                 {"factor", 2},
                                 {"beta_fast", 16},
                                 {"beta_slow", 2},
                                 {"attention_factor", 1.5},
                                 {"mscale", 3.0},
                                 {"mscale_all_dim", 1.0}});
  CHECK(full.original_max_position_embeddings == 4096);  // the model's length, if it does not say
  CHECK(full.beta_fast == 16);
  CHECK(full.beta_slow == 2);
  CHECK(full.attention_factor == 1.5);
  const YarnScaling mscale = yarn({{"type", "yarn"}, {"factor", 4}, {"mscale", 2.0}, {"mscale_all_dim", 0.5}});
  CHECK(*mscale.attention_factor == doctest::Approx((0.2 * std::log(4.) + 1) / (0.05 * std::log(4.) + 1)));
  CHECK(yarn({{"type", "yarn"}, {"factor", nullptr}, {"original_max_position_embeddings", 1024}}).factor == 4);
  const json nested = {{"rope_type", "yarn"},
                       {"factor", 4.0},
                       {"original_max_position_embeddings", 64},
                       {"rope_theta", 1e6},
                       {"partial_rotary_factor", 0.5}};
  CHECK(parse(with(without(base(), "rope_scaling"), {{"rope_parameters", nested}})).yarn->factor == 4);
  CHECK(!parse(with(base(), {{"rope_scaling", {{"rope_type", "default"}}}})).yarn);
}

TEST_CASE("config.json: the FP8 release") {
  const json fp8{{"quant_method", "fp8"},
                 {"fmt", "e4m3"},
                 {"activation_scheme", "dynamic"},
                 {"weight_block_size", {128, 128}},
                 {"modules_to_not_convert", {"lm_head", "model.layers.0.mlp.gate"}}};
  CHECK(same_config(parse(with(base(), {{"quantization_config", fp8}})), parse(base())));
  CHECK(same_config(parse(with(base(), {{"quantization_config", {{"quant_method", "fp8"}}}})), parse(base())));
}

TEST_CASE("config.json: what cannot be run is refused with the reason") {
  const auto refused = [](const json& j, const std::string& part) {
    CAPTURE(part);
    const std::string message = error_of([&] { parse(j); });
    CHECK(contains(message, "config.json: "));
    CHECK(contains(message, part));
  };
  const auto changed = [&](const json& changes, const std::string& part) { refused(with(base(), changes), part); };
  changed({{"model_type", "qwen3_moe"}}, "model_type is 'qwen3_moe', expected 'qwen3_next'");
  refused(without(base(), "model_type"), "model_type is ''");
  for (const char* method : {"gptq", "awq", "compressed-tensors", "bitsandbytes", "mxfp4"}) {
    changed({{"quantization_config", {{"quant_method", method}}}},
            concat("quantization_config has quant_method '", method, "', expected 'fp8'; use the BF16 or FP8 release"));
  }
  changed({{"quantization_config", 5}}, "quantization_config is a number, expected an object");
  const auto fp8 = [&](const json& changes, const std::string& part) {
    changed({{"quantization_config", with({{"quant_method", "fp8"}}, changes)}}, part);
  };
  fp8({{"fmt", "e5m2"}}, "has fmt 'e5m2', expected 'e4m3'");
  fp8({{"activation_scheme", "static"}}, "has activation_scheme 'static', expected 'dynamic'");
  fp8({{"weight_block_size", {64, 128}}}, "has weight_block_size [64,128], expected [128,128]");
  fp8({{"weight_block_size", nullptr}}, "has weight_block_size null");
  fp8({{"fmt", 4}}, "fmt is a number, expected a string");
  changed({{"quantization", {{"bits", 4}}}}, "an MLX conversion");
  changed({{"hidden_act", "gelu"}}, "hidden_act is 'gelu', expected 'silu'");
  changed({{"attention_bias", true}}, "attention_bias is true");
  changed({{"mlp_only_layers", json::array({1})}}, "mlp_only_layers is not empty");
  changed({{"decoder_sparse_step", 2}}, "decoder_sparse_step is 2, expected 1");
  changed({{"rope_scaling", {{"rope_type", "linear"}, {"factor", 2}}}}, "rope_type is 'linear'");
  changed({{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2}, {"truncate", false}}}}, "truncate false");
  changed({{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 0.5}}}}, "rope_scaling factor");
  changed({{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 2}, {"attention_factor", -1}}}}, "attention_factor");
  changed({{"rope_scaling", {{"rope_type", "yarn"}, {"original_max_position_embeddings", 0}}}}, "rope_scaling factor");
  changed({{"rope_scaling", 5}}, "rope_scaling is a number, expected an object");
  changed({{"layer_types", json::array({"full_attention", "sliding_attention"})}},
          "layer_types has \"sliding_attention\"");
  changed({{"layer_types", json::array({"full_attention"})}}, "number of layer_types is 1");
  changed({{"layer_types", "full_attention"}}, "layer_types is a string, expected an array");
  changed({{"hidden_size", "2048"}}, "hidden_size is a string, expected an integer");
  changed({{"hidden_size", 2048.0}}, "hidden_size is a number, expected an integer");
  changed({{"hidden_size", 1ll << 40}}, "hidden_size is 1099511627776, which no model has");
  changed({{"hidden_size", ~0ull}}, "hidden_size is 18446744073709551615");
  changed({{"hidden_size", 0}}, "hidden_size is 0");
  changed({{"num_experts_per_tok", 4}}, "num_experts_per_tok is 4, expected 1..3");
  changed({{"linear_num_value_heads", 5}}, "expected a multiple of linear_num_key_heads = 2");
  changed({{"norm_topk_prob", 1}}, "norm_topk_prob is a number, expected true or false");
  changed({{"rms_norm_eps", "x"}}, "rms_norm_eps is a string, expected a number");
  changed({{"partial_rotary_factor", 2}}, "partial_rotary_factor is 2");
  refused(with(without(base(), "layer_types"), {{"full_attention_interval", 0}}), "full_attention_interval is 0");
  refused(with(without(base(), "layer_types"), {{"num_hidden_layers", 2000000000}}), "num_hidden_layers 2000000000");
  refused(json::array(), "is an array, expected an object");
  const auto text_refused = [](const std::string& text, const std::string& part) {
    CHECK(contains(error_of([&] { read_hf_config(text, "config.json"); }), part));
  };
  text_refused("", "not valid JSON");
  text_refused("{\"a\": \"\xff\"}", "not valid JSON");
  text_refused("{\"hidden_size\": 1e999}", "not valid JSON");
  text_refused(std::string(100000, '['), "nested deeper than 64 levels");
}

TEST_CASE("GGUF metadata <-> config") {
  TempFolder folder;
  Config c = small_config();
  CHECK(same_config(through_gguf(folder, c), c));
  c.has_mtp = false, c.norm_topk_prob = false;
  CHECK(same_config(through_gguf(folder, c), c));
  c.yarn = YarnScaling{4, 1024, 16, 2, {}};
  CHECK(same_config(through_gguf(folder, c), c));
  c.yarn->attention_factor = 1.25;
  CHECK(same_config(through_gguf(folder, c), c));
  for (int pattern = 0; pattern < 16; ++pattern) {  // regular or not
    for (int i = 0; i < 4; ++i) {
      c.layer_types[static_cast<std::size_t>(i)] =
          pattern >> i & 1 ? LayerType::full_attention : LayerType::linear_attention;
    }
    c.has_mtp = pattern & 1;
    CHECK(same_config(through_gguf(folder, c), c));
  }
}

TEST_CASE("GGUF metadata: forms that other converters write") {
  TempFolder folder;
  const Config c = small_config();  // layer 3 is full attention
  const auto a = through_gguf(folder, c, [](GgufWriter& out) {
    out.set_i32s("qwen3next.attention.head_count", std::vector<std::int32_t>{0, 0, 0, 4, 4});
    out.set_i32s("qwen3next.attention.head_count_kv", std::vector<std::int32_t>{0, 0, 0, 2, 2});
  });
  CHECK(same_config(a, c));
  const auto scaled = through_gguf(folder, c, [](GgufWriter& out) {
    out.set_string("qwen3next.rope.scaling.type", "yarn");
    out.set_f32("qwen3next.rope.scaling.factor", 4);
    out.set_f32("qwen3next.rope.scaling.attn_factor", 2);
  });
  CHECK(scaled.yarn->original_max_position_embeddings == 4096);
  CHECK(*scaled.yarn->attention_factor == doctest::Approx(2 * (0.1 * std::log(4.) + 1)));
}

TEST_CASE("GGUF metadata: what cannot be run is refused with the reason") {
  TempFolder folder;
  const auto refused = [&](auto change, const std::string& part) {
    const std::string message = error_of([&] { through_gguf(folder, small_config(), change); });
    CHECK(contains(message, "c.gguf: "));
    CHECK(contains(message, part));
  };
  const auto u32 = [](const char* key, std::uint32_t value) {
    return [=](GgufWriter& out) { out.set_u32(concat("qwen3next.", key), value); };
  };
  refused([](GgufWriter& out) { out.set_string("general.architecture", "llama"); }, "architecture is 'llama'");
  refused([](GgufWriter& out) { out.set_string("general.architecture", "qwen35moe"); }, "orders its value heads");
  refused([](GgufWriter& out) { out.set_string("general.type", "adapter"); }, "general.type is 'adapter'");
  refused([](GgufWriter& out) { out.set_bool("qwen3next.ssm.v_head_reordered", true); }, "value heads are reordered");
  refused([](GgufWriter& out) { out.set_string("qwen3next.embedding_length", "x"); }, "expected an integer");
  refused([](GgufWriter& out) { out.set_string("qwen3next.rope.scaling.type", "linear"); }, "expected 'yarn'");
  refused([](GgufWriter& out) { out.set_i32s("qwen3next.attention.head_count_kv", std::vector<std::int32_t>{2}); },
          "head_count_kv has 1 elements, expected 4");
  refused([](GgufWriter& out) { out.set_bools("qwen3next.attention.recurrent_layers", {true}); }, "has 1 elements");
  refused([](GgufWriter& out) { out.set_bool("qwen3next.ssm.group_count", true); }, "is of type bool");
  refused(u32("nextn_predict_layers", 2), "2 MTP blocks");
  refused(u32("block_count", 1), "block_count is 1");
  refused(u32("block_count", 4000000000u), "which no model has");
  refused(u32("full_attention_interval", 0), "full_attention_interval is 0");
  refused(u32("attention.value_length", 8), "value_length is 8, expected key_length = 12");
  refused(u32("ssm.inner_size", 31), "ssm.inner_size is 31, expected a multiple of ssm.time_step_rank = 6");
  refused(u32("ssm.time_step_rank", 0), "ssm.time_step_rank = 0");
  refused(u32("expert_used_count", 9), "num_experts_per_tok is 9");
  GgufWriter(folder / "bare.gguf").finish();
  CHECK(contains(error_of([&] { read_gguf_config(Gguf::open(folder / "bare.gguf")); }),
                 "general.architecture is missing"));
}
