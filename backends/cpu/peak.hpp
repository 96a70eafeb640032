#pragma once
// How many multiply-adds this instruction set can do: the roof of what is limited by arithmetic.
//
// 12 accumulators hide an instruction's latency (4 cycles, two a cycle) and leave registers for its factors.

#include "backends/cpu/int8_dot.hpp"

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

constexpr int peak_chains = 12, peak_rounds = 4096;

// Products of int8, summed in 32 bits, as prefill does them.  The factors change or they would be moved out of the
// loop.
inline std::int64_t integer_peak(float* sink) noexcept {
  alignas(64) std::int8_t w[4 * lanes];
  for (int i = 0; i < 4 * lanes; ++i) w[i] = static_cast<std::int8_t>(i % 15 - 7);
  I acc[peak_chains];
  for (I& a : acc) a = I(0);
  for (int r = 0; r < peak_rounds; ++r) {
    const auto x = static_cast<std::int32_t>(static_cast<std::uint32_t>(r & 63) * 0x01010101u);
    for (I& a : acc) a = dot4<false>(a, x, w);
  }
  I total(0);
  for (const I& a : acc) total = total + a;
  *sink += static_cast<float>(sum(total));
  return std::int64_t{4} * lanes * peak_chains * peak_rounds;
}

inline std::int64_t floating_peak(float* sink) noexcept {
  F acc[peak_chains];
  for (F& a : acc) a = F(1.0f);
  F x(1e-6f);
  const F step(1e-9f);
  for (int r = 0; r < peak_rounds; ++r, x += step) {
    for (F& a : acc) a = mul_add(a, x, x);
  }
  F total(0.0f);
  for (const F& a : acc) total += a;
  *sink += sum(total);
  return std::int64_t{lanes} * peak_chains * peak_rounds;
}

}  // namespace QWEN3NEXT_KERNEL_UNIT
}  // namespace qwen3next::cpu::QWEN3NEXT_ISA
