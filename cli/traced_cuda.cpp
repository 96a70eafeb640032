// A traced model on the cuda backend, and the GPU's limits.

#include <memory>
#include <vector>

#include "backends/cuda/cuda_meter.hpp"
#include "backends/cuda/roofs.hpp"
#include "cli/traced_model.hpp"
#include "generate/cuda_engine.hpp"

namespace qwen3next::cli {

namespace {

class TracedCudaModel final : public TracedModel {
 public:
  TracedCudaModel(const Model& model, KvType kv) : config_(model.config()), kv_(kv), device_(cuda::Device::open()) {
    ModelWeights<CudaBackend> untraced;
    qwen3next::detail::CudaBackends(device_, {}).take(model.checkpoint().weights, untraced);
    std::vector<const void*> in_file;  // in the order of zip()
    ModelWeights<NoWeights> nothing;
    zip(model.checkpoint().weights, nothing, [&](const auto& view, auto&) { in_file.push_back(&view); });
    const auto views = std::make_shared<CudaFileViews>();
    auto view = in_file.begin();
    zip(untraced, weights_, [&](const auto& weight, auto& mine) {
      mine = weight;
      views->add(*view++, weight);
    });
    views_ = views;
  }

  std::unique_ptr<Timeline> timeline(int batch, bool mtp) override {
    return std::make_unique<BackendTimeline<B>>(B(CudaBackend(device_, kv_), trace, CudaMeter(device_, views_)),
                                                config_, weights_, kv_, batch, mtp);
  }
  bool is_slowed() const noexcept override { return true; }

 private:
  using B = Traced<CudaBackend, CudaMeter>;

  const Config& config_;
  KvType kv_;
  std::shared_ptr<cuda::Device> device_;
  ModelWeights<B> weights_;
  std::shared_ptr<const CudaFileViews> views_;
};

}  // namespace

std::unique_ptr<TracedModel> traced_cuda_model(const Model& model, KvType kv) {
  return std::make_unique<TracedCudaModel>(model, kv);
}

Roofs cuda_roofs(bool products) {
  const std::shared_ptr<cuda::Device> device = cuda::Device::open();
  const double peak = products ? cuda::measure_tensor_peak(device) : 0;
  return {.bandwidth = cuda::measure_copy_bandwidth(device), .integer_macs = peak, .floating_macs = peak};
}

}  // namespace qwen3next::cli
