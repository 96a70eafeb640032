#include "backends/cuda/elementwise.hpp"

#include "backends/cuda/launch.cuh"
#include "backends/cuda/scalar.cuh"

namespace qwen3next::cuda {

namespace {

constexpr int block_threads = 256;

// f(row, column) for every value.
template <class F>
__global__ void __launch_bounds__(block_threads) each_value(int cols, F f) {
  let_successor_start();
  wait_for_predecessor();
  const int c = static_cast<int>(blockIdx.x) * block_threads + static_cast<int>(threadIdx.x);
  if (c < cols) f(static_cast<std::ptrdiff_t>(blockIdx.y), c);
}

template <class F>
void for_each_value(const Device& device, const CudaTensor& x, F f) {
  constexpr int most_rows = 65535;  // of a grid
  for (int begin = 0; begin < x.n_rows; begin += most_rows) {
    const int rows = x.n_rows - begin < most_rows ? x.n_rows - begin : most_rows;
    const auto from_begin = [=] __device__(std::ptrdiff_t t, int c) { f(t + begin, c); };
    launch(device, each_value<decltype(from_begin)>,
           dim3(static_cast<unsigned>((x.n_cols + block_threads - 1) / block_threads), static_cast<unsigned>(rows)),
           block_threads, 0, x.n_cols, from_begin);
  }
}

// A block for each row and group: out = x / sqrt(mean(x^2) + eps) * weight [* silu(z)].
template <bool gated>
__global__ void __launch_bounds__(block_threads)
    norm_groups(CudaTensor out, CudaTensor x, CudaTensor z, const float* __restrict__ weight, int size, float eps) {
  const auto row = static_cast<std::ptrdiff_t>(blockIdx.x);
  const std::ptrdiff_t begin = row * x.stride + static_cast<std::ptrdiff_t>(blockIdx.y) * size;
  const std::ptrdiff_t to = row * out.stride + static_cast<std::ptrdiff_t>(blockIdx.y) * size;
  const std::ptrdiff_t z_begin = row * z.stride + static_cast<std::ptrdiff_t>(blockIdx.y) * size;
  let_successor_start();
  wait_for_predecessor();
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
    const float value = x.data[begin + i];
    squares += value * value;
  }
  squares = block_sum(squares);
  const float scale = 1 / sqrtf(squares / static_cast<float>(size) + eps);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
    float value = x.data[begin + i] * scale * weight[i];
    if (gated) value *= silu(z.data[z_begin + i]);
    out.data[to + i] = value;
    out.half[to + i] = half_bits(value);
  }
}

template <bool gated>
void norm(const Device& device, CudaTensor out, CudaTensor x, CudaTensor z, const float* weight, int size, float eps) {
  if (x.n_rows == 0) return;
  const int threads = size >= block_threads ? block_threads : (size + 31) / 32 * 32;
  launch(device, norm_groups<gated>, dim3(static_cast<unsigned>(x.n_rows), static_cast<unsigned>(x.n_cols / size)),
         threads, 0, out, x, z, weight, size, eps);
}

}  // namespace

void rms_norm(const Device& device, CudaTensor out, CudaTensor x, const float* weight, int size, float eps) {
  norm<false>(device, out, x, x, weight, size, eps);
}

void gated_rms_norm(const Device& device, CudaTensor out, CudaTensor o, CudaTensor z, const float* weight, int size,
                    float eps) {
  norm<true>(device, out, o, z, weight, size, eps);
}

void sigmoid_gate(const Device& device, CudaTensor x, CudaTensor gate) {
  for_each_value(device, x, [=] __device__(std::ptrdiff_t t, int c) {
    const float value = x.data[t * x.stride + c] * sigmoid(gate.data[t * gate.stride + c]);
    x.data[t * x.stride + c] = value;
    x.half[t * x.stride + c] = half_bits(value);
  });
}

void swiglu(const Device& device, CudaTensor out, CudaTensor gate, CudaTensor up, float half_scale) {
  for_each_value(device, out, [=] __device__(std::ptrdiff_t t, int c) {
    const float value = silu(gate.data[t * gate.stride + c]) * up.data[t * up.stride + c];
    out.data[t * out.stride + c] = value;
    out.half[t * out.stride + c] = half_bits(value * half_scale);
  });
}

void copy(const Device& device, CudaTensor out, CudaTensor x) {
  for_each_value(device, x, [=] __device__(std::ptrdiff_t t, int c) {
    out.data[t * out.stride + c] = x.data[t * x.stride + c];
    out.half[t * out.stride + c] = x.half[t * x.stride + c];
  });
}

void add(const Device& device, CudaTensor x, CudaTensor y) {
  for_each_value(device, x,
                 [=] __device__(std::ptrdiff_t t, int c) { x.data[t * x.stride + c] += y.data[t * y.stride + c]; });
}

void add_gated(const Device& device, CudaTensor x, CudaTensor y, CudaTensor gate) {
  for_each_value(device, x, [=] __device__(std::ptrdiff_t t, int c) {
    x.data[t * x.stride + c] += sigmoid(gate.data[t * gate.stride]) * y.data[t * y.stride + c];
  });
}

void round_to_half(const Device& device, CudaTensor x) {
  for_each_value(device, x, [=] __device__(std::ptrdiff_t t, int c) {
    x.half[t * x.stride + c] = half_bits(x.data[t * x.stride + c]);
  });
}

}  // namespace qwen3next::cuda
