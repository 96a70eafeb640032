#pragma once
// Rows of any stored type to floats and back.  Scalar and plain: the meaning of the formats, which every faster kernel
// is tested against.  One header per family of types; a new type is a block struct with unpack() and pack(), a line in
// dtype.hpp and a line in each switch below.

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "blocks/dtype.hpp"
#include "blocks/floats.hpp"
#include "blocks/fp4.hpp"
#include "blocks/fp4_pack.hpp"
#include "blocks/half.hpp"
#include "blocks/iq4.hpp"
#include "blocks/iq4_pack.hpp"
#include "blocks/k_quants.hpp"
#include "blocks/k_quants_pack.hpp"
#include "blocks/legacy_quants.hpp"
#include "blocks/legacy_quants_pack.hpp"
#include "blocks/q8_0.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next {

namespace detail {

template <class Block>
void unpack_row(const std::byte* src, float* dst, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; i += Block::elements, src += sizeof(Block)) unpack(load<Block>(src), dst + i);
}

template <class Block>
void pack_row(const float* src, std::byte* dst, std::int64_t n, const float* importance) noexcept {
  for (std::int64_t i = 0; i < n; i += Block::elements, dst += sizeof(Block)) {
    Block block;
    pack(src + i, importance ? importance + i : nullptr, block);
    store(dst, block);
  }
}

}  // namespace detail

// n elements, a multiple of the type's block; `src` at any address.
inline void dequantize_row(DType type, const std::byte* src, float* dst, std::int64_t n) noexcept {
  assert(fits_blocks(type, n));
  switch (type) {
    case DType::f32:
      return unpack_f32(src, dst, n);
    case DType::f16:
      return unpack_f16(src, dst, n);
    case DType::bf16:
      return unpack_bf16(src, dst, n);
    case DType::f8_e4m3:
      return unpack_f8_e4m3(src, dst, n);
    case DType::q4_0:
      return detail::unpack_row<BlockQ4_0>(src, dst, n);
    case DType::q4_1:
      return detail::unpack_row<BlockQ4_1>(src, dst, n);
    case DType::q5_0:
      return detail::unpack_row<BlockQ5_0>(src, dst, n);
    case DType::q5_1:
      return detail::unpack_row<BlockQ5_1>(src, dst, n);
    case DType::q8_0:
      return detail::unpack_row<BlockQ8_0>(src, dst, n);
    case DType::q2_k:
      return detail::unpack_row<BlockQ2_K>(src, dst, n);
    case DType::q3_k:
      return detail::unpack_row<BlockQ3_K>(src, dst, n);
    case DType::q4_k:
      return detail::unpack_row<BlockQ4_K>(src, dst, n);
    case DType::q5_k:
      return detail::unpack_row<BlockQ5_K>(src, dst, n);
    case DType::q6_k:
      return detail::unpack_row<BlockQ6_K>(src, dst, n);
    case DType::iq4_nl:
      return detail::unpack_row<BlockIQ4_NL>(src, dst, n);
    case DType::iq4_xs:
      return detail::unpack_row<BlockIQ4_XS>(src, dst, n);
    case DType::mxfp4:
      return detail::unpack_row<BlockMXFP4>(src, dst, n);
    case DType::nvfp4:
      return detail::unpack_row<BlockNVFP4>(src, dst, n);
  }
}

// Row r of a matrix as it is meant: with the factors that its file keeps beside it.
inline void dequantize(const WeightView& w, int r, float* dst) noexcept {
  dequantize_row(w.type, w.row(r), dst, w.cols);
  if (const std::byte* factors = w.grid_row(r)) {
    for (int begin = 0; begin < w.cols; begin += ScaleGrid::block, factors += row_bytes(w.grid.type, 1)) {
      float factor;
      dequantize_row(w.grid.type, factors, &factor, 1);
      for (int c = begin; c < w.cols && c < begin + ScaleGrid::block; ++c) dst[c] *= factor;
    }
  }
  if (w.scale == 1) return;
  for (int c = 0; c < w.cols; ++c) dst[c] *= w.scale;
}

// Deterministic.  `importance`, one value >= 0 per column or null, weighs the squared error of each column: the mean
// square of the activations that meet it.  Values must be finite.
inline void quantize_row(DType type, const float* src, std::byte* dst, std::int64_t n,
                         const float* importance = nullptr) noexcept {
  assert(fits_blocks(type, n));
  switch (type) {
    case DType::f32:
      return pack_f32(src, dst, n);
    case DType::f16:
      return pack_f16(src, dst, n);
    case DType::bf16:
      return pack_bf16(src, dst, n);
    case DType::f8_e4m3:
      return pack_f8_e4m3(src, dst, n);
    case DType::q4_0:
      return detail::pack_row<BlockQ4_0>(src, dst, n, importance);
    case DType::q4_1:
      return detail::pack_row<BlockQ4_1>(src, dst, n, importance);
    case DType::q5_0:
      return detail::pack_row<BlockQ5_0>(src, dst, n, importance);
    case DType::q5_1:
      return detail::pack_row<BlockQ5_1>(src, dst, n, importance);
    case DType::q8_0:
      return detail::pack_row<BlockQ8_0>(src, dst, n, importance);
    case DType::q2_k:
      return detail::pack_row<BlockQ2_K>(src, dst, n, importance);
    case DType::q3_k:
      return detail::pack_row<BlockQ3_K>(src, dst, n, importance);
    case DType::q4_k:
      return detail::pack_row<BlockQ4_K>(src, dst, n, importance);
    case DType::q5_k:
      return detail::pack_row<BlockQ5_K>(src, dst, n, importance);
    case DType::q6_k:
      return detail::pack_row<BlockQ6_K>(src, dst, n, importance);
    case DType::iq4_nl:
      return detail::pack_row<BlockIQ4_NL>(src, dst, n, importance);
    case DType::iq4_xs:
      return detail::pack_row<BlockIQ4_XS>(src, dst, n, importance);
    case DType::mxfp4:
      return detail::pack_row<BlockMXFP4>(src, dst, n, importance);
    case DType::nvfp4:
      return detail::pack_row<BlockNVFP4>(src, dst, n, importance);
  }
}

}  // namespace qwen3next
