#pragma once
// F32, F16, BF16: one element per "block".

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "blocks/half.hpp"

namespace qwen3next {

inline void unpack_f32(const std::byte* src, float* dst, std::int64_t n) noexcept {
  std::memcpy(dst, src, static_cast<std::size_t>(n) * sizeof(float));
}
inline void unpack_f16(const std::byte* src, float* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) dst[i] = f16_to_f32(load<std::uint16_t>(src + 2 * i));
}
inline void unpack_bf16(const std::byte* src, float* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) dst[i] = bf16_to_f32(load<std::uint16_t>(src + 2 * i));
}

inline void pack_f32(const float* src, std::byte* dst, std::int64_t n) noexcept {
  std::memcpy(dst, src, static_cast<std::size_t>(n) * sizeof(float));
}
inline void pack_f16(const float* src, std::byte* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) store(dst + 2 * i, f32_to_f16(src[i]));
}
inline void pack_bf16(const float* src, std::byte* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) store(dst + 2 * i, f32_to_bf16(src[i]));
}

}  // namespace qwen3next
