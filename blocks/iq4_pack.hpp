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

  // The nearest level and its index, for every half from -128: what lies between two halves has the same.
  struct Nearest {
    std::array<float, 512> level;
    std::array<std::uint8_t, 512> index;
  };
  static constexpr Nearest nearest = [] {
    Nearest n{};
    for (std::size_t i = 0, code = 0; i < 512; ++i) {
      const int middle = 2 * static_cast<int>(i) - 511;  // of the interval, in quarters
      if (code < 15 && middle > 2 * (iq4_levels[code] + iq4_levels[code + 1])) ++code;
      n.level[i] = iq4_levels[code], n.index[i] = static_cast<std::uint8_t>(code);
    }
    return n;
  }();

  static void round(PackVector& v) noexcept {
    const PackVector lower = spread(low), upper = spread(high);
    v = v > lower ? v : lower;
    v = v < upper ? v : upper;
    v = 2 * v + 256;
    for (int k = 0; k < pack_lanes; ++k) v[k] = nearest.level[static_cast<std::size_t>(static_cast<int>(v[k]))];
  }
  static std::uint8_t code(float level) noexcept {
    return nearest.index[static_cast<std::size_t>(static_cast<int>(level) * 2 + 256)];
  }
};

struct IQ4_NLSpec {
  using Levels = IQ4Levels;
  static constexpr int elements = 32, starts = 8;
  static constexpr bool has_offset = false;
  static constexpr float from = -14, step = 12;
};

struct IQ4_XSSpec {
  using Levels = IQ4Levels;
  static constexpr int sub_blocks = 8, depth = 32, scale_low = -32, scale_high = 31, min_high = 0;
  static constexpr int steps = 4;
  static constexpr float from = -14, step = 12;
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
