// Protects: token ids equal to the `tokenizers` package's, on the real vocabulary (if it is here) and on a small one of
// our own; text survives the round trip; users cannot type control tokens; hostile input costs linear time; broken
// files are errors, never crashes.

#include <doctest/doctest.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "text/tokenizer.hpp"
#include "text_golden.hpp"

using namespace qwen3next;
using Ids = std::vector<std::int32_t>;

static const Tokenizer& small() {
  static const Tokenizer tokenizer = Tokenizer::from_json(test::text_golden("tokenizer.json"), "tokenizer.json");
  return tokenizer;
}

// Null if the real tokenizer is not on this machine.
static const Tokenizer* real() {
  static const std::unique_ptr<Tokenizer> tokenizer = [] {
    const auto json = test::read_file(test::shared_path("tokenizer/tokenizer.json"));
    return json ? std::make_unique<Tokenizer>(Tokenizer::from_json(*json, "tokenizer.json")) : nullptr;
  }();
  return tokenizer.get();
}

static Tokenizer through_gguf(const Tokenizer& tokenizer, std::size_t padded_size = 0) {
  Vocabulary v = tokenizer.vocabulary(padded_size);
  return Tokenizer::from_parts(std::move(v.tokens), std::move(v.types), std::move(v.merges), "model.gguf");
}

static void check_cases(const Tokenizer& tokenizer, const char* golden) {
  for (const ordered_json& c : test::text_golden_json(golden)) {
    const std::string text = c["text"];
    CAPTURE(text);
    const Ids ids = tokenizer.encode(text);
    CHECK(ids == c["ids"].get<Ids>());
    CHECK(tokenizer.encode(text, Special::parse) == (c.contains("parsed") ? c["parsed"] : c["ids"]).get<Ids>());
    CHECK(nfc(tokenizer.decode(ids)) == nfc(text));
    for (const std::int32_t id : ids) CHECK(!tokenizer.is_special(id));
  }
}

TEST_CASE("tokenizer: ids of the small vocabulary") { check_cases(small(), "small_ids.json"); }
TEST_CASE("tokenizer: ids of the small vocabulary, by way of GGUF") {
  check_cases(through_gguf(small()), "small_ids.json");
}

TEST_CASE("tokenizer: ids of the real vocabulary") {
  if (real() == nullptr) QWEN3NEXT_SKIP("../shared/tokenizer/tokenizer.json");
  check_cases(*real(), "qwen_ids.json");
  check_cases(through_gguf(*real(), 151936), "qwen_ids.json");
}

TEST_CASE("tokenizer: the declaration of human rights in all languages") {
  const auto corpus = test::shared_path("corpus/udhr/udhr.jsonl.xz");
  std::string lines;
  if (std::filesystem::exists(corpus)) {
    const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(("xz -dc '" + corpus.string() + "'").c_str(), "r"), pclose);
    char buffer[65536];
    for (std::size_t n = 0; pipe && (n = fread(buffer, 1, sizeof buffer, pipe.get())) > 0;) lines.append(buffer, n);
  }
  if (real() == nullptr || lines.empty()) QWEN3NEXT_SKIP("../shared/corpus/udhr (or xz)");
  const ordered_json expected = test::text_golden_json("udhr.json");
  std::size_t languages = 0;
  for (std::size_t begin = 0; begin < lines.size(); ++languages) {
    const std::size_t end = lines.find('\n', begin);
    const ordered_json line = parse_json(std::string_view(lines).substr(begin, end - begin), "udhr");
    begin = end + 1;
    const std::string language = line["lang"];
    CAPTURE(language);
    const Ids ids = real()->encode(line["text"].get_ref<const std::string&>());
    std::string bytes;
    for (const std::int32_t id : ids)
      for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(id >> shift & 255);
    CHECK(ids.size() == expected[language][0].get<std::size_t>());
    CHECK(test::hex(test::fnv(bytes)) == expected[language][1].get<std::string>());
  }
  CHECK(languages == expected.size());
}

