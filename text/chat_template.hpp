#pragma once
// The chat templates of Qwen3-Next, Instruct and Thinking, written out in C++.  They print, byte for byte, what
// Jinja prints in transformers' apply_chat_template, and refuse what Jinja refuses.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.hpp"
#include "text/jinja_fingerprint.hpp"
#include "text/python_json.hpp"
#include "text/rendered.hpp"

namespace qwen3next {

// Which of Qwen3-Next's templates a model was trained with.
enum class TemplateKind {
  instruct,  // never thinks
  thinking,  // the prompt ends inside <think>: the model's output starts with reasoning and holds only </think>
};

namespace detail {

struct KnownTemplate {
  std::uint64_t fingerprint;
  TemplateKind kind;
};

// jinja_fingerprint() of the templates that the code below equals.  To add one that renders the same, run
// `QWEN3NEXT_TEMPLATE=file.jinja <tests> -tc="fingerprint of a template"` and put its number here.
inline constexpr KnownTemplate known_templates[] = {
    {0x988D3CD303AABE4F, TemplateKind::instruct},  // Qwen3-Next-80B-A3B-Instruct
    {0x9F604E7E464D2F15, TemplateKind::thinking},  // Qwen3-Next-80B-A3B-Thinking
    {0x2D70B0E3D4AF5968, TemplateKind::instruct},  // ours, weights/tiny/chat_template.jinja
};

// Python's str.strip("\n") and its halves.
inline std::string_view lstrip_newlines(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of('\n'), text.size()));
}
inline std::string_view rstrip_newlines(std::string_view text) {
  return text.substr(0, text.find_last_not_of('\n') + 1);
}

// bool(value) in Python.
inline bool is_truthy(const ordered_json& value) {
  switch (value.type()) {
    case ordered_json::value_t::null:
      return false;
    case ordered_json::value_t::boolean:
      return value.get<bool>();
    case ordered_json::value_t::number_integer:
      return value.get<std::int64_t>() != 0;
    case ordered_json::value_t::number_unsigned:
      return value.get<std::uint64_t>() != 0;
    case ordered_json::value_t::number_float:
      return value.get<double>() != 0;
    case ordered_json::value_t::string:
      return !value.get_ref<const std::string&>().empty();
    default:
      return !value.empty();
  }
}

// value.key in Jinja: null if undefined.
inline const ordered_json* member(const ordered_json& value, const char* key) {
  if (!value.is_object()) return nullptr;
  const auto it = value.find(key);
  return it == value.end() ? nullptr : &*it;
}

// The member if it is a string, else nothing.
inline const std::string* string_member(const ordered_json& value, const char* key) {
  const ordered_json* found = member(value, key);
  return found == nullptr ? nullptr : found->get_ptr<const std::string*>();
}

}  // namespace detail

// Messages in, prompt out.  Immutable; threads may share it.
class ChatTemplate {
 public:
  // The template of that kind, whatever the files say.
  explicit ChatTemplate(TemplateKind kind) : kind_(kind) {}

  // Recognises the text of a template (chat_template.jinja, or the chat_template of a GGUF or tokenizer_config.json).
  // Anything but the two above is an error: their rendering would differ in ways that only show in the answers.
  static ChatTemplate detect(std::string_view jinja, std::string_view source) {
    const std::uint64_t fingerprint = jinja_fingerprint(jinja);
    for (const detail::KnownTemplate& known : detail::known_templates)
      if (known.fingerprint == fingerprint) return ChatTemplate(known.kind);
    std::string hex;
    detail::append_hex(hex, static_cast<char32_t>(fingerprint >> 32), 8);
    detail::append_hex(hex, static_cast<char32_t>(fingerprint & 0xFFFFFFFF), 8);
    throw Error(std::string(source) +
                ": its chat template is neither Qwen3-Next Instruct's nor Thinking's (fingerprint " + hex +
                "); use --raw to go on without a template");
  }

  // Whether the model thinks before it answers.
  TemplateKind kind() const noexcept { return kind_; }

  // The prompt for OpenAI-style messages; `tools` is null or an array of {"type": "function", "function": {..}}. Throws
  // Error if `messages` is not such a list.
  std::string render(const ordered_json& messages, const ordered_json& tools = nullptr,
                     bool add_generation_prompt = true) const {
    return render_prompt(messages, tools, add_generation_prompt).text();
  }

  // The same, with the template's control tokens told from text that looks like them: what a model should be given.
  RenderedPrompt render_prompt(const ordered_json& messages, const ordered_json& tools = nullptr,
                               bool add_generation_prompt = true) const {
    check(messages, tools);
    RenderedPrompt out;
    render_head(out, messages[0], tools);
    const std::size_t last_query = kind_ == TemplateKind::thinking ? last_query_index(messages) : messages.size();
    for (std::size_t i = 0; i < messages.size(); ++i) {
      const ordered_json& message = messages[i];
      const std::string* const role = detail::string_member(message, "role");
      const std::string* const text = detail::string_member(message, "content");
      const std::string_view content = text != nullptr ? std::string_view(*text) : std::string_view();
      if (role == nullptr) continue;  // as in the templates, a role that they don't know prints nothing
      if (*role == "user" || (*role == "system" && i > 0)) {
        ((out.markup("<|im_start|>") += *role) += '\n') += content;
        out.markup("<|im_end|>\n");
      } else if (*role == "assistant") {
        render_assistant(out, messages, i, content, i > last_query);
      } else if (*role == "tool") {
        if (i == 0 || !has_role(messages[i - 1], "tool")) out.markup("<|im_start|>user");
        ((out += "\n<tool_response>\n") += content) += "\n</tool_response>";
        if (i + 1 == messages.size() || !has_role(messages[i + 1], "tool")) out.markup("<|im_end|>\n");
      }
    }
    if (add_generation_prompt)
      out.markup(kind_ == TemplateKind::thinking ? "<|im_start|>assistant\n<think>\n" : "<|im_start|>assistant\n");
    return out;
  }

