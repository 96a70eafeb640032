#include "backends/cuda/delta_state.hpp"

#include <vector>

namespace qwen3next::cuda {

CudaDeltaState::CudaDeltaState(const std::shared_ptr<Device>& device, DeltaShape shape)
    : shape_(shape),
      memory_(device, sizeof(float) * (aligned(S_size()) + 2 * aligned(window_size())), "a session's DeltaNet state") {
  device->clear(memory_.data(), memory_.size());
}

CudaDeltaState& CudaDeltaState::operator=(const CudaDeltaState& other) {
  if (this == &other) return *this;
  if (memory_.size() == other.memory_.size() && memory_.device() == other.memory_.device()) {
    if (memory_.size() > 0) memory_.device()->copy_on_device(memory_.data(), other.memory_.data(), memory_.size());
  } else {
    memory_ = other.memory_.copy();
  }
  shape_ = other.shape_;
  window_ = other.window_, journal_ = other.journal_;
  accepted_ = other.accepted_, journal_rows_ = other.journal_rows_;
  if (journal_rows_ > 0) {
    if (journal_memory_.size() != other.journal_memory_.size()) {
      journal_memory_ = DeviceBytes();
      journal_memory_ =
          DeviceBytes(other.memory_.device(), other.journal_memory_.size(), "a copy of a session's state");
    }
    memory_.device()->copy_on_device(journal(), other.journal(), sizeof(float) * journal_size());
  }
  return *this;
}

float* CudaDeltaState::next_journal() {
  if (journal_memory_.size() == 0) {
    journal_memory_ = DeviceBytes(memory_.device(), 2 * sizeof(float) * aligned(journal_size()), "a session's guesses");
  }
  return journal_at(1 - journal_);
}

void CudaDeltaState::bytes(const BytesSink& sink) const { to_host().bytes(sink); }

HostDeltaState CudaDeltaState::to_host() const {
  HostDeltaState host(shape_);
  if (memory_.size() == 0) return host;
  memory_.device()->copy_to_host(host.S.data(), S(), host.S.size());
  if (host.conv.size() > 0) memory_.device()->copy_to_host(host.conv.data(), window(), host.conv.size());
  return host;
}

void CudaDeltaState::from_host(const HostDeltaState& host) {
  memory_.device()->copy_to_device(S(), host.S.data(), host.S.size());
  if (host.conv.size() > 0) memory_.device()->copy_to_device(window(), host.conv.data(), host.conv.size());
  accepted_ = journal_rows_ = 0;
}

}  // namespace qwen3next::cuda
