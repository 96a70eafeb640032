#pragma once
// Times a CudaBackend's operations by events, for Traced: the host queues a whole pass while the card waits, so that
// what is measured is the card's time alone.  Between operations that are measured nothing overlaps, as it does
// otherwise: together they take longer than a pass.

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "backends/cuda/router.hpp"
#include "backends/cuda/stream_clock.hpp"
#include "backends/cuda/weights.hpp"
#include "backends/traced_backend.hpp"

namespace qwen3next {

// What weights on the card are in the file: costs are counted in the file's bytes.  Views live as long as this.
class CudaFileViews {
 public:
  // `view` is a WeightView, ExpertViews or VectorView.
  void add(const void* view, const cuda::CudaWeight& w) {
    matrices_[w.matrix().data] = *static_cast<const WeightView*>(view);
  }
  void add(const void* view, const cuda::CudaExperts& e) {
    experts_[e.matrices.slots] = static_cast<const ExpertViews*>(view);
  }
  void add(const void*, const cuda::CudaVector&) {}

  // Of a part of a matrix, the first rows.
  WeightView view(const cuda::CudaWeight& w) const {
    WeightView view = std::prev(matrices_.upper_bound(w.matrix().data))->second;
    return view.rows == w.rows() ? view : view.slice(0, w.rows());
  }
  const ExpertViews& view(const cuda::CudaExperts& e) const { return *experts_.at(e.matrices.slots); }

 private:
  std::map<const std::byte*, WeightView> matrices_;
  std::map<const std::byte* const*, const ExpertViews*> experts_;
};

class CudaMeter {
 public:
  CudaMeter(std::shared_ptr<cuda::Device> device, std::shared_ptr<const CudaFileViews> views)
      : device_(std::move(device)), views_(std::move(views)), clock_(std::make_unique<cuda::StreamClock>(device_)) {}

  WeightView view(const cuda::CudaWeight& w) const { return views_->view(w); }

  template <class Work>
  void time(Trace& trace, std::string_view name, const OpCost& cost, Work work) {
    if (!trace.on) return work();
    begin();
    work();
    end(name, cost);
  }
  template <class Work>
  void time_experts(Trace& trace, std::string_view name, const OpCost& cost, const cuda::CudaExperts& experts,
                    const cuda::Routing& routing, int T, Work work) {
    if (!trace.on) return work();
    begin();
    work();
    end(name, cost);
    // Which experts it were is known on the card alone, until the next layer.
    Picks picks{&views_->view(experts), {}, static_cast<std::size_t>(T * routing.k)};
    picks.ids = cuda::DeviceBytes(device_, picks.count * sizeof(std::int32_t), "measuring experts");
    device_->copy_on_device(picks.ids.data(), routing.ids, picks.ids.size());
    timed_.back().picks = std::move(picks);
    last_ = clock_->now();
  }

  void finish(Trace& trace) {
    clock_->release();
    for (Timed& t : timed_) {
      if (t.picks.experts) {
        ids_.resize(t.picks.count);
        device_->copy_to_host(ids_.data(), t.picks.ids.data(), t.picks.ids.size());
        t.cost += experts_cost(*t.picks.experts, ids_, rows_);
      }
      trace.add(t.name, clock_->seconds(t.begin, t.end), t.cost);
    }
    timed_.clear();
    clock_->clear();
  }

 private:
  struct Picks {
    const ExpertViews* experts = nullptr;
    cuda::DeviceBytes ids;
    std::size_t count = 0;
  };
  struct Timed {
    std::string_view name;
    OpCost cost;
    std::size_t begin, end;  // moments
    Picks picks;
  };
  // Fewer than the card's queue takes, two entries or more each.
  static constexpr std::size_t most_held = 400;

  // Each operation begins where the one before it ended: as few events as can be.
  void begin() {
    if (!timed_.empty()) return;
    clock_->hold();
    last_ = clock_->now();
  }
  void end(std::string_view name, const OpCost& cost) {
    const std::size_t begin = std::exchange(last_, clock_->now());
    timed_.push_back({name, cost, begin, last_, {}});
    if (timed_.size() == most_held) clock_->release();
  }

  std::shared_ptr<cuda::Device> device_;
  std::shared_ptr<const CudaFileViews> views_;
  std::unique_ptr<cuda::StreamClock> clock_;
  std::vector<Timed> timed_;
  std::size_t last_ = 0;
  std::vector<std::int32_t> ids_;
  std::vector<int> rows_;
};

}  // namespace qwen3next
