#pragma once
// A queue of reads whose threads each wait for one read at a time: what works everywhere.

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/message.hpp"
#include "weights/read_request.hpp"

namespace qwen3next {

class ThreadReadQueue final : public ReadQueue {
 public:
  // What reads; as DirectFile::read_at, which it is but in tests.
  using ReadAt =
      std::function<std::int64_t(const DirectFile&, std::byte* into, std::size_t size, std::uint64_t offset)>;
  static constexpr int most_threads = 32;

  // Up to `depth` threads, at most 32, begun as they are needed.  Throws Error if the system gives none.
  ThreadReadQueue(
      int depth, OnDone on_done,
      ReadAt read_at = [](const DirectFile& file, std::byte* into, std::size_t size,
                          std::uint64_t offset) { return file.read_at(into, size, offset); })
      : on_done_(std::move(on_done)), read_at_(std::move(read_at)) {
    const auto most = static_cast<std::size_t>(std::clamp(depth, 1, most_threads));
    threads_.reserve(most);
    done_.reserve(2 * most);
    given_.reserve(2 * most);
    if (!add_thread()) throw_error("the system gives no thread to read files with: end other programs");
  }
  ~ThreadReadQueue() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void submit(std::span<const ReadRequest> requests) override {
    const std::lock_guard lock(mutex_);
    waiting_.append(requests);
    std::size_t asleep = asleep_;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      if (asleep > 0) {
        --asleep;
        wake_.notify_one();
      } else if (threads_.size() == threads_.capacity() || !add_thread()) {
        break;  // those that read now will come for it
      }
    }
  }

  std::string_view kind() const noexcept override { return "threads"; }

 private:
  bool add_thread() {
    try {
      threads_.emplace_back([this] { work(); });
      return true;
    } catch (const std::system_error&) {
      return false;
    }
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      ++asleep_;
      wake_.wait(lock, [&] { return stopping_ || !waiting_.empty(); });
      --asleep_;
      if (waiting_.empty()) return;
      detail::ReadUnderWay read(waiting_.take());
      if (stopping_) {
        done_.push_back(read.failed(ECANCELED));
      } else {
        lock.unlock();
        while (!read.take(read_at_(read.file(), read.into(), read.size(), read.offset()))) {
        }
        lock.lock();
        done_.push_back(read.result());
      }
      give_results(lock);
    }
  }

  // One thread at a time; the others leave their results to it and go on reading.
  void give_results(std::unique_lock<std::mutex>& lock) {
    if (giving_) return;
    giving_ = true;
    while (!done_.empty()) {
      given_.swap(done_);
      lock.unlock();
      on_done_(given_);
      given_.clear();
      lock.lock();
    }
    giving_ = false;
  }

  const OnDone on_done_;
  const ReadAt read_at_;
  std::mutex mutex_;  // for all below
  std::condition_variable wake_;
  detail::WaitingReads waiting_;
  std::vector<ReadResult> done_, given_;  // given_: in the hands of the thread that is giving
  std::vector<std::thread> threads_;
  std::size_t asleep_ = 0;
  bool giving_ = false, stopping_ = false;
};

}  // namespace qwen3next
