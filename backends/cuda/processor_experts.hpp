#pragma once
// The processor's part of a pass: experts that are not on the card, for the rows that miss them.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/cuda/card_experts.hpp"
#include "backends/expert_supply.hpp"

namespace qwen3next::cuda {

// Counts picks by expert.
class PickCounter {
 public:
  using Pick = ExpertSupply::Pick;
  // ids [rows, k] as RowExchange gives them: ~id for an expert that is on the card.
  void count(const std::int32_t* ids, std::ptrdiff_t n) {
    missed_.clear(), all_.clear();
    sorted_.assign(ids, ids + n);
    std::ranges::sort(sorted_, {}, id_of);
    for (const std::int32_t id : sorted_) {
      for (std::vector<Pick>* to : {&all_, id >= 0 ? &missed_ : nullptr}) {
        if (!to) continue;
        if (to->empty() || to->back().expert != id_of(id)) to->push_back({id_of(id), 0});
        ++to->back().tokens;
      }
    }
  }
  std::span<const Pick> all() const noexcept { return all_; }
  std::span<const Pick> missed() const noexcept { return missed_; }

 private:
  static std::int32_t id_of(std::int32_t id) noexcept { return id < 0 ? ~id : id; }
  std::vector<std::int32_t> sorted_;
  std::vector<Pick> all_, missed_;
};

// A backend's thread that answers the card.  The card waits for it alone, and it calls nothing of CUDA: so whoever
// launches may run ahead, wait for the card or be stopped by an error, and the pass goes on to its end.
class ProcessorExperts {
 public:
  // `supply` is null if all experts are mapped.
  ProcessorExperts(std::shared_ptr<Device> device, std::shared_ptr<CardExperts> experts, const CpuOptions& options,
                   std::unique_ptr<StreamedExperts> supply)
      : device_(std::move(device)),
        experts_(std::move(experts)),
        cpu_(options),
        supply_(std::move(supply)),
        found_(*experts_),
        thread_([this] { work(); }) {}
  ~ProcessorExperts() {
    try {
      drain();
    } catch (...) {  // nobody is left to be told
    }
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  ProcessorExperts(const ProcessorExperts&) = delete;

  RowExchange& exchange() noexcept { return exchange_; }

  // Makes room for exchanges of this size.
  void reserve(int rows, int k, int width) {
    if (exchange_.holds(rows, k, width)) return;
    drain();
    device_->wait();  // the last answer may not have been read yet
    exchange_.reserve(rows, k, width);
  }

  struct Job {
    int layer, rows, k, width;
  };
  // This exchange was launched: it is to be answered.
  void take(const Job& job) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(job);
    }
    changed_.notify_all();
  }

  // Waits until all are answered.  Throws Error if the card failed, or what a supply of experts threw.
  void drain() {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, std::chrono::milliseconds(50), [&] { return jobs_.empty(); })) {
      lock.unlock();
      try {
        check_running(*device_);
      } catch (...) {
        abandoned_ = true;
        throw;
      }
      lock.lock();
    }
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

  // For whoever looks at rows himself and gives no answer: counts their picks.
  void wait_for_rows(int rows, int k, int width, PickCounter& counter) {
    drain();  // what arrives before is another's
    for (int looks = 1; !exchange_.arrived(rows); ++looks) {
      if (looks % 65536 == 0) check_running(*device_);
      pause();
    }
    counter.count(exchange_.rows(rows, k, width).ids, static_cast<std::ptrdiff_t>(rows) * k);
    exchange_.take(rows);
  }

 private:
  using Clock = std::chrono::steady_clock;

  static void pause() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void work() noexcept {
    for (;;) {
      Job job;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
        if (stopping_) return;
        job = jobs_.front();
      }
      while (!exchange_.arrived(job.rows) && !abandoned_) pause();
      try {
        if (abandoned_ || failure_)
          exchange_.answer(job.rows, false);
        else
          answer(job);
      } catch (...) {
        exchange_.answer(job.rows, false);
        const std::lock_guard lock(mutex_);
        failure_ = std::current_exception();
      }
      const std::lock_guard lock(mutex_);
      jobs_.pop_front();
      if (jobs_.empty()) changed_.notify_all();
    }
  }

  void answer(const Job& job) {
    const RowExchange::Rows rows = exchange_.rows(job.rows, job.k, job.width);
    const auto picks = static_cast<std::ptrdiff_t>(job.rows) * job.k;
    counter_.count(rows.ids, picks);
    const std::span<const ExpertSupply::Pick> missed = counter_.missed();
    if (missed.empty()) {
      exchange_.answer(job.rows, false);
    } else {
      const Clock::time_point start = Clock::now();
      routing_.rows = job.rows, routing_.k = job.k;
      routing_.ids.assign(rows.ids, rows.ids + picks);
      routing_.weights.assign(rows.weights, rows.weights + picks);
      const HostTensor x{rows.x, job.rows, job.width, rows.stride}, sums{rows.sums, job.rows, job.width, rows.stride};
      compute(job.layer, sums, x);
      exchange_.answer(job.rows, true);
      const std::chrono::duration<double> seconds = Clock::now() - start;
      double bytes = 0, products = 0;
      for (const ExpertSupply::Pick& pick : missed) {
        const double size = experts_->bytes_of_one(job.layer);
        bytes += size, products += size * pick.tokens;
      }
      experts_->processor_took(seconds.count(), bytes, products);
    }
    experts_->picked(job.layer, counter_.all(), missed, job.rows);
  }

  void compute(int layer, const HostTensor& sums, const HostTensor& x) {
    if (!supply_) {
      found_.choose(layer);
      return cpu_.experts_from(found_, sums, x, routing_);
    }
    struct End {
      StreamedExperts& supply;
      ~End() { supply.end(); }
    } const end{*supply_};
    supply_->choose(layer);
    cpu_.experts_from(*supply_, sums, x, routing_);
  }

  std::shared_ptr<Device> device_;
  std::shared_ptr<CardExperts> experts_;
  CpuBackend cpu_;
  std::unique_ptr<StreamedExperts> supply_;
  FoundExperts found_;
  RowExchange exchange_;
  HostRouting routing_;
  PickCounter counter_;
  std::mutex mutex_;
  std::condition_variable changed_;  // a job came, or all are done
  std::deque<Job> jobs_;
  std::exception_ptr failure_;  // written with the mutex held, by the thread alone while there are jobs
  std::atomic<bool> abandoned_{false};
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all of this
};

}  // namespace qwen3next::cuda
