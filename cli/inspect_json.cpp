// `inspect --json`.  Its keys are a promise to programs: docs/inspect.md lists them.

#include <cmath>
#include <iostream>

#include "cli/inspection.hpp"
#include "core/json.hpp"

namespace qwen3next::cli {

namespace {

ordered_json config_json(const Config& c) {
  ordered_json j{{"vocab_size", c.vocab_size},
                 {"hidden_size", c.hidden_size},
                 {"num_hidden_layers", c.num_hidden_layers},
                 {"max_position_embeddings", c.max_position_embeddings},
                 {"rms_norm_eps", c.rms_norm_eps},
                 {"num_attention_heads", c.num_attention_heads},
                 {"num_key_value_heads", c.num_key_value_heads},
                 {"head_dim", c.head_dim},
                 {"rope_theta", c.rope_theta},
                 {"rotary_dim", c.rotary_dim},
                 {"linear_num_key_heads", c.linear_num_key_heads},
                 {"linear_num_value_heads", c.linear_num_value_heads},
                 {"linear_key_head_dim", c.linear_key_head_dim},
                 {"linear_value_head_dim", c.linear_value_head_dim},
                 {"linear_conv_kernel_dim", c.linear_conv_kernel_dim},
                 {"num_experts", c.num_experts},
                 {"num_experts_per_tok", c.num_experts_per_tok},
                 {"moe_intermediate_size", c.moe_intermediate_size},
                 {"shared_expert_intermediate_size", c.shared_expert_intermediate_size},
                 {"tie_word_embeddings", c.tie_word_embeddings},
                 {"norm_topk_prob", c.norm_topk_prob}};
  for (const LayerType type : c.layer_types) {
    j["layer_types"].push_back(type == LayerType::full_attention ? "full_attention" : "linear_attention");
  }
  if (c.yarn) {
    j["yarn"] = {{"factor", c.yarn->factor},
                 {"original_max_position_embeddings", c.yarn->original_max_position_embeddings}};
  }
  return j;
}

ordered_json traffic_json(const Traffic& t) {
  return {{"dense", std::llround(t.dense)},
          {"experts", std::llround(t.experts)},
          {"kv_cache", std::llround(t.kv_cache)},
          {"delta_state", std::llround(t.states)},
          {"total", std::llround(t.total())}};
}

ordered_json sum_json(std::string_view key, std::string_view value, const Sum& sum) {
  return {{key, value},
          {"tensors", sum.tensors},
          {"values", sum.values},
          {"bytes", sum.bytes},
          {"bits_per_value", sum.bits_per_value()}};
}

std::string_view key(Role role) { return role_names[static_cast<std::size_t>(role)].first; }

}  // namespace

void print_json(const Inspection& i) {
  const Checkpoint& files = i.checkpoint;
  ordered_json j{{"path", display(files.path)},
                 {"format", i.format()},
                 {"parameters",
                  {{"total", i.parameters.total},
                   {"experts", i.parameters.experts},
                   {"mtp", i.parameters.mtp},
                   {"active", i.parameters.active}}},
                 {"config", config_json(files.config)},
                 {"mtp", files.config.has_mtp},
                 {"tokenizer", i.text.tokenizer},
                 {"tokens", i.text.tokens},
                 {"chat_template", i.text.chat_template},
                 {"problems", i.problems}};
  for (const MappedFile& file : files.files) j["files"].push_back({{"path", file.name()}, {"bytes", file.size()}});
  for (const auto& [role, sum] : i.roles) j["roles"].push_back(sum_json("role", key(role), sum));
  for (const auto& [type, sum] : i.types) j["types"].push_back(sum_json("type", type, sum));
  for (const TensorGroup& g : i.groups) {
    j["tensor_groups"].push_back({{"role", key(g.role)},
                                  {"name", g.name},
                                  {"type", g.type},
                                  {"shape", g.shape.span()},
                                  {"count", g.sum.tensors},
                                  {"bytes", g.sum.bytes}});
  }
  for (const TensorRecord& r : files.records) {
    j["tensors"].push_back({{"name", r.name},
                            {"type", r.dtype},
                            {"shape", r.shape.span()},
                            {"bytes", r.bytes},
                            {"file", r.file},
                            {"offset", r.offset},
                            {"alignment", alignment(r.offset)}});
  }
  j["copied"] = ordered_json::array();
  for (const VectorCopy& copy : files.copies) {
    j["copied"].push_back({{"name", copy.name}, {"why", copy.why}, {"bytes", copy.bytes()}});
  }
  j["memory"] = {{"context", i.context},
                 {"kv_type", name(i.kv)},
                 {"weights_mapped", i.memory.weights_mapped},
                 {"weights_copied", i.memory.weights_copied},
                 {"kv_cache", i.memory.kv_cache},
                 {"delta_state", i.memory.delta_state},
                 {"scratch", i.memory.scratch},
                 {"session", i.memory.session()}};
  if (const MemoryPlan& m = i.memory; m.streamed()) {
    j["memory"]["streaming"] = {{"budget", m.budget},
                                {"needed", m.needed},
                                {"weights_resident", m.weights_resident},
                                {"state_copy", m.state_copy},
                                {"experts_resident", m.experts_resident},
                                {"experts_held", m.experts_held},
                                {"experts", m.experts},
                                {"expected_hit_rate", m.hit_rate},
                                {"missed_bytes_per_token", m.missed_bytes_per_token},
                                {"read_bandwidth", i.read_bandwidth},
                                {"expected_tokens_per_second", m.tokens_per_second(i.read_bandwidth)}};
  }
  j["bytes_per_token"] = {{"first", traffic_json(i.first_token)}, {"last", traffic_json(i.last_token)}};
  // Names come from files: whatever is not UTF-8 in them must not stop us.
  std::cout << j.dump(2, ' ', false, ordered_json::error_handler_t::replace) << "\n";
}

}  // namespace qwen3next::cli
