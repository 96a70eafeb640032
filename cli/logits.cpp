// logits: what the model expects after each token of a list.

#include "cli/commands.hpp"
#include "cli/common.hpp"
#include "cli/npy.hpp"
#include "cli/progress.hpp"
#include "cli/token_list.hpp"

namespace qwen3next::cli {

namespace {

struct LogitsOptions {
  ModelOptions model;
  std::optional<std::string> tokens;
  std::string file, out;
  bool mtp = false, quiet = false;
};

void logits(const LogitsOptions& o) {
  if (!o.tokens && o.file.empty()) throw CLI::RequiredError("--tokens or --tokens-file");
  const std::string source = o.tokens ? "--tokens" : o.file == "-" ? "standard input" : o.file;
  const auto tokens = parse_tokens(o.tokens ? *o.tokens : read_text(o.file, "token ids"), source);
  const Model model = open_model(o.model);
  const int vocabulary = model.config().vocab_size;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) {
      throw_error(source, ": token ", i, " is ", tokens[i], ", expected 0..", vocabulary - 1,
                  ", this model's vocabulary");
    }
  }
  if (o.mtp && !model.config().has_mtp) throw Error(o.model.path + ": has no MTP head; leave --mtp out");
  if (o.mtp && tokens.size() < 2) throw Error(source + ": the MTP head needs at least two tokens");
  SessionOptions options = session_options(o.model);
  if (!options.kv) options.kv = KvType::f32;  // these numbers are for comparing: nothing is rounded that need not be
  Session session = model.session(options);

  const Interruptible scope;
  const auto rows = static_cast<std::int64_t>(tokens.size()) - (o.mtp ? 1 : 0);
  NpyWriter out(file_path(o.out), rows, vocabulary);
  Progress progress("logits", Progress::Unit::tokens, !o.quiet);
  std::int64_t done = 0;
  const auto sink = [&](std::span<const float> row) {
    stop_if_interrupted();
    if (!is_finite(row))
      throw_error(o.model.path, ": the logits of token ", done, " are not numbers: its weights are damaged");
    out.write(row);
    progress.update(++done, rows);
  };
  o.mtp ? session.mtp_logits(tokens, sink) : session.all_logits(tokens, sink);
  out.finish();
}

}  // namespace

void add_logits(CLI::App& app) {
  auto o = std::make_shared<LogitsOptions>();
  CLI::App& command = *app.add_subcommand("logits", "Write the logits after every token of a list, as .npy");
  add_model_options(command, o->model);
  add_session_options(command, o->model);
  auto* tokens = command.add_option("--tokens", o->tokens, "Token ids, 1,2,3")->option_text("IDS");
  command.add_option("--tokens-file", o->file, "Read the ids from a file, '-' is standard input")
      ->option_text("FILE")
      ->excludes(tokens);
  command.add_option("-o,--out", o->out, "The file to write: float32 [tokens, vocabulary]")
      ->option_text("F.npy")
      ->required();
  command.add_flag("--mtp", o->mtp,
                   "The MTP head's logits instead, [tokens - 1, vocabulary]: row t guesses token t + 2");
  command.add_flag("-q,--quiet", o->quiet, "No progress on stderr");
  add_example(
      command,
      "qwen3next logits model.gguf --tokens 785,6722,315 --out logits.npy\n"
      "  qwen3next tokenize model.gguf < text.txt | qwen3next logits model.gguf --tokens-file - --out logits.npy\n\n"
      "Row t is computed from tokens 0..t.  No tokenizer is needed.\n"
      "The KV cache is f32 here unless --kv says otherwise.");
  command.callback([o] { logits(*o); });
}

}  // namespace qwen3next::cli
