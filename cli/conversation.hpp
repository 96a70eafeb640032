#pragma once
// A conversation and its file: {"version": 1, "messages": [{"role": .., "content": ..}, ...]}.

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.hpp"
#include "text/python_json.hpp"
#include "weights/atomic_file.hpp"

namespace qwen3next::cli {

class Conversation {
 public:
  explicit Conversation(std::string system) : system_(std::move(system)) { reset(); }

  // Back to the system message, if there is one.
  void reset() {
    messages_ = ordered_json::array();
    if (!system_.empty()) messages_.push_back({{"role", "system"}, {"content", system_}});
  }
  void add(ordered_json message) { messages_.push_back(std::move(message)); }
  void drop_last() { messages_.erase(messages_.size() - 1); }
  const ordered_json& messages() const { return messages_; }

  void save(const std::filesystem::path& path) const {
    const ordered_json json{{"version", 1}, {"messages", messages_}};
    const std::string text = json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
    AtomicFile file(path);
    file.write(std::as_bytes(std::span(text)));
    file.commit();
  }

  // Takes over the messages of `text`; `source` names it.  Throws Error, and changes nothing, if they are not in order.
  void load(std::string_view text, const std::string& source) {
    const ordered_json json = parse_json(text, source, BigInt::rounded);
    const auto fail = [&](const std::string& what) { throw Error(source + ": " + what); };
    if (!json.is_object() || !json.contains("messages")) fail("not a saved conversation (an object with \"messages\")");
    if (!json.contains("version") || json["version"] != 1) fail("\"version\" is not 1: saved by another version");
    const ordered_json& messages = json["messages"];
    if (!messages.is_array()) fail("\"messages\" is not a list");
    for (std::size_t i = 0; i < messages.size(); ++i) {
      const std::string which = "message " + std::to_string(i) + " ";
      const ordered_json& m = messages[i];
      if (!m.is_object() || !m.contains("role") || !m["role"].is_string()) fail(which + "has no role");
      const std::string role = m["role"];
      if (role != "user" && role != "assistant" && role != "tool" && !(role == "system" && i == 0)) {
        fail(which + "has the role \"" + excerpt(role) +
             "\", expected user, assistant, tool, or system at the beginning");
      }
      if (!m.contains("content") || !m["content"].is_string()) fail(which + "has no text as its content");
    }
    messages_ = messages;
  }

 private:
  std::string system_;
  ordered_json messages_;
};

}  // namespace qwen3next::cli
