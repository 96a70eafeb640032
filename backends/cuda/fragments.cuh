#pragma once
// From strips (strip.hpp) to A fragments of mma.m16n8k16: for one warp, first loads into registers, then arithmetic.
//
// Two ways.  levels() and apply_scale() give a tile of 16 x 64 weights as f16, to be used against many rows.
// strip_product() multiplies a strip of 16 x 256 with at most eight rows in fewer instructions and without rounding:
// the fragments of K types are products of a code and its sub-scale, whole numbers of at most 12 bits, and what a row
// of 256 shares is applied to the sums.  Codes are cut out of their words as they are: as bits of an f16, q is the
// subnormal q 2^-24, or, four bits further up, q 2^-20.  Multiplications and tensor cores take subnormals at full
// speed.
//
// Fragments of a lane = 4 g + t:  MMA m = 2 u + j of a tile has columns 32 u + 8 t + 4 j + {0, 1} in a0 (row g), a1
// (row g + 8) and b0, and + {2, 3} in a2, a3 and b1;  b is of activation row g;  c0, c1 are of row g and activation
// rows 2 t, 2 t + 1, c2, c3 of row g + 8.

#include <cuda_fp16.h>

#include <cstdint>

#include "backends/cuda/strip.hpp"

namespace qwen3next::cuda {

__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// B fragments of a tile for the activation row at `row` (f16 [64] of this tile, 16-byte aligned): b[u] holds those of
// MMAs 2 u (x, y) and 2 u + 1 (z, w).
__device__ __forceinline__ void load_b(uint4 (&b)[2], const std::uint16_t* row, int lane) {
  const auto* from = reinterpret_cast<const uint4*>(row) + lane % 4;
  b[0] = from[0], b[1] = from[4];
}

// Where strips are read from.
struct FromMemory {
  template <class T>
  __device__ __forceinline__ static T get(const std::byte* p) {
    return __ldg(reinterpret_cast<const T*>(p));
  }
};
struct FromShared {
  template <class T>
  __device__ __forceinline__ static T get(const std::byte* p) {
    return *reinterpret_cast<const T*>(p);
  }
};

namespace detail {

__device__ __forceinline__ std::uint32_t bits(__half2 h) { return *reinterpret_cast<std::uint32_t*>(&h); }
__device__ __forceinline__ __half2 halves(std::uint32_t b) { return *reinterpret_cast<__half2*>(&b); }
__device__ __forceinline__ __half2 twice(float f) { return __float2half2_rn(f); }

__device__ __forceinline__ std::uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ std::uint32_t word(const uint2& v, int i) { return i == 0 ? v.x : v.y; }

// Byte i of w as f16 in both halves, minus `offset`.
template <int offset>
__device__ __forceinline__ __half2 byte_twice(std::uint32_t w, int i) {
  const std::uint32_t biased = __byte_perm(w, 0x64646464, 0x4040 + i * 0x0101);  // 1024 + byte
  return __hsub2(halves(biased), twice(1024 + offset));
}
// f16 i of v in both halves.
__device__ __forceinline__ __half2 half_twice(std::uint32_t w, int i) {
  return halves(__byte_perm(w, 0, i == 0 ? 0x1010 : 0x3232));
}

// Four bits each of the low half of w, as bytes of iq4_levels + 128.
__device__ __forceinline__ std::uint32_t iq4_bytes(std::uint32_t w) {
  const std::uint32_t v = w & 0x7777;
  const std::uint32_t low = __byte_perm(0x3f2d1801, 0x766a5d4f, v);   // 1, 24, 45, 63, 79, 93, 106, 118
  const std::uint32_t high = __byte_perm(0xa6998d81, 0xf1d9c5b5, v);  // 129, 141, 153, 166, 181, 197, 217, 241
  return __byte_perm(low, high, (w & 0x8888) >> 1 | 0x3210);
}

}  // namespace detail

// The registers of a lane for one tile.
template <DType type>
struct Tile {
  static constexpr StripFormat format = strip_format(type);
  static constexpr int code_words = format.bits == 16 ? 16 : format.bits == 8 ? 8 : 4;
  static constexpr int high_words = format.bits == 5 ? 1 : format.bits == 6 ? 2 : 0;
  static constexpr int scale_words = format.kind == ScaleKind::none    ? 0
                                     : format.kind == ScaleKind::bytes ? 1
                                                                       : 2;  // of [r][u]; f8: of [r]
  uint4 codes[code_words / 4];
  std::uint32_t high[high_words > 0 ? high_words : 1];
  std::uint32_t scales[scale_words > 0 ? scale_words : 1];
  std::uint32_t minima[format.minimum ? scale_words : 1];
  std::uint32_t factors[format.minimum ? 2 : 1];  // [r] of d, or of (d, dmin)
};

template <class Source = FromMemory, DType type>
__device__ __forceinline__ void load(Tile<type>& x, const std::byte* strip, int tile, int lane) {
  using namespace detail;
  constexpr StripFormat f = Tile<type>::format;
  constexpr StripLayout at = strip_layout(type);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < Tile<type>::code_words / 4; ++i) {
    x.codes[i] = Source::template get<uint4>(strip + (tile * (Tile<type>::code_words / 4) + i) * 512 + lane * 16);
  }
  if constexpr (f.bits == 5) x.high[0] = Source::template get<std::uint32_t>(strip + at.high + lane * 16 + tile * 4);
  if constexpr (f.bits == 6) {
    const auto v = Source::template get<uint2>(strip + at.high + (tile / 2 * 32 + lane) * 16 + tile % 2 * 8);
    x.high[0] = v.x, x.high[1] = v.y;
  }
  if constexpr (f.kind == ScaleKind::bytes) {
    const int i = (f.group == 16 ? 2 * g + t / 2 : g) * 16 + tile * 4;
    x.scales[0] = Source::template get<std::uint32_t>(strip + at.scales + i);
    if constexpr (f.minimum) x.minima[0] = Source::template get<std::uint32_t>(strip + at.minima + i);
  }
  if constexpr (f.kind == ScaleKind::halves) {
    const auto v = Source::template get<uint2>(strip + at.scales + g * 32 + tile * 8);
    x.scales[0] = v.x, x.scales[1] = v.y;
    if constexpr (f.minimum) {
      const auto m = Source::template get<uint2>(strip + at.minima + g * 32 + tile * 8);
      x.minima[0] = m.x, x.minima[1] = m.y;
    }
  }
  if constexpr (f.kind == ScaleKind::floats) {
    x.scales[0] = Source::template get<std::uint32_t>(strip + at.scales + g * 16 + tile / 2 * 4);
    x.scales[1] = Source::template get<std::uint32_t>(strip + at.scales + g * 16 + 8 + tile / 2 * 4);
  }
  if constexpr (f.factors && f.minimum) {
    const auto v = Source::template get<uint2>(strip + at.factors + g * 8);
    x.factors[0] = v.x, x.factors[1] = v.y;
  }
  if constexpr (f.factors && !f.minimum) x.factors[0] = Source::template get<std::uint32_t>(strip + at.factors + g * 4);
}

