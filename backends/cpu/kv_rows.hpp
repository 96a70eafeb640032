#pragma once
// Rows of the KV cache.

#include "backends/cpu/simd.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

// A row of n values as the cache keeps it: f32, f16, or q8_0 (n a multiple of 32).
inline void store_kv(DType type, const float* row, int n, std::byte* out) noexcept {
  if (type == DType::f32) {
    std::memcpy(out, row, static_cast<std::size_t>(n) * sizeof(float));
  } else if (type == DType::f16) {
    for (int i = 0; i < n; ++i) {
      const std::uint16_t h = float_to_half(row[i]);
      std::memcpy(out + 2 * i, &h, 2);
    }
  } else {
    for (int i = 0; i < n; i += 32, out += 34) {
      float amax = 0;
      for (int j = 0; j < 32; ++j) {
        const float a = row[i + j] < 0 ? -row[i + j] : row[i + j];
        amax = a > amax ? a : amax;
      }
      const std::uint16_t d = float_to_half(amax / 127);
      const float stored = half_to_float(d), inverse = stored > 0 ? 1 / stored : 0;
      std::memcpy(out, &d, 2);
      std::int8_t q[32];
      for (int j = 0; j < 32; ++j) {
        const float x = row[i + j] * inverse;
        const int rounded = static_cast<int>(x + (x < 0 ? -0.5f : 0.5f));
        q[j] = static_cast<std::int8_t>(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
      }
      std::memcpy(out + 2, q, 32);
    }
  }
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
