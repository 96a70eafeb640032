#pragma once
// Functions of one value, and sums over a warp or a block in an order that does not change.

#include <cuda_fp16.h>

#include <cstdint>

namespace qwen3next::cuda {

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }

// One instruction each; relative errors of some 1e-7.
inline constexpr float log2_e = 1.4426950408889634f;
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__host__ __device__ inline bool aligned_to_16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// To f16, beyond its range the largest there is.
__device__ inline __half to_half(float x) { return __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)); }
__device__ inline std::uint16_t half_bits(float x) { return __half_as_ushort(to_half(x)); }

// Every thread of the warp gets the sum.
__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

// Every thread of the block gets the sum; blocks are whole warps.  Calls must not overlap: the sums lie in one place.
__device__ inline float block_sum(float x) {
  __shared__ float of_warps[32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  x = warp_sum(x);
  if (warps == 1) return x;
  __syncthreads();
  if (lane == 0) of_warps[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? of_warps[lane] : 0.0f);
}

}  // namespace qwen3next::cuda