// What dequantize()'s fragments, and so products with them, are to be multiplied with (and with Matrix::scale): keeps
// f8 and FP4 in the range of f16.
__host__ __device__ constexpr float tile_unit(DType type) {
  return type == DType::f8_e4m3 ? 0x1p-8f : type == DType::mxfp4 ? 0x1p4f : type == DType::nvfp4 ? 0x1p7f : 1.0f;
}

namespace detail {

// The codes of columns 32 u + 8 t + 2 p, + 1 of row g + 8 r as numbers, less the type's zero, exactly.  FP4 levels
// come as E 2^-14.
template <DType type>
__device__ __forceinline__ void levels(const Tile<type>& x, int r, int u, __half2 (&pair)[4]) {
  constexpr StripFormat f = Tile<type>::format;
  if constexpr (f.bits == 16) {
    const uint4 v = x.codes[2 * r + u];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const std::uint32_t w = word(v, p);
      if constexpr (type == DType::bf16) {
        const float low = __uint_as_float(w << 16), high = __uint_as_float(w & 0xffff0000);
        pair[p] = __floats2half2_rn(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f));
      } else {
        pair[p] = halves(w);
      }
    }
  } else if constexpr (f.bits == 8) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const std::uint32_t w = word(x.codes[r], 2 * u + p / 2);
      if constexpr (type == DType::f8_e4m3) {
#if __CUDA_ARCH__ >= 890
        std::uint32_t h;
        const auto two = static_cast<std::uint16_t>(p % 2 ? w >> 16 : w);
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(two));
        pair[p] = halves(h);
