#pragma once
// The types in which weights are stored, and the bytes that they take.

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace qwen3next {

enum class DType : std::uint8_t {
  f32,
  f16,
  bf16,
  f8_e4m3,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs,
  mxfp4,
  nvfp4,
};

// A row of n elements is n / elements blocks of `bytes` bytes; n must be a multiple of `elements`.
struct DTypeInfo {
  DType type;
  std::string_view name;  // as the containers spell it
  std::uint32_t ggml_id;  // type id in a GGUF tensor record, or no_ggml_id
  int elements;           // per block
  int bytes;              // per block
  bool quantised;         // multiplied with int8 activations on the CPU
};

inline constexpr std::uint32_t no_ggml_id = 0xffffffff;  // not a type of GGUF

inline constexpr std::array<DTypeInfo, 18> dtype_table{{
    {DType::f32, "F32", 0, 1, 4, false},
    {DType::f16, "F16", 1, 1, 2, false},
    {DType::bf16, "BF16", 30, 1, 2, false},
    {DType::f8_e4m3, "F8_E4M3", no_ggml_id, 1, 1, false},
    {DType::q4_0, "Q4_0", 2, 32, 18, true},
    {DType::q4_1, "Q4_1", 3, 32, 20, true},
    {DType::q5_0, "Q5_0", 6, 32, 22, true},
    {DType::q5_1, "Q5_1", 7, 32, 24, true},
    {DType::q8_0, "Q8_0", 8, 32, 34, true},
    {DType::q2_k, "Q2_K", 10, 256, 84, true},
    {DType::q3_k, "Q3_K", 11, 256, 110, true},
    {DType::q4_k, "Q4_K", 12, 256, 144, true},
    {DType::q5_k, "Q5_K", 13, 256, 176, true},
    {DType::q6_k, "Q6_K", 14, 256, 210, true},
    {DType::iq4_nl, "IQ4_NL", 20, 32, 18, true},
    {DType::iq4_xs, "IQ4_XS", 23, 256, 136, true},
    {DType::mxfp4, "MXFP4", 39, 32, 17, true},
    {DType::nvfp4, "NVFP4", 40, 64, 36, true},
}};

constexpr const DTypeInfo& info(DType type) noexcept { return dtype_table[static_cast<std::size_t>(type)]; }

constexpr bool fits_blocks(DType type, std::int64_t n) noexcept { return n % info(type).elements == 0; }

constexpr std::size_t row_bytes(DType type, std::int64_t n) noexcept {
  return static_cast<std::size_t>(n / info(type).elements) * static_cast<std::size_t>(info(type).bytes);
}

static_assert([] {
  for (std::size_t i = 0; i < dtype_table.size(); ++i) {
    if (static_cast<std::size_t>(dtype_table[i].type) != i) return false;
  }
  return true;
}());

}  // namespace qwen3next