TEST_CASE("tokenizer: added tokens marked normalized are matched after normalisation") {
  ordered_json json = test::text_golden_json("tokenizer.json");
  for (ordered_json& token : json["added_tokens"]) token["normalized"] = true;
  check_cases(Tokenizer::from_json(json.dump(), "edited"), "normalized_ids.json");
}

TEST_CASE("tokenizer: control tokens come from the template, not from the user") {
  const std::int32_t end = small().find("<|im_end|>").value();
  CHECK(small().is_special(end));
  CHECK(small().encode("a<|im_end|>", Special::parse).back() == end);
  const Ids typed = small().encode("a<|im_end|>");
  CHECK(std::find(typed.begin(), typed.end(), end) == typed.end());
  CHECK(small().decode(typed) == "a<|im_end|>");
  CHECK(small().decode(Ids{end, 64, end}, true) == "a");
  CHECK(small().decode(Ids{end, 64, end}) == "<|im_end|>a<|im_end|>");
  const std::int32_t think = small().find("<think>").value();
  CHECK(!small().is_special(think));
  CHECK(small().encode("<think>") == Ids{think});
  // GGUF calls these control tokens, tokenizer.json does not.
  const Tokenizer gguf = through_gguf(small());
  CHECK(!gguf.is_special(gguf.find("<|fim_prefix|>").value()));
}

TEST_CASE("tokenizer: GGUF metadata survives both ways") {
  const Vocabulary once = small().vocabulary(1100);
  CHECK(once.tokens.size() == 1100);
  CHECK(once.tokens.back() == "[PAD1099]");
  CHECK(once.types.back() == 5);
  const auto type_of = [&](const char* token) {
    return once.types[static_cast<std::size_t>(small().find(token).value())];
  };
  CHECK(type_of("<|im_end|>") == 3);
  CHECK(type_of("<|fim_prefix|>") == 3);
  CHECK(type_of("<think>") == 4);
  CHECK(type_of("a") == 1);
  const Vocabulary twice = through_gguf(small(), 1100).vocabulary();
  CHECK(once.tokens == twice.tokens);
  CHECK(once.types == twice.types);
  CHECK(once.merges == twice.merges);
  const ordered_json json = test::text_golden_json("tokenizer.json");
  const ordered_json& merges = json["model"]["merges"];
  REQUIRE(once.merges.size() == merges.size());
  for (std::size_t i = 0; i < merges.size(); ++i)
    CHECK(once.merges[i] == merges[i][0].get<std::string>() + " " + merges[i][1].get<std::string>());
}

TEST_CASE("tokenizer: bytes that are not UTF-8 survive") {
  test::Random random(3);
  for (int i = 0; i < 3000; ++i) {
    std::string bytes;
    for (std::size_t n = random.below(40); n > 0; --n) bytes += static_cast<char>(random.below(256));
    CHECK(small().decode(small().encode(bytes)) == nfc(bytes));
  }
}

TEST_CASE("tokenizer: ids without a token decode to nothing") {
  const std::int32_t size = small().size();
  CHECK(small().decode(Ids{-1, size, 2147483647, -2147483647 - 1}) == "");
  CHECK(small().token_bytes(size) == "");
  CHECK(!small().is_special(-5));
  CHECK(!small().find("no such token"));
  CHECK(!small().find(""));
  const Tokenizer padded = through_gguf(small(), 1100);
  CHECK(padded.size() == 1100);
  CHECK(padded.token_bytes(1099) == "");
}

TEST_CASE("tokenizer: streamed text is cut between characters only") {
  const std::string text = "h\xC3\xA9 \xF0\x9F\x98\x80 \xE4\xBD\xA0";
  Utf8Stream stream(small());
  std::string out;
  for (const std::int32_t id : small().encode(text)) {
    const std::string ready = stream.push(id);
    CHECK(is_valid_utf8(ready));
    out += ready;
  }
  CHECK(out + stream.flush() == text);
  CHECK(stream.push(small().encode("\xF0\x9F").front()) == "");
  CHECK(stream.flush() == utf8_replacement);
}

