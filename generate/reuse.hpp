#pragma once
// What a prompt went on from, and what stood in the way of more.

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "core/message.hpp"

namespace qwen3next {

// How much of a prompt was there when Session::sync() was called.
struct Reuse {
  // Nothing was; the session's own timeline went on; a state in memory; one in a file of the cache folder.
  enum class Source : std::uint8_t { nothing, timeline, memory, disk };
  Source source = Source::nothing;
  std::int64_t tokens = 0;  // of the prompt
  std::int64_t reused = 0;  // of these, their state was there

  // So many had been read before; the state nearest to the end of these is the one at `reused`.  At that place stood
  // `was` and stands `is` now: -1 where nothing did or does.
  std::int64_t known = 0;
  std::int32_t was = -1, is = -1;

  std::string trouble{};  // why a file of the cache folder could not be used or written; empty: none was in the way

  // The prompt is another than what was read before, not a longer one.
  bool diverged() const noexcept { return known > 0 && was >= 0; }
};

constexpr std::string_view name(Reuse::Source source) noexcept {
  constexpr std::string_view names[] = {"nothing", "timeline", "memory", "disk"};
  return names[static_cast<std::size_t>(source)];
}

// One line: "reused 37912 of 38230 tokens (memory); at 37915 stood "<think>", now "The": 3 tokens back to the nearest
// state".  `spell(token)` is how a token is shown.
inline std::string describe(const Reuse& r, const std::function<std::string(std::int32_t token)>& spell) {
  std::string line = concat("reused ", r.reused, " of ", r.tokens, " tokens");
  if (r.reused > 0) line += concat(" (", name(r.source), ")");
  if (!r.trouble.empty()) line += concat("; ", r.trouble);
  if (!r.diverged()) {
    if (r.known > r.reused) line += concat("; ", r.known - r.reused, " more were known, without a state after them");
    return line;
  }
  const auto shown = [&](std::int32_t token) {
    return token < 0 ? std::string("its end") : concat("\"", spell(token), "\"");
  };
  line += concat("; at ", r.known, " stood ", shown(r.was), ", now ", shown(r.is));
  if (r.known > r.reused) line += concat(": ", r.known - r.reused, " tokens back to the nearest state");
  return line;
}

}  // namespace qwen3next
