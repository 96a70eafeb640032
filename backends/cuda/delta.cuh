#pragma once
// What the kernels of DeltaNet share.

#include <cstddef>

#include "backends/cuda/delta.hpp"
#include "backends/cuda/launch.cuh"
#include "backends/cuda/scalar.cuh"

namespace qwen3next::cuda {

// A segment, for kernels.  First the `pending` rows of the journal enter S and the window, then come rows
// [begin, begin + count) of the batch: these leave no trace but in the next journal if they are tentative.
struct DeltaRows {
  float* S;             // [Hv, Dv, Dk]
  const float* window;  // [K-1, channels]
  float* next_window;   // null: it stays
  const float* journal;
  float* next_journal;  // null: not tentative
  int begin, count, pending;
};

// By value: a copy to the card would cost more than the work.
template <int N>
struct DeltaBatch {
  DeltaRows rows[N];
};

struct Journal {
  template <class Pointer>
  __device__ static Pointer inputs(Pointer journal, int row, int channels) {
    return journal + static_cast<std::size_t>(row) * static_cast<std::size_t>(channels);
  }
  template <class Pointer>
  __device__ static Pointer outputs(Pointer journal, int row, int channels) {
    return inputs(journal, max_tentative_rows + row, channels);
  }
  template <class Pointer>
  __device__ static Pointer beta(Pointer journal, int row, int channels, int heads) {
    return inputs(journal, 2 * max_tentative_rows, channels) + row * heads;
  }
  template <class Pointer>
  __device__ static Pointer g(Pointer journal, int row, int channels, int heads) {
    return beta(journal, max_tentative_rows + row, channels, heads);
  }
};

// Row `back` of the window with the pending rows in it, K-1 of which are the last: 0 <= back < K-1.
__device__ inline float past_input(const DeltaRows& d, int K, int channels, int back, int channel) {
  const int row = d.pending + back;
  const float* from = row < K - 1
                          ? d.window + static_cast<std::size_t>(row) * static_cast<std::size_t>(channels)
                          : d.journal + static_cast<std::size_t>(row - (K - 1)) * static_cast<std::size_t>(channels);
  return from[channel];
}

// Many rows of one segment, in chunks, for Dk of 64 or 128 and Dv of a multiple of 64; nothing pending, none tentative.
bool chunks_fit(DeltaShape shape) noexcept;
void delta_chunks(const Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor qkv, CudaTensor beta,
                  CudaTensor g, DeltaShape shape, float* S);

}  // namespace qwen3next::cuda
