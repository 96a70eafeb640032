#pragma once
// Which model a state belongs to: a number that differs whenever another would be computed.

#include <algorithm>
#include <cstdint>
#include <span>

#include "backends/backend_kind.hpp"
#include "core/xxhash64.hpp"
#include "weights/checkpoint.hpp"

namespace qwen3next {

// Of the shape as it is used (YaRN, experts of a token), every tensor's name, type and size, bytes of up to 256 tensors
// all over the files, and the backend, where cpu and cuda are one: each goes on from what the other read.  Reads about
// a megabyte of the files.  Tokenizer and file names do not matter.
inline std::uint64_t model_identity(const Checkpoint& checkpoint, Backend backend) {
  HashChain hash;
  const Config& c = checkpoint.config;
  hash.add(backend == Backend::cuda ? Backend::cpu : backend);
  hash.add(c.vocab_size).add(c.hidden_size).add(c.num_hidden_layers);
  for (const LayerType type : c.layer_types) hash.add(type);
  hash.add(c.rms_norm_eps).add(c.num_attention_heads).add(c.num_key_value_heads).add(c.head_dim).add(c.rope_theta);
  const YarnScaling yarn = c.yarn.value_or(YarnScaling{.factor = 0});
  hash.add(c.rotary_dim).add(yarn.factor).add(yarn.original_max_position_embeddings);
  hash.add(yarn.beta_fast).add(yarn.beta_slow).add(yarn.attention_factor.value_or(0));
  hash.add(c.linear_num_key_heads).add(c.linear_num_value_heads).add(c.linear_key_head_dim);
  hash.add(c.linear_value_head_dim).add(c.linear_conv_kernel_dim);
  hash.add(c.num_experts).add(c.num_experts_per_tok).add(c.moe_intermediate_size);
  hash.add(c.shared_expert_intermediate_size).add(c.norm_topk_prob).add(c.has_mtp);

  constexpr std::size_t most_samples = 256, sample = 64;
  const std::size_t step = checkpoint.records.size() / most_samples + 1;
  for (std::size_t i = 0; i < checkpoint.records.size(); ++i) {
    const TensorRecord& record = checkpoint.records[i];
    hash.add(std::as_bytes(std::span(record.name))).add(std::as_bytes(std::span(record.dtype)));
    for (const std::int64_t dim : record.shape.span()) hash.add(dim);
    if (i % step != 0) continue;
    const std::size_t bytes = record.bytes, n = std::min(bytes, sample);
    for (const std::size_t at : {std::size_t{0}, (bytes - n) / 2, bytes - n}) hash.add(std::span(record.data + at, n));
  }
  return hash.value();
}

}  // namespace qwen3next
