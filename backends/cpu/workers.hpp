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
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/available_processors.hpp"
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
  void run(const F& f) noexcept {
    static_assert(std::is_trivially_copyable_v<F> && sizeof(F) <= sizeof job_.work && alignof(F) <= alignof(void*),
                  "capture references or a few plain values");
    if (busy_.exchange(true, std::memory_order_acquire)) {
      for (int i = 0; i < threads_; ++i) f(i, threads_);
      return;
    }
    job_.call = [](const std::byte* work, int share, int shares) {
      (*std::launder(reinterpret_cast<const F*>(work)))(share, shares);
    };
    ::new (static_cast<void*>(job_.work)) F(f);
    job_.processor.store(this_processor(), std::memory_order_relaxed);
    const std::uint32_t job = job_.number.load(std::memory_order_relaxed) + 1;
    job_.number.store(job, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) job_.number.notify_all();
    f(0, threads_);
    // Asking who has a share takes its cache line from the worker, which then needs it back: only after a while.
    int looks = 0;
    for (int i = 1; i < threads_; ++i) {
      const auto done = [&] { return share_of(i).done.load(std::memory_order_acquire) == job; };
      while (!done() && looks++ < 40) pause();
      if (done()) continue;
      if (take(i, job))
        f(i, threads_);
      else
        wait(done);
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

  Share& share_of(int i) const noexcept { return shares_[static_cast<std::size_t>(i)]; }

  // Of worker and caller, one gets the share.  A worker that comes a job late gets nothing.
  bool take(int share, std::uint32_t job) noexcept {
    std::uint32_t before = job - 1;
    return share_of(share).taken.compare_exchange_strong(before, job, std::memory_order_acq_rel);
  }

  void work(int share) noexcept {
    for (std::uint32_t seen = 0;;) {
      wait_for_job(seen);
      if (stopping_.load(std::memory_order_acquire)) return;
      seen = job_.number.load(std::memory_order_acquire);
      if (!take(share, seen)) continue;
      job_.call(job_.work, share, threads_);
      share_of(share).done.store(seen, std::memory_order_release);
    }
  }

  // Looks for a while, then sleeps.  The system leaves two busy threads on one processor for long, with another one
  // idle: a thread that finds itself where the last job came from goes elsewhere.
  void wait_for_job(std::uint32_t seen) noexcept {
    const auto start = Clock::now();
    do {
      for (int i = 0; i < 64; ++i) {
        if (job_.number.load(std::memory_order_acquire) != seen) return;
        pause();
      }
      if (const int here = this_processor(); here >= 0 && here == job_.processor.load(std::memory_order_relaxed))
        leave_processor(here);
    } while (Clock::now() - start < patience);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    job_.number.wait(seen, std::memory_order_seq_cst);
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
    job_.number.fetch_add(1, std::memory_order_seq_cst);
    job_.number.notify_all();
    for (std::thread& thread : others_) thread.join();
  }

  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds patience{200};

  // What a worker has to read before it can begin, close together: each cache line that another core wrote takes as
  // long to come as a hundred rows of a small matrix to multiply.
  struct alignas(64) Job {
    std::atomic<std::uint32_t> number{0};  // of the last job
    std::atomic<int> processor{-1};        // where its caller runs
    void (*call)(const std::byte* work, int share, int shares) = nullptr;
    alignas(void*) std::byte work[112];
  };
  Job job_;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> busy_{false};  // a caller has the workers
  std::unique_ptr<Share[]> shares_;
  int threads_;
  std::vector<std::thread> others_;
};

}  // namespace qwen3next::cpu
