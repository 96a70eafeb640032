#pragma once
// Included before the kernels of amx to test them on processors without tiles: the same source, and the instructions
// that it uses in plain words (Intel's Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TDPBSSD).  What
// would be an invalid-opcode or general-protection exception ends the program.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_INT8__ 1

namespace {

struct EmulatedTile {
  int rows, row_bytes;
  alignas(64) unsigned char data[16][64];
};
thread_local EmulatedTile emulated_tiles[8];

inline void must(bool holds) noexcept {
  if (!holds) __builtin_trap();
}
inline EmulatedTile& emulated_tile(int i) noexcept {
  must(emulated_tiles[i].rows > 0);
  return emulated_tiles[i];
}
inline void emulated_loadconfig(const void* config) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(config);
  must(bytes[0] == 1);
  for (int i = 1; i < 16; ++i) must(bytes[i] == 0);
  for (int i = 0; i < 16; ++i) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    const int rows = bytes[48 + i];
    must(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0) && (i < 8 || rows == 0));
    if (i < 8) emulated_tiles[i] = {rows, row_bytes, {}};
  }
}
inline void emulated_release() noexcept {
  for (EmulatedTile& tile : emulated_tiles) tile = {};
}
inline void emulated_zero(int i) noexcept { std::memset(emulated_tile(i).data, 0, sizeof emulated_tiles[i].data); }
inline void emulated_loadd(int i, const void* base, long stride) noexcept {
  EmulatedTile& tile = emulated_tile(i);
  emulated_zero(i);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.data[r], static_cast<const char*>(base) + r * stride, static_cast<std::size_t>(tile.row_bytes));
}
inline void emulated_stored(int i, void* base, long stride) noexcept {
  const EmulatedTile& tile = emulated_tile(i);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, tile.data[r], static_cast<std::size_t>(tile.row_bytes));
}
// sums[m][n] += sum of four a[m][4 k + j] b[k][4 n + j], for all k.
inline void emulated_dpbssd(int sums, int a, int b) noexcept {
  EmulatedTile &s = emulated_tile(sums), &x = emulated_tile(a), &w = emulated_tile(b);
  must(s.rows == x.rows && s.row_bytes == w.row_bytes && x.row_bytes == 4 * w.rows);
  for (int m = 0; m < s.rows; ++m) {
    std::int32_t row[16];
    std::memcpy(row, s.data[m], 64);
    for (int k = 0; k < w.rows; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int j = 0; j < 4; ++j)
          row[n] += static_cast<signed char>(x.data[m][4 * k + j]) * static_cast<signed char>(w.data[k][4 * n + j]);
      }
    }
    std::memcpy(s.data[m], row, 64);
  }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbssd emulated_dpbssd
