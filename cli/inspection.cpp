// Finding out what is in a model's files.

#include "cli/inspection.hpp"

#include <algorithm>
#include <bit>
#include <optional>

#include "cli/common.hpp"
#include "cli/expert_bandwidth.hpp"
#include "cli/format.hpp"

namespace qwen3next::cli {

namespace {

// The first pattern that a tensor's name holds says what it is for: the particular before the general.
constexpr std::pair<std::string_view, Role> role_patterns[] = {
    {"nextn.", Role::mtp},
    {"embed_tokens.", Role::embedding},
    {"token_embd.", Role::embedding},
    {"lm_head.", Role::head},
    {"shared_expert", Role::shared_experts},
    {"shexp.", Role::shared_experts},
    {"experts.", Role::experts},
    {"_exps.", Role::experts},
    {"mlp.gate.", Role::router},
    {"ffn_gate_inp.", Role::router},
    {"linear_attn.", Role::delta_net},
    {"ssm_", Role::delta_net},
    {"attn_qkv.", Role::delta_net},
    {"attn_gate.", Role::delta_net},
    {"layernorm.", Role::norms},
    {"attn_norm.", Role::norms},
    {"post_attention_norm.", Role::norms},
    {"output_norm.", Role::norms},
    {"self_attn.", Role::attention},
    {"attn_", Role::attention},
    {"norm.", Role::norms},
};

// The layer of a GGUF tensor blk.N.*; nothing for others.
std::optional<int> gguf_layer(std::string_view name) {
  if (!name.starts_with("blk.")) return {};
  int layer = 0;
  for (name.remove_prefix(4); !name.empty() && name[0] >= '0' && name[0] <= '9' && layer < 10000; name.remove_prefix(1))
    layer = layer * 10 + (name[0] - '0');
  return layer;
}

Role role_of(std::string_view name, const Config& c) {
  if (name.starts_with("mtp.") || gguf_layer(name).value_or(0) >= c.num_hidden_layers) return Role::mtp;
  if (name.starts_with("output.")) return Role::head;
  for (const auto& [pattern, role] : role_patterns) {
    if (name.find(pattern) != name.npos) return role;
  }
  return Role::other;
}

// model.layers.3.mlp.experts.17.up_proj.weight -> model.layers.*.mlp.experts.*.up_proj.weight
std::string without_numbers(std::string_view name) {
  std::string out;
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    const std::string_view part = name.substr(begin, end - begin);
    const bool number = !part.empty() && part.find_first_not_of("0123456789") == part.npos;
    if (begin > 0) out += '.';
    out += number ? "*" : part;
    begin = end + 1;
  }
  return out;
}

std::vector<TensorGroup> group(const std::vector<TensorRecord>& records, const Config& c) {
  std::vector<TensorGroup> groups;
  std::map<std::string, std::size_t> index;
  for (const TensorRecord& r : records) {
    const Role role = role_of(r.name, c);
    std::string name = without_numbers(r.name);
    const auto [found, added] =
        index.try_emplace(concat(static_cast<int>(role), " ", name, " ", r.dtype, " ", r.shape.text()), groups.size());
    if (added) groups.push_back({role, std::move(name), r.dtype, r.shape, {}});
    groups[found->second].sum.add(r);
  }
  std::stable_sort(groups.begin(), groups.end(),
                   [](const TensorGroup& a, const TensorGroup& b) { return a.role < b.role; });
  return groups;
}

TextSide inspect_text(const std::string& path, std::vector<std::string>& problems) {
  TextSide text;
  try {
    text.tokens = load_tokenizer(path).size();
    text.tokenizer = "byte-level BPE";
  } catch (const Error& e) {
    text.tokenizer = std::string("none: ") + e.what();
    problems.push_back(concat("No tokenizer, so no text: only 'logits' and 'bench' run. (", e.what(), ")"));
  }
  try {
    const std::optional<std::string> jinja = load_chat_template_text(path);
    if (!jinja) {
      text.chat_template = "none";
      problems.emplace_back("No chat template, so no 'chat' and no 'run --chat'; 'run' continues a text.");
    } else {
      const bool thinking = ChatTemplate::detect(*jinja, "chat template").kind() == TemplateKind::thinking;
      text.chat_template = thinking ? "thinking" : "instruct";
    }
  } catch (const Error& e) {
    text.chat_template = std::string("unknown: ") + e.what();
    problems.push_back(
        concat("The chat template is not one that is known here; use 'run --raw' with a prompt of your own. (",
               e.what(), ")"));
  }
  return text;
}

double bits(const TensorGroup& g) { return g.sum.bits_per_value(); }

// Choices of types that are legal, and that a person would want to hear of.
void find_type_problems(const Inspection& i, std::vector<std::string>& problems) {
  std::vector<std::string> told;  // once for each role and type
  for (const TensorGroup& g : i.groups) {
    const std::string_view role = role_names[static_cast<std::size_t>(g.role)].second;
    std::string what;
    if (g.role == Role::router && bits(g) < 8) {
      what = concat(role, " are ", g.type, ": rounding them changes which experts are picked; F32 or BF16 is usual.");
    } else if (g.role == Role::mtp && bits(g) < 4) {
      what = concat(role, " has ", g.type, " weights: fewer of its drafts will be accepted.");
    } else if (bits(g) < 3) {
      what = concat(role, " are partly ", g.type, format(" (%.2f bits", bits(g)), " a weight): expect worse text.");
    } else if (g.type == "F32" && g.shape.rank > 1 && g.role != Role::router && i.share(g.sum.bytes) > 0.05) {
      what = concat(role, " has F32 matrices: twice the bytes of BF16, and as slow as that.");
    }
    if (!what.empty() && std::find(told.begin(), told.end(), what) == told.end()) told.push_back(what);
  }
  problems.insert(problems.end(), told.begin(), told.end());
}

void find_problems(Inspection& i) {
  find_type_problems(i, i.problems);
  const Config& c = i.checkpoint.config;
  if (!c.has_mtp) i.problems.emplace_back("No MTP head in the files, so no drafts: one token is decoded at a time.");
  if (i.text.tokens > c.vocab_size) {
    i.problems.push_back(concat("The tokenizer has ", count_text(i.text.tokens), " tokens, the model only ",
                                count_text(c.vocab_size), ": they do not belong together."));
  }
}

}  // namespace

