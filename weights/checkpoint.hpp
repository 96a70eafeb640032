#pragma once
// A model as it lies on disk: mapped, validated, bound.

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

// A model's files, mapped and validated, without a backend: what to inspect or quantise.  Everything that `weights`
// points to belongs to the object and stays in place when it is moved.
class Checkpoint {
 public:
  // `path` is a GGUF file (the first of a split set) or a Hugging Face folder.  Throws Error as Model::open does.
  static Checkpoint open(const std::filesystem::path& path);

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
};

}  // namespace qwen3next

#if QWEN3NEXT_DEFINITIONS

#include "weights/bind.hpp"
#include "weights/gguf_config.hpp"
#include "weights/hf_config.hpp"
#include "weights/safetensors.hpp"

namespace qwen3next {

QWEN3NEXT_INLINE Checkpoint Checkpoint::open(const std::filesystem::path& path) {
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
  BoundWeights bound =
      bind_weights(checkpoint.format, checkpoint.records, checkpoint.files, display(path), checkpoint.config);
  checkpoint.weights = std::move(bound.weights);
  checkpoint.copies = std::move(bound.copies);
  return checkpoint;
}

}  // namespace qwen3next

#endif  // QWEN3NEXT_DEFINITIONS
