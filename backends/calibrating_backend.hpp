#pragma once
// A backend that also watches what goes into every matrix.  The forward pass stays as it is, and costs nothing more on
// the backend itself.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

#include "backends/activation_statistics.hpp"
#include "backends/backend.hpp"
#include "backends/host_state.hpp"
#include "backends/host_tensor.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next {

// All operations are B's; `linear` and `experts` count their inputs first.  The input of an expert's `down` arises
// inside B's `experts`, so here that is composed of B's other operations, expert by expert.
template <BackendOps B>
requires std::same_as<typename B::Tensor, HostTensor> && std::same_as<typename B::Weight, WeightView> &&
    std::same_as<typename B::Experts, ExpertViews> && std::same_as<typename B::Routing, HostRouting>
class CalibratingBackend : public B {
 public:
  // `statistics` outlives the backend; `on_layer` is told of each layer that is done.
  CalibratingBackend(B backend, ActivationStatistics& statistics, std::function<void(int layer)> on_layer = {})
      : B(std::move(backend)), statistics_(&statistics), on_layer_(std::move(on_layer)) {}

  void linear(HostTensor x, std::initializer_list<Projection<WeightView, HostTensor>> projections) {
    matrices_.clear();
    for (const auto& projection : projections) matrices_.push_back(projection.weight);
    statistics_->add(matrices_, x.n_rows, squares(x));
    B::linear(x, projections);
  }

  // An input of a matrix whose output nobody needs.
  void watch(HostTensor x, const WeightView& matrix) {
    statistics_->add(std::initializer_list<WeightView>{matrix}, x.n_rows, squares(x));
  }

  void experts(HostTensor out, HostTensor x, const ExpertViews& experts, const HostRouting& routing) {
    for (int t = 0; t < out.n_rows; ++t) std::ranges::fill(out[t], 0.0f);
    rows_.resize(experts.size());
    for (auto& rows : rows_) rows.clear();
    for (int i = 0; i < routing.rows * routing.k; ++i) {
      const auto slot = static_cast<std::size_t>(i);
      rows_[static_cast<std::size_t>(routing.ids[slot])].push_back({i / routing.k, routing.weights[slot]});
    }
    make_room(routing.rows, x.n_cols, experts.front().gate.rows);
    for (std::size_t e = 0; e < experts.size(); ++e) {
      const std::vector<Row>& mine = rows_[e];
      const int T = static_cast<int>(mine.size());
      HostTensor in = in_.rows(0, T), gate = gate_.rows(0, T), up = up_.rows(0, T);
      for (int t = 0; t < T; ++t) std::ranges::copy(x[mine[static_cast<std::size_t>(t)].row], in[t].begin());
      statistics_->add_expert(experts, e, T, squares(in));
      if (T > 0) {
        B::linear(in, {{experts[e].gate, gate}, {experts[e].up, up}});
        B::swiglu(gate, gate, up);
      }
      watch(gate, experts[e].down);
      if (T > 0) B::linear(gate, {{experts[e].down, in}});
      for (int t = 0; t < T; ++t) {
        const Row& row = mine[static_cast<std::size_t>(t)];
        for (int c = 0; c < out.n_cols; ++c) out.row(row.row)[c] += row.weight * in.row(t)[c];
      }
    }
  }

  void observe(int layer, HostTensor) {
    if (on_layer_) on_layer_(layer);
  }

 private:
  struct Row {
    int row;
    float weight;
  };

  // The sum of the squares of each column.
  std::span<const float> squares(const HostTensor& x) {
    squares_.assign(static_cast<std::size_t>(x.n_cols), 0.0f);
    for (int t = 0; t < x.n_rows; ++t) {
      const float* row = x.row(t);
      for (std::size_t c = 0; c < squares_.size(); ++c) squares_[c] += row[c] * row[c];
    }
    return squares_;
  }

  void make_room(int rows, int hidden, int width) {
    if (in_.n_rows >= rows && in_.n_cols == hidden && gate_.n_cols == width) return;
    in_ = B::tensor(rows, hidden);
    gate_ = B::tensor(rows, width);
    up_ = B::tensor(rows, width);
  }

  ActivationStatistics* statistics_;
  std::function<void(int layer)> on_layer_;
  std::vector<WeightView> matrices_;
  std::vector<float> squares_;
  std::vector<std::vector<Row>> rows_;  // of each expert
  HostTensor in_, gate_, up_;           // [T, H] [T, I] x2
};

}  // namespace qwen3next
