#pragma once
// Tokens for engines, and all the logits that they give.

#include <cstdint>
#include <span>
#include <vector>

#include "generate/engine.hpp"
#include "weights/checkpoint.hpp"

namespace qwen3next::test {

// n tokens of the vocabulary, without a pattern.
inline std::vector<std::int32_t> text(const Checkpoint& c, int n, int seed = 1) {
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back((i * i * 7 + i * 31 + seed * 101) % c.config.vocab_size);
  return tokens;
}

using Rows = std::vector<std::vector<float>>;
inline LogitsSink into(Rows& rows) {
  return [&rows](std::span<const float> row) { rows.emplace_back(row.begin(), row.end()); };
}

}  // namespace qwen3next::test
