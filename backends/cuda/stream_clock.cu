#include <cuda_runtime.h>

#include "backends/cuda/stream_clock.hpp"

namespace qwen3next::cuda {

namespace {

__device__ unsigned long long nanoseconds() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// For at most 10 ms: the queue may be full before its end, and then the host waits for us.
__global__ void wait_until(const volatile int* released, int hold) {
  const unsigned long long start = nanoseconds();
  while (*released < hold && nanoseconds() - start < 10'000'000) {
  }
}

}  // namespace

StreamClock::StreamClock(std::shared_ptr<Device> device) : device_(std::move(device)), released_(sizeof(int)) {
  *released_.data<int>() = 0;
}
StreamClock::~StreamClock() {
  release();
  for (CUevent_st* event : events_) cudaEventDestroy(event);
}

void StreamClock::hold() {
  ++holds_;
  wait_until<<<1, 1, 0, device_->stream()>>>(released_.data<int>(), holds_);
  check(cudaGetLastError(), "holding the stream");
}
void StreamClock::release() { *static_cast<volatile int*>(released_.data<int>()) = holds_; }

std::size_t StreamClock::now() {
  if (used_ == events_.size()) {
    events_.push_back(nullptr);
    check(cudaEventCreate(&events_.back()), "making an event");
  }
  check(cudaEventRecord(events_[used_], device_->stream()), "recording an event");
  return used_++;
}

double StreamClock::seconds(std::size_t from, std::size_t to) {
  float milliseconds = 0;
  check(cudaEventSynchronize(events_[to]), "work on the GPU");
  check(cudaEventElapsedTime(&milliseconds, events_[from], events_[to]), "reading an event");
  return static_cast<double>(milliseconds) / 1000;
}

}  // namespace qwen3next::cuda
