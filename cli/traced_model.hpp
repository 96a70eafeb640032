#pragma once
// A model on a cpu backend that measures every operation, without Model and Session: what `bench` looks into.

#include <memory>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/traced_backend.hpp"
#include "cli/bench.hpp"
#include "generate/backend_timeline.hpp"

namespace qwen3next::cli {

class TracedModel {
 public:
  TracedModel(const Model& model, const BenchOptions& o, KvType kv)
      : config_(model.config()), kv_(kv), cpu_(resolve_cpu_options(o.model.isa, o.model.threads)) {
    cpu_.kv = kv;
    zip(model.checkpoint().weights, weights_, [](const auto& view, auto& mine) { mine = view; });
  }

  std::unique_ptr<Timeline> timeline(int batch, bool mtp = false) {
    return std::make_unique<BackendTimeline<B>>(B(CpuBackend(cpu_), trace), config_, weights_, kv_, batch, mtp);
  }

  Trace trace;

 private:
  using B = Traced<CpuBackend>;

  const Config& config_;
  KvType kv_;
  CpuOptions cpu_;
  ModelWeights<B> weights_;
};

}  // namespace qwen3next::cli
