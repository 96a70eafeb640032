#include "backends/cuda/linear_few.hpp"

#include <cassert>

#include "backends/cuda/few.cuh"

namespace qwen3next::cuda {
namespace {

struct FewProducts {
  Product of[max_few_products];
  int units_before[max_few_products + 1];
  int count;
};

// Eight neighbours of a row; those beyond `cols` are 0.
__device__ __forceinline__ void load_eight(float (&v)[8], const float* row, int begin, int cols) {
  if (begin + 8 <= cols && reinterpret_cast<std::uintptr_t>(row) % 16 == 0) {
    const auto* from = reinterpret_cast<const float4*>(row + begin);
    const float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) v[k] = begin + k < cols ? row[begin + k] : 0.0f;
}
__device__ __forceinline__ void store_eight(const CudaTensor& to, int row, int begin, const float (&v)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (begin + k >= to.n_cols) break;
    to.data[row * to.stride + begin + k] = v[k];
    to.half[row * to.stride + begin + k] = __half_as_ushort(__float2half_rn(saturated(v[k])));
  }
}

__device__ __forceinline__ float group_scale(const float* x, int size, float eps, int lane) {
  float squares = 0;
  for (int i = lane; i < size; i += 32) squares = fmaf(x[i], x[i], squares);
  return 1 / sqrtf(warp_sum(squares) / static_cast<float>(size) + eps);
}

// The products' input to shared memory.  `factors` has room for a float for each group of each row and warp.
__device__ void prepare_rows(const SharedRows& to, const CudaTensor& x, const FewInput& input, float* factors) {
  using Kind = FewInput::Kind;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32, chunks = to.strips * strip_cols / 8;
  const bool normed = input.kind == Kind::rms_norm || input.kind == Kind::gated_rms_norm;
  const int groups = normed ? x.n_cols / input.norm_size : 1;
  if (normed && groups == 1) {  // all warps on one row
    for (int n = 0; n < to.rows; ++n) {
      float squares = 0;
      for (int i = thread; i < chunks; i += threads) {
        float v[8];
        load_eight(v, x.data + n * x.stride, 8 * i, x.n_cols);
#pragma unroll
        for (const float value : v) squares = fmaf(value, value, squares);
      }
      squares = warp_sum(squares);
      if (lane == 0) factors[n * warps + warp] = squares;
    }
    __syncthreads();
  } else if (normed) {
    for (int i = warp; i < to.rows * groups; i += warps) {
      const float* from = x.data + i / groups * x.stride + i % groups * input.norm_size;
      const float scale = group_scale(from, input.norm_size, input.eps, lane);
      if (lane == 0) factors[i] = scale;
    }
    __syncthreads();
  }
  for (int n = 0; n < to.rows; ++n) {
    const std::ptrdiff_t row = n * x.stride;
    if (input.kind == Kind::plain && !to.single && x.n_cols % 8 == 0 &&
        reinterpret_cast<std::uintptr_t>(x.half + row) % 16 == 0) {
      for (int i = thread; i < chunks; i += threads) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (8 * i < x.n_cols) bits = *reinterpret_cast<const uint4*>(x.half + row + 8 * i);
        float sum = 0;
        const auto* pair = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 two = __half22float2(pair[k]);
          sum += two.x + two.y;
        }
        to.store_bits(n, i, bits, sum);
      }
      continue;
    }
    float scale = 1;
    if (normed && groups == 1) {
      float squares = 0;
      for (int w = 0; w < warps; ++w) squares += factors[n * warps + w];
      scale = 1 / sqrtf(squares / static_cast<float>(x.n_cols) + input.eps);
    }
    for (int i = thread; i < chunks; i += threads) {
      float v[8];
      load_eight(v, x.data + row, 8 * i, x.n_cols);
      if (normed) {
        float w[8];
        if (groups == 1) {
          load_eight(w, input.norm, 8 * i, x.n_cols);
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const int c = 8 * i + k;
            w[k] = c < x.n_cols ? input.norm[c % input.norm_size] * factors[n * groups + c / input.norm_size] : 0.0f;
          }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] = v[k] * scale * w[k];
      }
      if (input.kind == Kind::gated_rms_norm || input.kind == Kind::sigmoid_gate) {
        float g[8];
        load_eight(g, input.gate.data + n * input.gate.stride, 8 * i, x.n_cols);
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] *= input.kind == Kind::sigmoid_gate ? sigmoid(g[k]) : silu(g[k]);
      }
      to.store(n, i, v);
      if (input.written.data && blockIdx.x == 0) store_eight(input.written, n, 8 * i, v);
    }
  }
}

