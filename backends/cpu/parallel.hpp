#pragma once
// Threads and scratch memory of the CPU backend's operations.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "backends/host_state.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace qwen3next::cpu {

// What is shared out never depends on the number of threads, only who does it: every output element is computed by one
// thread, in one order.
//
// Work is counted in multiply-adds.  Less than `worth_sharing`, about 5 us of decoding, stays on the caller: waking the
// team takes 1 us or 2 when the processors are free, and milliseconds when others want them.
class Team {
 public:
  static constexpr std::int64_t worth_sharing = 1 << 18;

  explicit Team(int threads) : threads_(threads > 0 ? threads : 1) {}
  int size() const noexcept { return threads_; }

  // f(thread, threads) on every thread of the team, or f(0, 1).
  template <class F>
  void run([[maybe_unused]] std::int64_t work, F f) const {
#if defined(_OPENMP)
    if (threads_ > 1 && work >= worth_sharing) {
#pragma omp parallel num_threads(threads_)
      f(omp_get_thread_num(), omp_get_num_threads());
      return;
    }
#endif
    f(0, 1);
  }

  // f(i, thread) for i in [0, n); whoever is free takes the next.
  template <class F>
  void each(int n, std::int64_t work_each, F f) const {
    std::atomic<int> next{0};
    run(n > 1 ? n * work_each : 0, [&](int thread, int) {
      for (int i = next.fetch_add(1, std::memory_order_relaxed); i < n;
           i = next.fetch_add(1, std::memory_order_relaxed))
        f(i, thread);
    });
  }

  // f(begin, end) over [0, n) in one piece per thread.  A value read, worked on and written counts for 16.
  template <class F>
  void split(int n, std::int64_t values_each, F f) const {
    run(n > 1 ? 16 * n * values_each : 0, [&](int thread, int threads) {
      const int begin = static_cast<int>(static_cast<std::int64_t>(n) * thread / threads);
      const int end = static_cast<int>(static_cast<std::int64_t>(n) * (thread + 1) / threads);
      if (begin < end) f(begin, end);
    });
  }

 private:
  int threads_;
};

// Memory that grows to the largest size asked for and is kept: none is allocated in steady decode.
class Scratch {
 public:
  std::byte* get(std::size_t bytes) {
    if (memory_.size() < bytes) {
      memory_ = AlignedBytes();
      memory_ = AlignedBytes(bytes + bytes / 4, AlignedBytes::Uncleared());
    }
    return memory_.data();
  }
  // `count` pieces of at least `bytes`, each on its own cache lines.
  struct Pieces {
    std::byte* data;
    std::size_t stride;
    std::byte* operator[](std::size_t i) const noexcept { return data + i * stride; }
    std::byte* operator[](int i) const noexcept { return data + static_cast<std::size_t>(i) * stride; }
  };
  Pieces pieces(std::size_t count, std::size_t bytes) {
    const std::size_t stride = (bytes + 127) / 128 * 128;
    return {get(count * stride), stride};
  }

 private:
  AlignedBytes memory_;
};

}  // namespace qwen3next::cpu
