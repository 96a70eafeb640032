// Files beyond 4 GiB: offsets, rows and sizes that do not fit 32 bits.  The files are sparse: they take kilobytes.

#include <doctest/doctest.h>

#include "tests/weights/fixtures.hpp"
#include "weights/checkpoint.hpp"

#if QWEN3NEXT_MMAP

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

constexpr std::int64_t vocabulary = 9'000'000;  // rows of 512 bytes: 4.3 GiB

Config tied_config() {
  Config c = small_config();
  c.hidden_size = 128, c.tie_word_embeddings = true, c.vocab_size = 1;
  return c;
}

// The row of the embeddings that is no hole.
std::vector<float> last_row() {
  std::vector<float> row(128);
  for (std::size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(i) - 64;
  return row;
}

// `head`, a hole of `hole` bytes, then `tail`.
void write_sparse(const fs::path& path, const std::string& head, std::int64_t hole, const std::string& tail) {
  write_text(path, head);
  fs::resize_file(path, head.size() + static_cast<std::uintmax_t>(hole) + tail.size());
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(head.size()) + hole);
  file.write(tail.data(), static_cast<std::streamsize>(tail.size()));
  REQUIRE(file.good());
}

void check(const Checkpoint& large, const Checkpoint& small) {
  const WeightView& e = large.weights.embed_tokens;
  REQUIRE(e.rows == vocabulary);
  CHECK(e.bytes() > std::uint64_t{1} << 32);
  std::vector<float> row(128);
  const auto row_of = [&](const WeightView& w, int r) {
    dequantize(w, r, row.data());
    return row;
  };
  CHECK(row_of(e, vocabulary - 1) == last_row());
  CHECK(row_of(e, vocabulary - 2) == std::vector<float>(128, 0.0f));
  CHECK(row_of(e.slice(vocabulary - 5, 5), 4) == last_row());
  CHECK(row_of(e.every(10, 8, 2), vocabulary / 5 - 1) == last_row());
  CHECK(large.locate(e.row(vocabulary - 1))->offset > std::uint64_t{1} << 32);
  CHECK(large.locate(large.weights.layers[2].mlp.experts[1].down.data)->offset > std::uint64_t{1} << 32);

  const auto rest = [](ModelWeights<Views> w) {
    for (WeightView* view : {&w.embed_tokens, &w.lm_head, &w.mtp->embed_tokens, &w.mtp->lm_head}) *view = {};
    return all_values(w);
  };
  CHECK(rest(large.weights) == rest(small.weights));
}

}  // namespace

TEST_CASE("large: a GGUF with tensors beyond 4 GiB") {
  TempFolder folder;
  const Config c = tied_config();
  Tensors tensors = gguf_tensors(c, hf_tensors(c));
  tensors["token_embd.weight"].values = last_row();
  {
    GgufWriter out(folder / "small.gguf");  // the embeddings first, so that all others lie behind them
    set_gguf_config(out, c);
    out.add_tensor("token_embd.weight", {1, 128}, DType::f32);
    for (const auto& [name, tensor] : tensors) {
      if (name != "token_embd.weight") out.add_tensor(name, tensor.shape, DType::f32);
    }
    out.begin();
    const auto write = [&](const Tensor& tensor) {
      const std::string bytes = packed(DType::f32, tensor.values);
      out.write(std::as_bytes(std::span(bytes)));
    };
    write(tensors.at("token_embd.weight"));
    for (const auto& [name, tensor] : tensors) {
      if (name != "token_embd.weight") write(tensor);
    }
    out.finish();
  }
  const Checkpoint small = Checkpoint::open(folder / "small.gguf");
  const auto data_begin = static_cast<std::size_t>(small.records.front().offset);
  std::string text = read_text(folder / "small.gguf"), header = text.substr(0, data_begin);
  constexpr std::int64_t hole = (vocabulary - 1) * 512;
  for (const auto& [name, tensor] : tensors) {  // name, rank, ne, type, offset
    const std::size_t at = header.find(raw_u64(name.size()) + name) + 8 + name.size();
    const auto patch = [&](std::size_t where, std::uint64_t value) { std::memcpy(header.data() + where, &value, 8); };
    const std::size_t offset_at = at + 4 + 8 * static_cast<std::size_t>(tensor.shape.rank) + 4;
    std::uint64_t offset;
    std::memcpy(&offset, header.data() + offset_at, 8);
    if (name == "token_embd.weight")
      patch(at + 4 + 8, vocabulary);
    else
      patch(offset_at, offset + hole);
  }
  write_sparse(folder / "large.gguf", header, hole, text.substr(data_begin));
  check(Checkpoint::open(folder / "large.gguf"), small);
}

TEST_CASE("large: safetensors with tensors beyond 4 GiB") {
  TempFolder folder;
  Config c = tied_config();
  Tensors tensors = hf_tensors(c);
  tensors["model.embed_tokens.weight"].values = last_row();
  write_hf(folder / "small", c, tensors);
  json header;
  std::string tail = packed(DType::f32, last_row());
  constexpr std::int64_t hole = (vocabulary - 1) * 512;
  header["model.embed_tokens.weight"] = {
      {"dtype", "F32"}, {"shape", {vocabulary, 128}}, {"data_offsets", {0, vocabulary * 512}}};
  for (const auto& [name, tensor] : tensors) {
    if (name == "model.embed_tokens.weight") continue;
    const auto begin = hole + static_cast<std::int64_t>(tail.size());
    tail += packed(DType::f32, tensor.values);
    std::vector<std::int64_t> shape(tensor.shape.span().begin(), tensor.shape.span().end());
    header[name] = {
        {"dtype", "F32"}, {"shape", shape}, {"data_offsets", {begin, hole + static_cast<std::int64_t>(tail.size())}}};
  }
  c.vocab_size = vocabulary;
  fs::create_directories(folder / "large");
  write_text(folder / "large/config.json", hf_config_json(c).dump());
  write_sparse(folder / "large/model.safetensors", safetensors_text(header.dump(), ""), hole, tail);
  check(Checkpoint::open(folder / "large"), Checkpoint::open(folder / "small"));
}

#endif  // QWEN3NEXT_MMAP
