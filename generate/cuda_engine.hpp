#pragma once
// A model whose weights are copied to the card when it is opened.

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "backends/cuda/cuda_backend.hpp"
#include "generate/backend_engine.hpp"
#include "generate/cuda_offload.hpp"

namespace qwen3next::detail {

// Backends of one card, and how they take weights.
class CudaBackends {
 public:
  CudaBackends(std::shared_ptr<cuda::Device> device, Progress on_load)
      : device_(std::move(device)), on_load_(std::move(on_load)) {}

  CudaBackend operator()(KvType kv) const { return CudaBackend(device_, kv); }

  // Matrices that share their bytes (a head that is the embedding, the MTP layer's) are copied once.
  void take(const ModelWeights<Views>& views, ModelWeights<CudaBackend>& mine) const {
    std::uint64_t total = 0, done = 0;
    ModelWeights<NoWeights> nothing;
    zip(views, nothing, [&](const auto& view, auto&) { total += bytes(view); });
    cuda::Uploader uploader(device_);
    std::map<std::pair<const std::byte*, int>, cuda::CudaWeight> known;
    const auto upload = [&](const auto& view, auto& weight) {
      if constexpr (std::same_as<std::remove_cvref_t<decltype(view)>, WeightView>) {
        const auto [place, is_new] = known.try_emplace({view.data, view.rows});
        if (is_new) place->second = uploader.weight(view);
        weight = place->second;
      } else if constexpr (std::same_as<std::remove_cvref_t<decltype(view)>, VectorView>) {
        weight = uploader.vector(view);
      } else {
        weight = uploader.experts(view);
      }
      done += bytes(view);
      if (on_load_ && !on_load_(static_cast<std::int64_t>(done), static_cast<std::int64_t>(total))) throw Cancelled();
    };
    zip(views, mine, upload);
    uploader.finish();
    device_->wait();
  }

 private:
  static std::uint64_t bytes(const WeightView& view) noexcept { return view.bytes(); }
  static std::uint64_t bytes(const VectorView& view) noexcept {
    return sizeof(float) * static_cast<std::uint64_t>(view.size);
  }
  static std::uint64_t bytes(const ExpertViews& experts) noexcept {
    std::uint64_t sum = 0;
    for (const ExpertView& e : experts) sum += e.gate.bytes() + e.up.bytes() + e.down.bytes();
    return sum;
  }

  std::shared_ptr<cuda::Device> device_;
  Progress on_load_;
};

inline std::unique_ptr<const Engine> make_cuda_engine(const Config& config, const ModelWeights<Views>& weights,
                                                      const EngineOptions& options) {
  const std::shared_ptr<cuda::Device> device = cuda::Device::open();
  if (auto engine = make_offload_engine(device, config, weights, options)) return engine;
  return std::make_unique<BackendEngine<CudaBackend, CudaBackends>>(config, weights, KvType::f16,
                                                                    CudaBackends(device, options.on_load),
                                                                    "cuda, " + device->properties().name, nullptr);
}

}  // namespace qwen3next::detail
