#pragma once
// Packing of the IQ4 types: as the legacy and the K types, but that levels lie where the table says.

#include <array>
#include <cstdint>

#include "blocks/half.hpp"
#include "blocks/iq4.hpp"
#include "blocks/k_quants_pack.hpp"
#include "blocks/scale_search.hpp"

namespace qwen3next {

namespace detail {

struct IQ4Levels {
  static constexpr int low = iq4_levels.front(), high = iq4_levels.back();

  // Where rounding changes from one level to the next, and by how much.
  static constexpr std::array<float, 15> middle = [] {
    std::array<float, 15> m{};
    for (std::size_t i = 0; i < 15; ++i) m[i] = static_cast<float>(iq4_levels[i] + iq4_levels[i + 1]) / 2;
    return m;
  }();
  static constexpr std::array<std::uint8_t, 256> codes = [] {
    std::array<std::uint8_t, 256> c{};
    for (std::size_t i = 0; i < 16; ++i)
      c[static_cast<std::size_t>(iq4_levels[i] + 128)] = static_cast<std::uint8_t>(i);
    return c;
  }();

  static void round(PackVector& v) noexcept {
    PackVector level = spread(low);
    for (std::size_t i = 0; i < 15; ++i) {
      const auto gap = static_cast<float>(iq4_levels[i + 1] - iq4_levels[i]);
      level += v > spread(middle[i]) ? spread(gap) : PackVector{};
    }
    v = level;
  }
  static std::uint8_t code(float level) noexcept {
    return codes[static_cast<std::size_t>(static_cast<int>(level) + 128)];
  }
};

struct IQ4_NLSpec {
  using Levels = IQ4Levels;
  static constexpr int elements = 32, starts = 16;
  static constexpr bool has_offset = false;
  static constexpr float from = -14, step = 6;
};

struct IQ4_XSSpec {
  using Levels = IQ4Levels;
  static constexpr int sub_blocks = 8, depth = 32, scale_low = -32, scale_high = 31, min_high = 0;
  static constexpr int steps = 8;
  static constexpr float from = -14, step = 6;
};

}  // namespace detail

inline void pack(const float* x, const float* importance, BlockIQ4_NL& b) noexcept {
  const detail::ScaleSearch<detail::IQ4_NLSpec> found(x, importance);
  b.d = f32_to_f16(found.scale);
  set_iq4_levels(b.qs, found.code);
}

inline void pack(const float* x, const float* importance, BlockIQ4_XS& b) noexcept {
  const detail::KSearch<detail::IQ4_XSSpec> found(x, importance);
  b.d = f32_to_f16(found.d);
  set_scales(b, found.scale);
  for (int k = 0; k < 8; ++k) set_iq4_levels(b.qs + 16 * k, found.level + 32 * k);
}

}  // namespace qwen3next