#else
        const std::uint32_t v = __byte_perm(w, 0, p % 2 ? 0x3424 : 0x1404);  // bytes on top of the halves
        pair[p] = __hmul2(halves((v & 0x80008000) | (v >> 1 & 0x3f803f80)), twice(256));
#endif
      } else {
        pair[p] = __hsub2(halves(__byte_perm(w, 0x64646464, p % 2 ? 0x4342 : 0x4140)), twice(1024 + f.zero));
      }
    }
  } else {
    const std::uint32_t w = word(x.codes[0], 2 * r + u);
    if constexpr (type == DType::iq4_nl || type == DType::iq4_xs) {
      const std::uint32_t first = iq4_bytes(w), second = iq4_bytes(w >> 16);  // of c = 0 4 2 6, of 1 5 3 7
      const std::uint32_t c0123 = __byte_perm(first, second, 0x6240), c4567 = __byte_perm(first, second, 0x7351);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const std::uint32_t biased = __byte_perm(p < 2 ? c0123 : c4567, 0x64646464, p % 2 ? 0x4342 : 0x4140);
        pair[p] = __hsub2(halves(biased), twice(1024 + 128));
      }
    } else if constexpr (type == DType::mxfp4 || type == DType::nvfp4) {
      // s e e m at bits 15, 11..9 of an f16 are E 2^-14.
      const auto place = [](std::uint32_t sign, std::uint32_t rest) {
        return halves((sign & 0x80008000) | (rest & 0x0e000e00));
      };
      pair[0] = place(w << 12, w << 9), pair[1] = place(w << 4, w << 1);
      pair[2] = place(w << 8, w << 5), pair[3] = place(w, w >> 3);
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::uint32_t v = j == 0 ? w : w >> 8;
        std::uint32_t low = (v & 0x000f000f) | 0x64006400, high = (v & 0x00f000f0) | 0x64006400;
        if constexpr (f.bits == 5) {
          const std::uint32_t h = __funnelshift_r(x.high[0], x.high[0], high_rotation(5, 2 * r + u, j));
          low |= h & 0x00100010, high |= h & 0x01000100;
        }
        if constexpr (f.bits == 6) {
          const std::uint32_t h = __funnelshift_r(x.high[r], x.high[r], high_rotation(6, u, j));
          low |= h & 0x00300030, high |= h & 0x03000300;
        }
        pair[j] = __hsub2(halves(low), twice(1024 + f.zero));
        pair[2 + j] = __hfma2(halves(high), twice(0.0625f), twice(-(64 + f.zero)));
      }
    }
  }
}

// Scale and minimum of row g + 8 r and half u, in both halves; `minimum` is to be added.
template <DType type>
__device__ __forceinline__ void scale_of(const Tile<type>& x, int r, int u, __half2& scale, __half2& minimum) {
  constexpr StripFormat f = Tile<type>::format;
  const int i = 2 * r + u;
  if constexpr (f.kind == ScaleKind::halves) {
    scale = half_twice(x.scales[r], u);
    if constexpr (f.minimum) minimum = half_twice(x.minima[r], u);
  } else if constexpr (f.kind == ScaleKind::floats) {
    scale = twice(fminf(__uint_as_float(x.scales[r]) * 256, 65504.0f));
  } else if constexpr (type == DType::mxfp4) {  // 2^(e - 127) 2^10
    const int e = static_cast<int>(x.scales[0] >> (8 * i) & 255) - 102;
    const auto h = static_cast<std::uint32_t>(max(0, min(30, e))) << 10;
    scale = halves(h | h << 16);
  } else if constexpr (type == DType::nvfp4) {  // u 2^7
    const auto h = (x.scales[0] >> (8 * i) & 127) << 7;
    scale = __hmul2(halves(h | h << 16), twice(32768));
  } else {
    const std::uint32_t d = x.factors[f.minimum ? r : 0];
    scale = __hmul2(byte_twice<f.scale_offset>(x.scales[0], i), half_twice(d, f.minimum ? 0 : r));
    if constexpr (f.minimum) minimum = __hneg2(__hmul2(byte_twice<0>(x.minima[0], i), half_twice(d, 1)));
  }
}

