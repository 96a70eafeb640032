#pragma once
// The GPU of the tests.

#include <memory>

#include "backends/cuda/cuda_backend.hpp"

namespace qwen3next::test {

// One for all tests.  Throws Error if there is none: main() asks before any test runs.
inline const std::shared_ptr<cuda::Device>& gpu() {
  static const std::shared_ptr<cuda::Device> device = cuda::Device::open();
  return device;
}

// Takes a model's weights as the engine does.
struct Gpu : CudaBackend {
  explicit Gpu(KvType kv = KvType::f16) : CudaBackend(gpu(), kv), uploader(std::make_shared<cuda::Uploader>(gpu())) {}
  void take(const WeightView& view, cuda::CudaWeight& w) { w = uploader->weight(view), uploader->finish(); }
  void take(const VectorView& view, cuda::CudaVector& v) { v = uploader->vector(view), uploader->finish(); }
  void take(const ExpertViews& views, cuda::CudaExperts& e) { e = uploader->experts(views), uploader->finish(); }
  std::shared_ptr<cuda::Uploader> uploader;
};

}  // namespace qwen3next::test
