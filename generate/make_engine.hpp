#pragma once
// The one place that knows every backend by type.

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/cpu/streaming_backend.hpp"
#include "core/error.hpp"
#include "core/linkage.hpp"
#include "generate/backend_engine.hpp"
#ifdef QWEN3NEXT_REFERENCE
#include "backends/reference/reference_backend.hpp"
#endif
#ifdef QWEN3NEXT_CUDA
#include "generate/cuda_engine.hpp"
#endif

namespace qwen3next {

namespace detail {

template <BackendOps B, class MakeBackend>
std::unique_ptr<const Engine> engine_of(const Config& config, const ModelWeights<Views>& weights, KvType default_kv,
                                        MakeBackend make_backend, std::string description,
                                        std::shared_ptr<Streaming> streaming = {}) {
  return std::make_unique<BackendEngine<B, MakeBackend>>(config, weights, default_kv, std::move(make_backend),
                                                         std::move(description), std::move(streaming));
}

}  // namespace detail

QWEN3NEXT_INLINE std::vector<std::string_view> available_isas() { return cpu::available_isas(); }

QWEN3NEXT_INLINE std::unique_ptr<const Engine> make_engine(const Config& config, const ModelWeights<Views>& weights,
                                                           const EngineOptions& options) {
  switch (options.backend) {
    case Backend::cpu: {
      CpuOptions cpu = resolve_cpu_options(options.isa, options.threads);
      cpu.team.emplace(cpu.threads);  // one for all sessions
      const auto options_for = [cpu](KvType kv) {
        CpuOptions mine = cpu;
        mine.kv = kv;
        return mine;
      };
      const std::string description =
          "cpu, " + std::string(cpu.kernels->name) + ", " + std::to_string(cpu.threads) + " threads";
      if (options.streaming) {
        return detail::engine_of<StreamingCpuBackend>(
            config, weights, KvType::f16,
            [options_for, streaming = options.streaming](KvType kv) {
              return StreamingCpuBackend(options_for(kv), streaming->reader());
            },
            description + ", experts streamed", options.streaming);
      }
      return detail::engine_of<CpuBackend>(
          config, weights, KvType::f16, [options_for](KvType kv) { return CpuBackend(options_for(kv)); }, description);
    }
    case Backend::reference:
      if (!options.isa.empty()) throw Error("the reference backend has no ISA to choose: leave it out, or use cpu");
      if (options.streaming) throw Error("the reference backend does not stream experts: leave memory out, or use cpu");
      if (options.threads > 1) throw Error("the reference backend has one thread: leave threads out, or use cpu");
#ifdef QWEN3NEXT_REFERENCE
      return detail::engine_of<ReferenceBackend>(
          config, weights, KvType::f32,
          [](KvType kv) {
            if (kv != KvType::f32)
              throw Error("the reference backend keeps its KV cache in f32: leave kv out, or use cpu");
            return ReferenceBackend();
          },
          "reference");
#else
      throw Error("the reference backend is not built in: define QWEN3NEXT_REFERENCE (it needs Eigen)");
#endif
    case Backend::cuda:
      if (!options.isa.empty()) throw Error("the cuda backend has no ISA to choose: leave it out, or use cpu");
#ifdef QWEN3NEXT_CUDA
      return detail::make_cuda_engine(config, weights, options);
#else
      throw Error("the cuda backend is not built in: link a library built with CUDA (preset cuda), or use cpu");
#endif
  }
  throw Error("unknown backend");
}

}  // namespace qwen3next
