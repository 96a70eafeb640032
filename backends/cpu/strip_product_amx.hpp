#pragma once
// Products of strips and panels with AMX: a tile instruction multiplies the activations of 16 tokens with the weights
// of 16 rows.
//
//   sums[t, r] += sum_k x[t, k] w[r, k]     i32 [T, 16] = i8 [T, group] times i8 [group / 4, 16, 4]
//
// A strip's group is such a tile of weights as it lies there; in a panel, for each block of 32 columns, lie
//     i8 x[T][32]  f32 d[T]  f32 s[T]  f32 s16[T]
// Since every group has scales of its own, its sums go through memory to vectors, where they are scaled and added as in
// strip_product.hpp: for a token 3 or 4 vector instructions, two of which run in a cycle, while the next group's tiles
// are multiplied (16 cycles).  So 8192 products take 24 to 32 cycles, and 88 with vpdpbusd.

#include "backends/cpu/strip_product.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

#if QWEN3NEXT_TILES

inline void pack_panel(const std::byte* const* rows, int T, int n, std::byte* panel) noexcept {
  for (int t = 0; t < T; ++t) {
    const RowParts x = row_parts(rows[t], n);
    std::byte* block = panel;
    for (int b = 0; b < n / 32; ++b, block += panel_block(T)) {
      std::memcpy(block + 32 * t, x.q + 32 * b, 32);
      pack_panel_tail(x, b, block + 32 * T + 4 * t, T);
    }
  }
}

// What ldtilecfg reads.  Tiles 0 and 1 are sums, 2 and 3 activations, 4 and 5 weights.
struct TileShapes {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
constexpr TileShapes tile_shapes(int T, int group) noexcept {
  TileShapes s{};
  s.palette = 1;
  for (int i = 0; i < 6; ++i) {
    s.rows[i] = static_cast<std::uint8_t>(i < 4 ? T : group / 4);
    s.row_bytes[i] = static_cast<std::uint16_t>(i == 2 || i == 3 ? group : 64);
  }
  return s;
}
template <class Form, int T>
alignas(64) constexpr TileShapes shapes_of = tile_shapes(T, Form::group);

// Of two sets of tiles, so that one group need not wait for the other.
template <int set>
QWEN3NEXT_FORCE_INLINE void multiply_tiles(const std::byte* weights, const std::byte* x, std::int32_t* sums) noexcept {
  if constexpr (set == 0) {
    _tile_zero(0);
    _tile_loadd(2, x, 32);
    _tile_loadd(4, weights, 64);
    _tile_dpbssd(0, 2, 4);
    _tile_stored(0, sums, 64);
  } else {
    _tile_zero(1);
    _tile_loadd(3, x, 32);
    _tile_loadd(5, weights, 64);
    _tile_dpbssd(1, 3, 5);
    _tile_stored(1, sums, 64);
  }
}

template <class Form, int T>
void strip_tile(const std::byte* strip, int rows, int n, const std::byte* panel, float* y, std::ptrdiff_t y_stride,
                const Soon& soon) noexcept {
  static_assert(lanes == 16 && deep == 4 && panel_bias == 0);
  constexpr int halves = 32 / Form::group;
  const int groups = n / Form::group;
  Prefetch prefetch(soon, groups);
  alignas(64) std::int32_t sums[2][T][lanes];
  F acc[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) acc[t] = F(0.0f);

  auto weights = [&](int g) QWEN3NEXT_FORCE_INLINE_LAMBDA { return strip + g * StripGroup<Form>::bytes; };
  auto block = [&](int g) QWEN3NEXT_FORCE_INLINE_LAMBDA { return panel + g / halves * panel_block(T); };
  auto activations = [&](int g) QWEN3NEXT_FORCE_INLINE_LAMBDA { return block(g) + g % halves * Form::group; };
  auto add = [&](int g, const std::int32_t(*sum)[lanes]) QWEN3NEXT_FORCE_INLINE_LAMBDA {
    prefetch.step();
    add_group<Form, T>(
        weights(g), block(g) + 32 * T, g % halves, [&](int t) QWEN3NEXT_FORCE_INLINE_LAMBDA { return load(sum[t]); },
        acc);
  };
  _tile_loadconfig(&shapes_of<Form, T>);
  multiply_tiles<0>(weights(0), activations(0), sums[0][0]);
  for (int g = 0; g < groups; g += 2) {
    if (g + 1 < groups) multiply_tiles<1>(weights(g + 1), activations(g + 1), sums[1][0]);
    add(g, sums[0]);
    if (g + 1 == groups) break;
    if (g + 2 < groups) multiply_tiles<0>(weights(g + 2), activations(g + 2), sums[0][0]);
    add(g + 1, sums[1]);
  }
  _tile_release();
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) store_some(y + t * y_stride, acc[t], rows);
}

#endif

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
