#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "tests/weights/fixtures.hpp"
#include "weights/checkpoint.hpp"
#include "weights/quantize.hpp"
#include "weights/quantize_plan.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

fs::path golden_model(const std::string& name) { return fs::path(QWEN3NEXT_SOURCE_DIR) / "tests/golden/model" / name; }

// Every tensor of a checkpoint as floats, in the order of model/weights.hpp.
std::vector<std::vector<float>> all_floats(const Checkpoint& checkpoint) {
  std::vector<std::vector<float>> out;
  ModelWeights<Views> unused;
  zip(checkpoint.weights, unused, [&](const auto& from, auto&) { out.push_back(floats(from)); });
  return out;
}

void check_near(const Checkpoint& a, const Checkpoint& b, double bound) {
  const auto x = all_floats(a), y = all_floats(b);
  REQUIRE(x.size() == y.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    CAPTURE(i);
    REQUIRE(x[i].size() == y[i].size());
    double error = 0, square = 0;
    for (std::size_t j = 0; j < x[i].size(); ++j) {
      const double e = static_cast<double>(x[i][j]) - static_cast<double>(y[i][j]);
      error += e * e;
      square += static_cast<double>(x[i][j]) * static_cast<double>(x[i][j]);
    }
    CHECK(error <= bound * bound * square);
  }
}

const TensorRecord* record(const Checkpoint& checkpoint, const std::string& name) {
  for (const TensorRecord& r : checkpoint.records) {
    if (r.name == name) return &r;
  }
  return nullptr;
}

std::size_t files_in(const fs::path& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

}  // namespace

TEST_CASE("a GGUF of the source's own type holds the same model") {
  const std::map<std::string, std::string> types{
      {"release", "BF16"}, {"yarn", "BF16"}, {"fused", "F32"}, {"sharded", "F16"}};
  for (const auto& [source, type] : types) {
    const std::string name = source;
    CAPTURE(name);
    const TempFolder folder;
    const Checkpoint in = Checkpoint::open(golden_model(name));
    const QuantizeSummary summary = quantize(in, folder / "out.gguf", {.type = type});
    const Checkpoint out = Checkpoint::open(folder / "out.gguf");
    check_near(in, out, 0);
    CHECK(summary.fallbacks.empty());
    CHECK(summary.file_bytes == fs::file_size(folder / "out.gguf"));
    CHECK(out.config.has_mtp == in.config.has_mtp);
    CHECK(out.config.tie_word_embeddings == in.config.tie_word_embeddings);
    CHECK(out.config.layer_types == in.config.layer_types);
    CHECK(out.metadata.get<std::string_view>("general.name") == name);
    CHECK(!out.metadata.has("general.alignment"));
    std::uint64_t end = out.records.front().offset;
    for (const TensorRecord& r : out.records) {  // contiguous but for rounding up, as llama.cpp demands
      CHECK(r.offset == end);
      if (r.bytes % GgufWriter::data_alignment == 0) CHECK(r.offset % GgufWriter::data_alignment == 0);
      end = r.offset + (r.bytes + GgufWriter::alignment - 1) / GgufWriter::alignment * GgufWriter::alignment;
    }
    CHECK(end == fs::file_size(folder / "out.gguf"));

    quantize(out, folder / "again.gguf", {.type = type});
    check_near(in, Checkpoint::open(folder / "again.gguf"), 0);
    CHECK(read_text(folder / "again.gguf") == read_text(folder / "out.gguf"));
  }
}

