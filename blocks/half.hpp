#pragma once
// 16-bit floats as bits, and unaligned access.  Portable; the CPU kernels have vector forms of their own.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace qwen3next {

static_assert(std::endian::native == std::endian::little, "weight files are little-endian and read in place");

// A T from any address: files promise no alignment.
template <class T>
inline T load(const std::byte* p) noexcept {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

template <class T>
inline void store(std::byte* p, const T& value) noexcept {
  std::memcpy(p, &value, sizeof(T));
}

// IEEE binary16: 1 sign, 5 exponent (bias 15), 10 fraction bits.  Exact.  Selects instead of branches, so that loops
// over it vectorise.
constexpr float f16_to_f32(std::uint16_t h) noexcept {
  const std::uint32_t sign = (h & 0x8000u) << 16;
  const std::uint32_t magnitude = h & 0x7fffu;
  const std::uint32_t normal = (magnitude << 13) + ((127u - 15u) << 23);
  const std::uint32_t infinite = normal + ((127u - 15u) << 23);  // exponent 31 -> 255; a NaN keeps its payload
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);
  const std::uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00u ? infinite : finite));
}

// Rounds to nearest, ties to even; too large becomes infinity, NaN a quiet NaN.
constexpr std::uint16_t f32_to_f16(float f) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Halves up to 2^-14 are multiples of 2^-24, the spacing of floats just above 0.5: the addition rounds.
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  const std::uint32_t large = magnitude > 0x7f800000u ? nan : 0x7c00u;
  return static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));  // 65520 rounds to infinity
}

// bfloat16: the upper half of a float.
constexpr float bf16_to_f32(std::uint16_t h) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(h) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN (quiet).
constexpr std::uint16_t f32_to_bf16(float f) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x0040u : rounded);
}

}  // namespace qwen3next
