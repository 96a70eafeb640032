// What a model writes is cut apart while it streams; where the pieces begin and end must not show.

#include "target.hpp"
#include "text/stop_strings.hpp"
#include "text/tool_calls.hpp"
#include "text/utf8.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

// Pieces of `text` of 1 to 8 bytes.
template <class F>
static void in_pieces(std::string_view text, unsigned seed, F&& f) {
  while (!text.empty()) {
    seed = seed * 1664525u + 1013904223u;
    const std::size_t size = std::min<std::size_t>(1 + (seed >> 24) % 8, text.size());
    f(text.substr(0, size));
    text.remove_prefix(size);
  }
}

// The events as text, neighbouring ones of a kind as one.
static std::string events_of(TemplateKind kind, const ordered_json& tools, std::string_view text, unsigned seed) {
  std::string out;
  int last = -1;
  const auto note = [&](const std::vector<AnswerEvent>& events) {
    for (const AnswerEvent& e : events) {
      if (e.kind != last || e.kind == AnswerEvent::tool_call) out += "\x01" + std::to_string(e.kind);
      last = e.kind;
      out += e.kind == AnswerEvent::tool_call ? e.call.name + "\x02" + dump_python(e.call.arguments) : e.text;
    }
  };
  AnswerParser parser(kind, tools);
  if (seed == 0) {
    note(parser.push(text));
  } else {
    in_pieces(text, seed, [&](std::string_view piece) { note(parser.push(piece)); });
  }
  note(parser.finish());
  return out;
}

FUZZ_TARGET(answer) {
  static const ordered_json tools = ordered_json::parse(
      R"([{"function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}, "i": {"type": "integer"},
          "o": {"anyOf": [{"type": "object"}, {"type": "null"}]}, "l": {"type": ["array", "boolean"]}}}}}])");
  const auto head = Numbers(input).take<std::uint16_t>();
  const TemplateKind kind = head & 1 ? TemplateKind::thinking : TemplateKind::instruct;
  const std::string whole = events_of(kind, tools, input, 0);
  expect(events_of(kind, tools, input, head | 1u) == whole, "the events do not depend on the pieces");
}

FUZZ_TARGET(stop_strings) {
  Numbers numbers(input);
  const auto seed = numbers.take<std::uint16_t>();
  std::vector<std::string> stops;
  for (int i = 0; i < 2; ++i) {
    const std::size_t size = std::min<std::size_t>(numbers.take<std::uint8_t>() % 8u + 1u, input.size());
    if (size > 0) stops.emplace_back(input.substr(0, size));
    input.remove_prefix(size);
  }
  std::size_t end = std::string::npos;  // of the first stop string to be complete, and where it begins
  std::size_t begin = input.size();
  for (const std::string& stop : stops) {
    const std::size_t at = input.find(stop);
    if (at == input.npos) continue;
    if (at + stop.size() < end || (at + stop.size() == end && at < begin)) end = at + stop.size(), begin = at;
  }
  StopMatcher matcher(stops);
  std::string shown;
  in_pieces(input, seed, [&](std::string_view piece) { shown += matcher.push(piece); });
  expect(matcher.stopped().has_value() == (end != std::string::npos), "stops at stop strings alone");
  if (!matcher.stopped()) shown += matcher.flush();
  expect(shown == input.substr(0, begin), "shows what lies before the first");
}

FUZZ_TARGET(utf8) {
  Utf8Assembler whole, pieces;
  std::string a = whole.push(input) + whole.flush(), b;
  in_pieces(input, static_cast<unsigned>(input.size()), [&](std::string_view piece) { b += pieces.push(piece); });
  b += pieces.flush();
  expect(a == b && is_valid_utf8(a), "the pieces do not show");
  if (is_valid_utf8(input)) expect(a == input, "UTF-8 passes unchanged");
}
