// Protects: the decoder's verdict on every kind of broken UTF-8, and that cutting a stream anywhere changes nothing.

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "text/utf8.hpp"
#include "text_golden.hpp"

using namespace qwen3next;

static std::string assemble(const std::vector<std::string>& pieces) {
  Utf8Assembler assembler;
  std::string out;
  for (const std::string& piece : pieces) {
    const std::string ready = assembler.push(piece);
    CHECK(is_valid_utf8(ready));
    out += ready;
  }
  return out + assembler.flush();
}

TEST_CASE("utf8: every scalar value survives encoding and decoding") {
  bool all = true;
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    std::string text;
    append_utf8(text, code);
    const Decoded d = decode_utf8(text, 0);
    all = all && d.code == code && d.size == text.size();
  }
  CHECK(all);
}

TEST_CASE("utf8: broken sequences are replaced as Python does, one U+FFFD per maximal subpart") {
  const std::string r(utf8_replacement);
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\x80", r},
      {"a\xFFz", "a" + r + "z"},
      {"\xC0\xAF", r + r},                  // overlong
      {"\xE0\x80\x80", r + r + r},          // overlong
      {"\xED\xA0\x80", r + r + r},          // surrogate
      {"\xF4\x90\x80\x80", r + r + r + r},  // above U+10FFFF
      {"\xF0\x9F\x98", r},                  // cut off at the end
      {"\xF0\x9F\x98z", r + "z"},
      {"\xE4\xBD\xE4\xBD\xA0", r + "\xE4\xBD\xA0"},
      {"\xF0\x9F\x98\x80\xF0\x9F", "\xF0\x9F\x98\x80" + r},
      {"\xF8\x88\x80\x80\x80", r + r + r + r + r},
  };
  for (const auto& [bytes, expected] : cases) {
    CHECK(assemble({bytes}) == expected);
    for (std::size_t cut = 0; cut <= bytes.size(); ++cut)
      CHECK(assemble({bytes.substr(0, cut), bytes.substr(cut)}) == expected);
  }
}

TEST_CASE("utf8: random bytes give the same text whole and byte by byte") {
  test::Random random(1);
  const std::vector<std::string> parts = {"a",    "\xC3\xA9", "\xE4\xBD\xA0", "\xF0\x9F\x98\x80", "\xF0\x9F",
                                          "\xE4", "\x80",     "\xFF",         "\xED\xA0",         "\xC2"};
  for (int i = 0; i < 2000; ++i) {
    std::string bytes;
    for (std::size_t n = random.below(12); n > 0; --n) bytes += random.pick(parts);
    std::vector<std::string> single;
    for (const char c : bytes) single.emplace_back(1, c);
    CHECK(assemble(single) == assemble({bytes}));
  }
}

TEST_CASE("utf8: whole characters leave at once, only an unfinished one waits") {
  Utf8Assembler assembler;
  CHECK(assembler.push("a\xF0") == "a");
  CHECK(assembler.push("\x9F\x98") == "");
  CHECK(assembler.push("\x80z") == "\xF0\x9F\x98\x80z");
  CHECK(assembler.flush() == "");
}
