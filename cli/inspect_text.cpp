// `inspect` for a person: at most 100 columns, colours and block characters where a terminal shows them.

#include <algorithm>
#include <iostream>

#include "cli/format.hpp"
#include "cli/inspection.hpp"
#include "cli/terminal.hpp"

namespace qwen3next::cli {

namespace {

constexpr std::size_t name_width = 50, bar_width = 24;

std::string_view title(Role role) { return role_names[static_cast<std::size_t>(role)].second; }

// 63.1 M, 79.7 B
std::string parameters_text(std::int64_t n) {
  const auto x = static_cast<double>(n);
  return n < 1000000 ? count_text(n) : n < 1000000000 ? format("%.1f M", x / 1e6) : format("%.2f B", x / 1e9);
}

// Text of at most `width` columns; what is too long loses its middle.
std::string fitted(const std::string& text, std::size_t width) {
  if (text.size() <= width) return text;
  const std::size_t tail = width * 2 / 3;
  return text.substr(0, width - tail - 2) + ".." + text.substr(text.size() - tail);
}
// A group's name, without what every name has; model.layers.*.mlp.gate.weight -> layers.*.mlp.gate.weight
std::string short_name(const std::string& full, std::size_t width) {
  std::string name = printable(full);
  if (name.starts_with("model.")) name.erase(0, 6);
  if (const std::size_t at = name.find("layers.*."); name.size() > width && at != name.npos) name.erase(at, 7);
  return fitted(name, width);
}
std::string padded(std::string text, std::size_t width) {
  if (text.size() < width) text.append(width - text.size(), ' ');
  return text;
}

// A layer's number in a range: 0-2, 4-6 and so on, at most three ranges in full.
std::string layers_text(const Config& c, LayerType type) {
  std::vector<std::pair<int, int>> ranges;
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    if (c.layer_types[static_cast<std::size_t>(i)] != type) continue;
    if (!ranges.empty() && ranges.back().second == i - 1) {
      ranges.back().second = i;
    } else {
      ranges.emplace_back(i, i);
    }
  }
  std::string out;
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (ranges.size() > 4 && i == 2) out += ", ..", i = ranges.size() - 1;
    out += (i ? ", " : "") + std::to_string(ranges[i].first);
    if (ranges[i].second > ranges[i].first) out += "-" + std::to_string(ranges[i].second);
  }
  return out;
}

class Report {
 public:
  explicit Report(const Inspection& inspection) : i_(inspection), c_(inspection.checkpoint.config) {}

  void print() const {
    title_and_files();
    config();
    text();
    tensors();
    types();
    memory();
    traffic();
    problems();
  }

 private:
  std::ostream& out() const { return std::cout; }
  void heading(std::string_view text, const std::string& note = "") const {
    out() << "\n" << style_.bold() << style_.accent() << text << style_.reset();
    if (!note.empty()) out() << "  " << style_.dim() << note << style_.reset();
    out() << "\n";
  }
  void line(const std::string& name, const std::string& value, const std::string& note = "") const {
    out() << "  " << padded(name, 20) << style_.bold() << value << style_.reset();
    if (!note.empty()) out() << "  " << style_.dim() << note << style_.reset();
    out() << "\n";
  }

  // A share as a bar of `bar_width` columns, in eighths of one where the terminal has them.
  std::string bar(double share) const {
    const double columns = share * static_cast<double>(bar_width);
    if (!blocks_) return padded(std::string(static_cast<std::size_t>(columns + 0.5), '#'), bar_width);
    std::string text(style_.accent());
    std::size_t used = 0;
    for (int n = static_cast<int>(columns * 8 + 0.5); n > 0; n -= 8, ++used) {
      text += {'\xe2', '\x96', static_cast<char>(0x90 - std::min(n, 8))};  // U+2588, a full block, to U+258F, an eighth
    }
    return text + std::string(style_.reset()) + std::string(bar_width - std::min(used, bar_width), ' ');
  }

  void title_and_files() const {
    const Checkpoint& f = i_.checkpoint;
    const std::size_t n = f.files.size();
    const double bits = 8 * static_cast<double>(f.weight_bytes());
    out() << style_.bold() << display(f.path) << style_.reset() << "\n"
          << i_.format() << ", " << n << (n == 1 ? " file, " : " files, ") << bytes_text(f.file_bytes()) << "\n"
          << parameters_text(i_.parameters.total) << " parameters, " << parameters_text(i_.parameters.active)
          << " active per token"
          << format(", %.2f bits each\n", bits / static_cast<double>(std::max<std::int64_t>(1, i_.parameters.total)));
    if (n < 2) return;
    heading("Files");
    for (std::size_t i = 0; i < n; ++i) {
      std::int64_t tensors = 0;
      for (const TensorRecord& r : f.records) tensors += r.file == static_cast<int>(i);
      out() << format("  %3zu  %9s  %6lld tensors  ", i, bytes_text(std::uint64_t{f.files[i].size()}).c_str(),
                      static_cast<long long>(tensors))
            << display(f.files[i].path().filename()) << "\n";
    }
  }

