// Profiles of expert picks: what is written is read again, and nothing else is.

#include "weights/expert_profile.hpp"

#include <doctest/doctest.h>

#include <fstream>
#include <string>
#include <vector>

#include "tests/support/temp_folder.hpp"

using namespace qwen3next;

namespace {

ExpertProfile some_profile() {
  ExpertProfile profile(2, 3);
  profile.model = "a \"model\"\n\xff";
  profile.add(0, std::vector<std::int32_t>{0, 2}, std::vector<std::int32_t>{5, 7}, 10);
  profile.add(0, std::vector<std::int32_t>{2}, std::vector<std::int32_t>{1}, 3);
  profile.add(1, std::vector<std::int32_t>{1}, std::vector<std::int32_t>{9}, 9);
  return profile;
}

void check_equal(const ExpertProfile& a, const ExpertProfile& b) {
  REQUIRE(a.layers() == b.layers());
  REQUIRE(a.experts() == b.experts());
  for (int l = 0; l < a.layers(); ++l) {
    CHECK(a.tokens(l) == b.tokens(l));
    CHECK(std::ranges::equal(a.counts(l), b.counts(l)));
  }
}

}  // namespace

TEST_CASE("a profile counts, and comes back from its file") {
  const ExpertProfile profile = some_profile();
  CHECK(profile.tokens(0) == 13);
  CHECK(std::ranges::equal(profile.counts(0), std::vector<std::int64_t>{5, 0, 8}));
  CHECK(profile.picks(0) == 13);
  CHECK(profile.picks(1) == 9);
  const test::TempFolder folder;
  profile.save(folder / "p.json");
  profile.save(folder / "p.json");  // replaces
  const ExpertProfile again = ExpertProfile::load(folder / "p.json");
  check_equal(again, profile);
  CHECK(again.model == "a \"model\"\n\xef\xbf\xbd");
  again.expect_shape(2, 3, "x");
  CHECK_THROWS_WITH_AS(again.expect_shape(2, 4, "p.json"),
                       doctest::Contains("p.json: the profile has 2 layers of 3 experts, expected 2 of 4"), Error);
  CHECK_THROWS_AS(again.expect_shape(3, 3, "p.json"), Error);
  CHECK_THROWS_WITH_AS(ExpertProfile::load(folder / "none.json"), doctest::Contains("none.json"), Error);
}

TEST_CASE("what is no profile is refused, with the reason") {
  const std::string good =
      R"({"format": "qwen3next expert profile", "version": 1, "experts": 2, "tokens": [4], "counts": [[1, 4]]})";
  CHECK(ExpertProfile::parse(good, "p").counts(0)[1] == 4);
  const auto refused = [&](std::string_view from, std::string_view to, const char* reason) {
    std::string text = good;
    const std::size_t at = text.find(from);
    REQUIRE(at != std::string::npos);
    text.replace(at, from.size(), to);
    CAPTURE(text);
    CHECK_THROWS_WITH_AS(ExpertProfile::parse(text, "p"), doctest::Contains(reason), Error);
  };
  refused("}", "", "not valid JSON");
  refused("[[1, 4]]", "[[[[[1]]]]]", "nested");
  refused("\"format\"", "\"form\"", "it has no \"format\"");
  refused("expert profile", "imatrix", "\"format\" is not");
  refused("1,", "2,", "version 2, expected 1");
  refused("1,", "1.5,", "\"version\" is a number, expected");
  refused("\"experts\": 2", "\"experts\": 3", "array of 2, expected an array of 3");
  refused("\"experts\": 2", "\"experts\": 0", "expected an array of 0");
  refused("\"experts\": 2", "\"experts\": 100000000", "expected a whole number from 0 to 65536");
  refused("\"experts\": 2", "\"experts\": \"2\"", "\"experts\" is a string");
  refused("[4]", "[4, 4]", "counts of 1 layers but tokens of 2");
  refused("[4]", "[]", "counts of 1 layers but tokens of 0");
  refused("[4]", "[-4]", "a number of tokens is -4");
  refused("[4]", "[18446744073709551615]", "a number of tokens is");
  refused("[1, 4]", "[1, 5]", "a count is 5, expected a whole number from 0 to 4");
  refused("[1, 4]", "[1, null]", "a count is null");
  refused("[1, 4]", "{}", "an object of 0");
  refused("[[1, 4]]", "[]", "counts of 0 layers");
  CHECK_THROWS_WITH_AS(ExpertProfile::parse("[1]", "p"), doctest::Contains("an array, expected an object"), Error);
}
