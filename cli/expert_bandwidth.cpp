// How fast experts come from the disk.

#include "cli/expert_bandwidth.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <random>
#include <system_error>
#include <vector>

#include "backends/aligned_bytes.hpp"
#include "cli/common.hpp"
#include "weights/direct_file.hpp"
#include "weights/expert_layout.hpp"
#include "weights/read_queue.hpp"

namespace qwen3next::cli {

// Experts at random, as many at once as a layer of decoding misses, for a third of a second.
double measure_expert_bandwidth(const Checkpoint& checkpoint) {
  std::vector<DirectFile> files;
  std::size_t alignment = 64;
  for (const MappedFile& file : checkpoint.files) {
    files.push_back(DirectFile::open(file));
    alignment = std::max(alignment, files.back().alignment());
  }
  const ExpertLayout layout(checkpoint, alignment);
  std::size_t slot = 0;
  for (int cls = 0; cls < layout.classes(); ++cls) slot = std::max(slot, layout.slot_bytes(cls));
  const auto at_once = static_cast<std::size_t>(checkpoint.config.num_experts_per_tok);
  AlignedBytes memory(std::max(at_once * slot, AlignedBytes::large_page), AlignedBytes::Uncleared());

  std::mutex mutex;
  std::condition_variable changed;
  std::size_t pending = 0;
  int error = 0;
  const auto queue = make_read_queue(ReadQueueKind::best, 64, [&](std::span<const ReadResult> results) {
    const std::lock_guard lock(mutex);
    for (const ReadResult& result : results) error = result.error ? result.error : error;
    if ((pending -= results.size()) == 0) changed.notify_all();
  });
  std::mt19937_64 random(1);
  std::uint64_t bytes = 0;
  const auto start = std::chrono::steady_clock::now();
  while (seconds_since(start) < 0.33) {
    std::vector<ReadRequest> requests;
    for (std::size_t i = 0; i < at_once; ++i) {
      const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<std::uint64_t>(n)); };
      for (const ExpertLayout::Piece& piece : layout.place(pick(layout.layers()), pick(layout.experts())).span()) {
        requests.push_back({&files[static_cast<std::size_t>(piece.file)], piece.offset, piece.size, piece.needed,
                            memory.data() + i * slot + piece.into, nullptr});
        bytes += piece.size;
      }
    }
    std::unique_lock lock(mutex);
    pending = requests.size();
    lock.unlock();
    queue->submit(requests);
    lock.lock();
    changed.wait(lock, [&] { return pending == 0; });
    if (error) throw_error(display(checkpoint.path), ": cannot be read: ", std::generic_category().message(error));
  }
  return static_cast<double>(bytes) / seconds_since(start);
}

}  // namespace qwen3next::cli
