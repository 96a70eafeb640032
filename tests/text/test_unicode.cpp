// Protects: character classes and normal form C equal those inside the `tokenizers` package, whatever Unicode version
// the installed utf8proc has; normalisation stays linear.

#include <doctest/doctest.h>

#include <string>

#include "text/pretokenizer.hpp"
#include "text/unicode.hpp"
#include "text_golden.hpp"

using namespace qwen3next;

TEST_CASE("unicode: the class of all code points") {
  std::string classes;
  for (char32_t code = 0; code < 0x110000; ++code)
    if (code < 0xD800 || code >= 0xE000) classes += "olns"[static_cast<int>(char_class(code))];
  CHECK(test::hex(test::fnv(classes)) == test::text_golden_json("unicode.json")["classes"].get<std::string>());
}

TEST_CASE("unicode: normal form C of all code points among combining marks and Hangul") {
  std::uint64_t hash = test::fnv_seed;
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    std::string text;
    for (const char32_t c : {U'e', code, U'\u0334', U'\u0323', U'\u0301', U'\u1100', code, U'\u1161', code})
      append_utf8(text, c);
    hash = test::fnv(nfc(text), hash);
  }
  CHECK(test::hex(hash) == test::text_golden_json("unicode.json")["nfc"].get<std::string>());
}

TEST_CASE("unicode: normal form C around broken bytes") {
  CHECK(nfc("e\xCC\x81") == "\xC3\xA9");
  CHECK(nfc("e\xFF\xCC\x81") == "e\xFF\xCC\x81");
  CHECK(nfc("\xCC\x81\xCC\xA3\xE4") == "\xCC\xA3\xCC\x81\xE4");
  CHECK(nfc("") == "");
  CHECK(!may_need_nfc("plain \xC3\xA9"));
  CHECK(may_need_nfc("e\xCC\x81"));
}

TEST_CASE("unicode: a megabyte of unsorted marks is normalised in linear time") {
  std::string marks = "a";
  while (marks.size() < 1'000'000) marks += "\xCC\x81\xCC\xA3\xCC\xB4";  // would take minutes if sorted by swapping
  const std::string sorted = nfc(marks);
  CHECK(sorted.size() == marks.size());
  CHECK(sorted.starts_with("\xE1\xBA\xA1\xCC\xB4\xCC\xB4"));
}

TEST_CASE("pretokenizer: pieces cover the text, whatever it is") {
  test::Random random(2);
  const std::vector<std::string> parts = {
      " ",    "\n",           "\r",           "'",       "s", "LL", "x", "7", "!", "\xC2\xA0", "\xC5\xBF",
      "\xFF", "\xE4\xBD\xA0", "\xF0\x9F\x98", "\xCC\x81"};
  for (int i = 0; i < 5000; ++i) {
    std::string text;
    for (std::size_t n = 1 + random.below(10); n > 0; --n) text += random.pick(parts);
    for (std::size_t pos = 0; pos < text.size();) {
      const std::size_t end = piece_end(text, pos);
      REQUIRE(end > pos);
      REQUIRE(end <= text.size());
      pos = end;
    }
  }
}
