#pragma once
// What a DeltaNet layer keeps of a sequence on the card: HostDeltaState's twin, with the same contract.
//
// Nothing here starts a kernel.  A copy is an exact snapshot, made in the order of the stream.  accept() only counts:
// the next pass reads what was accepted from the journal, and folds it into the window and S as it goes.

#include <cstddef>
#include <memory>
#include <span>
#include <utility>

#include "backends/backend.hpp"
#include "backends/cuda/device.hpp"
#include "backends/host_state.hpp"

namespace qwen3next::cuda {

class CudaDeltaState {
 public:
  CudaDeltaState() = default;
  CudaDeltaState(const std::shared_ptr<Device>& device, DeltaShape shape);  // zeros
  CudaDeltaState(const CudaDeltaState& other) { *this = other; }
  CudaDeltaState(CudaDeltaState&&) noexcept = default;
  CudaDeltaState& operator=(const CudaDeltaState& other);  // into the memory that is there, if it is enough
  CudaDeltaState& operator=(CudaDeltaState&&) noexcept = default;

  const DeltaShape& shape() const noexcept { return shape_; }

  // For files: S f32 [Hv, Dv, Dk], then the window of the convolution f32 [K-1, channels], oldest first.  Settled.
  // Waits; the bytes are there until `sink` returns.
  void bytes(const BytesSink& sink) const;
  std::size_t size_in_bytes() const noexcept { return sizeof(float) * (S_size() + window_size()); }  // of the above
  HostDeltaState to_host() const;                                                                    // settled; waits
  void from_host(const HostDeltaState& host);  // settled, of the same shape

  // The first `rows` of the tentative pass before stay.
  void accept(int rows) noexcept { accepted_ = journal_rows_ = rows; }
  // The accepted rows are in S and the window now; gives the journal's memory back.
  void settled() noexcept {
    accepted_ = journal_rows_ = 0;
    journal_memory_ = DeviceBytes();
  }

  // For the kernels.  Two windows and two journals take turns: thread blocks still read the one while another writes
  // what is next.
  float* S() const noexcept { return memory_.data<float>(); }
  float* window() const noexcept { return window_at(window_); }
  float* next_window() const noexcept { return window_at(1 - window_); }
  float* journal() const noexcept { return journal_at(journal_); }  // null if there is none
  float* next_journal();                                            // makes room for it
  int accepted() const noexcept { return accepted_; }  // so many rows of the journal are yet to enter S and the window

  // After a pass over `count` rows that folded in what was accepted.
  void passed(int count, bool tentative) noexcept {
    if (accepted_ > 0 || (!tentative && count > 0)) window_passed();
    accepted_ = 0;
    rule_passed(count, tentative);
  }
  void window_passed() noexcept { window_ = 1 - window_; }  // of the convolution alone
  void rule_passed(int count, bool tentative) noexcept {    // of the delta rule alone
    if (tentative) journal_ = 1 - journal_;
    journal_rows_ = tentative ? count : 0;
  }

  // A journal holds, of max_tentative_rows rows each, one after the other: inputs and outputs of the convolution
  // [rows, channels], beta and g [rows, Hv].
  std::size_t journal_size() const noexcept {
    return static_cast<std::size_t>(max_tentative_rows) * 2 *
           (static_cast<std::size_t>(shape_.conv_dim()) + static_cast<std::size_t>(shape_.value_heads));
  }

 private:
  std::size_t S_size() const noexcept {
    return static_cast<std::size_t>(shape_.value_heads) * static_cast<std::size_t>(shape_.value_dim) *
           static_cast<std::size_t>(shape_.key_dim);
  }
  std::size_t window_size() const noexcept {
    return static_cast<std::size_t>(shape_.conv_kernel - 1) * static_cast<std::size_t>(shape_.conv_dim());
  }
  static std::size_t aligned(std::size_t floats) noexcept { return (floats + 63) / 64 * 64; }
  float* window_at(int which) const noexcept {
    return S() + aligned(S_size()) + static_cast<std::size_t>(which) * aligned(window_size());
  }
  float* journal_at(int which) const noexcept {
    if (journal_memory_.size() == 0) return nullptr;
    return journal_memory_.data<float>() + static_cast<std::size_t>(which) * aligned(journal_size());
  }

  DeltaShape shape_{0, 0, 0, 0, 1};
  DeviceBytes memory_;            // S, window, window
  DeviceBytes journal_memory_;    // two, from the first tentative pass on
  int window_ = 0, journal_ = 0;  // the current ones
  int accepted_ = 0;
  int journal_rows_ = 0;  // what a copy takes along
};

}  // namespace qwen3next::cuda
