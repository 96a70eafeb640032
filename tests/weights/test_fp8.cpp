// FP8 checkpoints: F8_E4M3 with a scale for every 128 x 128 values, in all layouts that Hugging Face folders have.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "tests/weights/fixtures.hpp"
#include "weights/checkpoint.hpp"
#include "weights/quantize.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

// More than one block in most directions, and heads that no block knows.
Config wide_config() {
  Config c = small_config();
  c.hidden_size = 150;
  c.linear_key_head_dim = 40, c.linear_value_head_dim = 37;
  c.head_dim = 36, c.rotary_dim = 6;
  c.moe_intermediate_size = 131, c.shared_expert_intermediate_size = 128;
  return c;
}

// As Qwen's releases choose: all projections but the small ones.
bool is_quantised(const std::string& name) {
  return (name.find("_proj") != name.npos || name.find("experts") != name.npos) && name.find("_ba") == name.npos &&
         name.find("in_proj_b.") == name.npos && name.find("in_proj_a.") == name.npos &&
         name.find("expert_gate") == name.npos;
}

// Stores the projections as F8_E4M3 beside their scales, and leaves in `tensors` the values that this means.
StoredTensors to_fp8(Tensors& tensors, DType scale_type) {
  StoredTensors stored;
  for (auto& [name, tensor] : tensors) {
    if (!is_quantised(name)) {
      stored[name] = {"F32", tensor.shape, packed(DType::f32, tensor.values)};
      continue;
    }
    const int rank = tensor.shape.rank;
    const auto count = static_cast<std::size_t>(rank == 3 ? tensor.shape[0] : 1);
    const auto R = static_cast<std::size_t>(tensor.shape[rank - 2]),
               C = static_cast<std::size_t>(tensor.shape[rank - 1]);
    const std::size_t Br = (R + 127) / 128, Bc = (C + 127) / 128;
    std::vector<float> scales(count * Br * Bc);
    for (std::size_t i = 0; i < scales.size(); ++i) {
      scales[i] = bf16_to_f32(f32_to_bf16(0.004f * (1 + 0.37f * static_cast<float>(i % 7))));
    }
    std::string codes(tensor.values.size(), '\0');
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const std::size_t e = i / (R * C), r = i / C % R, c = i % C;
      const float scale = scales[(e * Br + r / 128) * Bc + c / 128];
      const std::uint8_t code = f32_to_f8_e4m3(std::clamp(tensor.values[i] / scale, -448.0f, 448.0f));
      codes[i] = static_cast<char>(code);
      tensor.values[i] = f8_e4m3_to_f32(code) * scale;
    }
    stored[name] = {"F8_E4M3", tensor.shape, codes};
    const auto br = static_cast<std::int64_t>(Br), bc = static_cast<std::int64_t>(Bc);
    stored[name + "_scale_inv"] = {std::string(info(scale_type).name),
                                   rank == 3 ? Shape{tensor.shape[0], br, bc} : Shape{br, bc},
                                   packed(scale_type, scales)};
  }
  return stored;
}

fs::path write_fp8(const TempFolder& folder, const Config& c, const StoredTensors& stored) {
  fs::create_directories(folder / "fp8");
  json config = hf_config_json(c);
  config["quantization_config"] = {
      {"quant_method", "fp8"}, {"fmt", "e4m3"}, {"activation_scheme", "dynamic"}, {"weight_block_size", {128, 128}}};
  write_text(folder / "fp8/config.json", config.dump());
  write_safetensors(folder / "fp8/model.safetensors", stored);
  return folder / "fp8";
}

}  // namespace

