#pragma once
// How large the inputs of each matrix are, column by column, over the tokens of a text: what quantisation errors weigh.
//
// For inputs x whose columns are uncorrelated, an error E in a matrix costs  mean |E x|^2 = sum_rc E[r,c]^2 mean(x_c^2)
// in its output, so the importance of a column is its mean square.  A matrix is known by where its data lies.

#include <cstddef>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <span>
#include <unordered_map>
#include <vector>

#include "blocks/weight_view.hpp"

namespace qwen3next {

class ActivationStatistics {
 public:
  ActivationStatistics() = default;
  ActivationStatistics(ActivationStatistics&&) = default;  // a copy would point into the original
  ActivationStatistics& operator=(ActivationStatistics&&) = default;

  // Counts inputs of the matrices, which always share them: `rows` of them, whose squares have the sums [D].
  template <class Weights>
  void add(const Weights& matrices, std::int64_t rows, std::span<const float> squares) {
    add(columns_of(matrices, nullptr), rows, squares);
  }

  // The same for gate and up of expert `e` of a layer, whose inputs are some of the layer's.
  void add_expert(const ExpertViews& experts, std::size_t e, std::int64_t rows, std::span<const float> squares) {
    Columns*& layer = layers_[experts.front().gate.data];
    if (!layer) layer = &columns_.emplace_back();
    add(columns_of(std::initializer_list<WeightView>{experts[e].gate, experts[e].up}, layer), rows, squares);
  }

  // After the last observation: the layers' own means, which experts that saw few tokens lean on.
  void finish() {
    for (Columns& c : columns_) {
      if (!c.layer) continue;
      c.layer->squares.resize(c.squares.size());
      c.layer->rows += c.rows;
      for (std::size_t i = 0; i < c.squares.size(); ++i) c.layer->squares[i] += c.squares[i];
    }
  }

  bool has(const WeightView& matrix) const noexcept { return by_data_.contains(matrix.data); }

  // The importance of each column of a matrix, to `out`.  With s the sum of squares over the n rows seen:
  //
  //   importance = (s + k p) / (n + k),   k = 32
  //
  // as if k more rows had been seen that look like the prior p.  For an expert's gate and up, p is the mean square over
  // all rows that any expert of the layer saw; for other matrices, and for p itself, the same for all columns: the mean
  // of s / n.  So an expert without tokens has the layer's importance, columns that happened to be zero are not given
  // up, and thousands of rows are believed.  All alike if nothing was seen.
  void importance(const WeightView& matrix, std::vector<float>& out) const {
    const auto found = by_data_.find(matrix.data);
    if (found == by_data_.end()) return out.assign(static_cast<std::size_t>(matrix.cols), 1.0f);
    blend(*found->second, static_cast<std::size_t>(matrix.cols), out);
  }

  std::int64_t rows(const WeightView& matrix) const noexcept {
    const auto found = by_data_.find(matrix.data);
    return found == by_data_.end() ? 0 : found->second->rows;
  }

 private:
  static constexpr float prior_rows = 32;

  struct Columns {
    std::int64_t rows = 0;
    std::vector<float> squares;  // sums; [D], empty before the first row
    Columns* layer = nullptr;    // of an expert's gate and up
  };

  template <class Weights>
  Columns& columns_of(const Weights& matrices, Columns* layer) {
    Columns* columns = nullptr;
    for (const WeightView& matrix : matrices) {
      Columns*& mine = by_data_[matrix.data];
      if (!mine && !columns) {
        columns = &columns_.emplace_back();
        columns->layer = layer;
        columns->squares.resize(static_cast<std::size_t>(matrix.cols));
      }
      if (!mine) mine = columns;
      columns = mine;
    }
    return *columns;
  }

  static void add(Columns& columns, std::int64_t rows, std::span<const float> squares) {
    columns.rows += rows;
    for (std::size_t c = 0; c < squares.size(); ++c) columns.squares[c] += squares[c];
  }

  static void blend(const Columns& columns, std::size_t cols, std::vector<float>& out) {
    if (columns.layer) {
      blend(*columns.layer, cols, out);
    } else {
      double sum = 0;
      for (const float s : columns.squares) sum += static_cast<double>(s);
      const double rows = static_cast<double>(columns.rows) * static_cast<double>(cols);
      out.assign(cols, sum > 0 ? static_cast<float>(sum / rows) : 1.0f);
    }
    if (columns.rows == 0) return;
    const float n = static_cast<float>(columns.rows);
    for (std::size_t c = 0; c < cols; ++c) out[c] = (columns.squares[c] + prior_rows * out[c]) / (n + prior_rows);
  }

  std::deque<Columns> columns_;  // stay in place
  std::unordered_map<const std::byte*, Columns*> by_data_;
  std::unordered_map<const std::byte*, Columns*> layers_;  // by the first expert's gate
};

}  // namespace qwen3next
