// How fast experts come from the disk.

#include "cli/expert_bandwidth.hpp"

#include <algorithm>

#include "bench/disk.hpp"
#include "weights/direct_file.hpp"

namespace qwen3next::cli {

double measure_expert_bandwidth(const Checkpoint& checkpoint) {
  const ExpertView& expert = checkpoint.weights.layers.front().mlp.experts.front();
  const auto at = checkpoint.locate(expert.down.data);
  const DirectFile file = DirectFile::open(checkpoint.files[static_cast<std::size_t>(at.value().file)]);
  const std::size_t unit = std::max<std::size_t>(file.alignment(), 4096);
  DiskPattern pattern{.request = (expert.down.bytes() + unit - 1) / unit * unit,
                      .depth = 3 * checkpoint.config.num_experts_per_tok,
                      .order = DiskPattern::Order::bursts};
  pattern.request = std::min<std::size_t>(pattern.request, file.size() / unit * unit);
  return measure_disk(file, ReadQueueKind::best, pattern, 0.33).bytes_per_second;
}

}  // namespace qwen3next::cli
