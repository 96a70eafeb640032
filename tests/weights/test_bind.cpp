#include <doctest/doctest.h>

#include <chrono>

#include <random>

#include "tests/weights/fixtures.hpp"
#include "weights/checkpoint.hpp"
#include "weights/quantize.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

Checkpoint open_hf(const TempFolder& folder, const Config& c, const Tensors& tensors, DType type = DType::f32) {
  const fs::path path = folder.fresh() / "hf";
  write_hf(path, c, tensors, type);
  return Checkpoint::open(path);
}
Checkpoint open_gguf(const TempFolder& folder, const Config& c, const Tensors& tensors, DType type = DType::f32) {
  const fs::path path = folder.fresh() / "m.gguf";
  write_gguf(path, c, tensors, type);
  return Checkpoint::open(path);
}

std::vector<float> rows(const Tensor& t, const std::vector<int>& which) { return rows_of(t, which).values; }

}  // namespace

TEST_CASE("bind: strided views are the de-interleaved matrices") {
  TempFolder folder;
  const Config c = small_config();
  const Tensors t = hf_tensors(c);
  const Checkpoint checkpoint = open_hf(folder, c, t);
  CHECK(same_config(checkpoint.config, c));

  const DeltaNetWeights<Views>& delta = *checkpoint.weights.layers[1].linear_attn;
  const Tensor& qkvz = t.at("model.layers.1.linear_attn.in_proj_qkvz.weight");
  // Hk = 2 groups of Dk + Dk + 3 Dv + 3 Dv = 4 + 4 + 15 + 15 rows
  const auto range = [](int a, int n, int b) {
    std::vector<int> r;
    for (const int start : {a, b}) {
      for (int i = 0; i < n; ++i) r.push_back(start + i);
    }
    return r;
  };
  CHECK(floats(delta.in_proj_q) == rows(qkvz, range(0, 4, 38)));
  CHECK(floats(delta.in_proj_k) == rows(qkvz, range(4, 4, 42)));
  CHECK(floats(delta.in_proj_v) == rows(qkvz, range(8, 15, 46)));
  CHECK(floats(delta.in_proj_z) == rows(qkvz, range(23, 15, 61)));
  const Tensor& ba = t.at("model.layers.1.linear_attn.in_proj_ba.weight");
  CHECK(floats(delta.in_proj_b) == rows(ba, {0, 1, 2, 6, 7, 8}));
  CHECK(floats(delta.in_proj_a) == rows(ba, {3, 4, 5, 9, 10, 11}));
  CHECK(floats(delta.conv1d) == t.at("model.layers.1.linear_attn.conv1d.weight").values);
  CHECK(delta.conv1d.cols == 3);
  CHECK(delta.A.data[2] == -std::exp(t.at("model.layers.1.linear_attn.A_log").values[2]));
  CHECK(floats(delta.norm) == t.at("model.layers.1.linear_attn.norm.weight").values);

  const AttentionWeights<Views>& attention = *checkpoint.weights.layers[3].self_attn;
  const Tensor& q = t.at("model.layers.3.self_attn.q_proj.weight");
  std::vector<int> query, gate;
  for (int r = 0; r < 96; ++r) (r / 12 % 2 == 0 ? query : gate).push_back(r);
  CHECK(floats(attention.q_proj) == rows(q, query));
  CHECK(floats(attention.gate_proj) == rows(q, gate));
  CHECK(attention.q_norm.data[3] == 1 + t.at("model.layers.3.self_attn.q_norm.weight").values[3]);

  const ExpertView& expert = checkpoint.weights.layers[2].mlp.experts[1];
  CHECK(floats(expert.gate) == t.at("model.layers.2.mlp.experts.1.gate_proj.weight").values);
  CHECK(floats(expert.down) == t.at("model.layers.2.mlp.experts.1.down_proj.weight").values);
  REQUIRE(checkpoint.weights.mtp);
  CHECK(floats(checkpoint.weights.mtp->fc) == t.at("mtp.fc.weight").values);
  CHECK(checkpoint.weights.mtp->norm.data[0] == 1 + t.at("mtp.norm.weight").values[0]);
  CHECK(checkpoint.weights.layers.size() == 4);
}

