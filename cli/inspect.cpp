// inspect: what is in a model's files, and what it will take to run.

#include <map>

#include "cli/commands.hpp"
#include "cli/common.hpp"

namespace qwen3next::cli {

namespace {

struct InspectOptions {
  std::string path, kv = "f16";
  std::int64_t context = 0;
  bool json = false;
};

// Tensors that differ only in their layer or expert.
struct TensorGroup {
  std::string name, type;
  Shape shape;
  std::int64_t count = 0;
  std::uint64_t bytes = 0;
};

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

std::vector<TensorGroup> group(const std::vector<TensorRecord>& records) {
  std::vector<TensorGroup> groups;  // in the order of the file
  std::map<std::string, std::size_t> index;
  for (const TensorRecord& r : records) {
    const std::string name = without_numbers(r.name);
    const auto [found, added] = index.try_emplace(concat(name, " ", r.dtype, " ", r.shape.text()), groups.size());
    if (added) groups.push_back({name, std::string(r.dtype), r.shape});
    ++groups[found->second].count;
    groups[found->second].bytes += r.bytes;
  }
  return groups;
}

// Reasons for copies, each with how many vectors and bytes it costs.
struct CopyGroup {
  std::int64_t count = 0;
  std::uint64_t bytes = 0;
};
std::map<std::string, CopyGroup> group(const std::vector<VectorCopy>& copies) {
  std::map<std::string, CopyGroup> groups;
  for (const VectorCopy& copy : copies) ++groups[copy.why].count, groups[copy.why].bytes += copy.bytes();
  return groups;
}

// What the text side of the files is; a reason in words where there is none.
struct TextSide {
  std::string tokenizer, chat_template;
  std::int64_t tokens = 0;
};
TextSide inspect_text(const std::string& path) {
  TextSide text;
  try {
    text.tokens = load_tokenizer(path).size();
    text.tokenizer = "byte-level BPE";
  } catch (const Error& e) {
    text.tokenizer = std::string("none: ") + e.what();
  }
  try {
    const std::optional<std::string> jinja = load_chat_template_text(path);
    text.chat_template = !jinja                                                                           ? "none"
                         : ChatTemplate::detect(*jinja, "chat template").kind() == TemplateKind::thinking ? "thinking"
                                                                                                          : "instruct";
  } catch (const Error& e) {
    text.chat_template = std::string("unknown: ") + e.what();
  }
  return text;
}

struct Findings {
  const Checkpoint& checkpoint;
  std::vector<TensorGroup> tensors;
  std::map<std::string, CopyGroup> copies;
  TextSide text;
  std::int64_t context;
  MemoryPlan plan;

