#pragma once
// Packing of the legacy types: the F16 scale (and offset) with the least weighted squared error; see scale_search.hpp.

#include "blocks/half.hpp"
#include "blocks/legacy_quants.hpp"
#include "blocks/scale_search.hpp"

namespace qwen3next {

namespace detail {

template <int low, int high, bool has_offset_>
struct LegacySpec {
  using Levels = IntegerLevels<low, high>;
  static constexpr int elements = 32, starts = 16;
  static constexpr bool has_offset = has_offset_;
  // Measured on Gaussian and Laplace data.
  static constexpr float from = has_offset ? -2.0f : -1.0f, step = has_offset ? 0.3f : 0.4f;
};

template <int low, int high, class Block>
void pack_legacy(const float* x, const float* importance, Block& b) noexcept {
  constexpr bool has_offset = low == 0;
  const ScaleSearch<LegacySpec<low, high, has_offset>> found(x, importance);
  b.d = f32_to_f16(found.scale);
  if constexpr (has_offset) b.m = f32_to_f16(found.offset);
  set_levels_32(b, found.code);
}

}  // namespace detail

inline void pack(const float* x, const float* importance, BlockQ4_0& b) noexcept {
  detail::pack_legacy<-8, 7>(x, importance, b);
}
inline void pack(const float* x, const float* importance, BlockQ4_1& b) noexcept {
  detail::pack_legacy<0, 15>(x, importance, b);
}
inline void pack(const float* x, const float* importance, BlockQ5_0& b) noexcept {
  detail::pack_legacy<-16, 15>(x, importance, b);
}
inline void pack(const float* x, const float* importance, BlockQ5_1& b) noexcept {
  detail::pack_legacy<0, 31>(x, importance, b);
}

}  // namespace qwen3next
