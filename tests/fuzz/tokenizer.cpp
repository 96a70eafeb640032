// Any text as tokenizer.json; any text for a tokenizer.

#include "text/tokenizer.hpp"
#include "target.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

FUZZ_TARGET(tokenizer_json) {
  const Tokenizer tokenizer = Tokenizer::from_json(input, "tokenizer.json");
  constexpr std::string_view text = "Hello, the 12 lines:\r\n\tx <think>isn't</think> <|im_end|>  ";
  for (const Special special : {Special::as_text, Special::parse}) {
    const auto ids = tokenizer.encode(text, special);
    expect(tokenizer.decode(ids) == text, "decode(encode(text)) = text");
  }
}

// Every byte has a token, so no text may be refused.
FUZZ_TARGET(encode) {
  static const Tokenizer tokenizer = [] {
    std::vector<std::string> tokens, merges;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const char c = static_cast<char>(byte);
      tokens.push_back(spell_bytes({&c, 1}));
    }
    for (const char* pair : {"a a", "aa aa", "aaaa aaaa", "e r", "< |", "\u0120 a"}) {
      merges.emplace_back(pair);
      tokens.emplace_back(pair);
      tokens.back().erase(tokens.back().find(' '), 1);
    }
    std::vector<std::int32_t> types(tokens.size(), 1);
    for (const char* added : {"<|im_end|>", "<|im_start|>", "<tool_call>", "<tool", "\u00e9\u00e9"}) {
      tokens.emplace_back(added);
      types.push_back(added[1] == '|' ? 3 : 4);
    }
    return Tokenizer::from_parts(std::move(tokens), std::move(types), std::move(merges), "encode");
  }();
  const auto ids = tokenizer.encode(input, Special::parse);
  const std::string text = tokenizer.decode(ids);
  expect(nfc(text) == nfc(input), "decode(encode(text)) = nfc(text)");
  Utf8Stream stream(tokenizer);
  std::string streamed;
  for (const std::int32_t id : ids) streamed += stream.push(id);
  streamed += stream.flush();
  expect(is_valid_utf8(streamed), "streamed text is UTF-8");
  if (is_valid_utf8(text)) expect(streamed == text, "streaming loses nothing");
}