  void config() const {
    heading("Model");
    const auto attention = std::count(c_.layer_types.begin(), c_.layer_types.end(), LayerType::full_attention);
    const auto number = [](auto n) { return count_text(n); };
    line("layers", number(c_.num_hidden_layers));
    line("  Gated DeltaNet", number(c_.num_hidden_layers - attention), layers_text(c_, LayerType::linear_attention));
    line("  gated attention", number(attention), layers_text(c_, LayerType::full_attention));
    line("hidden size", number(c_.hidden_size), format("RMSNorm with epsilon %g", c_.rms_norm_eps));
    line("vocabulary", number(c_.vocab_size),
         c_.tie_word_embeddings ? "the head is the embedding (tied)" : "the head has weights of its own");
    line("length", number(c_.max_position_embeddings) + " tokens");
    heading("Gated attention");
    line("heads", concat(c_.num_attention_heads, " query, ", c_.num_key_value_heads, " key-value"),
         concat("of ", c_.head_dim));
    line("rope", concat(c_.rotary_dim, " of ", c_.head_dim, " dimensions"), format("theta %.10g", c_.rope_theta));
    if (c_.yarn) {
      line("YaRN", format("%g times", c_.yarn->factor),
           "over " + number(c_.yarn->original_max_position_embeddings) + " tokens");
    }
    heading("Gated DeltaNet");
    line("heads", concat(c_.linear_num_key_heads, " key, ", c_.linear_num_value_heads, " value"),
         concat("of ", c_.linear_key_head_dim, " and ", c_.linear_value_head_dim));
    line("convolution", concat(c_.linear_conv_kernel_dim, " taps"), number(c_.conv_dim()) + " channels");
    heading("Experts");
    line("routed", concat(number(c_.num_experts), ", top ", c_.num_experts_per_tok),
         concat("of width ", c_.moe_intermediate_size,
                c_.norm_topk_prob ? "; their weights are normalised" : "; their weights are not normalised"));
    line("shared", concat("1 of width ", c_.shared_expert_intermediate_size));
    heading("MTP head");
    line("present", c_.has_mtp ? "yes" : "no",
         c_.has_mtp ? parameters_text(i_.parameters.mtp) + " parameters, one attention layer" : "");
  }

  void text() const {
    heading("Text");
    line("tokenizer", printable(i_.text.tokenizer, 70), i_.text.tokens ? count_text(i_.text.tokens) + " tokens" : "");
    line("chat template", printable(i_.text.chat_template, 70));
  }

  void tensors() const {
    heading("Tensors", "* is every layer or expert; --tensors lists each");
    out() << style_.dim() << "  " << padded("name", name_width)
          << format(" %6s %-7s %-16s %8s %6s", "count", "type", "shape", "bytes", "share") << style_.reset() << "\n";
    const Role* previous = nullptr;
    for (const TensorGroup& g : i_.groups) {
      if (!previous || *previous != g.role) {
        const Sum& sum = i_.roles.at(g.role);
        out() << "  " << style_.bold() << padded(std::string(title(g.role)), name_width)
              << format(" %6lld ", static_cast<long long>(sum.tensors)) << style_.reset() << bar(i_.share(sum.bytes))
              << style_.bold() << format(" %8s %5.1f%%", bytes_text(sum.bytes).c_str(), 100 * i_.share(sum.bytes))
              << style_.reset() << "\n";
      }
      previous = &g.role;
      out() << "    " << padded(short_name(g.name, name_width - 2), name_width - 2)
            << format(" %6lld %-7s %-16s %8s %5.1f%%", static_cast<long long>(g.sum.tensors),
                      std::string(g.type).c_str(), fitted(g.shape.text(), 16).c_str(), bytes_text(g.sum.bytes).c_str(),
                      100 * i_.share(g.sum.bytes))
            << "\n";
    }
  }

  void types() const {
    heading("Types");
    out() << style_.dim()
          << format("  %-8s %8s %15s %24s %10s %6s %10s", "type", "tensors", "values", "", "bytes", "share",
                    "bits each")
          << style_.reset() << "\n";
    const auto row = [&](std::string_view type, const Sum& sum) {
      out() << format("  %-8s %8lld %15s ", std::string(type).c_str(), static_cast<long long>(sum.tensors),
                      count_text(sum.values).c_str())
            << bar(i_.share(sum.bytes))
            << format(" %10s %5.1f%% %10.2f\n", bytes_text(sum.bytes).c_str(), 100 * i_.share(sum.bytes),
                      sum.bits_per_value());
    };
    std::vector<std::pair<std::string_view, Sum>> types(i_.types.begin(), i_.types.end());
    std::stable_sort(types.begin(), types.end(),
                     [](const auto& a, const auto& b) { return a.second.bytes > b.second.bytes; });
    Sum all;
    for (const auto& [type, sum] : types) {
      row(type, sum);
      all.tensors += sum.tensors, all.values += sum.values, all.bytes += sum.bytes;
    }
    row("all", all);
  }