struct LinearUnits {
  const std::byte* data;
  std::size_t unit_bytes;
  __device__ __forceinline__ Unit operator()(int unit) const { return {data + unit * unit_bytes, -1}; }
};
struct LinearResult {
  float* y;
  float* residual;
  std::ptrdiff_t stride, residual_stride;
  int rows, height;
  float factor;
  __device__ __forceinline__ void operator()(int unit, int row, int n, float sum) const {
    const int i = unit * height + row;
    if (i >= rows) return;
    y[n * stride + i] = sum * factor;
    if (residual) residual[n * residual_stride + i] += sum * factor;
  }
};

template <bool all_types>
__global__ void __launch_bounds__(512, 1)
    linear_few_kernel(const __grid_constant__ FewProducts products, const CudaTensor x,
                      const __grid_constant__ FewInput input, const CudaTensor residual, bool single, int factors) {
  extern __shared__ uint4 shared_memory[];
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int strips = products.of[0].w.strips(), warps = static_cast<int>(blockDim.x) / 32;
  const SharedRows rows(memory, x.n_rows, strips, single);
  auto* factor = reinterpret_cast<float*>(memory + SharedRows::bytes(x.n_rows, strips, single));
  const FewBlock block{rows, factor + factors, x.n_rows, split_of(warps, strips)};

  const auto share = [&](unsigned b) {
    return static_cast<int>(static_cast<std::int64_t>(products.units_before[products.count]) * b / gridDim.x);
  };
  const int begin = share(blockIdx.x), end = share(blockIdx.x + 1);
  bool prepared = false;
  for (int p = 0; p < products.count; ++p) {
    const int before = products.units_before[p];
    const int first = max(begin, before), last = min(end, products.units_before[p + 1]);
    if (first >= last) continue;
    const Matrix& w = products.of[p].w;
    const CudaTensor& y = products.of[p].y;
    const int height = unit_rows(w.type);
    const std::size_t unit_bytes =
        strip_layout(w.type).bytes * static_cast<std::size_t>(strips) / (strip_rows / height);
    const LinearUnits at{w.data, unit_bytes};
    const LinearResult done{y.data,
                            p == 0 ? residual.data : nullptr,
                            y.stride,
                            residual.stride,
                            w.rows,
                            height,
                            w.scale * (w.type == DType::f32 ? 1.0f : strip_unit(w.type))};
    const auto ready = [&] {
      if (prepared) {
        __syncthreads();  // the sums of the product before are read
        return;
      }
      prepared = true;
      prefetch(w.data + (first - before) * unit_bytes, min((last - first) * unit_bytes, std::size_t{1} << 16));
      wait_for_predecessor();
      let_successor_start();
      prepare_rows(rows, x, input, factor);
      __syncthreads();
    };
    multiply_units<all_types>(w.type, block, first - before, last - before, at, ready, done);
  }
}

}  // namespace

void linear_few(const Device& device, CudaTensor x, std::span<const Product> products, const FewInput& input,
                CudaTensor residual) {
  assert(x.n_rows <= max_few_rows && products.size() <= max_few_products);
  if (x.n_rows == 0 || products.empty()) return;
  FewProducts all{};
  bool single = false, all_types = false;
  for (const Product& p : products) {
    assert(p.w.cols == x.n_cols && p.w.cols == products[0].w.cols);
    all.of[all.count] = p;
    all.units_before[all.count + 1] = all.units_before[all.count] + units_of(p.w);
    ++all.count;
    single |= p.w.type == DType::f32;
    all_types |= !usual(p.w.type);
  }
  const int units = all.units_before[all.count], strips = products[0].w.strips();
  if (units == 0) return;
  const int processors = device.properties().multiprocessors;
  const int warps = strips >= 16 && units <= processors ? 16 : 8;
  const int blocks = std::min(units, processors * 16 / warps);

  const int groups = input.norm_size > 0 ? x.n_cols / input.norm_size : 1;
  const int factors = (x.n_rows * std::max(groups, warps) + 3) / 4 * 4;
  const std::size_t shared = static_cast<std::size_t>(SharedRows::bytes(x.n_rows, strips, single)) +
                             static_cast<std::size_t>(factors) * sizeof(float) +
                             static_cast<std::size_t>(FewBlock::sum_bytes(warps, x.n_rows));
  launch(device, all_types ? linear_few_kernel<true> : linear_few_kernel<false>, dim3(static_cast<unsigned>(blocks)),
         dim3(static_cast<unsigned>(32 * warps)), shared, all, x, input, residual, single, factors);
}

}  // namespace qwen3next::cuda
