#pragma once
// How fast this machine reads memory: the roof of everything that is limited by it.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "core/available_processors.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace qwen3next {

namespace detail {

// Integers, so that the compiler may use all the lanes that it has without changing the sum.
inline std::uint64_t sum_of(const std::uint64_t* data, std::size_t n) noexcept {
  std::uint64_t a = 0, b = 0, c = 0, d = 0;
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (std::size_t j = 0; j < 8; ++j) {
      a += data[i + j], b += data[i + 8 + j], c += data[i + 16 + j], d += data[i + 24 + j];
    }
  }
  for (; i < n; ++i) a += data[i];
  return a + b + c + d;
}

}  // namespace detail

// Bytes per second, the best of several passes: `threads` threads (0: one per processor that this process may use) sum
// a buffer much larger than the caches.  Takes about a second and half a gigabyte.
inline double measure_read_bandwidth(int threads = 0, int passes = 7) {
  if (threads <= 0) threads = available_processors();
  std::size_t bytes = std::size_t{512} << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
  if (const long l3 = ::sysconf(_SC_LEVEL3_CACHE_SIZE); l3 > 0)
    bytes = std::max(bytes, 4 * static_cast<std::size_t>(l3));
#endif
  const std::size_t share = bytes / sizeof(std::uint64_t) / static_cast<std::size_t>(threads);
  const std::size_t n = share * static_cast<std::size_t>(threads);
  const std::unique_ptr<std::uint64_t[]> data(
      new std::uint64_t[n]);  // not touched yet: each thread places its own part

  using Clock = std::chrono::steady_clock;
  std::barrier turn(threads);
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads));
  double best = 0;
  auto work = [&](int thread) {
    std::uint64_t* mine = data.get() + share * static_cast<std::size_t>(thread);
    for (std::size_t i = 0; i < share; ++i) mine[i] = i;
    for (int pass = 0; pass < passes; ++pass) {
      turn.arrive_and_wait();
      const auto start = Clock::now();
      sums[static_cast<std::size_t>(thread)] += detail::sum_of(mine, share);
      turn.arrive_and_wait();
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (thread == 0) best = std::max(best, static_cast<double>(n * sizeof(std::uint64_t)) / seconds);
    }
  };
  std::vector<std::jthread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  others.clear();
  volatile std::uint64_t used = 0;  // or the compiler might find out that nobody wants the sums
  for (const std::uint64_t sum : sums) used = used + sum;
  return best;
}

}  // namespace qwen3next
