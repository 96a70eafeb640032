#pragma once
// F32, F16, BF16, F8: one element per "block".

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "blocks/half.hpp"

namespace qwen3next {

// E4M3 as in checkpoints: 1 sign, 4 exponent (bias 7), 3 fraction bits; up to 448, no infinity, NaN 0x7f and 0xff.
// Exact. Its scales, one for 128 x 128 elements, lie in a tensor of their own.
constexpr float f8_e4m3_to_f32(std::uint8_t h) noexcept {
  const std::uint32_t sign = (h & 0x80u) << 24;
  const std::uint32_t magnitude = h & 0x7fu;
  const std::uint32_t normal = (magnitude << 20) + ((127u - 7u) << 23);
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-9f);
  const std::uint32_t finite = magnitude < 8u ? subnormal : normal;
  return std::bit_cast<float>(sign | (magnitude == 0x7fu ? 0x7fc00000u : finite));
}

// To nearest, ties to even; NaN where the result would be beyond 448.
inline std::uint8_t f32_to_f8_e4m3(float value) noexcept {
  const float magnitude = std::fabs(value);
  std::uint32_t code = 0x7f;
  if (magnitude < 0x1p-6f) {
    code = static_cast<std::uint32_t>(std::nearbyint(magnitude * 0x1p9f));
  } else if (magnitude <= 464) {
    const auto bits = std::bit_cast<std::uint32_t>(magnitude);
    code = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  }
  return static_cast<std::uint8_t>(code | (std::signbit(value) ? 0x80u : 0u));
}

inline void unpack_f32(const std::byte* src, float* dst, std::int64_t n) noexcept {
  std::memcpy(dst, src, static_cast<std::size_t>(n) * sizeof(float));
}
inline void unpack_f16(const std::byte* src, float* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) dst[i] = f16_to_f32(load<std::uint16_t>(src + 2 * i));
}
inline void unpack_bf16(const std::byte* src, float* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) dst[i] = bf16_to_f32(load<std::uint16_t>(src + 2 * i));
}
inline void unpack_f8_e4m3(const std::byte* src, float* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) dst[i] = f8_e4m3_to_f32(load<std::uint8_t>(src + i));
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
inline void pack_f8_e4m3(const float* src, std::byte* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) store(dst + i, f32_to_f8_e4m3(src[i]));
}

}  // namespace qwen3next
