#pragma once
// Threads and scratch memory of the CPU backend's operations.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "backends/cpu/workers.hpp"
#include "backends/host_state.hpp"

namespace qwen3next::cpu {

// What is shared out never depends on the number of threads, only who does it: every output element is computed by one
// thread, in one order.  Copies are the same team; it serves one caller at a time, another works alone meanwhile.
//
// Work is counted in multiply-adds.  Less than `worth_sharing`, about 1 us of decoding, stays on the caller: giving it
// out and waiting takes 0.3 us.
class Team {
 public:
  static constexpr std::int64_t worth_sharing = 1 << 16;

  // Throws Error if the system does not give so many threads.
  explicit Team(int threads) {
    if (threads > 1) workers_ = std::make_shared<Workers>(threads);
  }
  int size() const noexcept { return workers_ ? workers_->size() : 1; }

  // f(share, shares): as many shares as the team has threads, each of them once, on any thread; or f(0, 1).  Scratch
  // memory by share is one thread's at a time.
  template <class F>
  void run(std::int64_t work, F f) const {
    if (workers_ && work >= worth_sharing)
      workers_->run(f);
    else
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

  // f(piece, pieces, thread): `each` pieces for each thread, of which slow threads do fewer.
  template <class F>
  void pieces(int each, std::int64_t work, F f) const {
    if (each == 1) return run(work, [&](int share, int shares) { f(share, shares, share); });
    if (size() == 1 || work < worth_sharing) return f(0, 1, 0);
    const int n = each * size();
    this->each(n, work / n + 1, [&](int i, int thread) { f(i, n, thread); });
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
  std::shared_ptr<Workers> workers_;
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
