// A traced model on the cpu backend.

#include "cli/traced_model.hpp"

#include "backends/cpu/cpu_backend.hpp"
#include "generate/backend_timeline.hpp"

namespace qwen3next::cli {

namespace {

class TracedCpuModel final : public TracedModel {
 public:
  TracedCpuModel(const Model& model, const BenchOptions& o, KvType kv)
      : config_(model.config()), kv_(kv), cpu_(resolve_cpu_options(o.model.isa, o.model.threads)) {
    cpu_.kv = kv;
    zip(model.checkpoint().weights, weights_, [](const auto& view, auto& mine) { mine = view; });
  }

  std::unique_ptr<Timeline> timeline(int batch, bool mtp) override {
    return std::make_unique<BackendTimeline<B>>(B(CpuBackend(cpu_), trace), config_, weights_, kv_, batch, mtp);
  }

 private:
  using B = Traced<CpuBackend>;

  const Config& config_;
  KvType kv_;
  CpuOptions cpu_;
  ModelWeights<B> weights_;
};

}  // namespace

std::unique_ptr<TracedModel> traced_model(const Model& model, const BenchOptions& o, KvType kv) {
#ifdef QWEN3NEXT_CUDA
  if (o.model.backend == "cuda") return traced_cuda_model(model, kv);
#endif
  return std::make_unique<TracedCpuModel>(model, o, kv);
}

}  // namespace qwen3next::cli
