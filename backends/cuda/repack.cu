// The kernels between files and strips: raw rows to strips, and rows of strips to float32.

#include <cuda_runtime.h>

#include "backends/cuda/launch.cuh"
#include "backends/cuda/raw_blocks.cuh"
#include "backends/cuda/repack.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {
namespace {

// One block of 128 threads fills one strip.  Rows beyond the matrix and columns beyond it are zeros.
template <DType type>
__global__ void __launch_bounds__(128) repack_kernel(RawRows raw, std::byte* to, int strips) {
  constexpr StripFormat f = strip_format(type);
  constexpr StripLayout at = strip_layout(type);
  constexpr int block_elements = info_of<type>.elements, block_bytes = info_of<type>.bytes;
  const int first_row = static_cast<int>(blockIdx.x) / strips * strip_rows;
  const int first_col = static_cast<int>(blockIdx.x) % strips * strip_cols;
  std::byte* strip = to + static_cast<std::size_t>(blockIdx.x) * at.bytes;
  auto* bytes = reinterpret_cast<std::uint8_t*>(strip);
  // The block of the file that holds an element; null if there is none.
  const auto block_of = [&](int row, int col) -> const std::uint8_t* {
    if (first_row + row >= raw.rows || first_col + col >= raw.cols) return nullptr;
    return reinterpret_cast<const std::uint8_t*>(raw.data) + static_cast<std::size_t>(first_row + row) * raw.row_bytes +
           static_cast<std::size_t>((first_col + col) / block_elements * block_bytes);
  };
  const auto code = [&](int row, int col) -> std::uint32_t {
    const std::uint8_t* b = block_of(row, col);
    return b ? static_cast<std::uint32_t>(raw_code<type>(b, (first_col + col) % block_elements)) : 0u;
  };

  if constexpr (f.bits == 16) {
    for (int i = static_cast<int>(threadIdx.x); i < strip_rows * strip_cols; i += 128) {
      const int c = i % 8, lane = i / 8 % 32, u = i / 256 % 2, r = i / 512 % 2, tile = i / 1024;
      const std::uint8_t* b = block_of(lane / 4 + 8 * r, tile * 64 + u * 32 + lane % 4 * 8 + c);
      reinterpret_cast<std::uint16_t*>(strip)[i] = b ? raw_u16(b) : 0;
    }
    return;
  }
  if constexpr (f.bits == 8) {
    for (int i = static_cast<int>(threadIdx.x); i < strip_rows * strip_cols; i += 128) {
      const int c = i % 8, u = i / 8 % 2, lane = i / 16 % 32, r = i / 512 % 2, tile = i / 1024;
      bytes[i] = static_cast<std::uint8_t>(code(lane / 4 + 8 * r, tile * 64 + u * 32 + lane % 4 * 8 + c));
    }
  }
  if constexpr (f.bits < 8) {
    for (int i = static_cast<int>(threadIdx.x); i < 512; i += 128) {
      const int w = i % 4, lane = i / 4 % 32, tile = i / 128, u = w % 2, r = w / 2;
      std::uint32_t word = 0, high = 0;
      for (int c = 0; c < 8; ++c) {
        const std::uint32_t q = code(lane / 4 + 8 * r, tile * 64 + u * 32 + lane % 4 * 8 + c);
        word |= (q & 15) << nibble_bit(c);
        if constexpr (f.bits > 4) high |= (q >> 4) << high_bit(f.bits, f.bits == 5 ? w : u, c);
      }
      reinterpret_cast<std::uint32_t*>(strip)[i] = word;
      if constexpr (f.bits > 4) {  // neighbouring threads hold the parts of a word
        const unsigned all = 0xffffffff;
        high |= __shfl_xor_sync(all, high, 1);
        auto* words = reinterpret_cast<std::uint32_t*>(bytes + at.high);
        if constexpr (f.bits == 5) {
          high |= __shfl_xor_sync(all, high, 2);
          if (w == 0) words[lane * 4 + tile] = high;
        } else if (u == 0) {
          words[(tile / 2 * 32 + lane) * 4 + tile % 2 * 2 + r] = high;
        }
      }
    }
  }

  constexpr int groups_per_row = strip_cols / f.group;
  for (int i = static_cast<int>(threadIdx.x); i < strip_rows * groups_per_row; i += 128) {
    const int row = i / groups_per_row, col = i % groups_per_row * f.group, k = scale_index(type, row, col);
    const std::uint8_t* b = block_of(row, col);
    if constexpr (f.kind == ScaleKind::floats) {
      const float factor = !b ? 0.0f
                           : !raw.factors
                               ? 1.0f
                               : raw.factors[static_cast<std::size_t>(first_row + row) * ((raw.cols + 127) / 128) +
                                             (first_col + col) / 128];
      reinterpret_cast<float*>(bytes + at.scales)[k] = factor;
    } else if constexpr (f.kind == ScaleKind::halves) {
      reinterpret_cast<std::uint16_t*>(bytes + at.scales)[k] = b ? raw_u16(b) : 0;
      if constexpr (f.minimum) reinterpret_cast<std::uint16_t*>(bytes + at.minima)[k] = b ? raw_u16(b + 2) : 0;
    } else {
      const int in_block = (first_col + col) % block_elements / f.group;
      bytes[at.scales + k] = static_cast<std::uint8_t>(b ? raw_scale<type>(b, in_block) : f.scale_offset);
      if constexpr (f.minimum) bytes[at.minima + k] = static_cast<std::uint8_t>(b ? raw_minimum<type>(b, in_block) : 0);
    }
  }
  if constexpr (f.factors) {
    if (threadIdx.x < strip_rows) {
      const int row = static_cast<int>(threadIdx.x), i = (row % 8 * 2 + row / 8) * (f.minimum ? 2 : 1);
      const std::uint8_t* b = block_of(row, 0);
      auto* factors = reinterpret_cast<std::uint16_t*>(bytes + at.factors);
      factors[i] = b ? raw_u16(b + raw_factor(type)) : 0;
      if constexpr (f.minimum) factors[i + 1] = b ? raw_u16(b + raw_factor(type) + 2) : 0;
    }
  }
}

__global__ void repack_f32_kernel(RawRows raw, float* to, int cols) {
  const int row = static_cast<int>(blockIdx.y);
  for (int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); c < cols; c += gridDim.x * blockDim.x) {
    std::uint32_t bits = 0;
    if (row < raw.rows && c < raw.cols) {
      const auto* p = reinterpret_cast<const std::uint8_t*>(raw.data) + row * raw.row_bytes + 4 * std::size_t(c);
      bits = raw_u16(p) | static_cast<std::uint32_t>(raw_u16(p + 2)) << 16;
    }
    to[static_cast<std::size_t>(row) * cols + c] = __uint_as_float(bits);
  }
}

