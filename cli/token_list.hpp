#pragma once
// Lists of token ids as users write them.

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "core/message.hpp"

namespace qwen3next::cli {

// Ids between commas or white space, in brackets or not; `source` names the list in errors.
inline std::vector<std::int32_t> parse_tokens(std::string_view text, const std::string& source) {
  constexpr std::string_view between = " \t\r\n,";
  const auto trim = [&](std::string_view s) {
    s.remove_prefix(std::min(s.find_first_not_of(between), s.size()));
    return s.substr(0, s.find_last_not_of(between) + 1);
  };
  text = trim(text);
  if (text.starts_with('[') && text.ends_with(']')) text = trim(text.substr(1, text.size() - 2));
  std::vector<std::int32_t> tokens;
  while (!text.empty()) {
    std::int32_t token = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), token);
    const auto length = static_cast<std::size_t>(end - text.data());
    if (error != std::errc() || (length < text.size() && between.find(text[length]) == between.npos)) {
      throw Error(source + ": '" + printable(text.substr(0, text.find_first_of(between)), 40) +
                  "' is no token id; expected numbers such as 1,2,3");
    }
    tokens.push_back(token);
    text.remove_prefix(length);
    text.remove_prefix(std::min(text.find_first_not_of(between), text.size()));
  }
  if (tokens.empty()) throw Error(source + ": no token ids; expected numbers such as 1,2,3");
  return tokens;
}

}  // namespace qwen3next::cli
