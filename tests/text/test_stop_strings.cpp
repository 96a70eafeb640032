// Protects: the text ends before the stop string that is completed first, however it is cut; only what may become a
// stop string waits.

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "text/stop_strings.hpp"
#include "text_golden.hpp"

using namespace qwen3next;

// The definition: the stop string that ends first, among those ending together the longest.
static std::string expected_text(const std::string& text, const std::vector<std::string>& stops) {
  for (std::size_t end = 1; end <= text.size(); ++end) {
    std::size_t longest = 0;
    for (const std::string& stop : stops)
      if (std::string_view(text).substr(0, end).ends_with(stop)) longest = std::max(longest, stop.size());
    if (longest > 0) return text.substr(0, end - longest);
  }
  return text;
}

TEST_CASE("stop strings: random texts, random cuts") {
  test::Random random(7);
  const auto word = [&](std::size_t most) {
    std::string out;
    for (std::size_t n = 1 + random.below(most); n > 0; --n) out += static_cast<char>('a' + random.below(2));
    return out;
  };
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::string> stops;
    for (std::size_t n = random.below(4); n > 0; --n) stops.push_back(word(6));
    const std::string text = word(30);
    StopMatcher matcher(stops);
    std::string out;
    for (std::size_t pos = 0, n = 0; pos < text.size(); pos += n) {
      n = 1 + random.below(4);
      out += matcher.push(std::string_view(text).substr(pos, n));
    }
    out += matcher.flush();
    CAPTURE(text);
    REQUIRE(out == expected_text(text, stops));
    REQUIRE(matcher.stopped().has_value() == (out != text));
  }
}

TEST_CASE("stop strings: nothing waits without need") {
  StopMatcher matcher({"\n\nUser:", "END"});
  CHECK(matcher.push("one\n") == "one");
  CHECK(matcher.push("two EN") == "\ntwo ");
  CHECK(matcher.push("d") == "ENd");
  CHECK(matcher.push("\n\nUser") == "");
  CHECK(!matcher.stopped());
  CHECK(matcher.push(": hi") == "");
  CHECK(matcher.stopped() == 0);
  CHECK(matcher.push("more") == "");
  CHECK(matcher.flush() == "");
}

TEST_CASE("stop strings: empty ones are refused, none is fine") {
  CHECK_THROWS_AS(StopMatcher({"a", ""}), Error);
  StopMatcher none({});
  CHECK(none.push("text") == "text");
  StopMatcher cut({"abc"});
  CHECK(cut.push("xab") == "x");
  CHECK(cut.flush() == "ab");
}
