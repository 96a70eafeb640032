#pragma once
// What a model's authors recommend for sampling from it.

#include <cstdint>
#include <optional>
#include <vector>

namespace qwen3next {

// From generation_config.json or a GGUF's general.sampling.*; what is absent there is absent here.
struct GenerationDefaults {
  std::optional<double> temperature;  // 0: greedy
  std::optional<double> top_p;
  std::optional<int> top_k;
  std::optional<double> min_p;
  std::optional<double> presence_penalty;
  std::optional<double> frequency_penalty;
  std::optional<double> repetition_penalty;
  std::vector<std::int32_t> eos_token_ids;  // generation ends after any of these
};

}  // namespace qwen3next
