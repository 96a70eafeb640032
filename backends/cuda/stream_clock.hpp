#pragma once
// Moments of the card's work, noted as it is queued and read when it is done.  Plain C++.

#include <cstddef>
#include <memory>
#include <vector>

#include "backends/cuda/device.hpp"

namespace qwen3next::cuda {

class StreamClock {
 public:
  explicit StreamClock(std::shared_ptr<Device> device);
  ~StreamClock();
  StreamClock(const StreamClock&) = delete;

  // The card waits (10 ms at most), so that work queues up: what is noted then has no gaps in which the card waited for
  // this thread.  One kernel no longer begins before the one before it has ended, where a moment is noted between them.
  void hold();
  void release();

  // Notes the moment when all work until now is done: its number, from 0.
  std::size_t now();
  std::size_t count() const noexcept { return used_; }
  double seconds(std::size_t from, std::size_t to);  // between two moments; waits for the later one
  void clear() noexcept { used_ = 0; }

 private:
  std::shared_ptr<Device> device_;
  std::vector<CUevent_st*> events_;
  std::size_t used_ = 0;
  PinnedBytes released_;  // int: up to which hold
  int holds_ = 0;
};

}  // namespace qwen3next::cuda
