// template: a conversation as the model sees it.

#include "cli/commands.hpp"
#include "cli/common.hpp"

namespace qwen3next::cli {

namespace {

struct TemplateOptions {
  std::string path;
  bool no_generation_prompt = false;
};

void render(const TemplateOptions& o) {
  const ChatTemplate chat_template = load_chat_template(file_path(o.path));
  const ordered_json json = parse_json(read_stdin("messages as JSON"), "standard input", BigInt::exact);
  ordered_json messages = json, tools;
  if (json.is_object()) {
    if (!json.contains("messages")) throw Error("standard input: no messages, expected {\"messages\": [...]}");
    messages = json["messages"];
    if (json.contains("tools")) tools = json["tools"];
  }
  std::cout << chat_template.render(messages, tools, !o.no_generation_prompt);
}

}  // namespace

void add_template(CLI::App& app) {
  auto o = std::make_shared<TemplateOptions>();
  CLI::App& command = *app.add_subcommand("template", "A conversation on stdin to the prompt that the model gets");
  command.add_option("MODEL", o->path, "GGUF file, or folder with a chat template (no weights needed)")
      ->required()
      ->option_text(" ");
  command.add_flag("--no-generation-prompt", o->no_generation_prompt, "End after the last message");
  add_example(
      command,
      "echo '{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}' | qwen3next template model.gguf\n\n"
      "Messages are OpenAI's: role, content, tool_calls; \"tools\" may stand beside \"messages\", and a bare list\n"
      "of messages will do.  The prompt is printed to the byte, without a line break at the end.");
  command.callback([o] { render(*o); });
}

}  // namespace qwen3next::cli
