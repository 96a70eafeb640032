#pragma once
// Softmax attention over KV caches.  Plain C++; see attention.cuh for how the kernels share the work.

#include <span>

#include "backends/backend.hpp"
#include "backends/cuda/device.hpp"
#include "backends/cuda/kv_cache.hpp"
#include "backends/cuda/tensor.hpp"

namespace qwen3next::cuda {

using KvSegments = std::span<const Segment<CudaKvCache>>;

// angles [T, 2 n] = scale * (cos | sin) of position * frequency, computed in double.
void rope_angles(Device& device, CudaTensor angles, std::span<const double> frequency, float scale,
                 KvSegments segments);

// Rotation of the pairs (i, i + n), i < n, of every head of x, in place; f32 alone.
void rope(Device& device, CudaTensor x, CudaTensor angles, int head_dim);

// Appends k, v [T, Hkv D] to the caches.
void append_kv(Device& device, CudaTensor k, CudaTensor v, AttentionShape shape, KvSegments segments);

// append_kv(), and out [T, Hq D] = softmax(q k / sqrt(D)) v, causally; both images of out.
void attention(Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor q, CudaTensor k, CudaTensor v,
               AttentionShape shape, KvSegments segments);

// All between the projections of a layer: q, k normed by head (q_norm, k_norm [D]) and rotated, then attention, then
// heads *= sigmoid(gate); both images of heads.  q is left in an undefined state.
//
// Segments of up to 8 rows take two launches, and each of their rows gets the bits that it gets alone.
void gated_attention(Device& device, DeviceScratch& scratch, CudaTensor heads, CudaTensor q, CudaTensor gate,
                     CudaTensor k, CudaTensor v, const float* q_norm, const float* k_norm, float eps, CudaTensor angles,
                     AttentionShape shape, KvSegments segments);

}  // namespace qwen3next::cuda
