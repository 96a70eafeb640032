// Protects: prompts equal Jinja's, byte for byte, odd messages included; unknown templates are never guessed at.

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "text/chat_template.hpp"
#include "text_golden.hpp"

using namespace qwen3next;

TEST_CASE("chat template: conversations render as Jinja renders them") {
  int rendered = 0, refused = 0;
  for (const ordered_json& c : test::text_golden_json("conversations.json")) {
    CAPTURE(dump_python(c["messages"]));
    for (const TemplateKind kind : {TemplateKind::instruct, TemplateKind::thinking}) {
      const char* name = kind == TemplateKind::instruct ? "instruct" : "thinking";
      const auto render = [&] {
        return ChatTemplate(kind).render(c["messages"], c["tools"], c["add_generation_prompt"]);
      };
      if (c[name].is_null()) {
        CHECK_THROWS_AS(render(), Error);
        ++refused;
      } else {
        CHECK(render() == c[name].get<std::string>());
        ++rendered;
      }
    }
  }
  CHECK(rendered >= 80);
  CHECK(refused >= 20);
}

TEST_CASE("chat template: errors say which message and what is wrong") {
  const auto message = [](const ordered_json& messages) -> std::string {
    try {
      ChatTemplate(TemplateKind::instruct).render(messages);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  CHECK(message(ordered_json::array()) == "chat template: messages must be a list of at least one message");
  CHECK(message({{{"role", "system"}}}) == "chat template: message 0 (system): content must be a string");
  const ordered_json user = {{"role", "user"}, {"content", "x"}};
  CHECK(message({user, 5}) == "chat template: message 1 is not an object with role and content, but 5");
  const ordered_json call = {{"name", "f"}};
  CHECK(message({user, {{"role", "assistant"}, {"tool_calls", {call}}}}) ==
        "chat template: message 1 (assistant): tool call 0 has no arguments: {\"name\": \"f\"}");
  ordered_json deep = 1;
  for (int i = 0; i < 1000; ++i) deep = ordered_json::array({deep});
  CHECK_THROWS_AS(ChatTemplate(TemplateKind::instruct).render({user}, {{{"x", deep}}}), Error);
}

static const char* const layout_a = R"({%- if tools %}
    {{- 'a  b' + "c" }}
{%- else %}

        {%- for m in messages[::-1] %}{{- m.x }}{%- endfor %}
{%- endif %})";

TEST_CASE("chat template: the fingerprint ignores layout") {
  const std::uint64_t expected = jinja_fingerprint(layout_a);
  CHECK(jinja_fingerprint(std::string(layout_a) + "\n") == expected);
  CHECK(jinja_fingerprint("{%-if tools%}{{-'a  b'+\"c\"}}{%-else%}{%-for m in messages[ ::-1 ]%}{{-m . x}}{%-endfor%}"
                          "{%-endif%}") == expected);
  CHECK(jinja_fingerprint("{#- note -#}\r\n{%- if\n tools %}{# x #}\r\n  {{- 'a  b' + \"c\" -}}\n{% else %}\n"
                          "  {% for m in messages[::-1] %}{{ m.x }}{% endfor %}\n{% endif %}\n") == expected);
}

TEST_CASE("chat template: the fingerprint sees what can change the output") {
  const std::uint64_t expected = jinja_fingerprint(layout_a);
  const std::string base = layout_a;
  for (const auto& [from, to] : {std::pair<std::string, std::string>{"'a  b'", "'a b'"},
                                 {"'a  b'", "'a\\n b'"},
                                 {"tools", "tool"},
                                 {"{%- else", "x{%- else"},
                                 {"{{- m.x }}", "\n\n{{ m.x }}"},
                                 {"{{- m.x }}", "{{- m.x }} "},
                                 {"[::-1]", "[::1]"},
                                 {"for m in", "form in"},
                                 {"{%- endif %}", "{%- endif %}\n\n\n"},
                                 {"m.x", "m.x|trim"}}) {
    std::string changed = base;
    changed.replace(changed.find(from), from.size(), to);
    // Text that is stripped anyway ("x" before a tag is not) must not matter; all others must.
    if (to == "{{- m.x }} ")
      CHECK(jinja_fingerprint(changed) == expected);
    else
      CHECK(jinja_fingerprint(changed) != expected);
  }
  for (std::string broken : {"{%", "{{ 'x", "{#", "{", "", "{{-", "{% '\\"})
    CHECK(jinja_fingerprint(broken) != expected);
}

TEST_CASE("chat template: the release's templates are recognised, others refused") {
  const auto instruct = test::read_file(test::shared_path("tokenizer/chat_template.instruct.jinja"));
  const auto thinking = test::read_file(test::shared_path("tokenizer/chat_template.thinking.jinja"));
  const auto config = test::read_file(test::shared_path("tokenizer/tokenizer_config.json"));
  if (!instruct || !thinking || !config) QWEN3NEXT_SKIP("../shared/tokenizer");
  CHECK(ChatTemplate::detect(*instruct, "x").kind() == TemplateKind::instruct);
  CHECK(ChatTemplate::detect(*thinking, "x").kind() == TemplateKind::thinking);
  CHECK(ChatTemplate::detect(*instruct + "\n", "x").kind() == TemplateKind::instruct);
  const std::string plain_qwen3 = parse_json(*config, "tokenizer_config.json")["chat_template"];
  CHECK_THROWS_WITH_AS(ChatTemplate::detect(plain_qwen3, "dir/tokenizer_config.json"),
                       "dir/tokenizer_config.json: its chat template is neither Qwen3-Next Instruct's nor Thinking's "
                       "(fingerprint f30dd71cfca5ca98); use --raw to go on without a template",
                       Error);
  for (std::size_t i = 0; i < instruct->size(); i += 7) {
    std::string changed = *instruct;
    if (changed[i] == ' ' || changed[i] == '\n') continue;
    changed[i] ^= 1;
    CHECK_THROWS_AS(ChatTemplate::detect(changed, "x"), Error);
  }
}

TEST_CASE("chat template: our own template counts as Instruct") {
  const auto own = test::read_file(std::filesystem::path(QWEN3NEXT_SOURCE_DIR) / "weights/tiny/chat_template.jinja");
  if (!own) QWEN3NEXT_SKIP("weights/tiny/chat_template.jinja");
  CHECK(ChatTemplate::detect(*own, "chat_template.jinja").kind() == TemplateKind::instruct);
  CHECK_THROWS_AS(ChatTemplate::detect("{{ messages }}", "x"), Error);
  CHECK_THROWS_AS(ChatTemplate::detect("", "x"), Error);
}

// Prints a number for known_templates in text/chat_template.hpp; a tool more than a test.
TEST_CASE("fingerprint of a template") {
  const char* path = std::getenv("QWEN3NEXT_TEMPLATE");
  if (path == nullptr) return;
  const auto text = test::read_file(path);
  REQUIRE(text);
  MESSAGE("0x", test::hex(jinja_fingerprint(*text)), " ", std::string(path));
}

TEST_CASE("python json: numbers print as in Python") {
  const std::vector<std::pair<double, std::string>> cases = {{1.0, "1.0"},
                                                             {-0.0, "-0.0"},
                                                             {1e-05, "1e-05"},
                                                             {0.0001, "0.0001"},
                                                             {1e16, "1e+16"},
                                                             {1e15, "1000000000000000.0"},
                                                             {9999999999999998.0, "9999999999999998.0"},
                                                             {1.5e300, "1.5e+300"},
                                                             {5e-324, "5e-324"},
                                                             {0.1, "0.1"},
                                                             {123456.789, "123456.789"},
                                                             {100.0, "100.0"},
                                                             {1e22, "1e+22"},
                                                             {-2.5e-7, "-2.5e-07"},
                                                             {1.0 / 3, "0.3333333333333333"}};
  for (const auto& [number, text] : cases) CHECK(dump_python(number) == text);
  CHECK(dump_python(std::nan("")) == "NaN");
  CHECK(dump_python(-std::numeric_limits<double>::infinity()) == "-Infinity");
  CHECK(python_str(std::numeric_limits<double>::infinity()) == "inf");
}

TEST_CASE("python json: reading keeps order, last values and the digits of big integers") {
  const std::string text = R"({"b": 1, "a": [123456789012345678901234567890, -5, 1e2], "b": null})";
  CHECK(dump_python(parse_json(text, "x")) == R"({"b": null, "a": [123456789012345678901234567890, -5, 100.0]})");
  CHECK(parse_json("1234567890123456789012", "x", BigInt::rounded).is_number_float());
  std::string many = "{";
  for (int i = 0; i < 50; ++i) many += "\"k" + std::to_string(i % 30) + "\": " + std::to_string(i) + ", ";
  const ordered_json object = parse_json(many + "\"k0\": -1}", "x");
  CHECK(object.size() == 30);
  CHECK(object["k0"] == -1);
  CHECK(object["k7"] == 37);
  CHECK(object.begin().key() == "k0");
  for (const char* bad : {"", "{", "[1,]", "nul", "\"\xFF\"", "1 2", "{\"a\" 1}"})
    CHECK_THROWS_AS(parse_json(bad, "x"), Error);
  CHECK_THROWS_AS(parse_json(std::string(1'000'000, '['), "x"), Error);
}
