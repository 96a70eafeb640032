#pragma once
// Which experts serve each row, and the rows of each expert.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "backends/cuda/device.hpp"
#include "backends/cuda/tensor.hpp"

namespace qwen3next::cuda {

// The k experts of each row, the most probable first; a view of the card's memory.
struct Routing {
  std::int32_t* ids = nullptr;  // [rows, k]
  float* weights = nullptr;     // [rows, k]
  int rows = 0;
  int k = 0;

  std::ptrdiff_t picks() const noexcept { return static_cast<std::ptrdiff_t>(rows) * k; }
  Routing slice(int begin, int count) const noexcept {
    return {ids + static_cast<std::ptrdiff_t>(begin) * k, weights + static_cast<std::ptrdiff_t>(begin) * k, count, k};
  }
};

// One that owns its memory, of up to `rows` x `k`.
class CudaRouting : public Routing {
 public:
  CudaRouting(std::shared_ptr<Device> device, int most_rows, int per_row)
      : memory_(std::move(device), static_cast<std::size_t>(most_rows) * static_cast<std::size_t>(per_row) * 8,
                "a routing") {
    rows = most_rows, k = per_row;
    ids = memory_.data<std::int32_t>();
    weights = reinterpret_cast<float*>(ids + picks());
  }

 private:
  DeviceBytes memory_;
};

// routing = the k largest of softmax(logits [T, E]), equal ones in the order of their ids; weights divided by their sum
// if `normalise`.  Rows with a NaN get the first k experts: damaged weights give no order, but an order.
// `routing` must hold T x k; k <= E.
void router(const Device& device, Routing& routing, CudaTensor logits, int k, bool normalise);

// Up to `tile_rows` picks of one expert: PickGroups::picks [first, first + count).
struct PickTile {
  std::int32_t expert;
  std::int32_t first;
  std::int32_t count;
};

// The picks of a routing, row * k + slot, sorted by expert and then by themselves; in the card's memory.
struct PickGroups {
  std::int32_t* offsets = nullptr;  // [experts + 1]: expert e has picks [offsets[e], offsets[e + 1])
  std::int32_t* picks = nullptr;    // [rows * k]
  PickTile* tiles = nullptr;        // of experts that have picks, in their order
  std::int32_t* n_tiles = nullptr;  // how many there are
  int max_tiles = 0;                // how many there may be
};

// `memory`: pick_groups_bytes(...) bytes, aligned to 256, that the result lies in.
std::size_t pick_groups_bytes(int rows, int k, int experts, int tile_rows);
PickGroups group_picks(const Device& device, const Routing& routing, int experts, int tile_rows, void* memory);

}  // namespace qwen3next::cuda
