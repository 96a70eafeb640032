#pragma once
// What the tests of the GPU's operations share: rows to the card and back.

#include <doctest/doctest.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "backends/cuda/device.hpp"
#include "backends/cuda/tensor.hpp"
#include "blocks/half.hpp"
#include "tests/ops/cpu_ops.hpp"

namespace qwen3next::test {

// Tensors in the card's memory, as the backend makes them.
class CudaTensors {
 public:
  explicit CudaTensors(std::shared_ptr<cuda::Device> device) : device_(std::move(device)) {}

  // Of zeros, or of NaN: to be written.
  cuda::CudaTensor make(int rows, int cols, bool nan = false) {
    const std::ptrdiff_t stride = (cols + 63) / 64 * 64;
    const std::size_t count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride);
    memory_.emplace_back(device_, count * (sizeof(float) + sizeof(std::uint16_t)), "a test");
    float* data = memory_.back().data<float>();
    const cuda::CudaTensor t{data, reinterpret_cast<std::uint16_t*>(data + count), rows, cols, stride};
    device_->clear(data, memory_.back().size());
    if (nan) write(t, Rows(static_cast<std::size_t>(rows), std::vector<float>(static_cast<std::size_t>(cols), NAN)));
    return t;
  }
  cuda::CudaTensor make(const Rows& rows) {
    const cuda::CudaTensor t = make(static_cast<int>(rows.size()), static_cast<int>(rows[0].size()));
    write(t, rows);
    return t;
  }
  void write(const cuda::CudaTensor& t, const Rows& rows) {
    const auto stride = static_cast<std::size_t>(t.stride);
    std::vector<float> data(rows.size() * stride);
    std::vector<std::uint16_t> half(data.size());
    for (std::size_t r = 0; r < rows.size(); ++r) {
      for (std::size_t c = 0; c < rows[r].size(); ++c) {
        data[r * stride + c] = rows[r][c];
        half[r * stride + c] = f32_to_f16(std::min(std::max(rows[r][c], -65504.0f), 65504.0f));
      }
    }
    device_->copy_to_device(t.data, data.data(), data.size() * sizeof(float));
    device_->copy_to_device(t.half, half.data(), half.size() * sizeof(std::uint16_t));
  }
  Rows read(const cuda::CudaTensor& t) {
    Rows rows;
    for (int r = 0; r < t.n_rows; ++r) {
      auto& row = rows.emplace_back(static_cast<std::size_t>(t.n_cols));
      device_->copy_to_host(row.data(), t.data + r * t.stride, row.size() * sizeof(float));
    }
    return rows;
  }
  Rows read_half(const cuda::CudaTensor& t) {
    Rows rows;
    for (int r = 0; r < t.n_rows; ++r) {
      std::vector<std::uint16_t> bits(static_cast<std::size_t>(t.n_cols));
      device_->copy_to_host(bits.data(), t.half + r * t.stride, bits.size() * sizeof(std::uint16_t));
      auto& row = rows.emplace_back();
      for (const std::uint16_t b : bits) row.push_back(f16_to_f32(b));
    }
    return rows;
  }

 private:
  std::shared_ptr<cuda::Device> device_;
  std::deque<cuda::DeviceBytes> memory_;
};

// As an f16 holds them: what products read.
inline Rows rounded_to_half(Rows rows) {
  for (auto& row : rows) {
    for (float& x : row) x = f16_to_f32(f32_to_f16(std::min(std::max(x, -65504.0f), 65504.0f)));
  }
  return rows;
}

// The first place where two matrices differ, in words; empty if they are equal bit for bit.
inline std::string first_difference(const Rows& found, const Rows& expected) {
  for (std::size_t r = 0; r < expected.size(); ++r) {
    for (std::size_t c = 0; c < expected[r].size(); ++c) {
      if (std::bit_cast<std::uint32_t>(found[r][c]) == std::bit_cast<std::uint32_t>(expected[r][c])) continue;
      return "row " + std::to_string(r) + " column " + std::to_string(c) + ": found " + std::to_string(found[r][c]) +
             ", expected " + std::to_string(expected[r][c]);
    }
  }
  return {};
}
// The element that is furthest off.
inline std::string worst_difference(const Rows& found, const Rows& expected) {
  double most = -1;
  std::string words;
  for (std::size_t r = 0; r < expected.size(); ++r) {
    for (std::size_t c = 0; c < expected[r].size(); ++c) {
      const double off = std::fabs(static_cast<double>(found[r][c]) - static_cast<double>(expected[r][c]));
      if (off <= most) continue;
      most = std::isnan(off) ? 1e300 : off;
      words = "row " + std::to_string(r) + " column " + std::to_string(c) + ": found " + std::to_string(found[r][c]) +
              ", expected " + std::to_string(expected[r][c]);
    }
  }
  return words;
}

}  // namespace qwen3next::test
