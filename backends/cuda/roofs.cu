#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backends/cuda/roofs.hpp"

namespace qwen3next::cuda {

namespace {

constexpr int chains = 8, rounds = 2048, warps = 8;  // chains: products that do not wait for each other

__global__ void __launch_bounds__(32 * warps) multiply(float* out) {
  float sums[chains][4] = {};
  const unsigned x = 0x3c003c00u + threadIdx.x;  // ones, about
  for (int i = 0; i < rounds; ++i) {
#pragma unroll
    for (int c = 0; c < chains; ++c) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
          : "+f"(sums[c][0]), "+f"(sums[c][1]), "+f"(sums[c][2]), "+f"(sums[c][3])
          : "r"(x));
    }
  }
  float sum = 0;
  for (int c = 0; c < chains; ++c) sum += sums[c][0] + sums[c][1] + sums[c][2] + sums[c][3];
  if (sum == 1) *out = sum;  // never: but the compiler does not know
}

template <class Work>
double best_seconds(const std::shared_ptr<Device>& device, Work work) {
  DeviceTimer timer(device);
  work();
  double best = 1e30;
  for (int i = 0; i < 7; ++i) {
    timer.start();
    work();
    best = std::min(best, timer.seconds());
  }
  return best;
}

}  // namespace

double measure_copy_bandwidth(const std::shared_ptr<Device>& device) {
  constexpr std::uint64_t least = std::uint64_t{32} << 20, most = std::uint64_t{512} << 20;
  const std::uint64_t bytes = std::clamp(device->free_memory() / 4, least, most);
  const DeviceBytes from(device, bytes, "measuring bandwidth"), to(device, bytes, "measuring bandwidth");
  device->clear(from.data(), bytes);
  return 2. * static_cast<double>(bytes) /
         best_seconds(device, [&] { device->copy_on_device(to.data(), from.data(), bytes); });
}

double measure_tensor_peak(const std::shared_ptr<Device>& device) {
  const DeviceBytes out(device, sizeof(float), "measuring products");
  const int blocks = 4 * device->properties().multiprocessors;
  const double seconds = best_seconds(device, [&] {
    multiply<<<blocks, 32 * warps, 0, device->stream()>>>(out.data<float>());
    check(cudaGetLastError(), "starting a kernel");
  });
  return 16. * 8 * 16 * chains * rounds * warps * blocks / seconds;
}

}  // namespace qwen3next::cuda