TEST_CASE("tensors have llama.cpp's names and shapes") {
  const TempFolder folder;
  const Checkpoint in = Checkpoint::open(golden_model("release"));
  quantize(in, folder / "out.gguf", {.type = "BF16"});
  const Checkpoint out = Checkpoint::open(folder / "out.gguf");
  const Config& c = in.config;
  const auto check = [&](const std::string& name, const std::string& dtype, const Shape& shape) {
    CAPTURE(name);
    const TensorRecord* r = record(out, name);
    REQUIRE(r);
    CHECK(r->dtype == dtype);
    CHECK(r->shape.text() == shape.text());
  };
  const int H = c.hidden_size;
  check("token_embd.weight", "BF16", {c.vocab_size, H});
  check("output.weight", "BF16", {c.vocab_size, H});
  check("output_norm.weight", "F32", {H});
  check("blk.0.attn_qkv.weight", "BF16", {c.conv_dim(), H});
  check("blk.0.attn_gate.weight", "BF16", {c.value_dim(), H});
  check("blk.0.ssm_ba.weight", "BF16", {2 * c.linear_num_value_heads, H});
  check("blk.0.ssm_conv1d.weight", "F32", {c.conv_dim(), c.linear_conv_kernel_dim});
  check("blk.0.ssm_a", "F32", {c.linear_num_value_heads});
  check("blk.0.ssm_dt.bias", "F32", {c.linear_num_value_heads});
  check("blk.0.ffn_gate_inp.weight", "F32", {c.num_experts, H});
  check("blk.0.ffn_down_exps.weight", "BF16", {c.num_experts, H, c.moe_intermediate_size});
  check("blk.0.ffn_gate_inp_shexp.weight", "F32", {H});
  check("blk.3.attn_q.weight", "BF16", {2 * c.attention_dim(), H});
  const std::string mtp = "blk." + std::to_string(c.num_hidden_layers) + ".";
  check(mtp + "nextn.eh_proj.weight", "BF16", {H, 2 * H});
  check(mtp + "nextn.shared_head_norm.weight", "F32", {H});
  check(mtp + "attn_v.weight", "BF16", {c.kv_dim(), H});
  CHECK(out.metadata.get<std::int64_t>("general.file_type") == 32);
  CHECK(out.metadata.get<std::int64_t>("general.quantization_version") == 2);
}

TEST_CASE("rows that are not whole blocks fall back, and the summary says so") {
  const TempFolder folder;
  const Checkpoint in = Checkpoint::open(golden_model("yarn"));  // hidden 32, experts 16 wide
  const QuantizeSummary summary = quantize(in, folder / "out.gguf", {.type = "Q4_K_M", .measure = true});
  const Checkpoint out = Checkpoint::open(folder / "out.gguf");
  check_near(in, out, 0.012);
  CHECK(record(out, "blk.0.ffn_gate_exps.weight")->dtype == "Q8_0");
  CHECK(record(out, "blk.0.ffn_down_exps.weight")->dtype == "F16");
  CHECK_FALSE(summary.fallbacks.empty());
  for (const Fallback& f : summary.fallbacks) {
    CAPTURE(f.name);
    CHECK(f.used == *record(out, f.name)->type);
    CHECK(f.wanted != f.used);
  }
  std::size_t tensors = 0;
  for (const auto& per : summary.types) {
    tensors += per.tensors;
    if (per.type == DType::q8_0) CHECK(*per.relative_rmse == doctest::Approx(0.005).epsilon(0.5));
  }
  CHECK(tensors == out.records.size());
}