void Sum::add(const TensorRecord& record) {
  ++tensors;
  values += record.shape.elements().value_or(0);
  bytes += record.bytes;
}

std::uint64_t alignment(std::uint64_t offset) {
  return offset == 0 ? 4096 : std::min<std::uint64_t>(4096, std::uint64_t{1} << std::countr_zero(offset));
}

std::string_view name(KvType kv) { return kv == KvType::f16 ? "f16" : kv == KvType::f32 ? "f32" : "q8_0"; }

Inspection inspect_model(const std::string& path, const std::string& mtp_path, double yarn, std::int64_t context,
                         KvType kv) {
  Inspection i{.checkpoint = Checkpoint::open(file_path(path), file_path(mtp_path)), .kv = kv, .context = context};
  if (yarn != 0) i.checkpoint.config.extend_context(yarn);
  const Config& c = i.checkpoint.config;
  const std::int64_t longest = c.max_position_embeddings;
  if (context > longest) throw_error("--ctx is ", context, ", expected at most ", longest, ", this model's length");
  if (context == 0) i.context = longest;
  i.text = inspect_text(path, i.problems);
  i.parameters = count_parameters(c, i.checkpoint.weights);
  i.groups = group(i.checkpoint.records, c);
  for (const TensorRecord& r : i.checkpoint.records) {
    i.roles[role_of(r.name, c)].add(r);
    i.types[r.dtype].add(r);
  }
  for (const VectorCopy& copy : i.checkpoint.copies) {
    ++i.copies[copy.why].vectors;
    i.copies[copy.why].bytes += copy.bytes();
  }
  i.memory = plan_session(c, kv, i.context, SessionOptions{}.batch);
  i.memory.weights_mapped = i.checkpoint.weight_bytes();
  i.memory.weights_copied = i.checkpoint.copied_bytes();
  i.first_token = pass_traffic(c, i.checkpoint.weights, kv, 1, 0);
  i.last_token = pass_traffic(c, i.checkpoint.weights, kv, 1, static_cast<double>(i.context - 1));
  find_problems(i);
  return i;
}

void plan_streaming(Inspection& i, const Options& options) {
  const MemoryPlan plan = Model::plan(i.checkpoint.path, options, {.context = i.context, .kv = i.kv});
  if (!plan.streamed()) return;  // all of it fits
  i.memory = plan;
  i.read_bandwidth = measure_expert_bandwidth(i.checkpoint);
}

}  // namespace qwen3next::cli