TEST_CASE("bind: every container and layout ends in the same weights") {
  TempFolder folder;
  Config c = small_config();
  for (const bool mtp : {true, false}) {
    for (const bool tied : {false, true}) {
      for (const int ratio : {1, 3}) {
        c.has_mtp = mtp, c.tie_word_embeddings = tied, c.linear_num_value_heads = 2 * ratio;
        const Tensors t = hf_tensors(c);
        const auto expected = all_values(open_hf(folder, c, t).weights);
        CHECK(expected.size() > 60);
        const auto same = [&](const Checkpoint& checkpoint) {
          CHECK(same_config(checkpoint.config, c));
          CHECK(checkpoint.weights.mtp.has_value() == mtp);
          CHECK(all_values(checkpoint.weights) == expected);
        };
        const Tensors g = gguf_tensors(c, t);
        same(open_gguf(folder, c, g));

        Tensors fused = t;
        fuse_experts(fused, c, "model.layers.1."), fuse_experts(fused, c, "model.layers.3.");
        if (mtp) fuse_experts(fused, c, "mtp.layers.0.");
        split_inputs(fused, c, "model.layers.0.");
        same(open_hf(folder, c, fused));

        Tensors other = g;  // HF's row order, gate and up in one tensor
        other.erase("blk.2.attn_qkv.weight"), other.erase("blk.2.attn_gate.weight");
        other["blk.2.ssm_in.weight"] = t.at("model.layers.2.linear_attn.in_proj_qkvz.weight");
        fuse_experts(fused = t, c, "model.layers.1.");
        other.erase("blk.1.ffn_gate_exps.weight"), other.erase("blk.1.ffn_up_exps.weight");
        other["blk.1.ffn_gate_up_exps.weight"] = fused.at("model.layers.1.mlp.experts.gate_up_proj");
        same(open_gguf(folder, c, other));
      }
    }
  }
}