TEST_CASE("the mixture gives bits to what needs them") {
  // Only the plan: views of the 80B's shapes that point nowhere.
  Config c;
  c.layer_types = interval_layer_types(c.num_hidden_layers, 4);
  c.has_mtp = true;
  c.num_experts = 2;
  static const std::byte nowhere{};
  const auto matrix = [&](int rows, int cols) { return WeightView::contiguous(&nowhere, DType::bf16, rows, cols); };
  ModelWeights<Views> w;
  const int H = c.hidden_size, I = c.moe_intermediate_size;
  const auto fill_layer = [&](LayerWeights<Views>& l, bool full) {
    if (full) {
      auto& a = l.self_attn.emplace();
      a.q_proj = a.gate_proj = matrix(c.attention_dim(), H);
      a.k_proj = a.v_proj = matrix(c.kv_dim(), H);
      a.o_proj = matrix(H, c.attention_dim());
      a.q_norm.size = a.k_norm.size = c.head_dim;
    } else {
      auto& d = l.linear_attn.emplace();
      d.in_proj_q = d.in_proj_k = matrix(c.key_dim(), H);
      d.in_proj_v = d.in_proj_z = matrix(c.value_dim(), H);
      d.in_proj_b = d.in_proj_a = matrix(c.linear_num_value_heads, H);
      d.out_proj = matrix(H, c.value_dim());
      d.conv1d.size = c.conv_dim() * c.linear_conv_kernel_dim;
      d.conv1d.cols = c.linear_conv_kernel_dim;
      d.A.size = d.dt_bias.size = c.linear_num_value_heads;
      d.norm.size = c.linear_value_head_dim;
    }
    l.input_layernorm.size = l.post_attention_layernorm.size = H;
    l.mlp.gate = matrix(c.num_experts, H);
    l.mlp.experts.assign(2, {matrix(I, H), matrix(I, H), matrix(H, I)});
    l.mlp.shared_gate_proj = l.mlp.shared_up_proj = matrix(I, H);
    l.mlp.shared_down_proj = matrix(H, I);
    l.mlp.shared_expert_gate = matrix(1, H);
  };
  w.embed_tokens = w.lm_head = matrix(c.vocab_size, H);
  w.norm.size = H;
  w.layers.resize(48);
  for (int i = 0; i < 48; ++i) fill_layer(w.layers[static_cast<std::size_t>(i)], c.full_attention(i));
  auto& mtp = w.mtp.emplace();
  fill_layer(mtp.layer, true);
  mtp.fc = matrix(H, 2 * H), mtp.embed_tokens = w.embed_tokens, mtp.lm_head = w.lm_head;
  mtp.pre_fc_norm_embedding.size = mtp.pre_fc_norm_hidden.size = mtp.norm.size = H;

  const QuantizePlan plan = plan_quantization(c, w, find_mix("Q4_K_M"), {{"ssm_out", DType::q5_k}});
  CHECK(plan.tensors.size() == 843 + 20);
  CHECK(plan.fallbacks.empty());
  std::map<std::string, DType> type;
  int down_q6 = 0;
  std::uint64_t offset = 0;
  for (const PlannedTensor& t : plan.tensors) {
    type[t.name] = t.type;
    down_q6 += t.name.find("ffn_down_exps") != std::string::npos && t.type == DType::q6_k;
    const bool aligned = offset % GgufWriter::data_alignment == 0;
    if (t.shape.rank == 3) CHECK((aligned && t.bytes() / 2 % GgufWriter::data_alignment == 0));  // expert slices
    offset += t.bytes() + (GgufWriter::alignment - t.bytes() % GgufWriter::alignment) % GgufWriter::alignment;
    if (t.name.starts_with("blk.48.") && t.shape.rank > 1 && t.role != Role::exact) {
      CHECK((t.type == DType::q5_k || t.type == DType::q6_k));
    }
  }
  CHECK(down_q6 == 24 + 1);
  CHECK(type["token_embd.weight"] == DType::q4_k);
  CHECK(type["output.weight"] == DType::q6_k);
  CHECK(type["blk.0.attn_qkv.weight"] == DType::q6_k);
  CHECK(type["blk.9.ffn_down_exps.weight"] == DType::q4_k);
  CHECK(type["blk.0.ssm_out.weight"] == DType::q5_k);
  CHECK(type["blk.0.ffn_gate_inp.weight"] == DType::f32);

  // The other mixtures where they differ, by file type and types of a layer each.
  const auto types_of = [&](std::string_view mix) {
    std::map<std::string, DType> types;
    for (const PlannedTensor& t : plan_quantization(c, w, find_mix(mix), {}).tensors) {
      types[t.name] = t.type;
      if (t.name.starts_with("blk.48.") && t.role != Role::exact) {
        CHECK(8.0 * info(t.type).bytes / info(t.type).elements >= 5);
      }
    }
    return types;
  };
  using enum DType;
  const auto check = [&](std::string_view mix, std::uint32_t file_type, const std::map<std::string, DType>& expected) {
    CAPTURE(mix);
    CHECK(find_mix(mix).file_type == file_type);
    const auto types = types_of(mix);
    for (const auto& [name, wanted] : expected) {
      CAPTURE(name);
      CHECK(types.at(name) == wanted);
    }
  };
  check("Q4_0", 2,
        {{"token_embd.weight", q4_0},
         {"output.weight", q6_k},
         {"blk.3.attn_v.weight", q4_0},
         {"blk.5.ffn_down_exps.weight", q4_1},
         {"blk.6.ffn_down_exps.weight", q4_0},
         {"blk.6.ssm_ba.weight", q8_0},
         {"blk.47.ffn_up_exps.weight", q4_0},
         {"blk.48.ffn_up_exps.weight", q5_k}});
  check("IQ4_NL", 25,
        {{"token_embd.weight", iq4_nl},
         {"output.weight", q6_k},
         {"blk.47.attn_v.weight", q5_k},
         {"blk.0.ffn_down_exps.weight", q5_k},
         {"blk.6.ffn_down_exps.weight", iq4_nl},
         {"blk.7.attn_q.weight", iq4_nl}});
  check("MXFP4", 38,
        {{"token_embd.weight", q8_0},
         {"output.weight", q8_0},
         {"blk.0.attn_qkv.weight", q8_0},
         {"blk.0.ffn_gate_exps.weight", mxfp4},
         {"blk.0.ffn_down_exps.weight", mxfp4},
         {"blk.0.ffn_down_shexp.weight", q8_0},
         {"blk.48.ffn_down_exps.weight", q6_k},
         {"blk.48.ffn_up_exps.weight", q5_k},
         {"blk.48.nextn.eh_proj.weight", q6_k}});

  // Every mixture keeps the experts' slices aligned, and makes of the 80B what `quantize --help` says, in GiB.
  const std::map<std::string_view, double> sizes{{"BF16", 151.6},  {"Q8_0", 80.6},   {"Q6_K", 62.3},
                                                 {"Q5_K_M", 54.0}, {"Q4_K_M", 46.3}, {"IQ4_NL", 43.6},
                                                 {"Q4_0", 43.3},   {"MXFP4", 41.9},  {"Q3_K_M", 36.6}};
  for (const Mix& mix : mixes) {
    CAPTURE(mix.name);
    std::uint64_t at = 0;
    double total = 0;
    for (const PlannedTensor& t : plan_quantization(c, w, mix, {}).tensors) {
      if (t.shape.rank == 3) {
        CHECK(at % GgufWriter::data_alignment == 0);
        CHECK(t.bytes() / 2 % GgufWriter::data_alignment == 0);
      }
      at += t.bytes() + (GgufWriter::alignment - t.bytes() % GgufWriter::alignment) % GgufWriter::alignment;
      const bool per_expert = t.shape.rank == 3 || t.name.ends_with("ffn_gate_inp.weight");
      total += static_cast<double>(t.bytes()) * (per_expert ? 512 / 2 : 1);
    }
    if (const auto size = sizes.find(mix.name); size != sizes.end()) {
      CHECK(total / 0x1p30 == doctest::Approx(size->second).epsilon(0.001));
    }
  }

  c.tie_word_embeddings = true;
  const QuantizePlan tied = plan_quantization(c, w, find_mix("Q4_K_M"), {});
  CHECK(tied.tensors.size() == 843 + 20 - 1);
  const auto embedding = std::ranges::find(tied.tensors, "token_embd.weight", &PlannedTensor::name);
  CHECK(embedding->type == DType::q6_k);
}

