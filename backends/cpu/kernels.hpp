#pragma once
// All kernels, compiled for one instruction set: the macro QWEN3NEXT_ISA names its namespace.
//
//   one object per ISA   kernels_isa.cpp, with QWEN3NEXT_ISA a name of cmake/CpuKernels.cmake; nothing but kernels()
//                        leaves the object (tests/ops/check_exported_symbols.sh), so no code compiled for a newer CPU
//                        can stand in for a function of the same name elsewhere
//   header-only          the macro is undefined: namespace `native`, ordinary inline functions, the user's flags
//   QWEN3NEXT_MULTI_ISA  links the objects and sees the table's type alone
//
// Inside: raw pointers and sizes only, no functions of the standard library that are not C's.

#include "backends/cpu/kernel_table.hpp"
#include "core/linkage.hpp"

#if defined(QWEN3NEXT_ISA) || (QWEN3NEXT_DEFINITIONS && !defined(QWEN3NEXT_MULTI_ISA))

#include "backends/cpu/attention_block.hpp"
#include "backends/cpu/delta_rule.hpp"
#include "backends/cpu/elementwise.hpp"
#include "backends/cpu/f8_product.hpp"
#include "backends/cpu/float_product.hpp"
#include "backends/cpu/kv_rows.hpp"
#include "backends/cpu/peak.hpp"
#include "backends/cpu/row_blocks_avx512.hpp"
#include "backends/cpu/row_product.hpp"
#include "backends/cpu/row_product_avx512.hpp"
#include "backends/cpu/simd.hpp"
#include "backends/cpu/strip_pack_avx2.hpp"
#include "backends/cpu/strip_pack_avx512.hpp"
#include "backends/cpu/strip_product.hpp"
#include "backends/cpu/strip_product_amx.hpp"
#include "backends/cpu/unpack.hpp"

#define QWEN3NEXT_STRING_OF(x) #x
#define QWEN3NEXT_STRING(x) QWEN3NEXT_STRING_OF(x)

namespace qwen3next::cpu::QWEN3NEXT_ISA {
namespace QWEN3NEXT_KERNEL_UNIT {

template <class Type>
constexpr void use(Kernels& k, DType type) {
  const auto i = static_cast<std::size_t>(type);
  k.quantised_types |= 1u << i;
  k.row_product[i] = row_product<Type>;
#if QWEN3NEXT_FUSED_ROWS
  k.pack_strip[i] = pack_strip_transposed<Type>;
#elif QWEN3NEXT_TRANSPOSED_BY_8
  k.pack_strip[i] = pack_strip_by_8<Type>;
#else
  k.pack_strip[i] = pack_strip<Type>;
#endif
  k.strip_product[i] = strip_product<FormOf<Type>>;
}

constexpr Kernels make_table() {
  Kernels k{};
  k.name = QWEN3NEXT_STRING(QWEN3NEXT_ISA);
  k.lanes = lanes;
  k.max_panel = max_panel;
  k.integer_peak = integer_peak;
  k.floating_peak = floating_peak;
  k.float_product[0] = float_product<DType::f32>;
  k.float_product[1] = float_product<DType::f16>;
  k.float_product[2] = float_product<DType::bf16>;
  k.f8_product = f8_product;
  k.dequantize_f8 = dequantize_f8;
  k.quantize = quantize;
  k.row_tokens = row_tokens;
  k.operand_bytes = operand_bytes;
  k.make_operand = make_operand;
  k.strip_bytes = strip_bytes;
  k.panel_bytes = panel_bytes;
  k.pack_panel = pack_panel;
  use<Q4_0>(k, DType::q4_0);
  use<Q4_1>(k, DType::q4_1);
  use<Q5_0>(k, DType::q5_0);
  use<Q5_1>(k, DType::q5_1);
  use<Q8_0>(k, DType::q8_0);
  use<Q2_K>(k, DType::q2_k);
  use<Q3_K>(k, DType::q3_k);
  use<Q4_K>(k, DType::q4_k);
  use<Q5_K>(k, DType::q5_k);
  use<Q6_K>(k, DType::q6_k);
  use<IQ4_NL>(k, DType::iq4_nl);
  use<IQ4_XS>(k, DType::iq4_xs);
  use<MXFP4>(k, DType::mxfp4);
  use<NVFP4>(k, DType::nvfp4);
  k.dequantize = dequantize;
  k.rms_norm = rms_norm;
  k.l2_norm = l2_norm;
  k.gated_rms_norm = gated_rms_norm;
  k.swiglu = swiglu;
  k.sigmoid_gate = sigmoid_gate;
  k.delta_gates = delta_gates;
  k.add = add;
  k.rope = rope;
  k.sigmoid = sigmoid_scalar;
  k.softmax = softmax;
  k.top_k = top_k;
  k.causal_conv1d = causal_conv1d;
  k.delta_recurrent = delta_recurrent;
  k.delta_scratch = delta_scratch;
  k.delta_chunked = delta_chunked;
  k.store_kv = store_kv;
  k.attention_space = attention_space;
  k.attention_start = attention_start;
  k.attention_block = attention_block;
  k.scale_row = scale_row;
  return k;
}

inline constexpr Kernels table = make_table();

static_assert(row_tokens <= max_row_tokens, "callers keep room for so many operands");
static_assert(
    [] {
      for (const DTypeInfo& i : dtype_table) {
        if (i.quantised && !(table.quantised_types >> static_cast<int>(i.type) & 1u)) return false;
      }
      return true;
    }(),
    "make_table() lacks a quantised type");

}  // namespace QWEN3NEXT_KERNEL_UNIT

#if QWEN3NEXT_HEADER_ONLY_KERNELS
inline const Kernels& kernels() noexcept { return kernel_unit::table; }
#else
const Kernels& kernels() noexcept;
const Kernels& kernels() noexcept { return table; }
#endif

}  // namespace qwen3next::cpu::QWEN3NEXT_ISA

#undef QWEN3NEXT_STRING_OF
#undef QWEN3NEXT_STRING
#if QWEN3NEXT_HEADER_ONLY_KERNELS
#undef QWEN3NEXT_ISA  // simd.hpp's `native`
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // kernels here
