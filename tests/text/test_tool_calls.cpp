// Protects: reasoning, content and tool calls come out the same however the stream is cut; nothing that is not a call
// is lost or changed; nothing is held back without need; hostile output costs linear time.

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "text/tool_calls.hpp"
#include "text_golden.hpp"

using namespace qwen3next;

static const ordered_json tools = ordered_json::parse(R"([
  {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
    "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": ["number", "null"]}, "b": {"type": "boolean"},
    "o": {"type": "object"}, "l": {"anyOf": [{"type": "array"}, {"type": "null"}]}, "any": {}}}}}, 7])");

static void add(std::string& out, const std::vector<AnswerEvent>& events) {
  // Notation: R<..> reasoning, C<..> content, T<name args> a call; neighbouring texts of a kind are joined.
  static const char* const names[] = {"R<", "C<"};
  for (const AnswerEvent& e : events) {
    if (e.kind == AnswerEvent::tool_call) {
      out += "T<" + e.call.name + " " + dump_python(e.call.arguments) + ">";
      continue;
    }
    const std::size_t last = out.rfind(e.kind == AnswerEvent::reasoning ? "\x01R"
                                                                        : "\x01"
                                                                          "C");
    const bool joins = last != std::string::npos && out.find("\x02", last) == out.size() - 1;
    if (joins)
      out.pop_back();
    else
      out += std::string("\x01") + names[e.kind][0] + "<";
    out += e.text + "\x02";
  }
}

static std::string parse(TemplateKind kind, const std::vector<std::string>& pieces, bool calls = true) {
  AnswerParser parser(kind, tools, calls);
  std::string out;
  for (const std::string& piece : pieces) add(out, parser.push(piece));
  add(out, parser.finish());
  std::string clean;
  for (const char c : out) {
    if (c == '\x02')
      clean += '>';
    else if (c != '\x01')
      clean += c;
  }
  return clean;
}

static void check(TemplateKind kind, const std::string& text, const std::string& expected) {
  CAPTURE(text);
  CHECK(parse(kind, {text}) == expected);
  for (std::size_t cut = 1; cut < text.size(); ++cut)
    REQUIRE(parse(kind, {text.substr(0, cut), text.substr(cut)}) == expected);
  std::vector<std::string> single;
  for (const char c : text) single.emplace_back(1, c);
  CHECK(parse(kind, single) == expected);
}
static void instruct(const std::string& text, const std::string& expected) {
  check(TemplateKind::instruct, text, expected);
}
static void thinking(const std::string& text, const std::string& expected) {
  check(TemplateKind::thinking, text, expected);
}

TEST_CASE("answer: reasoning ends at its closing tag") {
  thinking("Let me see.\n</think>\n\nYes.", "R<Let me see.>C<Yes.>");
  thinking("<think>\nLet me see.\n\n</think>\n\nYes.\n", "R<Let me see.>C<Yes.\n>");
  thinking(" \n<think>x</think>y", "R<x>C<y>");
  thinking("cut in the middle", "R<cut in the middle>");
  thinking("a\n\nb < c </thin", "R<a\n\nb < c </thin>");
  thinking("</think>only", "C<only>");
  thinking("\n\n</think>\n\n", "");
  thinking("", "");
  thinking("<thin", "R<<thin>");
  thinking("a <think> b</think>c</think>", "R<a <think> b>C<c</think>>");
  thinking(
      "about <tool_call>\n{\"name\": \"f\"}\n</tool_call>\n</think>\n\n<tool_call>\n{\"name\": \"g\"}\n</tool_call>",
      "R<about <tool_call>\n{\"name\": \"f\"}\n</tool_call>>T<g {}>");
  instruct("<think>\nx\n</think>\n\ny", "C<<think>\nx\n</think>\n\ny>");
}

