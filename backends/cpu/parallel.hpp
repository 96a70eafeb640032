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
class Team {
 public:
  explicit Team(int threads) : threads_(threads > 0 ? threads : 1) {}
  int size() const noexcept { return threads_; }

  // f(thread, threads) on every thread of the team.
  template <class F>
  void run(F f) const {
#if defined(_OPENMP)
    if (threads_ > 1) {
#pragma omp parallel num_threads(threads_)
      f(omp_get_thread_num(), omp_get_num_threads());
      return;
    }
#endif
    f(0, 1);
  }

  // f(i, thread) for i in [0, n); whoever is free takes the next.
  template <class F>
  void each(int n, F f) const {
    if (n == 1 || threads_ == 1) {
      for (int i = 0; i < n; ++i) f(i, 0);
      return;
    }
    std::atomic<int> next{0};
    run([&](int thread, int) {
      for (int i = next.fetch_add(1, std::memory_order_relaxed); i < n;
           i = next.fetch_add(1, std::memory_order_relaxed))
        f(i, thread);
    });
  }

  // f(begin, end) over [0, n) in one piece per thread; `values_each` of them small enough stay on the caller.
  template <class F>
  void split(int n, std::int64_t values_each, F f) const {
    constexpr std::int64_t worth_waking = 16384;
    if (n == 0) return;
    if (threads_ == 1 || n == 1 || n * values_each < worth_waking) {
      f(0, n);
      return;
    }
    run([&](int thread, int threads) {
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
      memory_ = AlignedBytes(bytes + bytes / 4);
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