  std::string_view format() const { return checkpoint.format == Format::gguf ? "GGUF" : "Hugging Face"; }
};

std::vector<std::pair<std::string, double>> config_numbers(const Config& c) {
  const auto n = [](auto x) { return static_cast<double>(x); };
  return {{"vocab_size", n(c.vocab_size)},
          {"hidden_size", n(c.hidden_size)},
          {"num_hidden_layers", n(c.num_hidden_layers)},
          {"max_position_embeddings", n(c.max_position_embeddings)},
          {"rms_norm_eps", c.rms_norm_eps},
          {"num_attention_heads", n(c.num_attention_heads)},
          {"num_key_value_heads", n(c.num_key_value_heads)},
          {"head_dim", n(c.head_dim)},
          {"rope_theta", c.rope_theta},
          {"rotary_dim", n(c.rotary_dim)},
          {"linear_num_key_heads", n(c.linear_num_key_heads)},
          {"linear_num_value_heads", n(c.linear_num_value_heads)},
          {"linear_key_head_dim", n(c.linear_key_head_dim)},
          {"linear_value_head_dim", n(c.linear_value_head_dim)},
          {"linear_conv_kernel_dim", n(c.linear_conv_kernel_dim)},
          {"num_experts", n(c.num_experts)},
          {"num_experts_per_tok", n(c.num_experts_per_tok)},
          {"moe_intermediate_size", n(c.moe_intermediate_size)},
          {"shared_expert_intermediate_size", n(c.shared_expert_intermediate_size)}};
}

void print_json(const Findings& f) {
  const Config& c = f.checkpoint.config;
  ordered_json config;
  for (const auto& [name, value] : config_numbers(c)) {
    if (value == std::floor(value)) {
      config[name] = static_cast<std::int64_t>(value);
    } else {
      config[name] = value;
    }
  }
  config["tie_word_embeddings"] = c.tie_word_embeddings;
  config["norm_topk_prob"] = c.norm_topk_prob;
  for (const LayerType type : c.layer_types) {
    config["layer_types"].push_back(type == LayerType::full_attention ? "full_attention" : "linear_attention");
  }
  if (c.yarn) {
    config["yarn"] = {{"factor", c.yarn->factor},
                      {"original_max_position_embeddings", c.yarn->original_max_position_embeddings}};
  }
  ordered_json json{{"path", display(f.checkpoint.path)},
                    {"format", f.format()},
                    {"config", config},
                    {"mtp", c.has_mtp},
                    {"tokenizer", f.text.tokenizer},
                    {"tokens", f.text.tokens},
                    {"chat_template", f.text.chat_template}};
  for (const MappedFile& file : f.checkpoint.files) {
    json["files"].push_back({{"path", file.name()}, {"bytes", file.size()}});
  }
  for (const TensorGroup& g : f.tensors) {
    json["tensor_groups"].push_back(
        {{"name", g.name}, {"type", g.type}, {"shape", g.shape.span()}, {"count", g.count}, {"bytes", g.bytes}});
  }
  for (const TensorRecord& r : f.checkpoint.records) {
    json["tensors"].push_back({{"name", r.name},
                               {"type", r.dtype},
                               {"shape", r.shape.span()},
                               {"bytes", r.bytes},
                               {"file", r.file},
                               {"offset", r.offset}});
  }
  json["copied"] = ordered_json::array();
  for (const VectorCopy& copy : f.checkpoint.copies) {
    json["copied"].push_back({{"name", copy.name}, {"why", copy.why}, {"bytes", copy.bytes()}});
  }
  json["memory"] = {{"context", f.context},
                    {"weights_mapped", f.plan.weights_mapped},
                    {"weights_copied", f.plan.weights_copied},
                    {"kv_cache", f.plan.kv_cache},
                    {"delta_state", f.plan.delta_state},
                    {"scratch", f.plan.scratch},
                    {"session", f.plan.session()}};
  // Names come from files: whatever is not UTF-8 in them must not stop us.
  std::cout << json.dump(2, ' ', false, ordered_json::error_handler_t::replace) << "\n";
}

void print_text(const Findings& f, const std::string& kv) {
  const Style style(stdout);
  const Config& c = f.checkpoint.config;
  const auto heading = [&](const std::string& text) {
    std::cout << "\n" << style.bold() << text << style.reset() << "\n";
  };
  const auto line = [&](const std::string& name, const std::string& value, const std::string& note = "") {
    std::cout << "  " << name << std::string(name.size() < 34 ? 34 - name.size() : 1, ' ') << value << style.dim()
              << (note.empty() ? "" : "  " + note) << style.reset() << "\n";
  };
  const std::size_t files = f.checkpoint.files.size();
  std::cout << style.bold() << display(f.checkpoint.path) << style.reset() << ": " << f.format() << ", " << files
            << (files == 1 ? " file, " : " files, ") << bytes_text(f.checkpoint.file_bytes()) << "\n";

  heading("Config");
  for (const auto& [name, value] : config_numbers(c)) line(name, format("%.10g", value));
  const auto full = std::count(c.layer_types.begin(), c.layer_types.end(), LayerType::full_attention);
  line("layers",
       concat(static_cast<std::int64_t>(c.layer_types.size()) - full, " Gated DeltaNet, ", full, " gated attention"));
  line("norm_topk_prob", c.norm_topk_prob ? "true" : "false");
  line("tie_word_embeddings", c.tie_word_embeddings ? "true" : "false");
  if (c.yarn)
    line("YaRN", format("factor %g over %lld", c.yarn->factor,
                        static_cast<long long>(c.yarn->original_max_position_embeddings)));
  line("MTP head", c.has_mtp ? "yes" : "no");

  heading("Text");
  line("tokenizer", f.text.tokenizer, f.text.tokens ? count_text(f.text.tokens) + " tokens" : "");
  line("chat template", f.text.chat_template);

  heading("Tensors");
  const auto total = static_cast<double>(f.checkpoint.weight_bytes());
  std::cout << style.dim()
            << format("  %6s %-8s %-22s %10s %7s  %s\n", "count", "type", "shape", "bytes", "share", "name")
            << style.reset();
  for (const TensorGroup& g : f.tensors) {
    std::cout << format("  %6lld %-8s %-22s %10s %6.2f%%  ", static_cast<long long>(g.count), g.type.c_str(),
                        g.shape.text().c_str(), bytes_text(g.bytes).c_str(), 100 * static_cast<double>(g.bytes) / total)
              << printable(g.name) << "\n";
  }
  std::cout << format("  %6zu %-31s %10s\n", f.checkpoint.records.size(), "all", bytes_text(total).c_str());

  heading("Memory, at a context of " + count_text(f.context) + " tokens, KV cache " + kv);
  line("weights, mapped", bytes_text(f.plan.weights_mapped), "the system keeps what is used and fits");
  line("weights, copied", bytes_text(f.plan.weights_copied));
  for (const auto& [why, copies] : f.copies) {
    std::cout << style.dim() << "    " << copies.count << " vectors, " << bytes_text(copies.bytes) << ": " << why
              << style.reset() << "\n";
  }
  line("KV cache", bytes_text(f.plan.kv_cache), "grows with the text up to this");
  line("DeltaNet states", bytes_text(f.plan.delta_state), "whatever the length");
  line("scratch", bytes_text(f.plan.scratch));
  line("a session", bytes_text(f.plan.session()));
}

void inspect(const InspectOptions& o) {
  const Checkpoint checkpoint = Checkpoint::open(o.path);
  const std::int64_t longest = checkpoint.config.max_position_embeddings;
  if (o.context > longest) throw_error("--ctx is ", o.context, ", expected at most ", longest, ", this model's length");
  Findings f{checkpoint,           group(checkpoint.records),       group(checkpoint.copies),
             inspect_text(o.path), o.context ? o.context : longest, {}};
  f.plan = plan_session(checkpoint.config, *kv_type(o.kv), f.context, SessionOptions{}.batch);
  f.plan.weights_mapped = checkpoint.weight_bytes();
  f.plan.weights_copied = checkpoint.copied_bytes();
  o.json ? print_json(f) : print_text(f, o.kv);
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto o = std::make_shared<InspectOptions>();
  CLI::App& command = *app.add_subcommand("inspect", "Show a model's config, tensors and memory plan");
  command.add_option("MODEL", o->path, std::string(model_help))->required()->option_text(" ");
  command.add_option("--ctx", o->context, "Plan memory for this many tokens [the model's length]")
      ->option_text("N")
      ->check(CLI::PositiveNumber);
  command.add_option("--kv", o->kv, "Type of the KV cache in the plan: f16, f32 or q8_0")
      ->option_text("TYPE [f16]")
      ->check(CLI::IsMember({"f16", "f32", "q8_0"}));
  command.add_flag("--json", o->json, "All of it as JSON, every tensor included");
  add_example(
      command,
      "qwen3next inspect model.gguf --ctx 32768\n\nOpens and checks the files as running would, but computes nothing.");
  command.callback([o] { inspect(*o); });
}

}  // namespace qwen3next::cli
