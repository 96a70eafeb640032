#include "backends/cuda/linear_few.hpp"

#include <cassert>

#include "backends/cuda/few.cuh"

namespace qwen3next::cuda {
namespace {

struct FewProducts {
  Product of[max_few_products];
  int strip_bytes[max_few_products];
  float factor[max_few_products];  // of the sums
  int units_before[max_few_products + 1];
  int count;
};

// A thread block's units of all products.
struct ProductSections {
  const FewProducts& products;
  CudaTensor residual;
  int begin, end, rows, strips;
  int count;

  __device__ __forceinline__ DType type(int i) const { return products.of[i].w.type; }
  __device__ __forceinline__ int strip_bytes(int i) const { return products.strip_bytes[i]; }
  __device__ __forceinline__ int first(int i) const {
    return max(begin, products.units_before[i]) - products.units_before[i];
  }
  __device__ __forceinline__ int last(int i) const {
    return min(end, products.units_before[i + 1]) - products.units_before[i];
  }
  __device__ __forceinline__ int columns(int) const { return rows; }
  __device__ __forceinline__ Unit unit(int i, int unit) const {
    const auto bytes = static_cast<std::size_t>(products.strip_bytes[i] * strips);
    return {products.of[i].w.data + static_cast<std::size_t>(unit) * bytes, -1};
  }
  __device__ __forceinline__ static constexpr bool paired(int) { return false; }
  __device__ __forceinline__ void done(int i, int unit, int row, int n, float sum, float) const {
    const Product& p = products.of[i];
    const int at = unit * unit_rows(p.w.type) + row;
    if (at >= p.w.rows) return;
    const float value = sum * products.factor[i];
    p.y.data[n * p.y.stride + at] = value;
    if (i == 0 && residual.data) residual.data[n * residual.stride + at] += value;
  }
};

// Which threads find the scale of a group of columns.
enum class NormGroups { none, row, lanes, any };

// Shared memory, and who does what.
struct FewPlan {
  int slot_bytes, depth, rows_at, factors_at, sums_at, half_floats, bytes;
  int split, rounds;
  NormGroups groups;
  bool single;
};

__device__ __forceinline__ void store_eight(const CudaTensor& to, int row, int begin, const float (&v)[8]) {
  float* data = to.data + row * to.stride + begin;
  std::uint16_t* half = to.half + row * to.stride + begin;
  if (begin + 8 <= to.n_cols &&
      (reinterpret_cast<std::uintptr_t>(data) | reinterpret_cast<std::uintptr_t>(half)) % 16 == 0) {
    uint4 bits;
    auto* pair = reinterpret_cast<__half2*>(&bits);
#pragma unroll
    for (int k = 0; k < 4; ++k) pair[k] = __floats2half2_rn(saturated(v[2 * k]), saturated(v[2 * k + 1]));
    reinterpret_cast<float4*>(data)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(data)[1] = make_float4(v[4], v[5], v[6], v[7]);
    *reinterpret_cast<uint4*>(half) = bits;
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (begin + k >= to.n_cols) break;
    data[k] = v[k];
    half[k] = __half_as_ushort(__float2half_rn(saturated(v[k])));
  }
}

__device__ __forceinline__ float sum_of_squares(const float (&v)[8]) {
  float squares = 0;
#pragma unroll
  for (const float value : v) squares = fmaf(value, value, squares);
  return squares;
}

inline NormGroups norm_groups(const FewInput& input, int cols) {
  if (input.kind != FewInput::Kind::rms_norm && input.kind != FewInput::Kind::gated_rms_norm) return NormGroups::none;
  if (input.norm_size == cols) return NormGroups::row;
  const int lanes = input.norm_size / 8;  // that hold a group, eight columns each
  const bool fits = input.norm_size % 8 == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
  return fits ? NormGroups::lanes : NormGroups::any;
}

// Before waiting: what is no kernel's result.
__device__ __forceinline__ void prefetch_norm(const FewInput& input) {
  for (int i = static_cast<int>(threadIdx.x) * 32; i < input.norm_size; i += static_cast<int>(blockDim.x) * 32) {
    prefetch(input.norm + i);
  }
}

// The products' input to shared memory.  `factors` has room for a float for each group, or warp, of each row.
__device__ __forceinline__ void prepare_rows(const SharedRows& to, const CudaTensor& x, const FewInput& input,
                                             NormGroups groups, float* factors) {
  using Kind = FewInput::Kind;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32, chunks = to.strips * strip_cols / 8;
  if (input.kind == Kind::plain) {
    for (int n = 0; n < to.rows; ++n) prepare_plain_row(to, x, n);
    return;
  }
  const int size = input.norm_size;
  if (groups == NormGroups::row) {
    for (int n = 0; n < to.rows; ++n) {
      float squares = 0;
      for (int i = thread; i < chunks; i += threads) {
        float v[8];
        load_eight(v, x.data + n * x.stride, 8 * i, x.n_cols);
        squares += sum_of_squares(v);
      }
      squares = warp_sum(squares);
      if (lane == 0) factors[n * warps + warp] = squares;
    }
    __syncthreads();
  }
  if (groups == NormGroups::any) {
    const int count = x.n_cols / size;
    for (int i = warp; i < to.rows * count; i += warps) {
      const float* from = x.data + i / count * x.stride + i % count * size;
      float squares = 0;
      for (int c = lane; c < size; c += 32) squares = fmaf(from[c], from[c], squares);
      squares = warp_sum(squares);
      if (lane == 0) factors[i] = 1 / sqrtf(squares / static_cast<float>(size) + input.eps);
    }
    __syncthreads();
  }
  const bool gated = input.kind != Kind::rms_norm;
  for (int n = 0; n < to.rows; ++n) {
    float scale = 1;
    if (groups == NormGroups::row) {
      float squares = lane < warps ? factors[n * warps + lane] : 0.0f;
      scale = 1 / sqrtf(warp_sum(squares) / static_cast<float>(size) + input.eps);
    }
    for (int i = thread; i < chunks; i += threads) {
      float v[8], w[8], g[8];
      load_eight(v, x.data + n * x.stride, 8 * i, x.n_cols);
      if (gated) load_eight(g, input.gate.data + n * input.gate.stride, 8 * i, x.n_cols);
      if (groups == NormGroups::row) load_eight(w, input.norm, 8 * i, x.n_cols);
      if (groups == NormGroups::lanes) {
        load_eight(w, input.norm, 8 * i % size, size);
        float squares = sum_of_squares(v);
        for (int step = size / 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffff, squares, step);
        scale = 1 / sqrtf(squares / static_cast<float>(size) + input.eps);
      }
      if (groups == NormGroups::any) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const int c = 8 * i + k;
          w[k] = c < x.n_cols ? input.norm[c % size] * factors[n * (x.n_cols / size) + c / size] : 0.0f;
        }
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (groups != NormGroups::none) v[k] *= scale * w[k];
        if (gated) v[k] *= input.kind == Kind::sigmoid_gate ? sigmoid(g[k]) : silu(g[k]);
      }
      to.store(n, i, v);
      if (input.written.data && blockIdx.x == 0) store_eight(input.written, n, 8 * i, v);
    }
  }
}