  void memory() const {
    const MemoryPlan& m = i_.memory;
    heading("Memory", "at a context of " + count_text(i_.context) + " tokens, KV cache " + std::string(name(i_.kv)));
    const auto bytes = [](std::uint64_t n) { return format("%9s", bytes_text(n).c_str()); };
    if (m.streamed())
      line("dense weights", bytes(m.weights_resident), "read into memory, and locked there where that is allowed");
    else
      line("weights, mapped", bytes(m.weights_mapped), "used where they lie in the file; the system keeps what fits");
    line("weights, copied", bytes(m.weights_copied), i_.copies.empty() ? "none" : "");
    for (const auto& [why, copies] : i_.copies) {
      out() << style_.dim()
            << format("    %lld vectors, %s: ", static_cast<long long>(copies.vectors),
                      bytes_text(copies.bytes).c_str())
            << why << style_.reset() << "\n";
    }
    line("KV cache", bytes(m.kv_cache), "grows with the text up to this");
    line("DeltaNet states", bytes(m.delta_state), "whatever the length");
    line("scratch", bytes(m.scratch), "activations of the longest step");
    line("a session", bytes(m.session()), "KV cache, states and scratch");
    if (m.streamed()) streaming();
  }

  void streaming() const {
    const MemoryPlan& m = i_.memory;
    const auto bytes = [](double n) { return format("%9s", bytes_text(n).c_str()); };
    line("copy of the states", bytes(static_cast<double>(m.state_copy)), "to go back to if a read fails");
    line("experts", bytes(static_cast<double>(m.experts_resident)),
         concat(count_text(m.experts_held), " of ", count_text(m.experts), ": what the budget leaves"));
    line("budget", bytes(static_cast<double>(m.budget)),
         m.budget < m.needed ? "too small: at least " + bytes_text(m.needed) : "");
    line("expected hits", format("%7.1f %%", 100 * m.hit_rate), "of picks");
    line("to read for a token", bytes(m.missed_bytes_per_token));
    line("experts are read at", format("%9.2f GB/s", i_.read_bandwidth / 1e9), "measured now");
    if (m.missed_bytes_per_token > 0)
      line("decoding, at most", format("%9.2f tokens/s", m.tokens_per_second(i_.read_bandwidth)), "by that");
  }

  void traffic() const {
    heading("Bytes moved for a decoded token", "what its speed is limited by; first and last of the context");
    const auto row = [&](const std::string& name, double first, double last, const std::string& note = "") {
      line(name, format("%9s  %9s", bytes_text(first).c_str(), bytes_text(last).c_str()), note);
    };
    const Traffic &a = i_.first_token, &b = i_.last_token;
    row("dense weights", a.dense, b.dense, "mixers, shared experts, routers, norms, head");
    row("picked experts", a.experts, b.experts, concat(c_.num_experts_per_tok, " of ", c_.num_experts, " a layer"));
    row("KV cache", a.kv_cache, b.kv_cache);
    row("DeltaNet states", a.states, b.states, "read and written");
    row("all", a.total(), b.total());
  }

  void problems() const {
    if (i_.problems.empty()) return;
    heading("To know");
    for (const std::string& problem : i_.problems) {
      out() << style_.warning() << "  ! " << style_.reset();
      std::size_t column = 4;
      for (std::size_t begin = 0; begin < problem.size();) {  // wrapped at 100 columns
        const std::size_t end = std::min(problem.find(' ', begin), problem.size());
        if (column > 4 && column + 1 + (end - begin) > 100) out() << "\n   ", column = 3;
        if (column != 4) out() << " ", ++column;
        out() << printable(problem.substr(begin, end - begin), 400);
        column += end - begin;
        begin = end + 1;
      }
      out() << "\n";
    }
  }

  const Inspection& i_;
  const Config& c_;
  const Style style_{stdout};
  const bool blocks_ = style_.on() && utf8_terminal();
};

}  // namespace

void print_text(const Inspection& inspection) { Report(inspection).print(); }

void print_tensors(const Inspection& i) {
  const Style style(stdout);
  const auto& files = i.checkpoint.files;
  for (std::size_t f = 0; f < files.size(); ++f) {
    std::cout << style.dim() << "file " << f << ": " << files[f].name() << style.reset() << "\n";
  }
  std::cout << style.bold()
            << format("%4s %14s %5s %14s %-8s %-20s  %s\n", "file", "offset", "align", "bytes", "type", "shape", "name")
            << style.reset();
  for (const TensorRecord& r : i.checkpoint.records) {
    std::cout << format("%4d %14llu %5llu %14llu %-8s %-20s  ", r.file, static_cast<unsigned long long>(r.offset),
                        static_cast<unsigned long long>(alignment(r.offset)), static_cast<unsigned long long>(r.bytes),
                        std::string(r.dtype).c_str(), r.shape.text().c_str())
              << printable(r.name) << "\n";
  }
}

}  // namespace qwen3next::cli
