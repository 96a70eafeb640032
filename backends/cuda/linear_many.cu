#include "backends/cuda/linear_many.hpp"

#include <algorithm>
#include <cassert>

#include "backends/cuda/many_product.hpp"

namespace qwen3next::cuda {

namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

int blocks_of(const ManyProduct& p, int rows_of_block, int splits) {
  int blocks = 0;
  for (int i = 0; i < p.n_matrices; ++i)
    blocks += ceil_div(p.matrices[i].w.rows, many_block(rows_of_block).weight_rows(splits));
  return blocks * ceil_div(p.rows, rows_of_block);
}

void multiply_f16(const Device& device, const ManyProduct& p) {
  const int multiprocessors = device.properties().multiprocessors;
  int rows = p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : p.rows <= 64 ? 64 : 128;
  if (rows == 128 && blocks_of(p, 128, 1) < 2 * multiprocessors) rows = 64;  // smaller ones fill the card better
  // Two blocks for every multiprocessor, if the columns can be shared by so many warps.
  const int strips = ceil_div(p.matrices[0].w.cols, strip_cols);
  int splits = 1;
  while (splits < many_block(rows).most_splits() && splits < strips && blocks_of(p, rows, splits) < 2 * multiprocessors)
    splits *= 2;
  multiply_many(device, p, rows, splits);
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
