#pragma once
// Threads that wait for work together with the caller's: what OpenMP's `parallel` does, for jobs of a microsecond.
//
// Why not OpenMP: how its threads wait is fixed by the environment when the program starts, and its barrier needs every
// thread.  Here a share whose thread has not come yet is done by whoever gave the job, so that a thread which the
// system keeps from running (a busy machine, a CPU quota) delays nobody, unless it is stopped in the middle of a share.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "core/error.hpp"

namespace qwen3next::cpu {

class Workers {
 public:
  // `threads` of them, the caller's included.  Throws Error if the system does not give so many.
  explicit Workers(int threads) : shares_(new Share[static_cast<std::size_t>(threads)]), threads_(threads) {
    try {
      for (int i = 1; i < threads; ++i) others_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& e) {
      const std::size_t started = others_.size() + 1;
      stop();
      throw Error("the system gives " + std::to_string(started) + " of " + std::to_string(threads) + " threads (" +
                  e.what() + "): ask for fewer");
    }
  }
  ~Workers() { stop(); }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int size() const noexcept { return threads_; }

  // f(share, size()) for every share in [0, size()), each on some thread, share 0 on the caller's.  When another caller
  // has the workers, all on the caller's.  f must not throw.
  template <class F>
  void run(F& f) noexcept {
    if (busy_.exchange(true, std::memory_order_acquire)) {
      for (int i = 0; i < threads_; ++i) f(i, threads_);
      return;
    }
    call_ = [](void* of, int share, int shares) { (*static_cast<F*>(of))(share, shares); };
    context_ = &f;
    const std::uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    job_.store(job, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) job_.notify_all();
    f(0, threads_);
    for (int i = 1; i < threads_; ++i) {
      if (take(i, job))
        f(i, threads_);
      else
        wait([&] { return shares_[i].done.load(std::memory_order_acquire) == job; });
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  // The last job of which this share was taken, and done by a worker: written by different threads, on lines of their
  // own.
  struct alignas(64) Share {
    std::atomic<std::uint32_t> taken{0};
    alignas(64) std::atomic<std::uint32_t> done{0};
  };

  // Of worker and caller, one gets the share.  A worker that comes a job late gets nothing.
  bool take(int share, std::uint32_t job) noexcept {
    std::uint32_t before = job - 1;
    return shares_[share].taken.compare_exchange_strong(before, job, std::memory_order_acq_rel);
  }

  void work(int share) noexcept {
    for (std::uint32_t seen = 0;;) {
      wait_for_job(seen);
      if (stopping_.load(std::memory_order_acquire)) return;
      seen = job_.load(std::memory_order_acquire);
      if (!take(share, seen)) continue;
      call_(context_, share, threads_);
      shares_[share].done.store(seen, std::memory_order_release);
    }
  }

  // Looks for a while, since between two operations, and between two tokens, there is little to wait for; then sleeps.
  void wait_for_job(std::uint32_t seen) noexcept {
    const auto start = Clock::now();
    do {
      for (int i = 0; i < 64; ++i) {
        if (job_.load(std::memory_order_acquire) != seen) return;
        pause();
      }
    } while (Clock::now() - start < patience);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    job_.wait(seen, std::memory_order_seq_cst);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }

  // For the end of a share.  Its thread may have been interrupted in favour of another: then that one's processor is
  // of more use to it than to this loop.
  template <class Done>
  static void wait(Done done) noexcept {
    for (int i = 0; i < 2000; ++i) {
      if (done()) return;
      pause();
    }
    while (!done()) std::this_thread::yield();
  }

  static void pause() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // waits about as long as x86's; `yield` does not wait
#endif
  }

  void stop() noexcept {
    stopping_.store(true, std::memory_order_release);
    job_.fetch_add(1, std::memory_order_seq_cst);
    job_.notify_all();
    for (std::thread& thread : others_) thread.join();
  }

  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds patience{100};

  alignas(64) std::atomic<std::uint32_t> job_{0};  // the number of the last job; call_ and context_ are its
  void (*call_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> busy_{false};  // a caller has the workers
  std::unique_ptr<Share[]> shares_;
  int threads_;
  std::vector<std::thread> others_;
};

}  // namespace qwen3next::cpu