// Levels to weights.
template <DType type>
__device__ __forceinline__ void apply_scale(const Tile<type>& x, int r, int u, __half2 (&pair)[4]) {
  constexpr StripFormat f = Tile<type>::format;
  if constexpr (f.kind != ScaleKind::none) {
    __half2 scale, minimum;
    scale_of(x, r, u, scale, minimum);
#pragma unroll
    for (__half2& p : pair) p = f.minimum ? __hfma2(p, scale, minimum) : __hmul2(p, scale);
  }
}

}  // namespace detail

// The tile's fragments a[m] of MMAs m = 2 u + j: f16 of weight / tile_unit(type).
template <DType type>
__device__ __forceinline__ void dequantize(const Tile<type>& x, std::uint32_t (&a)[4][4]) {
  constexpr StripFormat f = Tile<type>::format;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      __half2 pair[4];
      detail::levels(x, r, u, pair);
      detail::apply_scale(x, r, u, pair);
#pragma unroll
      for (int p = 0; p < 4; ++p) a[2 * u + p / 2][p % 2 * 2 + r] = detail::bits(pair[p]);
    }
  }
}

// --- strips against few rows ---------------------------------------------------------------------------------------

// What strip_product()'s sums are to be multiplied with, besides Matrix::scale.
__host__ __device__ constexpr float strip_unit(DType type) {
  return type == DType::q3_k || type == DType::q4_k || type == DType::q5_k || type == DType::q6_k ? 0x1p24f
         : type == DType::f8_e4m3                                                                 ? 1.0f
                                                                                                  : tile_unit(type);
}

// The 256 columns of an activation row that meet a strip, in shared memory, as lane 4 g + t sees them: of the row that
// is column g of the product.
struct StripInput {
  const uint4* b;              // f16, from column 8 t
  const std::uint32_t* upper;  // sums of columns 32 (2 t), 32 (2 t + 1) to f16, and what that left
  const std::uint32_t* lower;
};

// Types whose fragments are whole numbers.
__host__ __device__ constexpr bool multiplied_whole(DType type) {
  return type == DType::q3_k || type == DType::q4_k || type == DType::q5_k || type == DType::q6_k ||
         type == DType::iq4_xs;
}

namespace detail {

// A half u of a tile: fragments of its two MMAs.  Codes of the second are 16 times as large, but for IQ4_XS.
template <DType type>
__device__ __forceinline__ void whole_fragments(const uint4& codes, const std::uint32_t (&high)[2],
                                                std::uint32_t scales, int u, std::uint32_t (&a)[2][4]) {
  constexpr StripFormat f = strip_format(type);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const __half2 scale = byte_twice<f.scale_offset>(scales, 2 * r + u);
    if constexpr (type == DType::iq4_xs) {
      Tile<type> tile;
      tile.codes[0] = codes;
      __half2 pair[4];
      levels(tile, r, u, pair);
#pragma unroll
      for (int p = 0; p < 4; ++p) a[p / 2][p % 2 * 2 + r] = bits(__hmul2(pair[p], scale));
    } else {
      const std::uint32_t w = word(codes, 2 * r + u);
      __half2 zero[2];
      if constexpr (f.zero != 0) {
        zero[0] = __hmul2(scale, twice(-f.zero * 0x1p-24f)), zero[1] = __hmul2(scale, twice(-f.zero * 0x1p-20f));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::uint32_t v = j == 0 ? w : w >> 8;
        std::uint32_t q[2] = {v & 0x000f000f, v & 0x00f000f0};
        if constexpr (f.bits == 5) {
          const std::uint32_t h = __funnelshift_r(high[0], high[0], high_rotation(5, 2 * r + u, j));
          q[0] |= h & 0x00100010, q[1] |= h & 0x01000100;
        }
        if constexpr (f.bits == 6) {
          const std::uint32_t h = __funnelshift_r(high[r], high[r], high_rotation(6, u, j));
          q[0] |= h & 0x00300030, q[1] |= h & 0x03000300;
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {  // columns 4 k + 2 j, + 1
          a[k][2 * j + r] = bits(f.zero != 0 ? __hfma2(halves(q[k]), scale, zero[k]) : __hmul2(halves(q[k]), scale));
        }
      }
    }
  }
}

}  // namespace detail

