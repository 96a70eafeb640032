#include "backends/cuda/experts_many.hpp"

#include <algorithm>
#include <cassert>

#include "backends/cuda/launch.cuh"
#include "backends/cuda/many_product.hpp"
#include "backends/cuda/scalar.cuh"

namespace qwen3next::cuda {

namespace {

constexpr int threads = 256;

// out[t] = sum of weights[slot] * parts[t k + slot], in their order; with `present` only of experts that have a slot
// there.  Four columns a thread.
__global__ void __launch_bounds__(threads)
    add_up(CudaTensor out, const float* __restrict__ parts, std::ptrdiff_t part_stride, Routing routing,
           const std::byte* const* present, CudaTensor shared, CudaTensor shared_gate, bool add) {
  let_successor_start();
  wait_for_predecessor();
  const auto t = static_cast<std::ptrdiff_t>(blockIdx.x);
  const int c = (static_cast<int>(blockIdx.y) * threads + static_cast<int>(threadIdx.x)) * 4;
  if (c >= out.n_cols) return;
  const float* part = parts + t * routing.k * part_stride + c;
  const float* const weights = routing.weights + t * routing.k;
  float4 sum{};
#pragma unroll 5
  for (int slot = 0; slot < routing.k; ++slot, part += part_stride) {
    if (present && !present[routing.ids[t * routing.k + slot]]) continue;
    const float4 v = __ldcs(reinterpret_cast<const float4*>(part));
    const float weight = weights[slot];
    sum.x += weight * v.x, sum.y += weight * v.y, sum.z += weight * v.z, sum.w += weight * v.w;
  }
  if (shared.data) {
    const float4 v = *reinterpret_cast<const float4*>(shared.data + t * shared.stride + c);
    const float weight = sigmoid(shared_gate.data[t * shared_gate.stride]);
    sum.x += weight * v.x, sum.y += weight * v.y, sum.z += weight * v.z, sum.w += weight * v.w;
  }
  float* const to = out.data + t * out.stride + c;
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  if (c + 4 <= out.n_cols) {
    float4 v = sum;
    if (add) {
      const float4 before = *reinterpret_cast<const float4*>(to);
      v = {before.x + v.x, before.y + v.y, before.z + v.z, before.w + v.w};
    }
    *reinterpret_cast<float4*>(to) = v;
    return;
  }
  for (int i = 0; c + i < out.n_cols; ++i) to[i] = (add ? to[i] : 0) + values[i];
}

// Gates and ups of different types are two launches, and this: hidden[pick] = 2^-4 silu(gate) * up, zero behind
// `width`.
__global__ void __launch_bounds__(threads)
    swiglu_picks(std::uint16_t* hidden, const float* __restrict__ gates, const float* __restrict__ ups, int width,
                 std::ptrdiff_t stride) {
  let_successor_start();
  wait_for_predecessor();
  const auto pick = static_cast<std::ptrdiff_t>(blockIdx.x);
  for (int c = static_cast<int>(threadIdx.x); c < stride; c += threads) {
    const std::ptrdiff_t i = pick * stride + c;
    hidden[i] = c < width ? half_bits(silu(gates[i]) * ups[i] * hidden_scale) : 0;
  }
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// Rows of x for a block, given how many an expert has if all share alike.  A block of more rows unpacks weights for
// more of them, and leaves out products of rows that it lacks.
int rows_of_block(std::ptrdiff_t picks, int experts) {
  const std::ptrdiff_t each = picks / experts;
  return each < 3 ? 8 : each < 13 ? 16 : each < 26 ? 32 : each < 48 ? 64 : 128;
}

void slice_of_rows(const Device& device, DeviceScratch& scratch, const ExpertsMany& e, const Routing& routing) {
  const ExpertMatrices& m = e.experts->matrices;
  const std::ptrdiff_t picks = routing.picks();
  const std::ptrdiff_t hidden_stride = (m.gate.rows + 63) / 64 * 64;
  const std::ptrdiff_t part_stride = (m.down.rows + 3) / 4 * 4;
  const int rows = rows_of_block(picks, m.count);
  const std::size_t group_bytes = aligned(pick_groups_bytes(routing.rows, routing.k, m.count, rows));
  const std::size_t hidden_bytes = aligned(static_cast<std::size_t>(picks * hidden_stride) * sizeof(std::uint16_t));
  const std::size_t part_bytes = aligned(static_cast<std::size_t>(picks * part_stride) * sizeof(float));
  const bool mixed = m.gate.type != m.up.type;
  const std::size_t gate_bytes = mixed ? static_cast<std::size_t>(picks * hidden_stride) * sizeof(float) : 0;
  std::byte* const memory = scratch.get(group_bytes + hidden_bytes + part_bytes + 2 * gate_bytes);
  auto* const hidden = reinterpret_cast<std::uint16_t*>(memory + group_bytes);
  auto* const parts = reinterpret_cast<float*>(memory + group_bytes + hidden_bytes);
  auto* const gates = reinterpret_cast<float*>(memory + group_bytes + hidden_bytes + part_bytes);
  float* const ups = gates + picks * hidden_stride;

  const PickGroups groups = group_picks(device, routing, m.count, rows, memory);
  ManyProduct p;
  p.tiles = groups.tiles, p.n_tiles = groups.n_tiles, p.max_tiles = groups.max_tiles, p.picks = groups.picks;
  p.scales = m.scales;

  const auto multiply = [&](const std::byte* const* slots) {
    p.slots_of_experts = slots;
    p.x = reinterpret_cast<const uint4*>(e.x.half), p.x_chunks = static_cast<std::uint32_t>(e.x.stride / 8);
    p.slots = routing.k, p.factor = 1;
    // Few rows: several warps share the columns, and a block has less to do.
    const int log_splits = rows <= 16 ? 1 : 0;
    const ManyProduct::Part gate{.w = m.gate, .y = gates, .y_stride = hidden_stride, .at = 0, .scale = 0};
    const ManyProduct::Part up{.w = m.up, .y = ups, .y_stride = hidden_stride, .at = m.up_at, .scale = 1};
    if (mixed) {
      p.n_matrices = 1;
      for (const ManyProduct::Part& part : {gate, up}) {
        p.matrices[0] = part;
        multiply_many(device, p, rows, log_splits);
      }
      launch(device, swiglu_picks, static_cast<unsigned>(picks), threads, 0, hidden, gates, ups, m.gate.rows,
             hidden_stride);
    } else {
      p.hidden = hidden, p.hidden_stride = hidden_stride;
      p.matrices[0] = gate, p.matrices[1] = up, p.n_matrices = 2;
      multiply_many(device, p, rows, log_splits);
      p.hidden = nullptr;
    }

    p.x = reinterpret_cast<const uint4*>(hidden), p.x_chunks = static_cast<std::uint32_t>(hidden_stride / 8);
    p.slots = mixed ? 1 : 0, p.factor = 1 / hidden_scale;
    p.matrices[0] = {.w = m.down, .y = parts, .y_stride = part_stride, .at = m.down_at, .scale = 2};
    p.n_matrices = 1;
    multiply_many(device, p, rows, 0);
  };
  if (e.waves) {
    while (const std::byte* const* slots = e.waves->next()) multiply(slots);
  } else {
    multiply(m.slots);
  }

  const auto blocks = static_cast<unsigned>((m.down.rows + 4 * threads - 1) / (4 * threads));
  launch(device, add_up, dim3(static_cast<unsigned>(routing.rows), blocks), threads, 0, e.out, parts, part_stride,
         routing, e.experts->complete || e.waves ? nullptr : m.slots, e.shared, e.shared_gate, e.add);
}

}  // namespace

void experts_many(const Device& device, DeviceScratch& scratch, const ExpertsMany& e) {
  const ExpertMatrices& m = e.experts->matrices;
  // Scratch memory of up to a gibibyte.
  const std::size_t row_bytes =
      static_cast<std::size_t>(e.routing->k) * (static_cast<std::size_t>(m.down.rows) * sizeof(float) +
                                                static_cast<std::size_t>(m.gate.rows) * sizeof(std::uint16_t));
  const int most = static_cast<int>(std::max<std::size_t>((std::size_t{1} << 30) / row_bytes / 64 * 64, 64));
  const int slices = (e.x.n_rows + most - 1) / most;
  for (int i = 0, begin = 0; i < slices; ++i) {
    const int count = (e.x.n_rows - begin) / (slices - i);
    ExpertsMany part = e;
    part.out = e.out.rows(begin, count), part.x = e.x.rows(begin, count);
    if (e.shared.data) part.shared = e.shared.rows(begin, count), part.shared_gate = e.shared_gate.rows(begin, count);
    slice_of_rows(device, scratch, part, e.routing->slice(begin, count));
    begin += count;
  }
}

}  // namespace qwen3next::cuda
