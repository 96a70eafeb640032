#pragma once
// Weights in the card's memory, in the order of strip.hpp, and the way there.

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backends/cuda/device.hpp"
#include "backends/cuda/strip.hpp"
#include "backends/cuda/tensor.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next::cuda {

// What kernels know of a matrix [rows, cols], y = scale * W x.
struct Matrix {
  const std::byte* data = nullptr;
  int rows = 0, cols = 0;
  float scale = 1;
  DType type = DType::f32;

  QWEN3NEXT_DEVICE int strips() const noexcept { return (cols + strip_cols - 1) / strip_cols; }
  QWEN3NEXT_DEVICE int row_tiles() const noexcept { return (rows + strip_rows - 1) / strip_rows; }
  // Strip s of the 16 rows from 16 i.  f32 lies in plain rows of strips() * 256.
  QWEN3NEXT_DEVICE const std::byte* strip(int i, int s) const noexcept {
    return data + (static_cast<std::size_t>(i) * static_cast<std::size_t>(strips()) + static_cast<std::size_t>(s)) *
                      static_cast<std::size_t>(strip_layout(type).bytes);
  }
  std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(row_tiles()) * static_cast<std::size_t>(strips()) *
           static_cast<std::size_t>(strip_layout(type).bytes);
  }
};

// A matrix and its share of the memory it lies in.
class CudaWeight {
 public:
  CudaWeight() = default;
  CudaWeight(Matrix matrix, std::shared_ptr<const DeviceBytes> memory) : matrix_(matrix), memory_(std::move(memory)) {}

  const Matrix& matrix() const noexcept { return matrix_; }
  int rows() const noexcept { return matrix_.rows; }
  int cols() const noexcept { return matrix_.cols; }
  std::size_t bytes() const noexcept { return matrix_.bytes(); }

  // Rows [begin, begin + count); begin is a multiple of 16.
  CudaWeight slice(int begin, int count) const noexcept {
    assert(begin % strip_rows == 0 && begin >= 0 && begin + count <= matrix_.rows);
    CudaWeight part = *this;
    part.matrix_.data = matrix_.strip(begin / strip_rows, 0);
    part.matrix_.rows = count;
    return part;
  }

 private:
  Matrix matrix_;
  std::shared_ptr<const DeviceBytes> memory_;
};

// cols > 1 only for the convolution: [size / cols, cols].
struct CudaVector {
  const float* data = nullptr;
  int size = 0;
  int cols = 1;
  std::shared_ptr<const DeviceBytes> memory;
};

// What kernels know of the experts of a layer.  Expert e lies in one slot: gate, up and down one behind the other, at
// the same places for all.  A slot may move between launches.
struct ExpertMatrices {
  const std::byte* const* slots = nullptr;  // [count], on the card; null, for many rows: an expert that is not there
  const float* scales = nullptr;            // [count, 3] of gate, up, down, on the card; null: all are 1
  int count = 0;
  Matrix gate, up, down;  // of expert 0 but for data, which is null, and scale, which is 1
  std::size_t up_at = 0, down_at = 0;

  // Expert e's, given its slot.
  QWEN3NEXT_DEVICE static Matrix in(Matrix m, const std::byte* slot, std::size_t at) noexcept {
    m.data = slot + at;
    return m;
  }
  std::size_t slot_bytes() const noexcept { return down_at + down.bytes(); }
};

struct CudaExperts {
  ExpertMatrices matrices;
  std::shared_ptr<const DeviceBytes> memory;  // all slots
  std::shared_ptr<const DeviceBytes> tables;  // slots, scales
  bool complete = true;                       // else some slots are null: their picks count for nothing
};

// Takes weights to the card.  Views must stay readable until finish().
class Uploader {
 public:
  // With a `link`, the same card by another stream, bytes cross the link there, while the device's stream goes on.
  explicit Uploader(std::shared_ptr<Device> device, std::shared_ptr<Device> link = nullptr);
  ~Uploader();
  Uploader(const Uploader&) = delete;

  CudaWeight weight(const WeightView& view);
  CudaVector vector(const VectorView& view);
  CudaExperts experts(const ExpertViews& views);
  // `shared`: the card may read the view's memory itself, until what was sent has passed.
  void expert(const ExpertView& view, const ExpertMatrices& layer, std::byte* slot, bool shared = false);

  // Sends off what still waits.  What is launched after this finds the weights; throws Error if the card failed.
  void finish();

 private:
  struct Staging;
  void add(const WeightView& view, std::byte* to, bool shared = false);

  std::shared_ptr<Device> device_;
  std::unique_ptr<Staging> staging_;
};

// The experts of a layer, without slots and scales yet.
ExpertMatrices expert_matrices(const ExpertViews& views);

// Bytes that the card needs for a matrix.
inline std::size_t device_bytes(const WeightView& view) noexcept {
  return Matrix{.rows = view.rows, .cols = view.cols, .type = view.type}.bytes();
}

// out [n, cols] = rows ids[0..n) of m, float32; ids lie on the card.
void expand_rows(Device& device, CudaTensor out, const std::int32_t* ids, const Matrix& m);

}  // namespace qwen3next::cuda
