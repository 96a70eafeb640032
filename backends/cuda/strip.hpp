#pragma once
// How a matrix lies in the card's memory: in strips of 16 rows x 256 columns, each a run of bytes, the strips of the
// same 16 rows one behind the other.  A strip is four tiles of 64 columns in the order in which the lanes of a warp
// need them as A fragments of mma.m16n8k16.
//
//   lane = 4 g + t owns rows g, g + 8 (r = 0, 1) and of each half u = 0, 1 of the tile columns 32 u + 8 t + c, c < 8.
//
// MMA 2 u + j of a tile takes c = 4 j .. 4 j + 3: so a lane's B fragments of a half are 8 neighbours of an activation
// row, one 16-byte load.  Nothing is lost but the order: codes, sub-scales, minima and factors are those of the file
// (of NVFP4 and MXFP4 the scale bytes, of Q2_K and Q3_K codes widened to four bits, f32 plain rows of whole strips).
//
//   codes   4 bits: 16 bytes for each tile and lane, word 2 r + u; c = 0..7 at bits 0 16 8 24 4 20 12 28
//           8 bits: [tile][r][lane][u][c];   16 bits: [tile][r][u][lane][c]
//   high    fifth bits: a word for each lane and tile; fifth and sixth bits: two words, of r = 0 and 1 (see high_bit)
//   scales  of 32 columns: [g][tile][r][u];   of 16: [g][t / 2][tile][r][u];   f8: f32 [g][r][column / 128]
//   minima  the same way
//   factors f16 [g][r] d, or [g][r] d, dmin

#include <cstddef>

#include "blocks/dtype.hpp"

#if defined(__CUDACC__)
#define QWEN3NEXT_DEVICE __host__ __device__
#else
#define QWEN3NEXT_DEVICE
#endif

