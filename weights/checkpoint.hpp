#pragma once
// A model as it lies on disk: mapped, validated, bound.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "core/linkage.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"
#include "weights/binder.hpp"
#include "weights/gguf.hpp"
#include "weights/mapped_file.hpp"

namespace qwen3next {

struct BoundWeights;

// A model's files, mapped and validated, without a backend: what to inspect or quantise.  Everything that `weights`
// points to belongs to the object and stays in place when it is moved.
class Checkpoint {
 public:
  // `path` is a GGUF file (the first of a split set) or a Hugging Face folder.  `mtp_path`, if not empty, is another
  // that holds nothing but the MTP block of the same model, which `path` then must not have.  Throws Error as
  // Model::open does.
  static Checkpoint open(const std::filesystem::path& path, const std::filesystem::path& mtp_path = {});

  std::filesystem::path path;
  Format format = Format::huggingface;
  Config config;
  ModelWeights<Views> weights;
  std::vector<TensorRecord> records;  // in the order of the files
  std::vector<VectorCopy> copies;     // the vectors that could not be used in place
  std::vector<MappedFile> files;
  GgufMetadata metadata;  // of a GGUF, else empty

  // Bytes of the tensors, of the files, and of the copies in memory.
  std::uint64_t weight_bytes() const noexcept {
    std::uint64_t sum = 0;
    for (const TensorRecord& record : records) sum += record.bytes;
    return sum;
  }
  std::uint64_t file_bytes() const noexcept {
    std::uint64_t sum = 0;
    for (const MappedFile& file : files) sum += file.size();
    return sum;
  }
  std::uint64_t copied_bytes() const noexcept {
    std::uint64_t sum = 0;
    for (const VectorCopy& copy : copies) sum += copy.bytes();
    return sum;
  }

  // Where the bytes of a view lie on disk; nothing for a copy.
  struct Location {  // which of `files`, and bytes from its start
    int file;
    std::uint64_t offset;
  };
  std::optional<Location> locate(const std::byte* data) const noexcept {
    for (std::size_t i = 0; i < files.size(); ++i) {
      if (files[i].contains(data)) {
        return Location{static_cast<int>(i), static_cast<std::uint64_t>(data - files[i].data())};
      }
    }
    return {};
  }

 private:
  Checkpoint() = default;
  static Checkpoint read(const std::filesystem::path& path);  // all but the weights
  void adopt(Checkpoint companion, BoundWeights& bound);
};

}  // namespace qwen3next

#if QWEN3NEXT_DEFINITIONS

#include "weights/bind.hpp"
#include "weights/gguf_config.hpp"
#include "weights/hf_config.hpp"
#include "weights/safetensors.hpp"

namespace qwen3next {

namespace detail {

// What a companion's config must say as the model's does: all that its layer is made of.
inline void expect_same_model(const Config& companion, const Config& model, std::string_view source,
                              std::string_view model_source) {
  const auto same = [&](std::string_view name, auto theirs, auto ours) {
    if (theirs == ours) return;
    throw_error(source, ": ", name, " is ", theirs, ", expected ", ours, " as in ", model_source,
                "; the two do not belong together");
  };
#define QWEN3NEXT_SAME(field) same(#field, companion.field, model.field)
  QWEN3NEXT_SAME(num_hidden_layers);
  QWEN3NEXT_SAME(hidden_size);
  QWEN3NEXT_SAME(vocab_size);
  QWEN3NEXT_SAME(num_attention_heads);
  QWEN3NEXT_SAME(num_key_value_heads);
  QWEN3NEXT_SAME(head_dim);
  QWEN3NEXT_SAME(rotary_dim);
  QWEN3NEXT_SAME(rope_theta);
  QWEN3NEXT_SAME(rms_norm_eps);
  QWEN3NEXT_SAME(num_experts);
  QWEN3NEXT_SAME(num_experts_per_tok);
  QWEN3NEXT_SAME(moe_intermediate_size);
  QWEN3NEXT_SAME(shared_expert_intermediate_size);
#undef QWEN3NEXT_SAME
}

}  // namespace detail

QWEN3NEXT_INLINE Checkpoint Checkpoint::read(const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) throw_error(display(path), ": no such file or folder");
  if (error) throw_error(display(path), ": ", error.message());
  Checkpoint checkpoint;
  checkpoint.path = path;
  if (fs::is_directory(status)) {
    if (!fs::exists(path / "config.json", error)) {
      throw_error(display(path), ": no config.json in this folder; expected a Hugging Face checkpoint, or the path of ",
                  "a .gguf file");
    }
    checkpoint.config = read_hf_config(path);
    SafetensorsFolder folder = open_safetensors(path);
    checkpoint.files = std::move(folder.files);
    checkpoint.records = std::move(folder.records);
  } else {
    if (path.extension() == ".safetensors" || path.extension() == ".json") {
      throw_error(display(path), ": is part of a Hugging Face checkpoint; give its folder instead");
    }
    Gguf gguf = Gguf::open(path);
    checkpoint.format = Format::gguf;
    checkpoint.config = read_gguf_config(gguf);
    checkpoint.files = std::move(gguf.files);
    checkpoint.records = std::move(gguf.records);
    checkpoint.metadata = std::move(gguf.metadata);
  }
  return checkpoint;
}

QWEN3NEXT_INLINE Checkpoint Checkpoint::open(const std::filesystem::path& path, const std::filesystem::path& mtp_path) {
  Checkpoint checkpoint = read(path);
  std::optional<Checkpoint> companion;
  if (!mtp_path.empty()) {
    companion = read(mtp_path);
    const auto& records = checkpoint.records;
    const auto own = std::find_if(records.begin(), records.end(),
                                  [](const TensorRecord& r) { return detail::is_mtp_tensor(r.name); });
    if (own != records.end()) {
      throw_error(display(path), ": has an MTP block already (", printable(own->name), "); leave ", display(mtp_path),
                  " out");
    }
    checkpoint.config.has_mtp = false;  // whatever the metadata promises
    detail::expect_same_model(companion->config, checkpoint.config, display(mtp_path), display(path));
  }
  BoundWeights bound =
      bind_weights(checkpoint.format, checkpoint.records, checkpoint.files, display(path), checkpoint.config);
  if (companion) checkpoint.adopt(std::move(*companion), bound);
  checkpoint.weights = std::move(bound.weights);
  checkpoint.copies = std::move(bound.copies);
  return checkpoint;
}

QWEN3NEXT_INLINE void Checkpoint::adopt(Checkpoint companion, BoundWeights& bound) {
  bind_companion(companion.format, companion.records, companion.files, display(companion.path), config, bound);
  config.has_mtp = true;
  for (TensorRecord& record : companion.records) {
    if (!record.name.starts_with("blk.") && !record.name.starts_with("mtp.")) continue;  // copies of the model's
    record.file += static_cast<int>(files.size());
    records.push_back(std::move(record));
  }
  for (MappedFile& file : companion.files) files.push_back(std::move(file));
}

}  // namespace qwen3next

#endif  // QWEN3NEXT_DEFINITIONS
