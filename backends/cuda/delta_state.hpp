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

// Which of a state's two windows and journals hold what is current, and how many rows of the journal are accepted: all
// that changes of a state's description from pass to pass, and the same for all layers of a sequence.  Where it lies on
// the card, a recorded pass can be played again (see DeltaNetInputs::turns).
struct DeltaTurn {
  int window = 0, journal = 0, accepted = 0;

  // After a pass over `count` rows.
  void pass(int count, bool tentative) noexcept {
    if (accepted > 0 || (!tentative && count > 0)) window = 1 - window;
    if (tentative) journal = 1 - journal;
    accepted = 0;
  }
};

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
  void accept(int rows) noexcept { turn_.accepted = journal_rows_ = rows; }
  // The accepted rows are in S and the window now; gives the journal's memory back.
  void settled() noexcept {
    turn_.accepted = journal_rows_ = 0;
    journal_memory_ = DeviceBytes();
  }

  // For the kernels.  Two windows and two journals take turns: thread blocks still read the one while another writes
  // what is next.
  float* S() const noexcept { return memory_.data<float>(); }
  float* windows() const noexcept { return S() + aligned(S_size()); }
  float* journals() const noexcept { return journal_memory_.data<float>(); }
  float* window(int which) const noexcept { return windows() + which * window_stride(); }
  float* journal(int which) const noexcept { return journals() ? journals() + which * journal_stride() : nullptr; }
  int window_stride() const noexcept { return static_cast<int>(aligned(window_size())); }
  int journal_stride() const noexcept { return static_cast<int>(aligned(journal_size())); }
  void make_journals();  // if there are none

  const DeltaTurn& turn() const noexcept { return turn_; }
  // After a pass over `count` rows that folded in what was accepted.
  void passed(int count, bool tentative) noexcept {
    turn_.pass(count, tentative);
    journal_rows_ = tentative ? count : 0;
  }
  void window_passed() noexcept { turn_.window = 1 - turn_.window; }  // of the convolution alone
  void rule_passed(int count, bool tentative) noexcept {              // of the delta rule alone
    if (tentative) turn_.journal = 1 - turn_.journal, journal_rows_ = count;
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
  DeltaShape shape_{0, 0, 0, 0, 1};
  DeviceBytes memory_;          // S, window, window
  DeviceBytes journal_memory_;  // two, from the first tentative pass on
  DeltaTurn turn_;
  int journal_rows_ = 0;  // what a copy takes along
};

}  // namespace qwen3next::cuda
