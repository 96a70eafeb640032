#pragma once
// The inside of a tool call, once it is complete.

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "core/error.hpp"
#include "text/python_json.hpp"

namespace qwen3next {

// A function that the model wants called.
struct ToolCall {
  std::string name;
  ordered_json arguments;  // an object, unless the model gave something else
};

namespace detail {

inline std::optional<ordered_json> try_parse_json(std::string_view text) {
  try {
    return parse_json(text, "tool call", BigInt::rounded);
  } catch (const Error&) {
    return {};
  }
}

}  // namespace detail

// {"name": .., "arguments": ..}, also inside {"function": ..}; arguments as an object or as a string that holds one.
// Nothing if this is not a call.
inline std::optional<ToolCall> parse_json_call(std::string_view text) {
  std::optional<ordered_json> json = detail::try_parse_json(text);
  if (!json || !json->is_object()) return {};
  ordered_json call = std::move(*json);
  if (!call.contains("name") && call.contains("function") && call["function"].is_object())
    call = ordered_json(std::move(call["function"]));
  if (!call.contains("name") || !call["name"].is_string() || call["name"].get_ref<const std::string&>().empty())
    return {};
  ToolCall out{call["name"], ordered_json::object()};
  if (!call.contains("arguments") || call["arguments"].is_null()) return out;
  out.arguments = std::move(call["arguments"]);
  if (out.arguments.is_string()) {
    auto inner = detail::try_parse_json(out.arguments.get_ref<const std::string&>());
    if (inner && inner->is_object()) out.arguments = std::move(*inner);
  }
  return out;
}

namespace detail {

// The schema of one tool's parameters: {"properties": {..}}, or null.
inline const ordered_json& parameter_schema(const ordered_json& tools, std::string_view name) {
  static const ordered_json none;
  if (!tools.is_array()) return none;
  for (const ordered_json& tool : tools) {
    if (!tool.is_object()) continue;
    const ordered_json& function = tool.contains("function") ? tool["function"] : tool;
    if (function.is_object() && function.contains("name") && function["name"] == name &&
        function.contains("parameters") && function["parameters"].is_object() &&
        function["parameters"].contains("properties"))
      return function["parameters"]["properties"];
  }
  return none;
}

// Whether `schema` allows `type`: "type" may be one name or several, or be spread over anyOf / oneOf.
inline bool schema_allows(const ordered_json& schema, std::string_view type, int depth = 0) {
  if (!schema.is_object() || depth > 8) return false;
  if (schema.contains("type")) {
    const ordered_json& given = schema["type"];
    if (given == type) return true;
    if (given.is_array() && std::find(given.begin(), given.end(), ordered_json(type)) != given.end()) return true;
  }
  for (const char* key : {"anyOf", "oneOf"})
    if (schema.contains(key) && schema[key].is_array())
      for (const ordered_json& option : schema[key])
        if (schema_allows(option, type, depth + 1)) return true;
  return false;
}

// Raw text as the type that the schema names; what does not fit stays text.
inline ordered_json typed_value(std::string_view text, const ordered_json& schema) {
  const auto allows = [&](std::string_view type) { return schema_allows(schema, type); };
  const ordered_json as_text = std::string(text);
  if (allows("null") && (text == "null" || text == "None")) return nullptr;
  if (allows("string")) return as_text;
  if (allows("boolean")) {
    if (text == "true" || text == "True") return true;
    if (text == "false" || text == "False") return false;
  }
  if (!allows("integer") && !allows("number") && !allows("object") && !allows("array")) return as_text;
  auto json = try_parse_json(text);
  const bool fits = json && ((json->is_number() && (allows("integer") || allows("number"))) ||
                             (json->is_object() && allows("object")) || (json->is_array() && allows("array")));
  return fits ? std::move(*json) : as_text;
}

// Where the value that starts at `begin` ends: at its closing tag, or, if the model forgot that, at the next parameter
// (which starts a line), or at the end.
inline std::size_t value_end(std::string_view body, std::size_t begin) {
  for (std::size_t pos = body.find('<', begin); pos != std::string_view::npos; pos = body.find('<', pos + 1)) {
    if (body.substr(pos).starts_with("</parameter>")) return pos;
    if (pos > begin && body[pos - 1] == '\n' && body.substr(pos).starts_with("<parameter=")) return pos - 1;
  }
  return body.size();
}

}  // namespace detail

// NAME>\n<parameter=KEY>\nVALUE\n</parameter> ..., the text between <function= and </function>.
inline ToolCall parse_function_call(std::string_view body, const ordered_json& tools) {
  const std::size_t name_end = std::min(body.find('>'), body.size());
  ToolCall call{std::string(body.substr(0, name_end)), ordered_json::object()};
  const ordered_json& properties = detail::parameter_schema(tools, call.name);
  ObjectFiller arguments(call.arguments);
  for (std::size_t pos = name_end; (pos = body.find("<parameter=", pos)) != std::string_view::npos;) {
    pos += std::string_view("<parameter=").size();
    const std::size_t key_end = body.find('>', pos);
    if (key_end == std::string_view::npos) break;
    const std::string key(body.substr(pos, key_end - pos));
    const std::size_t end = detail::value_end(body, key_end + 1);
    std::string_view value = body.substr(key_end + 1, end - key_end - 1);
    if (value.starts_with('\n')) value.remove_prefix(1);
    if (value.ends_with('\n') && !body.substr(end).starts_with('\n')) value.remove_suffix(1);
    static const ordered_json unknown;
    const bool known = properties.is_object() && properties.contains(key);
    arguments.slot(key) = detail::typed_value(value, known ? properties[key] : unknown);
    pos = end;
  }
  return call;
}

}  // namespace qwen3next
