// Any bytes as blocks of weights, as logits, as lists of token ids and patterns on the command line.

#include <algorithm>
#include <cmath>

#include "blocks/codec.hpp"
#include "cli/token_list.hpp"
#include "generate/sampler.hpp"
#include "target.hpp"
#include "weights/quantize.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

// Every type unpacks every block, NaN and infinity included; what is finite packs again.
FUZZ_TARGET(blocks) {
  for (const DTypeInfo& type : dtype_table) {
    const std::size_t blocks = std::min<std::size_t>(input.size() / static_cast<std::size_t>(type.bytes), 4);
    if (blocks == 0) continue;
    const auto n = static_cast<std::int64_t>(blocks) * type.elements;
    std::vector<float> values(static_cast<std::size_t>(n));
    dequantize_row(type.type, reinterpret_cast<const std::byte*>(input.data()), values.data(), n);
    if (!std::ranges::all_of(values, [](float x) { return std::fabs(x) <= 65504; })) continue;
    std::vector<std::byte> packed(blocks * static_cast<std::size_t>(type.bytes));
    quantize_row(type.type, values.data(), packed.data(), n);
    dequantize_row(type.type, packed.data(), values.data(), n);
    expect(std::ranges::all_of(values, [](float x) { return std::isfinite(x); }), "packing makes no infinities");
  }
}

FUZZ_TARGET(sampler) {
  Numbers numbers(input);
  Sampling s;
  for (float* value :
       {&s.temperature, &s.top_p, &s.min_p, &s.presence_penalty, &s.frequency_penalty, &s.repetition_penalty}) {
    *value = numbers.take<float>();
  }
  s.top_k = numbers.take<int>();
  s.seed = numbers.take<std::uint64_t>();
  std::vector<float> logits;
  while (input.size() >= sizeof(float)) logits.push_back(numbers.take<float>());
  if (logits.empty()) return;
  Sampler sampler(s);
  sampler.observe_prompt(0);
  for (int i = 0; i < 8; ++i) {
    const std::int32_t token = sampler.sample(logits);
    expect(token >= 0 && static_cast<std::size_t>(token) < logits.size(), "tokens are in the vocabulary");
  }
}

FUZZ_TARGET(options) {
  may_refuse([&] { expect(!cli::parse_tokens(input, "--tokens").empty(), "a list of tokens"); });
  (void)find_dtype(input);
  const Config config;
  detail::QuantizePlanner(config, find_mix("BF16"), {{std::string(input), DType::f16}});
}
