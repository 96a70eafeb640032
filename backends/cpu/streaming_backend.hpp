#pragma once
// The CPU backend with experts that are read as they are needed, and a guess at what the next layer will need.

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "backends/cpu/cpu_backend.hpp"
#include "backends/expert_supply.hpp"

namespace qwen3next {

class StreamingCpuBackend : public CpuBackend {
 public:
  struct Experts {
    int layer = -1;
    int count = 0;
    Experts& operator=(const ExpertViews& views) {
      count = static_cast<int>(views.size());
      return *this;
    }
  };

  StreamingCpuBackend(const CpuOptions& options, std::unique_ptr<StreamedExperts> supply)
      : CpuBackend(options), supply_(std::move(supply)) {}

  void experts(Tensor out, Tensor x, const Experts& experts, const Routing& routing) {
    struct End {
      StreamedExperts& supply;
      ~End() { supply.end(); }
    } const end{*supply_};
    supply_->choose(experts.layer);
    experts_from(*supply_, out, x, routing);
  }

  // After a pass that failed or was cancelled.
  void give_up() noexcept { supply_->give_up(); }

  // The input x of one layer's router, given to the next layer's: what it picks of that is a good guess, since a layer
  // changes the residual stream little.  A long pass needs nearly all experts anyway.
  void look_ahead(Tensor x, const Weight& gate, const Experts& next, int k) {
    if (supply_->complete()) return;
    guess_.clear();
    if (x.n_rows > guessed_rows) {
      guess_.resize(static_cast<std::size_t>(next.count));
      std::iota(guess_.begin(), guess_.end(), 0);
    } else {
      if (!logits_ || logits_->n_cols != next.count || guessed_.k != k) {
        logits_ = tensor(guessed_rows, next.count);
        guessed_ = routing(guessed_rows, k);
      }
      Tensor logits = logits_->rows(0, x.n_rows);
      linear(x, {{gate, logits}});
      router(guessed_, logits, k, false);
      for (int rank = 0; rank < k; ++rank) {  // first the first choices of all tokens
        for (int t = 0; t < x.n_rows; ++t) {
          const std::int32_t id = guessed_.ids[static_cast<std::size_t>(t * k + rank)];
          if (std::find(guess_.begin(), guess_.end(), id) == guess_.end()) guess_.push_back(id);
        }
      }
    }
    supply_->expect(next.layer, guess_);
  }

 private:
  static constexpr int guessed_rows = 16;

  std::unique_ptr<StreamedExperts> supply_;
  std::vector<std::int32_t> guess_;
  std::optional<Tensor> logits_;
  Routing guessed_;
};

static_assert(BackendOps<StreamingCpuBackend>);

}  // namespace qwen3next
