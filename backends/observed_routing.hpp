#pragma once
// A backend that also shows which experts its router picks.  The forward pass stays as it is, and costs nothing more on
// the backend itself.

#include <concepts>
#include <functional>
#include <utility>

#include "backends/backend.hpp"
#include "backends/host_state.hpp"

namespace qwen3next {

// All operations are B's.  `on_routing` is called once for every layer that a pass goes through, in order.
template <BackendOps B>
requires std::same_as<typename B::Routing, HostRouting>
class ObservedRouting : public B {
 public:
  using OnRouting = std::function<void(const HostRouting&)>;

  ObservedRouting(B backend, OnRouting on_routing) : B(std::move(backend)), on_routing_(std::move(on_routing)) {}

  void router(HostRouting& routing, typename B::Tensor logits, int k, bool normalise) {
    B::router(routing, logits, k, normalise);
    on_routing_(routing);
  }

 private:
  OnRouting on_routing_;
};

}  // namespace qwen3next
