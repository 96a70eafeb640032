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
  turn_ = other.turn_, journal_rows_ = other.journal_rows_;
  if (journal_rows_ > 0) {
    if (journal_memory_.size() != other.journal_memory_.size()) {
      journal_memory_ = DeviceBytes();
      journal_memory_ =
          DeviceBytes(other.memory_.device(), other.journal_memory_.size(), "a copy of a session's state");
    }
    memory_.device()->copy_on_device(journal(turn_.journal), other.journal(turn_.journal),
                                     sizeof(float) * journal_size());
  }
  return *this;
}

void CudaDeltaState::make_journals() {
  if (journal_memory_.size() > 0) return;
  journal_memory_ = DeviceBytes(memory_.device(), 2 * sizeof(float) * aligned(journal_size()), "a session's guesses");
}

void CudaDeltaState::bytes(const BytesSink& sink) const { to_host().bytes(sink); }

HostDeltaState CudaDeltaState::to_host() const {
  HostDeltaState host(shape_);
  if (memory_.size() == 0) return host;
  memory_.device()->copy_to_host(host.S.data(), S(), host.S.size());
  if (host.conv.size() > 0) memory_.device()->copy_to_host(host.conv.data(), window(turn_.window), host.conv.size());
  return host;
}

void CudaDeltaState::from_host(const HostDeltaState& host) {
  memory_.device()->copy_to_device(S(), host.S.data(), host.S.size());
  if (host.conv.size() > 0) memory_.device()->copy_to_device(window(turn_.window), host.conv.data(), host.conv.size());
  turn_.accepted = journal_rows_ = 0;
}

}  // namespace qwen3next::cuda
