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
  __device__ __forceinline__ static const std::byte* address(const std::byte* from, int) { return from; }
  __device__ __forceinline__ static constexpr bool paired(int) { return false; }
  __device__ __forceinline__ void done(int i, int unit, int row, int n, float sum, float) const {
    const Product& p = products.of[i];
    const int at = unit * unit_rows(p.w.type) + row;
    if (at >= p.w.rows) return;
    const float value = sum * products.factor[i];
    p.y.data[n * p.y.stride + at] = value;
    if (i == 0 && residual.data) add_to_memory(residual.data + n * residual.stride + at, value);
  }
};

// How the input is prepared: rows that are whole strips, aligned, of at most eight columns a thread, by code of their
// own; others as `general` does it.
enum class Prepare { general, plain, rms_norm, gated_rms_norm, sigmoid_gate };

// Which threads find the scale of a group of columns.
enum class NormGroups { none, row, lanes, any };

// Shared memory, and who does what.
struct FewPlan {
  int slot_bytes, depth, rows_at, factors_at, sums_at, half_floats, bytes;
  int log2_split, rounds;
  Shares units;
  NormGroups groups;
  bool single;
};

__device__ __forceinline__ void store_eight(const CudaTensor& to, int row, int begin, const float (&v)[8]) {
  float* data = to.data + row * to.stride + begin;
  std::uint16_t* half = to.half + row * to.stride + begin;
  if (begin + 8 <= to.n_cols && aligned_to_16(data) && aligned_to_16(half)) {
    reinterpret_cast<float4*>(data)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(data)[1] = make_float4(v[4], v[5], v[6], v[7]);
    *reinterpret_cast<uint4*>(half) = eight_halves(v);
    return;
  }
#pragma unroll 1
  for (int k = 0; k < 8; ++k) {
    if (begin + k >= to.n_cols) break;
    data[k] = v[k];
    half[k] = __half_as_ushort(__low2half(to_halves(v[k], 0)));
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

// A row, eight columns a thread.
template <Prepare prepare>
class RowInput {
 public:
  static constexpr bool gated = prepare == Prepare::gated_rms_norm || prepare == Prepare::sigmoid_gate;
  static constexpr bool normed = prepare == Prepare::rms_norm || prepare == Prepare::gated_rms_norm;

  // Before waiting: what is no kernel's result.
  __device__ RowInput(const FewInput& input, int strips)
      : input_(input), has_columns_(thread() < strips * strip_cols / 8) {
    if (normed && has_columns_)
      load_eight(norm_, input.norm + (prepare == Prepare::rms_norm ? 8 * thread() : 8 * thread() % input.norm_size));
  }

  // All rows.  `squares` has room for a float for each row and warp.
  template <unsigned types>
  __device__ __forceinline__ void prepare_rows(const SharedRows<types>& to, const CudaTensor& x, float* squares) const {
    const int lane = thread() % 32, warp = thread() / 32, warps = static_cast<int>(blockDim.x) / 32;
    const float per_column = __fdividef(1, static_cast<float>(input_.norm_size));
#pragma unroll 1
    for (int n = 0; n < to.rows; ++n, squares += warps) {
      float v[8] = {}, g[8], scale = 1;
      if (has_columns_) {
        load_eight(v, x.data + n * x.stride + 8 * thread());
        if constexpr (gated) load_eight(g, input_.gate.data + n * input_.gate.stride + 8 * thread());
      }
      if constexpr (prepare == Prepare::rms_norm) {
        const float sum = warp_sum(sum_of_squares(v));
        if (lane == 0) squares[warp] = sum;
        __syncthreads();
        scale = rsqrtf(warp_sum(lane < warps ? squares[lane] : 0.0f) * per_column + input_.eps);
      }
      if (!has_columns_) continue;
      if constexpr (prepare == Prepare::gated_rms_norm) {
        float sum = sum_of_squares(v);
#pragma unroll 1
        for (int step = input_.norm_size / 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
        scale = rsqrtf(sum * per_column + input_.eps);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if constexpr (normed) v[k] *= scale * norm_[k];
        if constexpr (gated) {
          const float open = __fdividef(1, 1 + __expf(-g[k]));
          v[k] *= prepare == Prepare::sigmoid_gate ? open : g[k] * open;
        }
      }
      to.store(n, thread(), v);
      if (input_.written.data && blockIdx.x == 0) {
        const std::ptrdiff_t at = n * input_.written.stride + 8 * thread();
        auto* data = reinterpret_cast<float4*>(input_.written.data + at);
        data[0] = make_float4(v[0], v[1], v[2], v[3]), data[1] = make_float4(v[4], v[5], v[6], v[7]);
        *reinterpret_cast<uint4*>(input_.written.half + at) = eight_halves(v);
      }
    }
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }

  const FewInput& input_;
  bool has_columns_;
  float norm_[8];
};

// Before waiting: what is no kernel's result.
__device__ __forceinline__ void prefetch_norm(const FewInput& input) {
  for (int i = static_cast<int>(threadIdx.x) * 32; i < input.norm_size; i += static_cast<int>(blockDim.x) * 32) {
    prefetch(input.norm + i);
  }
}

// The products' input to shared memory.  `factors` has room for a float for each group, or warp, of each row.
template <unsigned types>
__device__ __forceinline__ void prepare_rows(const SharedRows<types>& to, const CudaTensor& x, const FewInput& input,
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

template <unsigned types, Prepare prepare, bool one_row>
__global__ void __launch_bounds__(512, 2)
    linear_few_kernel(const __grid_constant__ FewProducts products, const CudaTensor x,
                      const __grid_constant__ FewInput input, const CudaTensor residual, const FewPlan plan) {
  extern __shared__ uint4 shared_memory[];
  __shared__ std::uint64_t barriers[16 * most_depth];
  let_successor_start();
  auto* memory = reinterpret_cast<std::byte*>(shared_memory);
  const int strips = products.of[0].w.strips(), warps = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const SharedRows<types> rows(memory + plan.rows_at, one_row ? 1 : x.n_rows, strips, plan.single);
  FewBlock<types> block{rows, reinterpret_cast<float*>(memory + plan.sums_at), plan.half_floats, plan.log2_split,
                        plan.rounds};
  const ProductSections sections{
      products, residual,      plan.units.begin(blockIdx.x), plan.units.begin(blockIdx.x + 1), rows.rows,
      strips,   products.count};
  StripRing ring(memory, barriers, plan.slot_bytes, plan.depth, warp, lane);
  StripCursor cursor(sections, block, warp, warps);
  ring.fill(cursor, lane);
  auto* const factors = reinterpret_cast<float*>(memory + plan.factors_at);
  if constexpr (prepare == Prepare::general) {
    prefetch_norm(input);
    wait_for_predecessor();
    prepare_rows(rows, x, input, plan.groups, factors);
  } else if constexpr (prepare == Prepare::plain) {
    wait_for_predecessor();
#pragma unroll 1
    for (int n = 0; n < rows.rows; ++n) prepare_plain_row(rows, x, n);
  } else {
    const RowInput<prepare> row_input(input, strips);
    wait_for_predecessor();
    row_input.prepare_rows(rows, x, factors);
  }
  __syncthreads();
  multiply_sections(sections, block, ring, cursor);
}

using FewKernel = void (*)(FewProducts, CudaTensor, FewInput, CudaTensor, FewPlan);

template <unsigned types, Prepare prepare>
FewKernel kernel_of(bool one_row) {
  return one_row ? with_shared_memory<linear_few_kernel<types, prepare, true>>()
                 : with_shared_memory<linear_few_kernel<types, prepare, false>>();
}
template <unsigned types>
FewKernel kernel_of(Prepare prepare, bool one_row) {
  switch (prepare) {
    case Prepare::plain:
      return kernel_of<types, Prepare::plain>(one_row);
    case Prepare::rms_norm:
      return kernel_of<types, Prepare::rms_norm>(one_row);
    case Prepare::gated_rms_norm:
      return kernel_of<types, Prepare::gated_rms_norm>(one_row);
    default:
      return kernel_of<types, Prepare::sigmoid_gate>(one_row);
  }
}
FewKernel kernel_of(unsigned types, Prepare prepare, bool one_row) {
  if (prepare != Prepare::general) {
    if (types == q4_k_alone) return kernel_of<q4_k_alone>(prepare, one_row);
    if (types == q6_k_alone) return kernel_of<q6_k_alone>(prepare, one_row);
    if (types == f32_alone) return kernel_of<f32_alone>(prepare, one_row);
    if ((types & ~usual_types) == 0) return kernel_of<usual_types>(prepare, one_row);
  }
  if ((types & ~usual_types) != 0) return with_shared_memory<linear_few_kernel<all_types, Prepare::general, false>>();
  return with_shared_memory<linear_few_kernel<usual_types, Prepare::general, false>>();
}

Prepare prepare_of(const CudaTensor& x, const FewInput& input, NormGroups groups, int strips, int threads) {
  const auto aligned = [](const CudaTensor& t) {
    return t.stride % 8 == 0 && aligned_to_16(t.data) && aligned_to_16(t.half);
  };
  const bool fits = x.n_cols == strips * strip_cols && x.n_cols / 8 <= threads && aligned(x) &&
                    aligned(input.written) && aligned_to_16(input.norm);
  if (!fits) return Prepare::general;
  using Kind = FewInput::Kind;
  switch (input.kind) {
    case Kind::plain:
      return Prepare::plain;
    case Kind::rms_norm:
      return groups == NormGroups::row ? Prepare::rms_norm : Prepare::general;
    case Kind::gated_rms_norm:
      return groups == NormGroups::lanes && aligned(input.gate) ? Prepare::gated_rms_norm : Prepare::general;
    default:
      return aligned(input.gate) ? Prepare::sigmoid_gate : Prepare::general;
  }
}

}  // namespace

void linear_few(const Device& device, CudaTensor x, std::span<const Product> products, const FewInput& input,
                CudaTensor residual) {
  assert(x.n_rows <= max_few_rows && products.size() <= max_few_products);
  if (x.n_rows == 0 || products.empty()) return;
  FewProducts all{};
  FewPlan plan{};
  unsigned types = 0;
  for (const Product& p : products) {
    assert(p.w.cols == x.n_cols);
    all.of[all.count] = p;
    all.strip_bytes[all.count] = strip_bytes(p.w.type);
    all.factor[all.count] = p.w.scale * (p.w.type == DType::f32 ? 1.0f : strip_unit(p.w.type));
    all.units_before[all.count + 1] = all.units_before[all.count] + units_of(p.w);
    ++all.count;
    plan.slot_bytes = std::max(plan.slot_bytes, piece_bytes(p.w.type));
    types |= types_of(p.w.type);
  }
  plan.single = (types & f32_alone) != 0;
  const int units = all.units_before[all.count], strips = products[0].w.strips();
  if (units == 0) return;
  const int processors = device.properties().multiprocessors;
  const int groups = input.norm_size > 0 ? x.n_cols / input.norm_size : 1;
  plan.groups = norm_groups(input, x.n_cols);
  // A block a multiprocessor, of half its registers and, unless it has much to do, hardly more than half its memory:
  // the next kernel's fits beside it and asks for its weights meanwhile.
  const int blocks = std::min(units, processors), most_units = (units + blocks - 1) / blocks;
  int warps = most_units << log2_split_of(16, strips) > 8 ? 16 : 8;
  plan.units = Shares(units, blocks);
  const auto limit = static_cast<int>(device.properties().shared_memory_per_block) - 1024;
  const int pieces = plan.single ? strips * (strip_cols / f32_strip_cols) : strips;  // of a unit, at most
  const auto lay_out = [&](int T) {
    plan.log2_split = log2_split_of(warps, strips);
    const int lanes = warps >> plan.log2_split, unit_rounds = (most_units + lanes - 1) / lanes;
    plan.rounds = std::min(4, unit_rounds);
    plan.half_floats = sum_bytes(warps, plan.rounds, T) / 8;
    const int rows = bytes_of_rows(types, T, strips), factors = (T * std::max(groups, warps) + 3) / 4 * 16;
    const int rest = rows + factors + 8 * plan.half_floats, ring = warps * plan.slot_bytes;
    const int room = (most_units * strips * plan.slot_bytes > 2 * limit ? limit : limit / 8 * 5) - rest;
    plan.depth =
        std::clamp(room / ring, 1, std::min(most_depth, unit_rounds * (((pieces - 1) >> plan.log2_split) + 1)));
    plan.rows_at = plan.depth * ring;
    plan.factors_at = plan.rows_at + rows;
    plan.sums_at = plan.factors_at + factors;
    plan.bytes = plan.sums_at + 8 * plan.half_floats;
    return plan.bytes <= limit;
  };
  // How k is split must not depend on the number of rows, which is split instead if need be.
  Prepare prepare;
  for (;; warps /= 2) {
    prepare = prepare_of(x, input, plan.groups, strips, 32 * warps);
    if (prepare == Prepare::general && plan.single) types |= q4_k_alone;  // no such kernel is for f32 alone
    if (lay_out(1) || warps == 1) break;
  }
  int T = x.n_rows;
  while (!lay_out(T) && T > 1) T = (T + 1) / 2;
  for (int begin = 0; begin < x.n_rows; begin += T) {
    const int n = std::min(T, x.n_rows - begin);
    FewInput part = input;
    if (part.gate.data) part.gate = part.gate.rows(begin, n);
    if (part.written.data) part.written = part.written.rows(begin, n);
    for (int i = 0; i < all.count; ++i) all.of[i].y = products[static_cast<std::size_t>(i)].y.rows(begin, n);
    launch(device, kernel_of(types, prepare, n == 1), dim3(static_cast<unsigned>(blocks)),
           dim3(static_cast<unsigned>(32 * warps)), static_cast<std::size_t>(plan.bytes), all, x.rows(begin, n), part,
           residual.data ? residual.rows(begin, n) : residual, plan);
  }
}

}  // namespace qwen3next::cuda
