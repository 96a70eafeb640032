#pragma once
// What `run` and `chat` share: sampling options, showing an answer, the timing line.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/common.hpp"
#include "cli/progress.hpp"

namespace qwen3next::cli {

// What is not given is as the model's files advise.
struct SamplingOptions {
  std::optional<float> temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
  std::optional<int> top_k;
  std::uint64_t seed = 0;
  std::int64_t max_tokens = -1;
  std::vector<std::string> stop;
};

inline void add_sampling_options(CLI::App& command, SamplingOptions& o) {
  const char* group = "Sampling (what is not given is as the model's files advise)";
  command.add_option("-n,--max-tokens", o.max_tokens, "Most tokens to generate; -1: until the model ends its text")
      ->option_text("N [-1]")
      ->check(CLI::Range(std::int64_t{-1}, std::int64_t{1} << 40));
  command.add_option("--stop", o.stop, "End the answer before this text (repeatable)")
      ->option_text("TEXT")
      ->take_all()
      ->allow_extra_args(false);
  auto add = [&](const char* name, auto& value, const char* help, const char* text) {
    command.add_option(name, value, help)->option_text(text)->group(group);
  };
  add("--temp", o.temperature, "Temperature; 0: always the most probable token", "T");
  add("--top-k", o.top_k, "Choose among the K most probable tokens; 0: all", "K");
  add("--top-p", o.top_p, "Choose among the fewest tokens that hold this probability; 1: all", "P");
  add("--min-p", o.min_p, "Drop tokens less probable than this times the best", "P");
  add("--presence-penalty", o.presence_penalty, "Against tokens that were generated before, -2..2", "X");
  add("--frequency-penalty", o.frequency_penalty, "The same, times how often, -2..2", "X");
  add("--repetition-penalty", o.repetition_penalty, "Against tokens seen, prompt included; 1: none", "X");
  add("--seed", o.seed, "The same seed, prompt and options give the same text", "N [0]");
}

inline GenerateOptions generate_options(const Session& session, const SamplingOptions& o) {
  GenerateOptions options = session.default_options();
  Sampling& s = options.sampling;
  s.temperature = o.temperature.value_or(s.temperature);
  s.top_k = o.top_k.value_or(s.top_k);
  s.top_p = o.top_p.value_or(s.top_p);
  s.min_p = o.min_p.value_or(s.min_p);
  s.presence_penalty = o.presence_penalty.value_or(s.presence_penalty);
  s.frequency_penalty = o.frequency_penalty.value_or(s.frequency_penalty);
  s.repetition_penalty = o.repetition_penalty.value_or(s.repetition_penalty);
  s.seed = o.seed;
  s.validate();  // before a long prompt is read
  options.max_tokens = o.max_tokens;
  options.stop = o.stop;
  return options;
}

// prompt 34 tokens 210 t/s, generated 128 tokens 31.2 t/s (2.1 a pass, guesses right: 78 % 64 %), end of text
inline std::string timing_line(const Generated& g, const Model& model) {
  const auto tokens = [](std::int64_t n) { return count_text(n) + (n == 1 ? " token" : " tokens"); };
  std::string line = "prompt " + tokens(g.prompt_tokens);
  if (g.reused_tokens > 0) line += " (" + count_text(g.reused_tokens) + " known)";
  if (g.prompt_tokens_per_second() > 0) line += " " + rate_text(g.prompt_tokens_per_second()) + " t/s";
  line += ", generated " + tokens(static_cast<std::int64_t>(g.tokens.size()));
  if (g.decode_tokens_per_second() > 0) line += " " + rate_text(g.decode_tokens_per_second()) + " t/s";
  if (g.mtp.drafted[0] > 0) {
    line += format(" (%.2f a pass, guesses right:", g.mtp.tokens_per_pass());
    for (std::size_t i = 0; i < g.mtp.drafted.size() && g.mtp.drafted[i] > 0; ++i)
      line += format(" %.0f %%", 100 * g.mtp.acceptance(i));
    line += ")";
  }
  line += ", " + std::string(name(g.reason));
  if (model.config().num_experts_per_tok != model.experts_of_model())
    line += format(" (%d of %d experts a token)", model.config().num_experts_per_tok, model.experts_of_model());
  return line;
}

// reused 37912 of 38230 tokens (memory); at 37915 stood "<think>", now "The": 3 tokens back to the nearest state
inline std::string reuse_line(const Reuse& reuse, const Model& model) {
  return describe(reuse,
                  [&](std::int32_t token) { return printable(model.tokenizer().decode(std::span(&token, 1)), 24); });
}

// experts: 45 % hits, 488 MiB read a token at 1.9 GB/s (12 in flight), 31 % of the time waiting for it; ...
inline std::string experts_line(const ExpertStatistics& s) {
  std::string line = "experts: " + count_text(static_cast<std::int64_t>(s.slots_filled)) + " of " +
                     count_text(static_cast<std::int64_t>(s.experts)) + " in memory (room for " +
                     count_text(static_cast<std::int64_t>(s.slots)) +
                     format("), %.1f %% of picks were there, %.1f %% on their way; ", 100 * s.hit_rate(),
                            s.picks() ? 100 * static_cast<double>(s.awaited) / static_cast<double>(s.picks()) : 0.0);
  line += bytes_text(s.bytes_read) +
          format(" read at %.2f GB/s, %.1f in flight, %.0f %% of it behind computing, %.2f s waited",
                 s.bandwidth() / 1e9, s.queue_depth(), 100 * s.overlap(), s.stall_seconds);
  if (s.guessed > 0)
    line += format("; looking ahead: %.0f %% of guesses right, %.0f %% of picks guessed", 100 * s.precision(),
                   100 * s.recall());
  return line;
}

// Text for stdout that a reader sees at once, and the cursor left at the start of a line.
class StreamedText {
 public:
  explicit StreamedText(std::FILE* file = stdout) : out_(file == stdout ? std::cout : std::cerr) {}
  void write(std::string_view text) {
    if (text.empty()) return;
    out_ << text << std::flush;
    at_line_start_ = text.ends_with('\n');
  }
  // Escape sequences don't move the cursor.
  void style(std::string_view sequence) { out_ << sequence << std::flush; }
  void end_line() {
    if (!at_line_start_) write("\n");
  }
  bool good() const { return out_.good(); }

