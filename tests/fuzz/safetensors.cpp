// Any bytes as a safetensors file: what is accepted lies inside it.

#include "weights/safetensors.hpp"
#include "target.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

FUZZ_TARGET(safetensors) {
  const MappedFile file = MappedFile::open(write_file("model.safetensors", input));
  std::vector<TensorRecord> records;
  read_safetensors(file, 0, records);
  for (const TensorRecord& r : records) {
    expect(r.offset <= file.size() && r.bytes <= file.size() - r.offset, "tensors lie in their file");
  }
}

FUZZ_TARGET(shard_index) {
  const auto counts = detail::read_shard_index(MappedFile::open(write_file("model.safetensors.index.json", input)));
  expect(!counts.empty(), "an index names files");
}
