#pragma once
// How many multiply-adds per second this machine's processors do: the roof of what is limited by arithmetic.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "backends/cpu/kernel_table.hpp"

namespace qwen3next {

// Multiply-adds per second of `threads` threads in all, the best of several passes of some milliseconds; `peak` is one
// of a kernel table.
inline double measure_peak(std::int64_t (*peak)(float*) noexcept, int threads, int passes = 7) {
  using Clock = std::chrono::steady_clock;
  constexpr int calls = 200;
  std::barrier turn(threads);
  std::vector<float> sinks(static_cast<std::size_t>(threads) * 16);  // a cache line each
  std::vector<std::int64_t> done(static_cast<std::size_t>(threads));
  double best = 0;
  auto work = [&](int thread) {
    const auto at = static_cast<std::size_t>(thread);
    for (int pass = 0; pass < passes; ++pass) {
      done[at] = 0;
      turn.arrive_and_wait();
      const auto start = Clock::now();
      for (int i = 0; i < calls; ++i) done[at] += peak(&sinks[16 * at]);
      turn.arrive_and_wait();
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (thread != 0) continue;
      double total = 0;
      for (const std::int64_t n : done) total += static_cast<double>(n);
      best = std::max(best, total / seconds);
    }
  };
  std::vector<std::jthread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  return best;
}

}  // namespace qwen3next