 private:
  static bool has_role(const ordered_json& message, std::string_view role) {
    const std::string* found = detail::string_member(message, "role");
    return found != nullptr && *found == role;
  }

  static void check(const ordered_json& messages, const ordered_json& tools) {
    if (!messages.is_array() || messages.empty())
      throw Error("chat template: messages must be a list of at least one message");
    for (std::size_t i = 0; i < messages.size(); ++i)
      if (!messages[i].is_object())
        throw Error(at(i) + "is not an object with role and content, but " + excerpt(dump_python(messages[i])));
    if (!tools.is_null() && !tools.is_array()) throw Error("chat template: tools must be null or a list");
    for (std::size_t i = 0; i < tools.size(); ++i)
      if (!tools[i].is_object())
        throw Error("chat template: tool " + std::to_string(i) + " is not an object, but " +
                    excerpt(dump_python(tools[i])));
  }

  static std::string at(std::size_t message) { return "chat template: message " + std::to_string(message) + " "; }

  // The system turn: the first message if it is the system's, and the tools.
  static void render_head(RenderedPrompt& out, const ordered_json& first, const ordered_json& tools) {
    const std::string* system = nullptr;
    if (has_role(first, "system")) {
      system = detail::string_member(first, "content");
      if (system == nullptr) throw Error(at(0) + "(system): content must be a string");
    }
    if (tools.empty()) {
      if (system != nullptr) (out.markup("<|im_start|>system\n") += *system).markup("<|im_end|>\n");
      return;
    }
    out.markup("<|im_start|>system\n");
    if (system != nullptr) (out += *system) += "\n\n";
    out.markup(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>");
    for (const ordered_json& tool : tools) (out += '\n') += dump_python(tool);
    out.markup(
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        "{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n");
  }

  // The last thing a person said (tool results in disguise don't count): reasoning from before it is dropped.
  static std::size_t last_query_index(const ordered_json& messages) {
    for (std::size_t i = messages.size(); i-- > 0;) {
      const std::string* content = detail::string_member(messages[i], "content");
      if (content != nullptr && has_role(messages[i], "user") &&
          !(content->starts_with("<tool_response>") && content->ends_with("</tool_response>")))
        return i;
    }
    return messages.size() - 1;
  }

  void render_assistant(RenderedPrompt& out, const ordered_json& messages, std::size_t i, std::string_view content,
                        bool after_query) const {
    using namespace detail;
    std::string_view reasoning;
    if (kind_ == TemplateKind::thinking) {
      const std::size_t close = content.find("</think>");
      if (const std::string* given = string_member(messages[i], "reasoning_content")) {
        reasoning = *given;
      } else if (close != std::string_view::npos) {
        reasoning = rstrip_newlines(content.substr(0, close));
        if (const std::size_t open = reasoning.rfind("<think>"); open != std::string_view::npos)
          reasoning.remove_prefix(open + 7);
        reasoning = lstrip_newlines(reasoning);
        content = lstrip_newlines(content.substr(content.rfind("</think>") + 8));
      }
    }
    out.markup("<|im_start|>assistant\n");
    if (after_query && (i + 1 == messages.size() || !reasoning.empty()))
      (((out += "<think>\n") += lstrip_newlines(rstrip_newlines(reasoning))) += "\n</think>\n\n") +=
          lstrip_newlines(content);
    else
      out += content;
    const ordered_json* calls = member(messages[i], "tool_calls");
    if (calls != nullptr && is_truthy(*calls)) render_calls(out, *calls, i, !content.empty());
    out.markup("<|im_end|>\n");
  }

  static void render_calls(RenderedPrompt& out, const ordered_json& calls, std::size_t message, bool has_content) {
    using namespace detail;
    const std::string where = at(message) + "(assistant): ";
    if (!calls.is_array()) throw Error(where + "tool_calls must be a list, found " + excerpt(dump_python(calls)));
    for (std::size_t i = 0; i < calls.size(); ++i) {
      const ordered_json* function = member(calls[i], "function");
      const ordered_json& call = function != nullptr && is_truthy(*function) ? *function : calls[i];
      const ordered_json* name = member(call, "name");
      const ordered_json* arguments = member(call, "arguments");
      if (arguments == nullptr)
        throw Error(where + "tool call " + std::to_string(i) + " has no arguments: " + excerpt(dump_python(calls[i])));
      if (i > 0 || has_content) out += '\n';
      out += "<tool_call>\n{\"name\": \"";
      if (name != nullptr) out += python_str(*name);
      out += "\", \"arguments\": ";
      out += arguments->is_string() ? arguments->get_ref<const std::string&>() : dump_python(*arguments);
      out += "}\n</tool_call>";
    }
  }

  TemplateKind kind_;
};

}  // namespace qwen3next