TEST_CASE("a split source gives the same file") {
  const TempFolder folder;
  quantize(Checkpoint::open(golden_model("release")), folder / "whole.gguf", {.type = "BF16"});
  const Checkpoint whole = Checkpoint::open(folder / "whole.gguf");
  const std::size_t half = whole.records.size() / 2, all = whole.records.size();
  for (const int part : {0, 1}) {
    GgufWriter out(folder / (part == 0 ? "part-00001-of-00002.gguf" : "part-00002-of-00002.gguf"));
    if (part == 0) {
      for (const GgufKv& kv : whole.metadata.all()) out.copy(kv);
    }
    out.set_u16("split.no", static_cast<std::uint16_t>(part));
    out.set_u16("split.count", 2);
    out.set_i32("split.tensors.count", static_cast<std::int32_t>(all));
    const auto records = std::span(whole.records).subspan(part == 0 ? 0 : half, part == 0 ? half : all - half);
    for (const TensorRecord& r : records) out.add_tensor(r.name, r.shape, *r.type);
    out.begin();
    for (const TensorRecord& r : records) out.write({r.data, static_cast<std::size_t>(r.bytes)});
    out.finish();
  }
  const Checkpoint parts = Checkpoint::open(folder / "part-00001-of-00002.gguf");
  CHECK(parts.files.size() == 2);
  for (const char* type : {"Q8_0", "Q4_K_M", "MXFP4"}) {
    quantize(whole, folder / "a.gguf", {.type = type, .threads = 1, .overwrite = true});
    quantize(parts, folder / "b.gguf", {.type = type, .threads = 3, .overwrite = true});
    CHECK(read_text(folder / "a.gguf") == read_text(folder / "b.gguf"));
  }
}

