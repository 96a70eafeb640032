#pragma once
// JSON from files that nobody vouches for.

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "core/message.hpp"

namespace qwen3next {

using Json = nlohmann::json;

// Parses `text`; `source` names it in errors.  A document nested deeper than `max_depth` is refused, since what comes
// after is recursive.
inline Json read_json(std::string_view text, std::string_view source, int max_depth = 64) {
  const auto limit_depth = [&](int depth, Json::parse_event_t, Json&) {
    if (depth > max_depth) throw_error(source, ": JSON nested deeper than ", max_depth, " levels");
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), limit_depth);
  } catch (const Json::exception& e) {
    throw_error(source, ": not valid JSON: ", printable(e.what()));
  }
}

// Tells `events` what `text` holds, in order.  One function for all kinds of readers: nlohmann's sax_parse brings its
// readers of five binary formats along, for each type that it is given.
inline void read_json_events(std::string_view text, nlohmann::json_sax<Json>& events) {
  Json::sax_parse(text.begin(), text.end(), &events);
}

// What a JSON value is, for "expected a number, found a string".
inline std::string_view json_kind(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::boolean:
      return "a boolean";
    case Json::value_t::string:
      return "a string";
    case Json::value_t::array:
      return "an array";
    case Json::value_t::object:
      return "an object";
    default:
      return "a number";
  }
}

}  // namespace qwen3next