 private:
  std::ostream& out_;
  bool at_line_start_ = true;
};

// Shows the events of an answer: reasoning dim on the terminal (never in a file or pipe), content as it comes, tool
// calls as lines of JSON.
class AnswerPrinter {
 public:
  // Content goes to stdout.  Reasoning goes where a person looks: to stdout, or to stderr if only that is a terminal.
  AnswerPrinter()
      : thoughts_to_stderr_(!is_terminal(stdout)),
        show_thoughts_(is_terminal(stdout) || is_terminal(stderr)),
        style_(thoughts_to_stderr_ ? stderr : stdout),
        thoughts_(thoughts_to_stderr_ ? stderr : stdout) {}

  void show(const AnswerEvent& event) {
    switch (event.kind) {
      case AnswerEvent::Kind::reasoning:
        if (!show_thoughts_) return;
        if (!thinking_) thoughts_.style(style_.dim());
        thinking_ = true;
        thoughts_.write(event.text);
        return;
      case AnswerEvent::Kind::content:
        end_thoughts();
        content_.write(event.text);
        return;
      case AnswerEvent::Kind::tool_call: {
        end_thoughts();
        content_.end_line();
        const ordered_json call{{"name", event.call.name}, {"arguments", event.call.arguments}};
        content_.write(dump_python(call) + "\n");
        return;
      }
    }
  }

  // `line`: leave the cursor at the start of a line.
  void finish(bool line) {
    end_thoughts();
    if (line) content_.end_line();
  }
  bool good() const { return content_.good(); }

 private:
  void end_thoughts() {
    if (!thinking_) return;
    thinking_ = false;
    thoughts_.style(style_.reset());
    thoughts_.end_line();
    thoughts_.write("\n");
  }

  bool thoughts_to_stderr_, show_thoughts_;
  Style style_;
  StreamedText content_{stdout}, thoughts_;
  bool thinking_ = false;
};

}  // namespace qwen3next::cli