#ifdef __unix__
// A run that was killed when about `bytes` were written: what it leaves is what lies there at that moment.
std::string killed_run(const Checkpoint& in, const fs::path& out, const QuantizeOptions& options, std::uint64_t bytes) {
  fs::path part = out;
  part += quantize_suffix;
  std::string left;
  CHECK_THROWS_AS(quantize(in, out, options,
                           [&](const QuantizeProgress& p) {
                             if (p.bytes_written < bytes) return true;
                             left = read_text(part);
                             return false;
                           }),
                  Cancelled);
  CHECK(!fs::exists(part));
  return left;
}

TEST_CASE("what a killed run left is gone on with, and the result is the same") {
  const TempFolder folder;
  const fs::path tiny = fs::path(QWEN3NEXT_SOURCE_DIR) / "weights/tiny/qwen3next-tiny.gguf", out = folder / "out.gguf";
  const fs::path part = folder / ("out.gguf" + std::string(quantize_suffix));
  const Checkpoint in = Checkpoint::open(tiny);
  const std::uint64_t MiB = 1 << 20;
  const QuantizeOptions options{.type = "BF16", .sync_bytes = MiB};
  const QuantizeSummary straight = quantize(in, out, options);
  CHECK(straight.resumed_bytes == 0);
  const std::string expected = read_text(out);
  const std::uint64_t data = Checkpoint::open(out).records.front().offset;
  REQUIRE(expected.size() > 100 * MiB);
  fs::remove(out);

  const std::string left = killed_run(in, out, options, 60 * MiB);
  CHECK(left.size() > 60 * MiB);
  const auto go_on = [&](const std::string& from, const QuantizeOptions& with) {
    write_text(part, from);
    std::uint64_t first = 0;
    const QuantizeSummary summary = quantize(in, out, with, [&](const QuantizeProgress& p) {
      if (first == 0) first = p.bytes_read;
      return true;
    });
    if (summary.resumed_bytes > 0) CHECK(first == summary.bytes_skipped);
    CHECK(files_in(folder.path()) == 1);
    if (with.type == "BF16") CHECK(read_text(out) == expected);
    fs::remove(out);
    return summary.resumed_bytes;
  };
  const std::uint64_t resumed = go_on(left, options);
  CHECK(resumed > 40 * MiB);
  CHECK(resumed < left.size());
  CHECK(go_on(expected, options) > 90 * MiB);  // killed just before the end

  // Only what is surely the same job, and surely on the disk.
  CHECK(go_on(left.substr(0, 40 * MiB), options) < 40 * MiB);
  CHECK(go_on(left, {.type = "BF16"}) == 0);  // its last 256 MiB may not be
  CHECK(go_on(left, {.type = "BF16", .threads = 1, .sync_bytes = MiB}) == resumed);
  CHECK(go_on(left, {.type = "Q8_0", .sync_bytes = MiB}) == 0);  // other types
  CHECK(go_on(left.substr(0, 2 * MiB), options) == 0);           // less than a batch
  CHECK(go_on("not a GGUF", options) == 0);
  std::string damaged = left;
  for (std::size_t i = data; i < data + 16; ++i) damaged[i] = '?';  // another source: the first row tells
  CHECK(go_on(damaged, options) == 0);
}

TEST_CASE("two runs do not write one file, and a source that shrinks is noticed") {
  const TempFolder folder;
  fs::copy(golden_model("release"), folder / "model");
  const Checkpoint in = Checkpoint::open(folder / "model");
  const fs::path out = folder / "out.gguf";
  std::string second;
  quantize(in, out, {.type = "BF16"}, [&](const QuantizeProgress&) {
    if (second.empty()) second = error_of([&] { quantize(in, out, {.type = "Q8_0"}); });
    return true;
  });
  CHECK(contains(second, "out.gguf.quantize.part: another process is writing it"));
  CHECK(Checkpoint::open(out).metadata.get<std::int64_t>("general.file_type") == 32);

  const std::string shrunk = error_of([&] {
    quantize(in, folder / "short.gguf", {.type = "BF16"}, [&](const QuantizeProgress&) {
      fs::resize_file(folder / "model/model.safetensors", 4096);
      return true;
    });
  });
  CHECK(contains(shrunk, "model.safetensors: was changed while it was in use"));
  CHECK(contains(shrunk, "4096 now"));
  CHECK(files_in(folder.path()) == 2);
}
#endif