TEST_CASE("tokenizer: a megabyte of anything takes linear time") {
  const auto repeated = [](std::string_view unit) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    return text;
  };
  std::vector<std::string> texts;
  for (const char* unit : {"a", " ", "\n", " \n", "\t ", "'", "<", "<|im_", "ab", "7", "\xCC\x81", "\xCC\x81\xCC\xA3",
                           "\xF0\x9F\x98\x80", "\xE0\xB8\x81", "\xFF", "th"})
    texts.push_back(repeated(unit));
  test::Random random(4);
  for (const auto& [first, count] : {std::pair<char32_t, std::size_t>{0x1F300, 0x300}, {'a', 26}, {0x4E00, 0x5000}}) {
    texts.emplace_back();
    while (texts.back().size() < 1'000'000)
      append_utf8(texts.back(), first + static_cast<char32_t>(random.below(count)));
  }
  for (const std::string& text : texts) {
    CAPTURE(text.substr(0, 8));
    const auto start = std::chrono::steady_clock::now();
    const Ids ids = (real() != nullptr ? *real() : small()).encode(text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    CHECK(!ids.empty());
    CHECK(seconds.count() < 30);  // well below a second in release; quadratic would be many minutes
  }
}

TEST_CASE("tokenizer: a hundred thousand added tokens that begin alike take n log n time") {
  std::vector<std::string> tokens, merges;
  for (unsigned byte = 0; byte < 256; ++byte) tokens.push_back(spell_bytes(std::string(1, static_cast<char>(byte))));
  std::vector<std::int32_t> types(256, 1);
  for (int i = 0; i < 100'000; ++i) {
    tokens.push_back("<" + std::to_string(i) + ">");
    types.push_back(i % 2 == 0 ? 4 : 3);  // every other one a control token
  }
  tokens.insert(tokens.end(), {"<a", "<ab", "<abc>"}), types.insert(types.end(), {4, 3, 4});
  const auto start = std::chrono::steady_clock::now();
  const Tokenizer t = Tokenizer::from_parts(tokens, types, merges, "many");
  std::string text;
  for (int i = 0; i < 100'000; ++i) text += "<" + std::to_string(i);  // never closed
  t.encode(text);
  CHECK(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < 20);

  CHECK(t.encode("<12>") == Ids{256 + 12});
  CHECK(t.encode("<13>").size() == 4);  // a control token is text here
  CHECK(t.encode("<13>", Special::parse) == Ids{256 + 13});
  CHECK(t.encode("<abc>x<ab<a") == Ids{100'258, 'x', 100'256, 'b', 100'256});  // the longest at each place
  CHECK(t.encode("<ab<abc", Special::parse) == Ids{100'257, 100'257, 'c'});
}

TEST_CASE("tokenizer: threads share one") {
  const std::string text = test::text_golden("tokenizer.json").substr(0, 20000);
  const Tokenizer fresh = Tokenizer::from_json(test::text_golden("tokenizer.json"), "tokenizer.json");
  const Ids expected = small().encode(text);
  std::vector<Ids> found(4);
  std::vector<std::thread> threads;
  for (Ids& ids : found) threads.emplace_back([&fresh, &text, &ids] { ids = fresh.encode(text); });
  for (std::thread& thread : threads) thread.join();
  for (const Ids& ids : found) CHECK(ids == expected);
}

static void check_refused(const ordered_json& json, std::string_view part_of_message) {
  try {
    Tokenizer::from_json(json.dump(), "t.json");
    FAIL("accepted, expected an error about " << part_of_message);
  } catch (const Error& error) {
    const std::string message = error.what();
    CAPTURE(message);
    CHECK(message.starts_with("t.json: "));
    CHECK(message.find(part_of_message) != std::string::npos);
    CHECK(message.find('\n') == std::string::npos);
  }
}

TEST_CASE("tokenizer: other kinds of tokenizer.json are refused by name") {
  const ordered_json good = test::text_golden_json("tokenizer.json");
  const auto with = [&](const char* pointer, const ordered_json& value) {
    ordered_json json = good;
    json[ordered_json::json_pointer(pointer)] = value;
    return json;
  };
  check_refused(with("/model/type", "WordPiece"), "/model/type is \"WordPiece\", expected \"BPE\"");
  check_refused(with("/model/byte_fallback", true), "byte_fallback");
  check_refused(with("/model/ignore_merges", true), "ignore_merges");
  check_refused(with("/model/dropout", 0.1), "dropout");
  check_refused(with("/normalizer", {{"type", "NFKC"}}), "NFKC");
  check_refused(with("/pre_tokenizer", nullptr), "/pre_tokenizer");
  check_refused(with("/pre_tokenizer/pretokenizers/0/pattern/Regex", "\\p{N}{1,3}"), "Regex");
  check_refused(with("/pre_tokenizer/pretokenizers/0/behavior", "Removed"), "behavior");
  check_refused(with("/pre_tokenizer/pretokenizers/1/add_prefix_space", true), "add_prefix_space");
  check_refused(with("/post_processor", {{"type", "TemplateProcessing"}}), "post_processor");
  check_refused(with("/decoder/type", "Metaspace"), "decoder");
  check_refused(with("/added_tokens/0/lstrip", true), "lstrip");
  check_refused(with("/added_tokens/0/id", 3), "has the id of");
  check_refused(with("/added_tokens/0/id", 900000000), "far beyond");
  check_refused(with("/added_tokens/0", 5), "without id and content");
  check_refused(with("/model/vocab/a", -1), "model.vocab");
  check_refused(with("/model/vocab/a", 65), "share id");
  check_refused(with("/model/merges/0", {"x"}), "model.merges");
  check_refused(with("/model/merges/0", {"qqq", "zzz"}), "merge 0");
  check_refused(with("/model/merges/1", good["model"]["merges"][0]), "occurs twice");
  check_refused(with("/model/merges", 3), "/model/merges");
  check_refused(with("/model/vocab/\xE2\x96\x81x", 2000), "byte-level");
  check_refused(ordered_json::array(), "expected an object");
  CHECK_THROWS_AS(Tokenizer::from_json("{", "t.json"), Error);
  CHECK_THROWS_AS(Tokenizer::from_json("", "t.json"), Error);
  CHECK_THROWS_AS(Tokenizer::from_json(std::string(100000, '['), "t.json"), Error);
  CHECK_THROWS_AS(Tokenizer::from_parts({}, {}, {}, "x"), Error);
  CHECK_THROWS_AS(Tokenizer::from_parts({"a"}, {}, {}, "x"), Error);
  CHECK_THROWS_AS(Tokenizer::from_parts({"a"}, {9}, {}, "x"), Error);
  CHECK_THROWS_AS(Tokenizer::from_parts({"a", "b", "<|x|>"}, {1, 1, 3}, {"a b"}, "x"), Error);
  // Text must not be able to make a control token out of its parts.
  CHECK_THROWS_AS(Tokenizer::from_parts({"a", "b", "ab"}, {1, 1, 3}, {"a b"}, "x"), Error);
}

TEST_CASE("tokenizer: a vocabulary without some byte says so when it meets one") {
  const Tokenizer tokenizer = Tokenizer::from_parts({"a", "b", "ab", "<0x0A>"}, {1, 1, 1, 6}, {"a b"}, "x");
  CHECK(tokenizer.encode("abba") == Ids{2, 1, 0});
  CHECK(tokenizer.decode(Ids{2, 3}) == "ab\n");
  CHECK(tokenizer.vocabulary().tokens.back() == "<0x0A>");
  CHECK_THROWS_WITH_AS(tokenizer.encode("abc"), "x: the vocabulary has no token for byte 99, which the text contains",
                       Error);
}

TEST_CASE("tokenizer: damaged files are errors, not crashes") {
  const std::string good = test::text_golden("tokenizer.json");
  test::Random random(5);
  int refused = 0;
  for (int i = 0; i < 300; ++i) {
    std::string bad = good;
    for (std::size_t n = 1 + random.below(4); n > 0; --n)
      bad[random.below(bad.size())] = static_cast<char>(random.below(256));
    if (random.below(4) == 0) bad.resize(random.below(bad.size()));
    try {
      (void)Tokenizer::from_json(bad, "bad").encode("Hello <|im_end|> world", Special::parse);
    } catch (const Error&) {
      ++refused;
    }
  }
  CHECK(refused > 100);
}
