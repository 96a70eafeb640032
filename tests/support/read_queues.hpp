#pragma once
// Queues that read as badly as disks may.

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "weights/read_queue.hpp"

namespace qwen3next::test {

// Says of one read that it failed.
class FaultyQueue final : public ReadQueue {
 public:
  // The read after `good` others fails with `error`, if `good` is not negative; shared with the test, that sets it.
  struct Fault {
    std::atomic<int> good{-1};
    int error = EIO;
  };
  FaultyQueue(std::shared_ptr<Fault> fault, OnDone on_done)
      : fault_(std::move(fault)),
        on_done_(std::move(on_done)),
        queue_(make_read_queue(ReadQueueKind::threads, 8, [this](std::span<const ReadResult> results) {
          std::vector<ReadResult> changed(results.begin(), results.end());
          for (ReadResult& result : changed) {
            if (fault_->good >= 0 && fault_->good-- == 0) result.error = fault_->error;
          }
          on_done_(changed);
        })) {}
  void submit(std::span<const ReadRequest> requests) override { queue_->submit(requests); }
  std::string_view kind() const noexcept override { return "faulty"; }

 private:
  std::shared_ptr<Fault> fault_;
  OnDone on_done_;
  std::unique_ptr<ReadQueue> queue_;
};

// Tells of reads late, and in any order.
class LateQueue final : public ReadQueue {
 public:
  explicit LateQueue(OnDone on_done)
      : on_done_(std::move(on_done)),
        queue_(make_read_queue(ReadQueueKind::threads, 8,
                               [this](std::span<const ReadResult> results) {
                                 const std::lock_guard lock(mutex_);
                                 done_.insert(done_.end(), results.begin(), results.end());
                                 changed_.notify_all();
                               })),
        teller_([this] { tell(); }) {}
  ~LateQueue() override {
    queue_.reset();
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    teller_.join();
  }
  void submit(std::span<const ReadRequest> requests) override { queue_->submit(requests); }
  std::string_view kind() const noexcept override { return "late"; }

 private:
  void tell() {
    std::mt19937 random(1);
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return closed_ || !done_.empty(); });
      if (done_.empty()) return;
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      lock.lock();
      std::swap(done_[random() % done_.size()], done_.back());
      const ReadResult one = done_.back();
      done_.pop_back();
      lock.unlock();
      on_done_({&one, 1});
      lock.lock();
    }
  }

  OnDone on_done_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<ReadResult> done_;
  bool closed_ = false;
  std::unique_ptr<ReadQueue> queue_;
  std::thread teller_;
};

}  // namespace qwen3next::test