TEST_CASE("answer: calls in JSON") {
  instruct("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>", "T<f {\"x\": 1}>");
  instruct(
      "Looking.\n<tool_call>\n{\"name\": \"f\", \"arguments\": "
      "{}}\n</tool_call>\n<tool_call>{\"name\":\"g\"}</tool_call>\n",
      "C<Looking.>T<f {}>T<g {}>");
  instruct("Two.\n\n<tool_call> {\"arguments\": \"{\\\"a\\\": 2}\", \"name\": \"f\"} </tool_call> done",
           "C<Two.\n>T<f {\"a\": 2}>C< done>");
  instruct("<tool_call>\n{\"name\": \"f\", \"arguments\": \"plain\"}\n</tool_call>", "T<f \"plain\">");
  instruct("<tool_call>{\"function\": {\"name\": \"f\", \"arguments\": null}}</tool_call>", "T<f {}>");
  instruct("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"t\": \"</tool_call> \\\" <tool_call>\"}}\n</tool_call>",
           "T<f {\"t\": \"</tool_call> \\\" <tool_call>\"}>");
  instruct("<tool_call>\n{\"name\": \"f\", \"arguments\": {}}", "T<f {}>");  // the end came before the closing tag
  instruct("<tool_call>\n{\"name\": \"f\"}\n<tool_call>\n{\"name\": \"g\"}\n</tool_call>", "T<f {}>T<g {}>");
  instruct("<tool_call>{\"name\": \"\xE4\xBD\xA0\", \"arguments\": {\"k\": 1.0}}</tool_call>\n\nText\n",
           "T<\xE4\xBD\xA0 {\"k\": 1.0}>C<\n\nText\n>");
}

TEST_CASE("answer: what is no call stays text, byte for byte") {
  for (const std::string text : {"a < b <= c <tool",
                                 "<tool_call>",
                                 "the <tool_call> tag\n",
                                 "<tool_call>\n</tool_call>",
                                 "</tool_call>",
                                 "x\n<tool_call>\n{\"name\": broken}\n</tool_call>\ny",
                                 "<tool_call>\n{\"nome\": \"f\"}\n</tool_call>",
                                 "<tool_call>\n{\"name\": 5}\n</tool_call>",
                                 "<tool_call>\n[1]\n</tool_call>",
                                 "<tool_call>\n{\"name\": \"f\", \"argum",
                                 "<tool_call>{\"name\": \"f\\",
                                 "<tool_call>\n{\"name\": \"unclosed}\n</tool_call>\nmore",
                                 "<function=",
                                 "<function=>",
                                 "<function=f> is how it starts",
                                 "<function=two words>\n</function>",
                                 "<function=f>\n<parameter=a>\n1\n",
                                 "std::<function<int>>",
                                 "\n\n\n",
                                 "\n<tool_call>\n\n",
                                 "<tool_call>\n<function=f\n",
                                 "<tool_call><function=f>x"})
    instruct(text, text.empty() ? "" : "C<" + text + ">");
  const std::string bad = "<tool_call>\n{\"name\": \"a\nb\n</tool_call>";
  instruct(bad + "\n<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "C<" + bad + ">T<f {}>");
  CHECK(parse(TemplateKind::instruct, {"x\n<tool_call>{\"name\": \"f\"}</tool_call>"}, false) ==
        "C<x\n<tool_call>{\"name\": \"f\"}</tool_call>>");
}

TEST_CASE("answer: calls in Coder's XML") {
  const auto body = [](const std::string& inner) { return "<function=f>\n" + inner + "</function>"; };
  const auto p = [](const std::string& key, const std::string& value) {
    return "<parameter=" + key + ">\n" + value + "\n</parameter>\n";
  };
  const std::string one = body(p("s", "5") + p("i", "5") + p("n", "2.5"));
  const std::string expected = "T<f {\"s\": \"5\", \"i\": 5, \"n\": 2.5}>";
  instruct("<tool_call>\n" + one + "\n</tool_call>", expected);
  instruct("Ok.\n<tool_call>\n" + one + "\n</tool_call>\n<tool_call>\n" + one + "\n</tool_call>",
           "C<Ok.>" + expected + expected);
  instruct("Ok.\n" + one + "\n</tool_call>\nBye", "C<Ok.>" + expected + "C<\nBye>");
  instruct(one, expected);
  instruct(body(p("b", "True") + p("o", "{\"k\": [1]}") + p("l", "null") + p("any", "1") + p("other", "x")),
           "T<f {\"b\": true, \"o\": {\"k\": [1]}, \"l\": null, \"any\": \"1\", \"other\": \"x\"}>");
  instruct(body(p("i", "five") + p("o", "[1]") + p("b", "maybe") + p("n", "null")),
           "T<f {\"i\": \"five\", \"o\": \"[1]\", \"b\": \"maybe\", \"n\": null}>");
  instruct(body(p("s", "  a\n\n<b> </function> x </tool_call> \"q\"\n")),
           "T<f {\"s\": \"  a\\n\\n<b> </function> x </tool_call> \\\"q\\\"\\n\"}>");
  instruct(body(p("s", "")) + "\n</tool_call>", "T<f {\"s\": \"\"}>");
  instruct(body(""), "T<f {}>");
  instruct("<function=unknown><parameter=i>7</parameter></function>", "T<unknown {\"i\": \"7\"}>");
  // closing tags forgotten
  instruct("<function=f>\n<parameter=i>\n5\n<parameter=s>\nx\n</function>\n</tool_call>",
           "T<f {\"i\": 5, \"s\": \"x\"}>");
  instruct("<tool_call>\n<function=f>\n" + p("i", "5") + "</tool_call>", "T<f {\"i\": 5}>");
  instruct("<function=f>\n<parameter=i>\n5\n</function>", "T<f {\"i\": 5}>");
}

TEST_CASE("answer: ordinary text streams without delay") {
  AnswerParser parser(TemplateKind::instruct);
  const auto text = [&](std::string_view piece) {
    std::string out;
    for (const AnswerEvent& e : parser.push(piece)) out += e.text;
    return out;
  };
  CHECK(text("if a <") == "if a ");
  CHECK(text(" b") == "< b");
  CHECK(text("<to") == "");
  CHECK(text("p>") == "<top>");
  CHECK(text("x\n") == "x");
  CHECK(text("y") == "\ny");
  CHECK(text("the <tool_call>") == "the ");
  CHECK(text(" tag") == "<tool_call> tag");
  CHECK(text("<function=f> is") == "<function=f> is");
}

TEST_CASE("answer: random mixtures give the same events whole and in pieces") {
  test::Random random(6);
  const std::vector<std::string> parts = {"<tool_call>",
                                          "</tool_call>",
                                          "\n",
                                          "{\"name\": \"f\"}",
                                          "{\"name\": \"",
                                          "\"}",
                                          "\"",
                                          "\\",
                                          "<function=f>",
                                          "</function>",
                                          "<parameter=i>",
                                          "</parameter>",
                                          "5",
                                          " ",
                                          "x",
                                          "<",
                                          "</think>",
                                          "<think>",
                                          "<function=",
                                          "{\"name\": \"g\", \"arguments\": {\"a\": 1}}"};
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (std::size_t n = random.below(14); n > 0; --n) text += random.pick(parts);
    CAPTURE(text);
    const TemplateKind kind = random.below(2) == 0 ? TemplateKind::instruct : TemplateKind::thinking;
    const std::string whole = parse(kind, {text});
    std::vector<std::string> pieces;
    for (std::size_t pos = 0, n = 0; pos < text.size(); pos += n)
      pieces.push_back(text.substr(pos, n = 1 + random.below(5)));
    REQUIRE(parse(kind, pieces) == whole);
    if (kind == TemplateKind::instruct && whole.find("T<") == std::string::npos && !text.empty())
      REQUIRE(whole == "C<" + text + ">");
  }
}

