#pragma once
// A model on a backend, without the facade: tests drive forward() with batches of their own.

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "model/forward.hpp"
#include "model/mtp.hpp"
#include "weights/checkpoint.hpp"

namespace qwen3next::test {

template <BackendOps B>
struct RunModel {
  using BackendType = B;

  RunModel(const Checkpoint& checkpoint, B backend, int max_rows, int sequences = 1)
      : config(checkpoint.config), be(std::move(backend)), a(be, config, max_rows, max_rows, sequences) {
    zip(checkpoint.weights, weights, [&](const auto& view, auto& mine) {
      if constexpr (requires { be.take(view, mine); })
        be.take(view, mine);
      else
        mine = view;
    });
  }

  SequenceState<B> state() { return SequenceState<B>(be, config); }

  // Appends `tokens` to one sequence in a single step; logits [T, V].
  std::vector<float> step(SequenceState<B>& s, std::span<const std::int32_t> tokens) {
    const SequenceRows<B> rows{0, static_cast<int>(tokens.size()), s.position, &s};
    forward<B>(be, config, weights, tokens, {&rows, 1}, a);
    return head_logits(static_cast<int>(tokens.size()));
  }

  // The same for several sequences in one batch; logits of all rows in the order of the sequences.
  std::vector<float> step(std::span<SequenceState<B>* const> states,
                          std::span<const std::vector<std::int32_t>> tokens) {
    std::vector<std::int32_t> all;
    std::vector<SequenceRows<B>> rows;
    for (std::size_t i = 0; i < states.size(); ++i) {
      rows.push_back(
          {static_cast<int>(all.size()), static_cast<int>(tokens[i].size()), states[i]->position, states[i]});
      all.insert(all.end(), tokens[i].begin(), tokens[i].end());
    }
    forward<B>(be, config, weights, all, rows, a);
    return head_logits(static_cast<int>(all.size()));
  }

  std::vector<float> logits(std::span<const std::int32_t> tokens) {
    auto s = state();
    return step(s, tokens);
  }

  std::vector<float> mtp_logits(std::span<const std::int32_t> tokens) {
    auto s = state();
    step(s, tokens);
    const int rows = static_cast<int>(tokens.size()) - 1;
    const SequenceRows<B> sequence{0, rows, 0, &s};
    mtp_forward<B>(be, config, *weights.mtp, tokens.subspan(1), a.h.rows(0, rows), {&sequence, 1}, a);
    return head_logits(rows, weights.mtp->lm_head);
  }

  std::vector<float> head_logits(int T) { return head_logits(T, weights.lm_head); }
  std::vector<float> head_logits(int T, const typename B::Weight& lm_head) {
    auto tensor = head(be, lm_head, a, 0, T);
    std::vector<float> out;
    for (int t = 0; t < T; ++t) {
      const std::span<const float> row = be.host(tensor.rows(t, 1));
      out.insert(out.end(), row.begin(), row.end());
    }
    return out;
  }

  Config config;
  B be;
  ModelWeights<B> weights;
  Activations<B> a;
};

}  // namespace qwen3next::test
