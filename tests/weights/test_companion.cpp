// The MTP block in a file of its own, beside a model that has none.

#include <doctest/doctest.h>

#include "tests/weights/fixtures.hpp"
#include "weights/checkpoint.hpp"
#include "weights/quantize.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

Tensors without(Tensors tensors, const std::string& prefix) {
  std::erase_if(tensors, [&](const auto& t) { return t.first.starts_with(prefix); });
  return tensors;
}

// What llama.cpp's converter writes when asked for the MTP block alone.
Tensors companion_tensors(const Tensors& gguf) {
  Tensors out;
  for (const auto& [name, tensor] : gguf) {
    if (name.starts_with("blk.4.") || !name.starts_with("blk.")) out[name] = tensor;
  }
  return out;
}

struct Files {
  TempFolder folder;
  Config with = small_config(), without_mtp = small_config();
  Tensors hf = hf_tensors(with), gguf = gguf_tensors(with, hf);

  Files() {
    without_mtp.has_mtp = false;
    write_gguf(folder / "whole.gguf", with, gguf);
    write_gguf(folder / "trunk.gguf", without_mtp, without(gguf, "blk.4."));
    write_gguf(folder / "mtp.gguf", with, companion_tensors(gguf));
    write_hf(folder / "trunk", without_mtp, without(hf, "mtp."));
    Tensors mtp;
    for (const auto& [name, tensor] : hf) {
      if (name.starts_with("mtp.")) mtp[name] = tensor;
    }
    write_hf(folder / "mtp", with, mtp);
  }
};

}  // namespace

TEST_CASE("companion: a model and its MTP block are the whole model") {
  const Files f;
  const Checkpoint whole = Checkpoint::open(f.folder / "whole.gguf");
  const auto expected = all_values(whole.weights);
  for (const std::string trunk : {"trunk.gguf", "trunk"}) {
    CHECK(!Checkpoint::open(f.folder / trunk).config.has_mtp);
    for (const std::string mtp : {"mtp.gguf", "mtp"}) {
      CAPTURE(trunk);
      CAPTURE(mtp);
      Checkpoint both = Checkpoint::open(f.folder / trunk, f.folder / mtp);
      const Checkpoint moved = std::move(both);
      CHECK(same_config(moved.config, f.with));
      CHECK(all_values(moved.weights) == expected);
      CHECK(moved.weights.mtp->embed_tokens.data == moved.weights.embed_tokens.data);
      const auto at = moved.locate(moved.weights.mtp->fc.data);
      REQUIRE(at);
      CHECK(at->file == 1);
      std::size_t in_companion = 0;
      for (const TensorRecord& r : moved.records) {
        in_companion += r.file == 1;
        CHECK(r.data == moved.files[static_cast<std::size_t>(r.file)].data() + r.offset);
      }
      CHECK(in_companion == (mtp == "mtp" ? 26 : 20));
      quantize(moved, f.folder / "merged.gguf", {.type = "F32", .overwrite = true});
      CHECK(all_values(Checkpoint::open(f.folder / "merged.gguf").weights) == expected);
    }
  }
}

TEST_CASE("companion: what is optional") {
  const Files f;
  const auto expected = all_values(Checkpoint::open(f.folder / "whole.gguf").weights);
  // metadata that promise the block that was left out
  write_gguf(f.folder / "promise.gguf", f.with, without(f.gguf, "blk.4."));
  CHECK(all_values(Checkpoint::open(f.folder / "promise.gguf", f.folder / "mtp.gguf").weights) == expected);
  // no norm of its own: the model's
  write_gguf(f.folder / "no_norm.gguf", f.with, without(companion_tensors(f.gguf), "blk.4.nextn.shared_head_norm"));
  const Checkpoint shared = Checkpoint::open(f.folder / "trunk.gguf", f.folder / "no_norm.gguf");
  CHECK(shared.weights.mtp->norm.data == shared.weights.norm.data);
  // no copies of the model's head and norm
  Tensors bare = companion_tensors(f.gguf);
  bare.erase("output.weight"), bare.erase("output_norm.weight");
  write_gguf(f.folder / "bare.gguf", f.with, bare);
  CHECK(all_values(Checkpoint::open(f.folder / "trunk.gguf", f.folder / "bare.gguf").weights) == expected);
}