TEST_CASE("answer: hostile output costs linear time") {
  for (const char* unit : {"<", "<tool_call>", "<tool_call>{", "<tool_call>{\"", "\n", "<function=f>",
                           "<function=f><parameter=a>\n", "</function>\n", "</think", "{\"",
                           "<tool_call>{\"name\":\"f\"}", "<function=f>\n<parameter=a>\n</function>   "}) {
    for (const TemplateKind kind : {TemplateKind::instruct, TemplateKind::thinking}) {
      AnswerParser parser(kind);
      std::string text;
      while (text.size() < 100'000) text += unit;
      if (kind == TemplateKind::thinking) text = "</think>" + text;
      std::size_t bytes = 0;
      const auto count = [&](const std::vector<AnswerEvent>& events) {
        for (const AnswerEvent& e : events) bytes += e.text.size() + e.call.name.size();
      };
      for (std::size_t pos = 0; pos < text.size(); ++pos) count(parser.push(std::string_view(text).substr(pos, 1)));
      count(parser.finish());
      CHECK((bytes > 0 || text.find_first_not_of("</think>\n") == std::string::npos));
    }
  }
  AnswerParser parser(TemplateKind::instruct);
  std::string keys = "<function=f>";
  for (int i = 0; i < 50'000; ++i) keys += "<parameter=" + std::to_string(i) + ">x</parameter>";
  const auto events = parser.push(keys + "</function>");
  REQUIRE(events.size() == 1);
  CHECK(events[0].call.arguments.size() == 50'000);
}