template <bool all_types>
__global__ void __launch_bounds__(512, 2)
    linear_few_kernel(const __grid_constant__ FewProducts products, const CudaTensor x,
                      const __grid_constant__ FewInput input, const CudaTensor residual, const FewPlan plan) {
  extern __shared__ uint4 shared_memory[];
  __shared__ std::uint64_t barriers[16 * most_depth];
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int strips = products.of[0].w.strips(), warps = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const SharedRows rows(memory + plan.rows_at, x.n_rows, strips, plan.single);
  FewBlock block{rows, reinterpret_cast<float*>(memory + plan.sums_at), plan.half_floats, plan.split, plan.rounds};
  const auto share = [&](unsigned b) {
    return static_cast<int>(static_cast<std::int64_t>(products.units_before[products.count]) * b / gridDim.x);
  };
  const ProductSections sections{products, residual, share(blockIdx.x), share(blockIdx.x + 1),
                                 x.n_rows, strips,   products.count};
  StripRing ring(memory, barriers, plan.slot_bytes, plan.depth, warp, lane);
  StripCursor cursor(sections, block, warp, warps);
  ring.fill(cursor, lane);
  prefetch_norm(input);
  wait_for_predecessor();
  let_successor_start();
  prepare_rows(rows, x, input, plan.groups, reinterpret_cast<float*>(memory + plan.factors_at));
  __syncthreads();
  multiply_sections<all_types>(sections, block, ring, cursor);
}

}  // namespace