namespace qwen3next::cuda {

inline constexpr int strip_rows = 16, strip_cols = 256, tile_cols = 64, strip_tiles = 4;

// What the bytes beside the codes are.
enum class ScaleKind : unsigned char { none, bytes, halves, floats };

struct StripFormat {
  int bits;          // per code; of these more than 4 (5, 6) in `high`
  ScaleKind kind;    // of the scales and minima
  int group;         // columns under one scale
  bool minimum;      // value = scale * code - minimum, or + of `halves`
  bool factors;      // f16 for each row: of the scales (and of the minima)
  int zero;          // subtracted from codes
  int scale_offset;  // subtracted from scale bytes
};

QWEN3NEXT_DEVICE constexpr StripFormat strip_format(DType type) noexcept {
  using enum ScaleKind;
  switch (type) {
    case DType::f32:
      return {32, none, 256, false, false, 0, 0};
    case DType::f16:
      return {16, none, 256, false, false, 0, 0};
    case DType::bf16:
      return {16, none, 256, false, false, 0, 0};
    case DType::f8_e4m3:
      return {8, floats, 128, false, false, 0, 0};
    case DType::q4_0:
      return {4, halves, 32, false, false, 8, 0};
    case DType::q4_1:
      return {4, halves, 32, true, false, 0, 0};
    case DType::q5_0:
      return {5, halves, 32, false, false, 16, 0};
    case DType::q5_1:
      return {5, halves, 32, true, false, 0, 0};
    case DType::q8_0:
      return {8, halves, 32, false, false, 128, 0};
    case DType::q2_k:
      return {4, bytes, 16, true, true, 0, 0};
    case DType::q3_k:
      return {4, bytes, 16, false, true, 4, 128};
    case DType::q4_k:
      return {4, bytes, 32, true, true, 0, 0};
    case DType::q5_k:
      return {5, bytes, 32, true, true, 0, 0};
    case DType::q6_k:
      return {6, bytes, 16, false, true, 32, 128};
    case DType::iq4_nl:
      return {4, halves, 32, false, false, 0, 0};
    case DType::iq4_xs:
      return {4, bytes, 32, false, true, 0, 128};
    case DType::mxfp4:
      return {4, bytes, 32, false, false, 0, 0};
    case DType::nvfp4:
      return {4, bytes, 16, false, false, 0, 0};
  }
  return {};
}

// Where the parts of a strip begin, in bytes.
struct StripLayout {
  int high, scales, minima, factors, bytes;
};

QWEN3NEXT_DEVICE constexpr StripLayout strip_layout(DType type) noexcept {
  const StripFormat f = strip_format(type);
  constexpr int elements = strip_rows * strip_cols;
  const int low_bits = f.bits == 5 || f.bits == 6 ? 4 : f.bits;
  const int groups = elements / f.group;
  const int scales = f.kind == ScaleKind::none     ? 0
                     : f.kind == ScaleKind::bytes  ? groups
                     : f.kind == ScaleKind::halves ? 2 * groups
                                                   : 4 * groups;
  StripLayout at{};
  at.high = elements * low_bits / 8;
  at.scales = at.high + elements * (f.bits - low_bits) / 8;
  at.minima = at.scales + scales;
  at.factors = at.minima + (f.minimum ? scales : 0);
  at.bytes = at.factors + (f.factors ? (f.minimum ? 64 : 32) : 0);
  return at;
}

// Bit of the low nibble's first bit in its word for column c of 8.
QWEN3NEXT_DEVICE constexpr int nibble_bit(int c) noexcept {
  return (c / 2 == 0 ? 0 : c / 2 == 1 ? 8 : c / 2 == 2 ? 4 : 12) + 16 * (c % 2);
}

// The high bits of word w = 2 r + u (of Q6_K: of w % 2 = u) are found by a rotation to the right that brings those of
// c = 0, 1 (or 2, 3) above the low ones of the first nibble, and with it those of c = 4, 5 (6, 7) above the second's.
QWEN3NEXT_DEVICE constexpr int high_rotation(int bits, int w, int j) noexcept {
  const int i = 2 * w + j;
  return bits == 5 ? (i < 4 ? i : i + 4) : 2 * (i & 1) + 8 * (i >> 1 & 1);
}
// Bit of the word, for column c of 8.
QWEN3NEXT_DEVICE constexpr int high_bit(int bits, int w, int c) noexcept {
  return ((c < 4 ? 4 : 8) + 16 * (c % 2) + high_rotation(bits, w, c / 2 % 2)) % 32;
}

// Index of a scale or minimum in its section.
QWEN3NEXT_DEVICE constexpr int scale_index(DType type, int row, int col) noexcept {
  const int g = row % 8, r = row / 8, tile = col / 64, u = col / 32 % 2;
  const int group = strip_format(type).group;
  if (group == 128) return 4 * g + 2 * r + col / 128;
  const int lanes = group == 16 ? 2 * g + col / 16 % 2 : g;
  return 16 * lanes + 4 * tile + 2 * r + u;
}

template <DType type>
struct TypeConstant {
  static constexpr DType value = type;
};
// Calls f with the type as a constant.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f is for the host or for the card, as the caller is
#endif
template <class F>
QWEN3NEXT_DEVICE void with_type(DType type, F&& f) {
  switch (type) {
#define QWEN3NEXT_CASE(name) \
  case DType::name:          \
    return f(TypeConstant<DType::name>{});
    QWEN3NEXT_CASE(f32)
    QWEN3NEXT_CASE(f16)
    QWEN3NEXT_CASE(bf16)
    QWEN3NEXT_CASE(f8_e4m3)
    QWEN3NEXT_CASE(q4_0)
    QWEN3NEXT_CASE(q4_1)
    QWEN3NEXT_CASE(q5_0)
    QWEN3NEXT_CASE(q5_1)
    QWEN3NEXT_CASE(q8_0)
    QWEN3NEXT_CASE(q2_k)
    QWEN3NEXT_CASE(q3_k)
    QWEN3NEXT_CASE(q4_k)
    QWEN3NEXT_CASE(q5_k)
    QWEN3NEXT_CASE(q6_k)
    QWEN3NEXT_CASE(iq4_nl)
    QWEN3NEXT_CASE(iq4_xs)
    QWEN3NEXT_CASE(mxfp4)
    QWEN3NEXT_CASE(nvfp4)
#undef QWEN3NEXT_CASE
  }
}

static_assert(strip_layout(DType::q4_k).bytes == 2048 + 128 + 128 + 64);
static_assert(strip_layout(DType::q6_k).bytes == 3072 + 256 + 32);

}  // namespace qwen3next::cuda