TEST_CASE("fp8: every layout means the values that its codes and scales give") {
  TempFolder folder;
  const Config c = wide_config();
  for (const DType scale_type : {DType::f32, DType::bf16}) {
    for (const bool later : {false, true}) {  // fused experts, split inputs
      Tensors tensors = hf_tensors(c);
      if (later) {
        for (int i = 0; i < 4; ++i) fuse_experts(tensors, c, concat("model.layers.", i, "."));
        split_inputs(tensors, c, "model.layers.1.");
      }
      const StoredTensors stored = to_fp8(tensors, scale_type);
      const Checkpoint fp8 = Checkpoint::open(write_fp8(folder, c, stored));
      write_hf(folder / "f32", c, tensors);
      const Checkpoint f32 = Checkpoint::open(folder / "f32");
      CHECK(all_values(fp8.weights) == all_values(f32.weights));
      CHECK(same_config(fp8.config, c));

      for (const WeightView& w : {fp8.weights.layers[2].linear_attn->in_proj_k, fp8.weights.layers[1].mlp.experts[2].up,
                                  fp8.weights.mtp->layer.self_attn->o_proj}) {  // in place, scales too
        CHECK(w.type == DType::f8_e4m3);
        CHECK(fp8.locate(w.data));
        CHECK(fp8.locate(w.grid.data));
      }
    }
  }
}

TEST_CASE("fp8: a GGUF made from it holds the same values") {
  TempFolder folder;
  const Config c = wide_config();
  Tensors tensors = hf_tensors(c);
  const Checkpoint fp8 = Checkpoint::open(write_fp8(folder, c, to_fp8(tensors, DType::bf16)));
  quantize(fp8, folder / "m.gguf", {.type = "F32"});
  CHECK(all_values(Checkpoint::open(folder / "m.gguf").weights) == all_values(fp8.weights));
}

TEST_CASE("fp8: scales that are missing, left over, of another shape or type are named") {
  TempFolder folder;
  const Config c = wide_config();
  Tensors tensors = hf_tensors(c);
  fuse_experts(tensors, c, "model.layers.1.");
  const StoredTensors good = to_fp8(tensors, DType::bf16);
  const auto refused = [&](auto change, const std::string& part) {
    StoredTensors bad = good;
    change(bad);
    CHECK(contains(error_of([&] { Checkpoint::open(write_fp8(folder, c, bad)); }), part));
  };
  const std::string q = "model.layers.3.self_attn.q_proj.weight", e = "model.layers.1.mlp.experts.down_proj";
  refused([&](StoredTensors& x) { x.erase(q + "_scale_inv"); },
          "tensor " + q + " is F8_E4M3, but its scales, " + q + "_scale_inv, are missing");
  refused([&](StoredTensors& x) { x.erase(q); },
          "1 tensor missing (" + q + "); 1 tensor unexpected (" + q + "_scale_inv)");
  refused(
      [&](StoredTensors& x) {
        x[q] = {"BF16", x[q].shape, std::string(2 * x[q].bytes.size(), '\0')};
      },
      "has " + q + "_scale_inv, but " + q + " is BF16, expected F8_E4M3");
  refused(
      [&](StoredTensors& x) {
        x[q + "_scale_inv"] = {"BF16", {2, 3}, std::string(12, '\0')};
      },
      q + "_scale_inv is [2, 3], expected [3, 2]: a scale for every 128 x 128 values of " + q);
  refused(
      [&](StoredTensors& x) {
        x[e + "_scale_inv"] = {"F32", {3, 2, 1}, std::string(24, '\0')};
      },
      e + "_scale_inv is [3, 2, 1], expected [3, 2, 2]");
  refused(
      [&](StoredTensors& x) {
        x[q + "_scale_inv"] = {"F16", {3, 2}, std::string(12, '\0')};
      },
      q + "_scale_inv is F16, expected F32 or BF16");
  refused(
      [&](StoredTensors& x) {
        x["model.norm.weight"] = {"F8_E4M3", {150}, std::string(150, '\0')};
      },
      "model.norm.weight is F8_E4M3, expected F32, F16 or BF16");
  refused([&](StoredTensors& x) { x[q].dtype = "F8_E5M2"; }, q + " is F8_E5M2, expected F32, F16, BF16 or F8_E4M3");
  // by another scheme than blocks
  refused([&](StoredTensors& x) { x[q + "_scale"] = x[q + "_scale_inv"]; }, "compressed-tensors");
}
