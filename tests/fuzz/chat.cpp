// Conversations from outside: messages for the template, a saved session, the text of a template itself.

#include "cli/conversation.hpp"
#include "target.hpp"
#include "text/chat_template.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

static void render(const ordered_json& messages, const ordered_json& tools) {
  for (const TemplateKind kind : {TemplateKind::instruct, TemplateKind::thinking}) {
    may_refuse([&] { expect(!ChatTemplate(kind).render(messages, tools).empty(), "a prompt"); });
  }
}

FUZZ_TARGET(messages) {
  const ordered_json json = parse_json(input, "messages", BigInt::exact);
  const std::string printed = dump_python(json);
  if (printed.find("Infinity") == printed.npos) {
    expect(dump_python(parse_json(printed, "printed", BigInt::exact)) == printed, "JSON survives printing");
  }
  const bool object = json.is_object() && json.contains("messages");
  render(object ? json["messages"] : json, object && json.contains("tools") ? json["tools"] : ordered_json());
}

FUZZ_TARGET(session) {
  cli::Conversation conversation("Be brief.");
  conversation.load(input, "saved.json");
  const auto path = folder() / "saved.json";
  conversation.save(path);
  std::ifstream file(path, std::ios::binary);
  cli::Conversation again("");
  again.load(std::string{std::istreambuf_iterator<char>(file), {}}, "saved.json");
  expect(again.messages() == conversation.messages(), "what is saved can be loaded");
  render(conversation.messages(), nullptr);
}

FUZZ_TARGET(template_text) { (void)ChatTemplate::detect(input, "chat_template.jinja"); }
