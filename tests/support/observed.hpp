#pragma once
// A backend that keeps the residual stream after each layer.

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "backends/backend.hpp"

namespace qwen3next::test {

template <BackendOps B>
struct Observed : B {
  using B::B;
  void observe(int layer, typename B::Tensor x) {
    residual.resize(std::max(residual.size(), static_cast<std::size_t>(layer) + 1));
    std::vector<float>& kept = residual[static_cast<std::size_t>(layer)];
    for (int t = 0; t < x.n_rows; ++t) {
      const std::span<const float> row = this->host(x.rows(t, 1));
      kept.insert(kept.end(), row.begin(), row.end());
    }
  }
  std::vector<std::vector<float>> residual;
};

}  // namespace qwen3next::test
