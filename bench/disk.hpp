#pragma once
// How fast this machine reads a file around the system's cache, by size and number of requests: the roof of everything
// that is streamed from it.

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <vector>

#include "backends/aligned_bytes.hpp"
#include "core/message.hpp"
#include "weights/direct_file.hpp"
#include "weights/read_queue.hpp"

namespace qwen3next {

struct DiskPattern {
  std::size_t request;  // bytes, a multiple of 4096
  int depth;            // requests under way at once
  // sequential: one behind the other; random: anywhere; bursts: anywhere, `depth` requests submitted together and the
  // next ones when all of these have come, as a layer needs its experts.
  enum class Order { sequential, random, bursts } order;
};

struct DiskSpeed {
  double bytes_per_second = 0, requests_per_second = 0;
};

namespace detail {

// Places of a file for reads of `request` bytes each: in order from a random one on, or all random.
class ReadPlaces {
 public:
  ReadPlaces(std::uint64_t file_size, const DiskPattern& pattern, std::uint64_t seed)
      : request_(pattern.request),
        places_(file_size / pattern.request),
        random_(pattern.order != DiskPattern::Order::sequential),
        numbers_(seed) {
    if (places_ > 0) next_ = numbers_() % places_;
  }
  std::uint64_t next() {
    const std::uint64_t place = random_ ? numbers_() % places_ : next_++ % places_;
    return place * request_;
  }

 private:
  std::size_t request_;
  std::uint64_t places_, next_ = 0;
  bool random_;
  std::mt19937_64 numbers_;
};

}  // namespace detail

// Reads for `seconds`, after a tenth of that to warm up.  Throws Error if a read fails, or if the file is smaller than
// a request.  The cache of this machine's system is avoided; that of a disk, or of the computer that emulates it, is
// not.
inline DiskSpeed measure_disk(const DirectFile& file, ReadQueueKind kind, const DiskPattern& pattern, double seconds,
                              std::uint64_t seed = 1) {
  if (pattern.request == 0 || pattern.request % file.alignment() != 0)
    throw_error("requests of ", pattern.request, " bytes: expected a multiple of ", file.alignment());
  if (file.size() < pattern.request)
    throw_error(file.name(), ": its ", file.size(), " bytes are less than a request of ", pattern.request);
  const bool bursts = pattern.order == DiskPattern::Order::bursts;
  const auto depth = static_cast<std::size_t>(pattern.depth);
  // So large that it is new memory in large pages: small ones, scattered, are filled at little more than half the
  // speed.
  AlignedBytes bytes(std::max(depth * pattern.request, std::size_t{64} << 20), AlignedBytes::Uncleared());
  std::memset(bytes.data(), 0, depth * pattern.request);  // memory that is there
  detail::ReadPlaces places(file.size(), pattern, seed);
  const auto request = [&](void* into) {
    return ReadRequest{&file, places.next(), pattern.request, pattern.request, static_cast<std::byte*>(into), into};
  };
  std::vector<ReadRequest> requests(depth), again;
  again.reserve(depth);

  using Clock = std::chrono::steady_clock;
  const auto after = [](double s) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
  };
  const auto start = Clock::now() + after(seconds / 10), end = start + after(seconds);
  std::mutex mutex;  // for all that follows
  std::condition_variable finished;
  std::uint64_t counted = 0;
  std::size_t under_way = 0;
  int error = 0;
  Clock::time_point last = start;
  ReadQueue* queue = nullptr;
  const auto on_done = [&](std::span<const ReadResult> results) {
    const std::lock_guard lock(mutex);
    const auto now = Clock::now();
    again.clear();
    for (const ReadResult& result : results) {
      if (result.error != 0) error = result.error;
      if (now >= start) ++counted, last = now;
      if (!bursts && now < end && error == 0)
        again.push_back(request(result.owner));
      else if (--under_way == 0)
        finished.notify_all();
    }
    if (!again.empty()) queue->submit(again);
  };
  const std::unique_ptr<ReadQueue> owned = make_read_queue(kind, pattern.depth, on_done);
  std::unique_lock lock(mutex);
  queue = owned.get();
  do {
    for (std::size_t i = 0; i < depth; ++i) requests[i] = request(bytes.data() + i * pattern.request);
    under_way = depth;
    lock.unlock();
    queue->submit(requests);
    lock.lock();
    finished.wait(lock, [&] { return under_way == 0; });
  } while (bursts && Clock::now() < end && error == 0);
  if (error != 0) throw Error(read_error(file, 0, pattern.request, error));
  const double took = std::chrono::duration<double>(last - start).count();
  const double per_second = took > 0 ? static_cast<double>(counted) / took : 0;
  return {per_second * static_cast<double>(pattern.request), per_second};
}

}  // namespace qwen3next