TEST_CASE("threads do not show in the output") {
  const TempFolder folder;
  const Checkpoint in = Checkpoint::open(golden_model("sharded"));
  quantize(in, folder / "one.gguf", {.type = "Q8_0", .threads = 1});
  quantize(in, folder / "many.gguf", {.type = "Q8_0", .threads = 5});
  CHECK(read_text(folder / "one.gguf") == read_text(folder / "many.gguf"));
}

TEST_CASE("a cancelled quantisation leaves nothing behind") {
  const TempFolder folder;
  const Checkpoint in = Checkpoint::open(golden_model("release"));
  for (const int stop_at : {0, 1}) {
    int calls = 0;
    const auto progress = [&](const QuantizeProgress& p) {
      CHECK(p.bytes_read <= p.bytes_to_read);
      CHECK(p.bytes_written <= p.bytes_to_write);
      return calls++ < stop_at;
    };
    CHECK_THROWS_AS(quantize(in, folder / "out.gguf", {.type = "BF16"}, progress), Cancelled);
    CHECK(files_in(folder.path()) == 0);
  }
}

TEST_CASE("what cannot be done is refused") {
  const TempFolder folder;
  const Checkpoint in = Checkpoint::open(golden_model("release"));
  const fs::path out = folder / "out.gguf";
  const auto refusal = [&](const QuantizeOptions& options) { return error_of([&] { quantize(in, out, options); }); };
  CHECK(contains(refusal({.type = "Q4_X"}), "Q4_K_M"));
  CHECK(contains(refusal({.type = "BF16", .tensor_types = {{"(", DType::f16}}}), "regular expression"));
  CHECK(contains(refusal({.type = "BF16", .tensor_types = {{"attn_norm", DType::f16}}}), "matches no matrix"));
  CHECK(contains(refusal({.type = "BF16", .tensor_types = {{"output", DType::q4_k}}}), "whole blocks"));
  CHECK(contains(refusal({.type = "BF16", .threads = -1}), "threads"));
  CHECK(files_in(folder.path()) == 0);

  quantize(in, out, {.type = "BF16", .tensor_types = {{"ffn_.*_exps", DType::f32}}});
  CHECK(record(Checkpoint::open(out), "blk.1.ffn_up_exps.weight")->dtype == "F32");
  CHECK(contains(refusal({.type = "BF16"}), "exists already"));
  quantize(in, out, {.type = "BF16", .overwrite = true});
  const Checkpoint self = Checkpoint::open(out);
  CHECK(contains(error_of([&] { quantize(self, out, {.type = "BF16", .overwrite = true}); }), "the source itself"));
  CHECK(files_in(folder.path()) == 1);
}

TEST_CASE("values that no block can hold are named") {
  const TempFolder folder;
  const fs::path copy = folder / "model";
  fs::copy(golden_model("release"), copy);
  std::uint64_t offset = 0;
  {
    const Checkpoint in = Checkpoint::open(copy);
    offset = in.locate(in.weights.lm_head.data)->offset;
  }
  const auto with_value = [&](std::uint16_t bf16, const std::string& type) {
    std::fstream file(copy / "model.safetensors", std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(offset));
    file.write(reinterpret_cast<const char*>(&bf16), sizeof bf16);
    file.close();
    const Checkpoint in = Checkpoint::open(copy);
    const std::string message = error_of([&] { quantize(in, folder / "out.gguf", {.type = type}); });
    CHECK(contains(message, "output.weight"));
    CHECK(files_in(folder.path()) == 1);
    return message;
  };
  CHECK(contains(with_value(0x7fc0, "F16"), "not finite"));
  CHECK(contains(with_value(0x7f80, "Q8_0"), "not finite"));
  CHECK(contains(with_value(0x4980, "F16"), "too large"));
}