// acc += strip x input, in units of strip_unit(), the strip in shared memory.  The order of additions is fixed.
template <DType type>
__device__ __forceinline__ void strip_product(const std::byte* strip, const StripInput& in, int lane, float (&acc)[4]) {
  using namespace detail;
  constexpr StripFormat f = strip_format(type);
  constexpr StripLayout at = strip_layout(type);
  const int g = lane / 4, t = lane % 4;
  if constexpr (multiplied_whole(type)) {
    float even[4] = {}, odd[4] = {};  // of the first and second MMA of each half
    const std::byte* const of_group = strip + at.scales + (f.group == 16 ? 2 * g + t / 2 : g) * 16;
#pragma unroll 1  // the code is to be short, see few.cuh
    for (int pair = 0; pair < strip_tiles / 2; ++pair) {
      const auto scales = FromShared::get<uint2>(of_group + pair * 8);
      uint4 high_words{};
      if constexpr (f.bits == 5) {
        const auto v = FromShared::get<uint2>(strip + at.high + lane * 16 + pair * 8);
        high_words.x = v.x, high_words.z = v.y;
      }
      if constexpr (f.bits == 6) high_words = FromShared::get<uint4>(strip + at.high + (pair * 32 + lane) * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto codes = FromShared::get<uint4>(strip + (2 * pair + i) * 512 + lane * 16);
        const std::uint32_t high[2] = {word(high_words, 2 * i), word(high_words, 2 * i + 1)};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          std::uint32_t a[2][4];
          whole_fragments<type>(codes, high, word(scales, i), u, a);
          const uint4 b = in.b[8 * (2 * pair + i) + 4 * u];
          mma(even, a[0], b.x, b.y);
          mma(odd, a[1], b.z, b.w);
        }
      }
    }
    float sum[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] = type == DType::iq4_xs ? even[k] + odd[k] : fmaf(odd[k], 0.0625f, even[k]);
    if constexpr (f.minimum) {
      // sum of minimum times sum of 32 inputs, for the eight groups: one more MMA, the inputs' sums in two parts.
      const auto minima = FromShared::get<std::uint32_t>(strip + at.minima + lane * 4);
      const std::uint32_t g0 = __byte_perm(minima, 0, 0x4140), g8 = __byte_perm(minima, 0, 0x4342);
      const std::uint32_t a[4] = {g0, g8, g0, g8};
      float minimum[4] = {};
      mma(minimum, a, *in.upper, *in.lower);
      const auto factors = FromShared::get<uint2>(strip + at.factors + g * 8);
      const float2 first = __half22float2(halves(factors.x)), second = __half22float2(halves(factors.y));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 d = k < 2 ? first : second;
        acc[k] = fmaf(d.x, sum[k], acc[k]);
        acc[k] = fmaf(-d.y, minimum[k], acc[k]);
      }
    } else {
      const float2 d = __half22float2(halves(FromShared::get<std::uint32_t>(strip + at.factors + g * 4)));
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[k] = fmaf(k < 2 ? d.x : d.y, sum[k], acc[k]);
    }
  } else {
    float sum[2][4] = {};
#pragma unroll
    for (int i = 0; i < strip_tiles; ++i) {
      Tile<type> tile;
      load<FromShared>(tile, strip, i, lane);
      std::uint32_t a[4][4];
      if constexpr (type == DType::f8_e4m3) {  // exact: the factor of 128 columns comes afterwards
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            __half2 pair[4];
            levels(tile, r, u, pair);
#pragma unroll
            for (int p = 0; p < 4; ++p) a[2 * u + p / 2][p % 2 * 2 + r] = bits(pair[p]);
          }
        }
      } else {
        dequantize(tile, a);
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint4 b = in.b[8 * i + 4 * u];
        mma(sum[0], a[2 * u], b.x, b.y);
        mma(sum[1], a[2 * u + 1], b.z, b.w);
      }
      if constexpr (type == DType::f8_e4m3) {
        if (i % 2 == 0) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          acc[k] = fmaf(__uint_as_float(tile.scales[k / 2]), sum[0][k] + sum[1][k], acc[k]);
          sum[0][k] = sum[1][k] = 0;
        }
      }
    }
    if constexpr (type != DType::f8_e4m3) {
#pragma unroll
      for (int k = 0; k < 4; ++k) acc[k] += sum[0][k] + sum[1][k];
    }
  }
}

}  // namespace qwen3next::cuda
