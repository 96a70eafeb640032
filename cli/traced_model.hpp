#pragma once
// A model on a backend that measures every operation, without Model and Session: what `bench` looks into.

#include <memory>

#include "backends/traced_backend.hpp"
#include "cli/bench.hpp"
#include "generate/engine.hpp"

namespace qwen3next::cli {

class TracedModel {
 public:
  virtual ~TracedModel() = default;
  virtual std::unique_ptr<Timeline> timeline(int batch, bool mtp = false) = 0;
  // Whether operations are slower while they are measured: then speed is to be measured with trace.on false.
  virtual bool is_slowed() const noexcept { return false; }

  Trace trace;
};

// On the backend that o names: cpu or cuda.
std::unique_ptr<TracedModel> traced_model(const Model& model, const BenchOptions& o, KvType kv);
std::unique_ptr<TracedModel> traced_cuda_model(const Model& model, KvType kv);  // traced_cuda.cpp

}  // namespace qwen3next::cli