template <DType type>
__global__ void expand_rows_kernel(CudaTensor out, const std::int32_t* ids, Matrix m) {
  let_successor_start();
  wait_for_predecessor();
  const int i = static_cast<int>(blockIdx.y), id = ids[i];
  const int col = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (col >= m.cols) return;
  float value;
  if constexpr (type == DType::f32) {
    value = reinterpret_cast<const float*>(m.data)[static_cast<std::size_t>(id) * m.strips() * strip_cols + col];
  } else {
    value = strip_value<type>(m.strip(id / strip_rows, col / strip_cols), id % strip_rows, col % strip_cols);
  }
  out.data[i * out.stride + col] = m.scale == 1 ? value : __fmul_rn(value, m.scale);
}

}  // namespace

void repack(const Device& device, DType type, const RawRows& raw, std::byte* to) {
  const int tiles = (raw.rows + strip_rows - 1) / strip_rows, strips = (raw.cols + strip_cols - 1) / strip_cols;
  if (tiles * strips == 0) return;
  with_type(type, [&](auto t) {
    if constexpr (decltype(t)::value == DType::f32) {
      const dim3 grid(static_cast<unsigned>(strips), static_cast<unsigned>(tiles * strip_rows));
      repack_f32_kernel<<<grid, 256, 0, device.stream()>>>(raw, reinterpret_cast<float*>(to), strips * strip_cols);
    } else {
      repack_kernel<decltype(t)::value>
          <<<static_cast<unsigned>(tiles * strips), 128, 0, device.stream()>>>(raw, to, strips);
    }
  });
  check(cudaGetLastError(), "starting a kernel");
}

void expand_rows(Device& device, CudaTensor out, const std::int32_t* ids, const Matrix& m) {
  if (out.n_rows == 0) return;
  const dim3 grid(static_cast<unsigned>((m.cols + 255) / 256), static_cast<unsigned>(out.n_rows));
  with_type(m.type,
            [&](auto t) { launch(device, expand_rows_kernel<decltype(t)::value>, grid, dim3(256), 0, out, ids, m); });
}

}  // namespace qwen3next::cuda