void linear_few(const Device& device, CudaTensor x, std::span<const Product> products, const FewInput& input,
                CudaTensor residual) {
  assert(x.n_rows <= max_few_rows && products.size() <= max_few_products);
  if (x.n_rows == 0 || products.empty()) return;
  [[maybe_unused]] static const bool asked = prefer_shared_memory(linear_few_kernel<false>, linear_few_kernel<true>);
  FewProducts all{};
  FewPlan plan{};
  bool all_types = false;
  for (const Product& p : products) {
    assert(p.w.cols == x.n_cols);
    all.of[all.count] = p;
    all.strip_bytes[all.count] = bytes_on_the_way(p.w.type);
    all.factor[all.count] = p.w.scale * (p.w.type == DType::f32 ? 1.0f : strip_unit(p.w.type));
    all.units_before[all.count + 1] = all.units_before[all.count] + units_of(p.w);
    ++all.count;
    plan.single |= p.w.type == DType::f32;
    plan.slot_bytes = std::max(plan.slot_bytes, bytes_on_the_way(p.w.type));
    all_types |= !usual(p.w.type);
  }
  const int units = all.units_before[all.count], strips = products[0].w.strips();
  if (units == 0) return;
  const int processors = device.properties().multiprocessors;
  const int groups = input.norm_size > 0 ? x.n_cols / input.norm_size : 1;
  plan.groups = norm_groups(input, x.n_cols);
  // A block a multiprocessor, of half its registers and, unless it has much to do, memory: the next kernel's fits
  // beside it and asks for its weights meanwhile.
  const int blocks = std::min(units, processors), most_units = (units + blocks - 1) / blocks;
  int warps = most_units * split_of(16, strips) > 8 ? 16 : 8;
  const auto limit = static_cast<int>(device.properties().shared_memory_per_block) - 1024;
  const auto lay_out = [&](int T) {
    plan.split = split_of(warps, strips);
    const int lanes = warps / plan.split, unit_rounds = (most_units + lanes - 1) / lanes;
    plan.rounds = std::min(4, unit_rounds);
    plan.half_floats = FewBlock::sum_bytes(warps, plan.rounds, T) / 8;
    const int rows = SharedRows::bytes(T, strips, plan.single), factors = (T * std::max(groups, warps) + 3) / 4 * 16;
    const int rest = rows + factors + 8 * plan.half_floats, ring = warps * plan.slot_bytes;
    const int room = (most_units * strips * plan.slot_bytes > 2 * limit ? limit : limit / 2) - rest;
    plan.depth =
        std::clamp(room / ring, 1, std::min(most_depth, unit_rounds * ((strips + plan.split - 1) / plan.split)));
    plan.rows_at = plan.depth * ring;
    plan.factors_at = plan.rows_at + rows;
    plan.sums_at = plan.factors_at + factors;
    plan.bytes = plan.sums_at + 8 * plan.half_floats;
    return plan.bytes <= limit;
  };
  // How k is split must not depend on the number of rows, which is split instead if need be.
  while (!lay_out(1) && warps > 1) warps /= 2;
  int T = x.n_rows;
  while (!lay_out(T) && T > 1) T = (T + 1) / 2;
  for (int begin = 0; begin < x.n_rows; begin += T) {
    const int n = std::min(T, x.n_rows - begin);
    FewInput part = input;
    if (part.gate.data) part.gate = part.gate.rows(begin, n);
    if (part.written.data) part.written = part.written.rows(begin, n);
    for (int i = 0; i < all.count; ++i) all.of[i].y = products[static_cast<std::size_t>(i)].y.rows(begin, n);
    launch(device, all_types ? linear_few_kernel<true> : linear_few_kernel<false>, dim3(static_cast<unsigned>(blocks)),
           dim3(static_cast<unsigned>(32 * warps)), static_cast<std::size_t>(plan.bytes), all, x.rows(begin, n), part,
           residual.data ? residual.rows(begin, n) : residual, plan);
  }
}

}  // namespace qwen3next::cuda
