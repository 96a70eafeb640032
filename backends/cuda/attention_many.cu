#include "backends/cuda/attention.cuh"

namespace qwen3next::cuda {
namespace {

constexpr int D = fast_head_dim, G = fast_group;
constexpr int tile = 64;                  // positions
constexpr int tile_bytes = tile * D * 2;  // of keys or values

constexpr std::size_t shared_bytes(int warps, int buffers) {
  return static_cast<std::size_t>(warps) * 16 * D * 2 + static_cast<std::size_t>(buffers) * 2 * tile_bytes;
}

// A block attends for 2 `warps` tokens with the eight query heads of one KV head, token by token 16 rows a warp; keys
// and values of 64 positions after the other pass through shared memory.  With two buffers the next positions are on
// their way meanwhile, and warps wait for each other once a tile; with one, the values come while keys are read, and
// the next keys while values are.
template <int warps, int buffers, bool q8_0>
__global__ void __launch_bounds__(32 * warps, 1) attend_many_kernel(__grid_constant__ const ManyWork w) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int rows = 16 * warps, tokens = rows / G, threads = 32 * warps;
  const std::uint32_t queries = shared_address(shared);
  const std::uint32_t tiles_begin = queries + rows * D * 2;  // [buffers] keys, values
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t4 = lane % 4;
  const int kv_head = static_cast<int>(blockIdx.x) % w.layout.kv_heads;
  // The last tokens see most: they begin.
  const int first_token =
      (static_cast<int>(gridDim.x) / w.layout.kv_heads - 1 - static_cast<int>(blockIdx.x) / w.layout.kv_heads) * tokens;
  const int last_token = min(first_token + tokens, w.span.count) - 1;
  const int tiles = (w.span.first + last_token) / tile + 1;
  const int end = w.span.first + w.span.count;  // rows beyond were never written

  const auto start_tile = [&](int index, int kv) {
    if (index >= tiles) return;
    const int begin = index * tile;
    const std::byte* const from = w.span.table[begin / kv_block] +
                                  (kv * w.layout.kv_heads + kv_head) * w.layout.plane() +
                                  static_cast<std::size_t>(begin % kv_block) * w.layout.row_bytes;
    const std::uint32_t to = tiles_begin + (index % buffers * 2 + kv) * tile_bytes;
#pragma unroll
    for (int i = 0; i < tile * 32 / threads; ++i) {
      const int at = i * threads + thread, row = at / 32, chunk = at % 32;
      if constexpr (q8_0) {
        const uint4 x = begin + row < end ? eight_of_q8_0(from + row * w.layout.row_bytes, chunk) : uint4{0, 0, 0, 0};
        *reinterpret_cast<uint4*>(shared + (to - queries) + tile_offset(row, chunk)) = x;
      } else {
        copy_or_clear_async(to + tile_offset(row, chunk), from + at * 16, begin + row < end);
      }
    }
    end_of_copies();
  };

  wait_for_predecessor();
  let_successor_start();
#pragma unroll 4
  for (int i = 0; i < rows * 32 / threads; ++i) {
    const int at = i * threads + thread, row = at / 32, chunk = at % 32, token = first_token + row / G;
    const std::uint16_t* const from =
        w.q + (w.span.begin + min(token, last_token)) * w.q_stride + (kv_head * G + row % G) * D + chunk * 8;
    copy_or_clear_async(queries + tile_offset(row, chunk), from, token <= last_token);
  }
  start_tile(0, 0);
  if (buffers == 2) start_tile(0, 1);

  float out[D / 8][4] = {};  // rows g, g + 8 of the warp's; dims 8 i + 2 t4 (+ 1)
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  // Rows g and g + 8 are head g of two tokens.
  const int position = w.span.first + first_token + 2 * warp;
  // Where a lane's rows of a matrix begin, and the chunks 2 c and 2 c + 1 of them: tile_offset(), with little left to
  // do in the loops.
  const auto chunks = [&](int c, int odd) {
    return static_cast<std::uint32_t>((2 * (c % 4) ^ odd ^ lane % 8) * 16 + c / 4 * 128);
  };
  const std::uint32_t query_rows = queries + (16 * warp + lane % 16) * 512;

  for (int index = 0; index < tiles; ++index) {
    await_copies<0>();
    __syncthreads();  // the keys are there for all; the tile before is read
    if (buffers == 2) {
      start_tile(index + 1, 0);
      start_tile(index + 1, 1);
    } else {
      start_tile(index, 1);
    }
    const std::uint32_t keys = tiles_begin + index % buffers * 2 * tile_bytes;
    const std::uint32_t key_rows = keys + (lane / 16 * 8 + lane % 8) * 512;
    const std::uint32_t value_rows = keys + tile_bytes + lane % 16 * 512;

    float scores[tile / 8][4] = {};  // positions 8 j + 2 t4 (+ 1)
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      std::uint32_t a[4];
      load_matrices(a, query_rows + chunks(kk, lane / 16));
#pragma unroll
      for (int j = 0; j < tile / 16; ++j) {
        std::uint32_t b[4];
        load_matrices(b, key_rows + 16 * j * 512 + chunks(kk, lane / 8 % 2));
        multiply_add(scores[2 * j], a, b[0], b[1]);
        multiply_add(scores[2 * j + 1], a, b[2], b[3]);
      }
    }

