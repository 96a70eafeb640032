// run: continues a text, or answers one message.

#include "cli/commands.hpp"
#include "cli/generating.hpp"

namespace qwen3next::cli {

namespace {

struct RunOptions {
  ModelOptions model;
  SamplingOptions sampling;
  std::optional<std::string> prompt;
  std::string file;
  bool raw = false, chat = false, quiet = false;
  std::string system, tools;
};

std::string read_prompt(const RunOptions& o) {
  std::string prompt = o.prompt ? *o.prompt : read_text(o.file.empty() ? "-" : o.file, "the prompt");
  // Editors and echo end a file with a line break that nobody means.
  if (!o.prompt && !o.raw && prompt.ends_with('\n')) prompt.pop_back();
  if (prompt.empty()) throw Error("the prompt is empty: give text with -p, with -f, or on standard input");
  return prompt;
}

// The text goes on where the prompt ends.
Generated complete(Session& session, const RunOptions& o, const std::string& prompt, GenerateOptions& options) {
  const auto tokens = session.model().tokenizer().encode(prompt, o.raw ? Special::parse : Special::as_text);
  StreamedText out;
  if (!o.raw && is_terminal(stdout)) {
    const Style style(stdout);
    out.style(style.dim());
    out.write(prompt);
    out.style(style.reset());
  }
  const auto start = std::chrono::steady_clock::now();
  const Session::Synced synced = session.sync(tokens, options.on_prefill);
  const double prompt_seconds = seconds_since(start);
  Generated result = session.generate(
      "",
      [&](std::string_view piece) {
        out.write(piece);
        return out.good() && !interrupted();
      },
      options);
  if (is_terminal(stdout)) out.end_line();
  result.prompt_tokens = static_cast<std::int64_t>(tokens.size());
  result.prompt_seconds = prompt_seconds;
  result.reused_tokens = synced.reused;
  result.reuse = synced.how;
  return result;
}

// The prompt is a user's message; the model's chat template goes around it.
Generated answer(Session& session, const RunOptions& o, const std::string& prompt, GenerateOptions& options) {
  ordered_json messages = ordered_json::array(), tools;
  if (!o.system.empty()) messages.push_back({{"role", "system"}, {"content", o.system}});
  messages.push_back({{"role", "user"}, {"content", prompt}});
  if (!o.tools.empty()) tools = parse_json(read_text(o.tools, "a JSON list of tools"), o.tools, BigInt::exact);
  AnswerPrinter printer;
  const Answer answer = session.chat(
      messages,
      [&](const AnswerEvent& event) {
        printer.show(event);
        return printer.good() && !interrupted();
      },
      options, tools);
  printer.finish(is_terminal(stdout));
  return answer.generated;
}

void run(const RunOptions& o) {
  const Model model = open_model(o.model);
  if (o.chat) (void)model.chat_template();  // says what is wrong before a prompt is typed
  const std::string prompt = read_prompt(o);
  Session session = model.session(session_options(o.model));
  GenerateOptions options = generate_options(session, o.sampling);
  options.drafts = drafts(o.model);

  const Interruptible scope;
  Progress progress("reading the prompt", Progress::Unit::tokens, !o.quiet);
  options.on_prefill = [&](std::int64_t done, std::int64_t total) {
    done < total ? progress.update(done, total) : progress.clear();
    return !interrupted();
  };
  const Generated result = o.chat ? answer(session, o, prompt, options) : complete(session, o, prompt, options);
  finish_output();
  if (!o.quiet) std::cerr << timing_line(result, model) << std::endl;
  if (o.model.verbose) std::cerr << reuse_line(result.reuse, model) << std::endl;
  const auto experts = model.expert_statistics();
  if (o.model.verbose && experts) std::cerr << experts_line(*experts) << std::endl;
  stop_if_interrupted();
}

}  // namespace

void add_run(CLI::App& app) {
  auto o = std::make_shared<RunOptions>();
  CLI::App& command = *app.add_subcommand("run", "Continue a text, or answer one message with --chat");
  add_model_options(command, o->model);
  add_session_options(command, o->model);
  add_cache_options(command, o->model);
  add_mtp_option(command, o->model);
  auto* prompt = command.add_option("-p,--prompt", o->prompt, "The prompt [standard input]")->option_text("TEXT");
  command.add_option("-f,--file", o->file, "Read the prompt from a file; a last line break is dropped")
      ->option_text("FILE")
      ->excludes(prompt);
  auto* chat = command.add_flag("--chat", o->chat, "The prompt is a user's message: apply the model's chat template")
                   ->option_text(" ");
  command.add_option("--system", o->system, "With --chat: the system message")->option_text("TEXT")->needs(chat);
  command.add_option("--tools", o->tools, "With --chat: a JSON list of tools; calls are printed as lines of JSON")
      ->option_text("FILE")
      ->needs(chat);
  command.add_flag("--raw", o->raw, "The prompt to the byte, <|im_start|> and the like in it being control tokens")
      ->option_text(" ")
      ->excludes(chat);
  command.add_flag("-q,--quiet", o->quiet, "No progress, no timing line on stderr");
  add_sampling_options(command, o->sampling);
  add_example(
      command,
      "qwen3next run model.gguf -p 'Once upon a time' -n 200\n"
      "  qwen3next run model.gguf --chat --temp 0 < question.txt > answer.txt\n\n"
      "Only what the model says goes to stdout.  On a terminal the prompt is shown before it, dimmed, and so is\n"
      "the reasoning of a Thinking model; elsewhere both are left out.  Ctrl-C ends the text after the next token.");
  command.callback([o] { run(*o); });
}

}  // namespace qwen3next::cli
