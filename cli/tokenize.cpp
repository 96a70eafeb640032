// tokenize, detokenize: text to token ids and back.

#include "cli/commands.hpp"
#include "cli/common.hpp"

namespace qwen3next::cli {

namespace {

constexpr const char* text_model_help = "GGUF file, or folder with a tokenizer.json (no weights needed)";

struct TokenizeOptions {
  std::string path;
  bool special = false;
};

void tokenize(const TokenizeOptions& o) {
  const Tokenizer tokenizer = load_tokenizer(file_path(o.path));
  const auto ids = tokenizer.encode(read_stdin("a text"), o.special ? Special::parse : Special::as_text);
  std::string line = "[";
  for (std::size_t i = 0; i < ids.size(); ++i) line += (i ? ", " : "") + std::to_string(ids[i]);
  std::cout << line << "]\n";
}

void detokenize(const std::string& path) {
  const Tokenizer tokenizer = load_tokenizer(path);
  const ordered_json json = parse_json(read_stdin("a JSON array of token ids"), "standard input", BigInt::exact);
  if (!json.is_array()) throw Error("standard input: expected a JSON array of token ids, such as [9707, 1879]");
  std::vector<std::int32_t> ids;
  for (const ordered_json& value : json) {
    // Ids that the model has, but its tokenizer gives no meaning to, are fine and stand for nothing.
    const bool fits = value.is_number_integer() && value.get<double>() >= 0 && value.get<double>() <= INT32_MAX;
    if (!fits) {
      throw_error("standard input: element ", ids.size(), " is ", excerpt(dump_python(value)),
                  ", expected a token id, 0..", tokenizer.size() - 1);
    }
    ids.push_back(value.get<std::int32_t>());
  }
  std::cout << tokenizer.decode(ids);
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto o = std::make_shared<TokenizeOptions>();
  CLI::App& command = *app.add_subcommand("tokenize", "Text on stdin to a JSON array of token ids");
  command.add_option("MODEL", o->path, text_model_help)->required()->option_text(" ");
  command.add_flag("--special", o->special, "<|im_start|> and the like are control tokens [they are text]");
  add_example(command, "echo -n 'Hello world' | qwen3next tokenize model.gguf");
  command.callback([o] { tokenize(*o); });
}

void add_detokenize(CLI::App& app) {
  auto path = std::make_shared<std::string>();
  CLI::App& command = *app.add_subcommand("detokenize", "A JSON array of token ids on stdin to their text");
  command.add_option("MODEL", *path, text_model_help)->required()->option_text(" ");
  add_example(command,
              "echo '[9707, 1879]' | qwen3next detokenize model.gguf\n\nThe bytes of the tokens, nothing added.");
  command.callback([path] { detokenize(*path); });
}

}  // namespace qwen3next::cli
