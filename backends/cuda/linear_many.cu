#include "backends/cuda/linear_many.hpp"

#include <algorithm>
#include <cassert>

#include "backends/cuda/many_product.hpp"

namespace qwen3next::cuda {

namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

int blocks_of(const ManyProduct& p, int rows_of_block, int log_splits) {
  int blocks = 0;
  for (int i = 0; i < p.n_matrices; ++i)
    blocks += ceil_div(p.matrices[i].w.rows, many_block(rows_of_block).weight_rows(log_splits));
  return blocks * ceil_div(p.rows, rows_of_block);
}

// Blocks as large as leave none of the multiprocessors without one; where columns are shared by more warps, or rows of
// x by more blocks, both are read more often.
void multiply_f16(const Device& device, const ManyProduct& p) {
  const int wanted = device.properties().multiprocessors;
  const int strips = ceil_div(p.matrices[0].w.cols, strip_cols);
  const auto can_split = [&](int rows, int log_splits) {
    return 1 << log_splits <= many_block(rows).most_splits() && 1 << log_splits <= strips;
  };
  int rows = 16, log_splits = 0;
  while (rows < 128 && rows < p.rows) rows *= 2;
  for (;;) {
    log_splits = 0;
    while (can_split(rows, log_splits + 1) && blocks_of(p, rows, log_splits) < wanted) ++log_splits;
    if (rows == 16 || blocks_of(p, rows, log_splits) >= wanted) break;
    rows /= 2;
  }
  multiply_many(device, p, rows, log_splits);
}

}  // namespace

void linear_many(const Device& device, CudaTensor x, std::span<const ManyOutput> outputs, float factor, bool add) {
  if (x.n_rows == 0) return;
  for (const bool f32 : {true, false}) {
    ManyProduct p;
    p.x = reinterpret_cast<const uint4*>(x.half), p.x_chunks = static_cast<std::uint32_t>(x.stride / 8);
    p.rows = x.n_rows, p.factor = factor, p.add = add;
    const auto send = [&] {
      if (p.n_matrices == 0) return;
      if (f32)
        multiply_f32(device, p, x.data, x.stride);
      else
        multiply_f16(device, p);
      p.n_matrices = 0;
    };
    for (const ManyOutput& output : outputs) {
      if ((output.w.type == DType::f32) != f32) continue;
      assert(output.w.cols == x.n_cols && output.y.n_rows == x.n_rows && output.y.n_cols == output.w.rows);
      if (p.n_matrices == ManyProduct::most_matrices) send();
      p.matrices[p.n_matrices++] = {.w = output.w, .y = output.y.data, .y_stride = output.y.stride};
    }
    send();
  }
}

}  // namespace qwen3next::cuda
