#pragma once
// A turn of a conversation, as the model gave it.

#include <functional>
#include <string>
#include <vector>

#include "generate/generate.hpp"
#include "text/chat_template.hpp"
#include "text/tool_calls.hpp"

namespace qwen3next {

// Called with each piece of reasoning, each piece of the answer and each whole tool call; false ends the generation.
using OnEvent = std::function<bool(const AnswerEvent& event)>;

// What the model answered, taken apart.
struct Answer {
  std::string reasoning;             // what a Thinking model thought, without its tags
  std::string content;               // what it said
  std::vector<ToolCall> tool_calls;  // what it wants called
  Generated generated;               // the raw text, tokens and timing

  // The message to append to the conversation.
  nlohmann::ordered_json message() const {
    nlohmann::ordered_json m{{"role", "assistant"}, {"content", content}};
    if (!reasoning.empty()) m["reasoning_content"] = reasoning;
    for (const ToolCall& call : tool_calls) {
      m["tool_calls"].push_back(
          {{"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
    }
    return m;
  }
};

}  // namespace qwen3next