TEST_CASE("bind: what is in place and what is copied") {
  TempFolder folder;
  const Config c = small_config();
  const Tensors t = hf_tensors(c);
  const Checkpoint gguf = open_gguf(folder, c, gguf_tensors(c, t));
  CHECK(gguf.copies.empty());
  CHECK(gguf.copied_bytes() == 0);
  CHECK(gguf.locate(gguf.weights.embed_tokens.data)->offset % GgufWriter::alignment == 0);
  CHECK(!gguf.locate(nullptr));

  const Checkpoint bf16 = open_hf(folder, c, t, DType::bf16);
  std::size_t norms = 0, exponents = 0, converted = 0;
  for (const VectorCopy& copy : bf16.copies) {
    norms += copy.why == "held as 1 + w";
    exponents += copy.why == "held as -exp(A_log)";
    converted += copy.why == "converted from BF16 to F32";
    CHECK(!bf16.locate(reinterpret_cast<const std::byte*>(copy.values.data())));
  }
  CHECK(norms == 4 * 2 + 2 + 1 + 2 + 5);
  CHECK(exponents == 3);
  CHECK(converted == 9);
  CHECK(bf16.copies.size() == norms + exponents + converted);
  // values of the fixture are exact in BF16 up to 8 bits
  CHECK(floats(bf16.weights.embed_tokens).size() == 50 * 20);
  CHECK(bf16.weights.embed_tokens.type == DType::bf16);
  CHECK(bf16.weight_bytes() * 2 == open_hf(folder, c, t).weight_bytes());

  // an F32 vector that is not aligned is copied, too
  Tensors odd = t;
  json header;
  std::string data;
  for (const auto& [name, tensor] : odd) {
    const DType type = name == "lm_head.weight" ? DType::f16 : DType::f32;
    const std::size_t begin = data.size();
    data += packed(type, tensor.values);
    std::vector<std::int64_t> shape(tensor.shape.span().begin(), tensor.shape.span().end());
    header[name] = {{"dtype", info(type).name}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text += std::string((5 - (text.size() + 8) % 4) % 4, ' ');
  const fs::path hf = folder.fresh() / "hf";
  write_hf(hf, c, t);
  write_text(hf / "model.safetensors", safetensors_text(text, data));
  const Checkpoint unaligned = Checkpoint::open(hf);
  std::size_t shifted = 0;
  for (const VectorCopy& copy : unaligned.copies) shifted += copy.why == "not aligned in the file";
  CHECK(shifted == 9);
}

TEST_CASE("bind: views survive a move of the checkpoint") {
  TempFolder folder;
  const Config c = small_config();
  const Tensors t = hf_tensors(c);
  Checkpoint a = open_hf(folder, c, t, DType::f16);
  const auto before = all_values(a.weights);
  const Checkpoint b = std::move(a);
  std::vector<Checkpoint> many;
  for (int i = 0; i < 3; ++i) many.push_back(open_hf(folder, c, t, DType::f16));
  CHECK(all_values(b.weights) == before);
  CHECK(all_values(many[0].weights) == before);
}

TEST_CASE("bind: quantised GGUF") {
  TempFolder folder;
  Config c = small_config();
  c.hidden_size = 256, c.moe_intermediate_size = c.shared_expert_intermediate_size = 32;
  c.head_dim = 32, c.linear_value_head_dim = 16, c.linear_num_value_heads = 4;
  const Tensors g = gguf_tensors(c, hf_tensors(c));
  GgufWriter out(folder / "q.gguf");
  set_gguf_config(out, c);
  const auto type_of = [](const std::string& name, const Tensor& tensor) {
    const bool small = tensor.shape.rank == 1 || name.find("conv1d") != name.npos;
    return small ? DType::f32 : tensor.shape[tensor.shape.rank - 1] % 256 == 0 ? DType::q4_k : DType::q8_0;
  };
  for (const auto& [name, tensor] : g) out.add_tensor(name, tensor.shape, type_of(name, tensor));
  out.begin();
  for (const auto& [name, tensor] : g) {
    const std::string bytes = packed(type_of(name, tensor), tensor.values);
    out.write(std::as_bytes(std::span(bytes)));
  }
  out.finish();
  const Checkpoint checkpoint = Checkpoint::open(folder / "q.gguf");
  CHECK(checkpoint.copies.empty());
  CHECK(checkpoint.weights.layers[0].linear_attn->in_proj_b.type == DType::q4_k);
  const WeightView& up = checkpoint.weights.layers[0].mlp.experts[2].up;
  const Tensor& exps = g.at("blk.0.ffn_up_exps.weight");
  const std::vector<float> found = floats(up);
  float worst = 0;
  for (std::size_t i = 0; i < found.size(); ++i)
    worst = std::max(worst, std::abs(found[i] - exps.values[2 * found.size() + i]));
  CHECK(worst < 0.3f);  // of values in -2..2
}

TEST_CASE("bind: any type anywhere, several in a layer, in one file or in three") {
  TempFolder folder;
  Config c = small_config();
  c.hidden_size = 256, c.moe_intermediate_size = 64, c.shared_expert_intermediate_size = 256;
  c.head_dim = 64, c.rotary_dim = 16, c.linear_value_head_dim = 32, c.linear_num_value_heads = 4;
  Tensors tensors = gguf_tensors(c, hf_tensors(c)), meant = tensors;
  struct Stored {
    std::string name;
    Shape shape;
    DType type;
    std::string bytes;
  };
  std::vector<Stored> stored;
  std::size_t turn = 0;
  for (auto& [name, tensor] : meant) {
    DType type = DType::f32;
    for (bool found = false; !found;) {
      const DTypeInfo& next = dtype_table[turn++ % dtype_table.size()];
      const bool vector = tensor.shape.rank == 1 || name.ends_with("conv1d.weight");
      found = next.ggml_id != no_ggml_id && fits_blocks(next.type, tensor.shape[tensor.shape.rank - 1]) &&
              (!vector || !next.quantised);
      if (found) type = next.type;
    }
    const std::string bytes = packed(type, tensor.values);
    stored.push_back({name, tensor.shape, type, bytes});
    dequantize_row(type, reinterpret_cast<const std::byte*>(bytes.data()), tensor.values.data(),
                   static_cast<std::int64_t>(tensor.values.size()));
  }
  write_gguf(folder / "meant.gguf", c, meant);
  const auto expected = all_values(Checkpoint::open(folder / "meant.gguf").weights);
  for (const std::size_t parts : {std::size_t{1}, std::size_t{3}}) {
    for (std::size_t part = 0; part < parts; ++part) {
      GgufWriter out(folder / (parts == 1 ? "m.gguf" : concat("m-0000", part + 1, "-of-00003.gguf")));
      if (part == 0) set_gguf_config(out, c);
      if (parts > 1) {
        out.set_u16("split.no", static_cast<std::uint16_t>(part)), out.set_u16("split.count", 3);
        out.set_i32("split.tensors.count", static_cast<std::int32_t>(stored.size()));
      }
      const auto mine = std::span(stored).subspan(part * stored.size() / parts,
                                                  (part + 1) * stored.size() / parts - part * stored.size() / parts);
      for (const Stored& t : mine) out.add_tensor(t.name, t.shape, t.type);
      out.begin();
      for (const Stored& t : mine) out.write(std::as_bytes(std::span(t.bytes)));
      out.finish();
    }
    const Checkpoint checkpoint = Checkpoint::open(folder / (parts == 1 ? "m.gguf" : "m-00001-of-00003.gguf"));
    CHECK(checkpoint.files.size() == parts);
    CHECK(all_values(checkpoint.weights) == expected);
  }
}

TEST_CASE("bind: missing, unexpected, misshapen and unsupported tensors are named") {
  TempFolder folder;
  const Config c = small_config();
  const Tensors t = hf_tensors(c), g = gguf_tensors(c, t);
  const auto hf = [&](auto change, const std::string& part) {
    Tensors changed = t;
    change(changed);
    CHECK(contains(error_of([&] { open_hf(folder, c, changed); }), part));
  };
  const auto gguf = [&](auto change, const std::string& part) {
    Tensors changed = g;
    change(changed);
    CHECK(contains(error_of([&] { open_gguf(folder, c, changed); }), part));
  };
  const Tensor one{{1}, {0}};
  hf([](Tensors& x) { x.erase("model.norm.weight"); },
     "hf: 1 tensor missing (model.norm.weight); the files are incompl");
  hf([](Tensors& x) { x.erase("model.layers.0.linear_attn.in_proj_qkvz.weight"); },
     "1 tensor missing (model.layers.0.linear_attn.in_proj_qkvz.weight)");
  hf([](Tensors& x) { std::erase_if(x, [](auto& e) { return e.first.find("experts.1.") != e.first.npos; }); },
     "15 tensors missing (model.layers.0.mlp.experts.1.gate_proj.weight, ");
  hf([](Tensors& x) { x.erase("mtp.fc.weight"); }, "1 tensor missing (mtp.fc.weight)");
  hf([](Tensors& x) { std::erase_if(x, [](auto& e) { return e.first.starts_with("mtp.layers"); }); },
     "tensors missing (mtp.");
  hf([&](Tensors& x) { x["mtp.layers.1.input_layernorm.weight"] = one; },
     "1 tensor unexpected (mtp.layers.1.input_lay");
  hf([&](Tensors& x) { x["model.layers.3.self_attn.q_proj.bias"] = one; },
     "unexpected (model.layers.3.self_attn.q_proj.bias); this");
  hf([&](Tensors& x) { rename(x, "model.norm.weight", "norm.weight", {20}); },
     "1 tensor missing (model.norm.weight); 1 tensor unexpected (norm.weight)");
  hf([&](Tensors& x) { x["model.norm.weight"] = one; }, "tensor model.norm.weight is [1], expected [20] by the config");
  hf([&](Tensors& x) { x["model.layers.0.mlp.switch_mlp.gate_proj.weight"] = one; }, "it is an MLX conversion");
  hf([&](Tensors& x) { x["model.layers.0.mlp.gate.weight_scale_inv"] = one; },
     "has model.layers.0.mlp.gate.weight_scale_inv, but model.layers.0.mlp.gate.weight is F32, expected F8_E4M3");
  hf([&](Tensors& x) { x["model.layers.0.mlp.gate.qweight"] = one; }, "GPTQ");
  hf(
      [&](Tensors& x) {  // MLX's convolution, if it gets that far
        Tensor& conv = x.at("model.layers.0.linear_attn.conv1d.weight");
        conv.shape = {conv.shape[0], 3, 1};
      },
      "has model.layers.0.linear_attn.conv1d.weight [46, 3, 1], so it is an MLX conversion");
  hf([&](Tensors& x) { x["model.embed_tokens.scales"] = one; }, "it is an MLX conversion");
  gguf([](Tensors& x) { x.erase("blk.1.attn_gate.weight"); }, "1 tensor missing (blk.1.attn_gate.weight)");
  gguf([](Tensors& x) { x.erase("token_embd.weight"); }, "no matrix token_embd.weight");
  gguf([](Tensors& x) { x.erase("blk.4.nextn.enorm.weight"); }, "missing (blk.4.nextn.enorm.weight)");
  gguf([&](Tensors& x) { x["rope_freqs.weight"] = one; }, "1 tensor unexpected (rope_freqs.weight)");
  for (const char* other : {"blk.0.ssm_beta.weight", "blk.1.ssm_alpha.weight", "blk.2.ssm_dt"}) {
    gguf([&](Tensors& x) { x[other] = one; },
         concat("m.gguf: has ", other, ", which only conversions with another order"));
  }
  // llama.cpp falls back to output_norm
  Tensors without_norm = g;
  without_norm.erase("blk.4.nextn.shared_head_norm.weight");
  const Checkpoint fallback = open_gguf(folder, c, without_norm);
  CHECK(fallback.weights.mtp->norm.data == fallback.weights.norm.data);

  // types
  write_hf(folder / "hf", c, t);
  std::string text = read_text(folder / "hf/model.safetensors");
  const std::size_t at = text.find("F32", text.find("\"lm_head.weight\""));
  text.replace(at, 3, "I32");
  write_text(folder / "hf/model.safetensors", text);
  CHECK(contains(error_of([&] { Checkpoint::open(folder / "hf"); }),
                 "model.safetensors: tensor lm_head.weight is I32, expected F32, F16, BF16 or F8_E4M3"));
}

TEST_CASE("bind: scales beside the tensors of a GGUF multiply them") {
  TempFolder folder;
  const Config c = small_config();
  const Tensors plain = gguf_tensors(c, hf_tensors(c));
  Tensors scaled = plain, expected = plain;
  const auto scale = [&](const std::string& stem, const std::vector<float>& factors) {
    scaled[stem + ".scale"] = {{static_cast<std::int64_t>(factors.size())}, factors};
    scaled[stem + ".input_scale"] = {{static_cast<std::int64_t>(factors.size())},
                                     std::vector<float>(factors.size(), 9)};
    std::vector<float>& values = expected.at(stem + ".weight").values;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] *= factors[i / (values.size() / factors.size())];
  };
  scale("blk.0.attn_qkv", {0.5f});
  scale("blk.0.attn_gate", {0.25f});
  scale("blk.0.ssm_out", {3});
  scale("blk.3.attn_q", {0.75f});
  scale("blk.1.ffn_gate_exps", {1, 2, 3});
  scale("blk.1.ffn_down_exps", {-1, 0.5f, 0});
  scale("blk.2.ffn_up_shexp", {1.5f});
  scale("blk.4.nextn.eh_proj", {5});
  scale("output", {7});
  const Checkpoint checkpoint = open_gguf(folder, c, scaled);
  const auto values = all_values(checkpoint.weights);
  quantize(checkpoint, folder / "again.gguf", {.type = "F32"});  // written out
  write_gguf(folder / "expected.gguf", c, expected);
  CHECK(values == all_values(Checkpoint::open(folder / "expected.gguf").weights));
  CHECK(values == all_values(Checkpoint::open(folder / "again.gguf").weights));

  const auto refused = [&](const std::string& name, const Tensor& tensor, const std::string& part) {
    Tensors bad = plain;
    bad[name] = tensor;
    CHECK(contains(error_of([&] { open_gguf(folder, c, bad); }), part));
  };
  refused("blk.1.ffn_gate_exps.scale", {{1}, {1}}, "ffn_gate_exps.scale is [1], expected [3]: a scale for each matrix");
  refused("blk.3.attn_q.scale", {{2}, {1, 1}}, "attn_q.scale is [2], expected [1]");
  refused("blk.3.attn_norm.scale", {{1}, {1}}, "1 tensor unexpected (blk.3.attn_norm.scale)");
  write_gguf(
      folder / "m.gguf", c,
      [&] {
        Tensors all = plain;
        all["blk.3.attn_q.scale"] = {{1}, {1}};
        return all;
      }(),
      DType::bf16);
  CHECK(contains(error_of([&] { Checkpoint::open(folder / "m.gguf"); }), "attn_q.scale is BF16, expected F32"));
}

TEST_CASE("bind: types that GGUF knows and this program does not are refused by name") {
  TempFolder folder;
  const Config c = small_config();
  write_gguf(folder / "m.gguf", c, gguf_tensors(c, hf_tensors(c)));
  const std::string good = read_text(folder / "m.gguf");
  const std::string name = "blk.0.ffn_down_shexp.weight";
  const std::size_t ne_at = good.find(raw_u64(name.size()) + name) + 8 + name.size() + 4;
  int codebooks = 0;
  for (const GgmlType& type : ggml_types) {
    if (dtype_of_ggml(type.id)) continue;
    std::string bad = good;  // one block
    const std::uint64_t ne[2] = {type.bytes > 0 ? static_cast<std::uint64_t>(type.elements) : 32, 1};
    std::memcpy(bad.data() + ne_at, ne, sizeof ne);
    std::memcpy(bad.data() + ne_at + sizeof ne, &type.id, sizeof type.id);
    write_text(folder / "bad.gguf", bad);
    const std::string message = error_of([&] { Checkpoint::open(folder / "bad.gguf"); });
    if (type.bytes == 0) {
      CHECK(contains(message, concat("tensor ", name, " has type ", type.name, ", which GGUF has withdrawn; convert")));
      continue;
    }
    CHECK(contains(message, concat("tensor ", name, " is ", type.name, ", expected F32, F16, BF16, Q4_0")));
    CHECK(contains(message, "use another file of the model"));
    codebooks += message.find("; codebook types of 1 to 3 bits are not supported") != message.npos;
  }
  CHECK(codebooks == 9);  // IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0
}

TEST_CASE("bind: a config that claims billions of tensors costs no more than the files hold") {
  Config c = small_config();
  json config = hf_config_json(c);
  config["num_hidden_layers"] = 4096, config["num_experts"] = 65536;
  config["layer_types"] = nullptr;
  TempFolder folder;
  write_text(folder / "config.json", config.dump());
  write_safetensors(folder / "model.safetensors", {{"model.embed_tokens.weight", {{50, 20}, std::vector<float>(1000)}}},
                    DType::bf16);
  const auto start = std::chrono::steady_clock::now();
  CHECK(contains(error_of([&] { Checkpoint::open(folder.path()); }), "1026 tensors or more missing (model.layers.0."));
  CHECK(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < 5);
}

TEST_CASE("bind: tied embeddings") {
  TempFolder folder;
  Config c = small_config();
  Tensors t = hf_tensors(c);
  c.tie_word_embeddings = true;  // says the config, and a duplicate of no account is in the file
  const Checkpoint duplicate = open_hf(folder, c, t);
  CHECK(duplicate.config.tie_word_embeddings);
  CHECK(duplicate.weights.lm_head.data == duplicate.weights.embed_tokens.data);
  c.tie_word_embeddings = false;  // says the config, but there is no head
  t.erase("lm_head.weight");
  CHECK(open_hf(folder, c, t).config.tie_word_embeddings);
}

TEST_CASE("checkpoint: paths that are none") {
  TempFolder folder;
  const auto open = [&](const std::string& name) { return error_of([&] { Checkpoint::open(folder / name); }); };
  CHECK(contains(open("none"), "none: no such file or folder"));
  fs::create_directories(folder / "empty");
  CHECK(contains(open("empty"), "no config.json in this folder"));
  write_text(folder / "model.safetensors", "x");
  CHECK(contains(open("model.safetensors"), "give its folder instead"));
  write_text(folder / "text", "hello");
  CHECK(contains(open("text"), "not a GGUF file"));
}

TEST_CASE("checkpoint: the goldens open") {
  int opened = 0;
  for (const auto& entry : fs::directory_iterator(fs::path(QWEN3NEXT_SOURCE_DIR) / "tests/golden/model")) {
    if (!fs::exists(entry.path() / "config.json")) continue;
    CAPTURE(entry.path());
    const Checkpoint checkpoint = Checkpoint::open(entry.path());
    CHECK(checkpoint.weights.layers.size() == static_cast<std::size_t>(checkpoint.config.num_hidden_layers));
    ++opened;
  }
  CHECK(opened >= 4);
}

TEST_CASE("checkpoint: damaged files are errors or models, never a crash") {
  TempFolder folder;
  Config c = small_config();
  c.num_hidden_layers = 2, c.layer_types = {LayerType::linear_attention, LayerType::full_attention};
  c.num_experts = 2, c.has_mtp = false;
  const Tensors t = hf_tensors(c);
  write_hf(folder / "hf", c, t), write_gguf(folder / "m.gguf", c, gguf_tensors(c, t));
  std::mt19937 rng(7);
  const auto try_open = [](const fs::path& path) {
    try {
      (void)all_values(Checkpoint::open(path).weights);
    } catch (const Error&) {
    }
  };
  const auto damage = [&](const fs::path& file, const fs::path& model, std::size_t header) {
    const std::string good = read_text(file);
    header = std::min(header, good.size());
    for (int i = 0; i < 1500; ++i) {
      std::string bad = good;
      for (auto n = 1 + rng() % 3; n-- > 0;) {
        const std::size_t at = rng() % header;
        if (rng() % 2)
          bad[at] = static_cast<char>(bad[at] ^ (1 << rng() % 8));
        else
          bad[at] = static_cast<char>(rng());
      }
      if (rng() % 8 == 0) bad.resize(rng() % bad.size());
      write_text(file, bad);
      try_open(model);
    }
    write_text(file, good);
    try_open(model);
  };
  const std::string st = read_text(folder / "hf/model.safetensors");
  std::uint64_t header = 0;
  std::memcpy(&header, st.data(), 8);
  damage(folder / "hf/model.safetensors", folder / "hf", static_cast<std::size_t>(header) + 8);
  damage(folder / "hf/config.json", folder / "hf", 100000);
  damage(folder / "m.gguf", folder / "m.gguf", 4096);
}