TEST_CASE("an MTP block may have embeddings and a head of its own") {
  const Files f;
  const Tensor other_embeddings{{50, 20}, std::vector<float>(1000, 0.25f)},
      other_head{{50, 20}, std::vector<float>(1000, 3)};
  for (const bool apart : {false, true}) {
    Tensors tensors = apart ? companion_tensors(f.gguf) : f.gguf;
    tensors["blk.4.nextn.embed_tokens.weight"] = other_embeddings;
    tensors["blk.4.nextn.shared_head_head.weight"] = other_head;
    write_gguf(f.folder / "own.gguf", f.with, tensors);
    const Checkpoint own = apart ? Checkpoint::open(f.folder / "trunk.gguf", f.folder / "own.gguf")
                                 : Checkpoint::open(f.folder / "own.gguf");
    CHECK(floats(own.weights.mtp->embed_tokens) == other_embeddings.values);
    CHECK(floats(own.weights.mtp->lm_head) == other_head.values);
    CHECK(floats(own.weights.embed_tokens) == f.gguf.at("token_embd.weight").values);
    quantize(own, f.folder / "again.gguf", {.type = "F32", .overwrite = true});
    CHECK(all_values(Checkpoint::open(f.folder / "again.gguf").weights) == all_values(own.weights));
  }
}

TEST_CASE("companion: what does not belong together is refused with the reason") {
  const Files f;
  const auto refused = [&](const std::string& trunk, const std::string& mtp, const std::string& part) {
    const fs::path companion = mtp.empty() ? fs::path() : f.folder / mtp;
    CHECK(contains(error_of([&] { Checkpoint::open(f.folder / trunk, companion); }), part));
  };
  const auto companion = [&](auto change, const std::string& part) {
    Config c = f.with;
    Tensors tensors = companion_tensors(f.gguf);
    change(c, tensors);
    write_gguf(f.folder / "bad.gguf", c, tensors);
    refused("trunk.gguf", "bad.gguf", part);
  };
  refused("mtp.gguf", "", "mtp.gguf: holds only the MTP block; open the model itself, and give this as its companion");
  refused("mtp", "", "mtp: holds only the MTP block");
  refused("whole.gguf", "mtp.gguf", "whole.gguf: has an MTP block already (blk.4.nextn.");
  refused("trunk.gguf", "whole.gguf", "so it is a whole model, expected its MTP block alone (blk.N.nextn.*)");
  refused("trunk.gguf", "trunk", "so it is a whole model, expected its MTP block alone (mtp.*)");
  refused("trunk.gguf", "none.gguf", "none.gguf: no such file");
  companion([](Config& c, Tensors&) { c.num_experts_per_tok = 1; },
            "bad.gguf: num_experts_per_tok is 1, expected 2 as in ");
  companion([](Config& c, Tensors&) { c.rope_theta = 1e5; }, "rope_theta is 1e+05, expected 1e+06 as in ");
  companion([](Config& c, Tensors&) { c.num_hidden_layers = 5, c.layer_types = interval_layer_types(5, 4); },
            "num_hidden_layers is 5, expected 4 as in ");
  companion(
      [](Config&, Tensors& x) {
        x["token_embd.weight"] = {{49, 20}, std::vector<float>(980)};
      },
      "vocab_size is 49, expected 50");
  companion([](Config&, Tensors& x) { x.erase("blk.4.nextn.enorm.weight"); },
            "bad.gguf: 1 tensor missing (blk.4.nextn.enorm.weight)");
  companion(
      [](Config&, Tensors& x) {
        x["blk.4.extra.weight"] = {{1}, {0}};
      },
      "bad.gguf: 1 tensor unexpected (blk.4.extra.weight)");
  companion([](Config&, Tensors& x) { x["output_norm.weight"].values[7] += 0.5f; },
            "its output_norm.weight is not the model's, so it belongs to another model");
}