    const int begin = index * tile;
    if (begin + tile - 1 > position) {
#pragma unroll
      for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (begin + 8 * j + 2 * t4 + i % 2 > position + i / 2) scores[j][i] = -INFINITY;
      }
    }
    float now[2] = {most[0], most[1]};
#pragma unroll
    for (int j = 0; j < tile / 8; ++j) {
      now[0] = fmaxf(now[0], fmaxf(scores[j][0], scores[j][1]));
      now[1] = fmaxf(now[1], fmaxf(scores[j][2], scores[j][3]));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffff, now[r], 1));
      now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffff, now[r], 2));
    }
    if (__any_sync(0xffffffff, now[0] > most[0] || now[1] > most[1])) {
      const float factor[2] = {exp2_fast((most[0] - now[0]) * w.scale), exp2_fast((most[1] - now[1]) * w.scale)};
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        out[i][0] *= factor[0], out[i][1] *= factor[0], out[i][2] *= factor[1], out[i][3] *= factor[1];
      sum[0] *= factor[0], sum[1] *= factor[1];
      most[0] = now[0], most[1] = now[1];
    }
    const float offset[2] = {most[0] * w.scale, most[1] * w.scale};
    std::uint32_t weights[tile / 8][2];
#pragma unroll
    for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = exp2_fast(scores[j][2 * r] * w.scale - offset[r]);
        const float b = exp2_fast(scores[j][2 * r + 1] * w.scale - offset[r]);
        sum[r] += a + b;
        weights[j][r] = half_pair(a, b);
      }
    }

    if (buffers == 1) {
      await_copies<0>();
      __syncthreads();  // the values are there for all; the keys are read
      start_tile(index + 1, 0);
    }
#pragma unroll
    for (int kk = 0; kk < tile / 16; ++kk) {
      const std::uint32_t a[4] = {weights[2 * kk][0], weights[2 * kk][1], weights[2 * kk + 1][0],
                                  weights[2 * kk + 1][1]};
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        std::uint32_t b[4];
        load_transposed(b, value_rows + 16 * kk * 512 + chunks(i, lane / 16));
        multiply_add(out[2 * i], a, b[0], b[1]);
        multiply_add(out[2 * i + 1], a, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 2);
    const int token = first_token + 2 * warp + r;
    if (token > last_token) continue;
    const int row = w.span.begin + token, column = (kv_head * G + g) * D + 2 * t4;
    const float inverse = 1 / sum[r];
    const float* const gate = w.out.gate.data ? w.out.gate.row(row) + column : nullptr;
    float* const heads = w.out.heads.row(row) + column;
    std::uint16_t* const half = w.out.half + row * w.out.heads.stride + column;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      float2 x = {out[i][2 * r] * inverse, out[i][2 * r + 1] * inverse};
      if (gate) {
        const float2 z = *reinterpret_cast<const float2*>(gate + 8 * i);
        x.x *= sigmoid(z.x), x.y *= sigmoid(z.y);
      }
      *reinterpret_cast<float2*>(heads + 8 * i) = x;
      *reinterpret_cast<__half2*>(half + 8 * i) = __halves2half2(to_half(x.x), to_half(x.y));
    }
  }
}

template <int warps, int buffers>
void start(const Device& device, const ManyWork& work) {
  const int tokens = 16 * warps / G, blocks = (work.span.count + tokens - 1) / tokens * work.layout.kv_heads;
  const bool q8_0 = work.layout.row_bytes != 2 * D;
  launch(device, q8_0 ? attend_many_kernel<warps, buffers, true> : attend_many_kernel<warps, buffers, false>,
         dim3(static_cast<unsigned>(blocks)), dim3(32 * warps), shared_bytes(warps, buffers), work);
}

}  // namespace

void attend_many(const Device& device, const ManyWork& work) {
  const std::size_t shared = device.properties().shared_memory_per_block;
  const int wide_blocks = (work.span.count + 15) / 16 * work.layout.kv_heads;
  if (shared < shared_bytes(8, 1) || wide_blocks < device.properties().multiprocessors) {
    start<4, 1>(device, work);
  } else if (shared < shared_bytes(8, 2)) {
    start<8, 1>(device, work);
  } else {
    start<8, 2>(device, work);
  }
}

}  // namespace qwen3next::cuda
