#pragma once
// The loop: sample, show, feed back.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.hpp"
#include "generate/engine.hpp"
#include "generate/reuse.hpp"
#include "generate/sampler.hpp"
#include "generate/speculate.hpp"
#include "text/stop_strings.hpp"
#include "text/tokenizer.hpp"

namespace qwen3next {

// What ends a text and how its tokens are chosen.  Session::default_options() fills in what the model's files advise.
struct GenerateOptions {
  Sampling sampling;
  std::int64_t max_tokens = -1;             // -1: until the model ends its turn or the context is full
  std::vector<std::string> stop{};          // text that ends the answer and is not part of it
  std::vector<std::int32_t> stop_tokens{};  // tokens that end it
  Progress on_prefill{};                    // during a long prompt
  int drafts = auto_drafts;  // tokens to guess ahead with the MTP head, 0..4: changes the speed, never the text
};

// What ended a text.
enum class StopReason : std::uint8_t { end_of_text, stop_string, max_tokens, context_full, cancelled };

constexpr std::string_view name(StopReason reason) noexcept {
  constexpr std::string_view names[] = {"end of text", "stop string", "max tokens", "context full", "cancelled"};
  return names[static_cast<std::size_t>(reason)];
}

// What came of generating: the text, its tokens, why it ended, how long it took.
struct Generated {
  std::string text;                  // what was shown: no stop strings, no control tokens
  std::vector<std::int32_t> tokens;  // sampled, the one that ended the text included
  StopReason reason = StopReason::end_of_text;
  std::int64_t prompt_tokens = 0;  // given
  std::int64_t reused_tokens = 0;  // of those, their state was there
  Reuse reuse{};                   // of a conversation: where that came from, and what stood in the way of more
  double prompt_seconds = 0;       // reading the prompt
  double decode_seconds = 0;       // sampling and reading what was sampled
  MtpStatistics mtp{};             // of guessing ahead

  // Speeds, of the tokens that were computed.
  double prompt_tokens_per_second() const {
    return prompt_seconds > 0 ? static_cast<double>(prompt_tokens - reused_tokens) / prompt_seconds : 0;
  }
  double decode_tokens_per_second() const {  // the first token comes from the prompt's logits
    return decode_seconds > 0 && tokens.size() > 1 ? static_cast<double>(tokens.size() - 1) / decode_seconds : 0;
  }
};

// Given pieces of whole UTF-8 characters as they come; returning false ends the generation.
using OnText = std::function<bool(std::string_view piece)>;

// Samples from `logits` and appends through `decode` until something ends it.  The last token sampled is not appended.
//   decode(token) -> logits of the next one;   room: tokens that fit the context.
template <class Decode>
void generate_tokens(const Tokenizer& tokenizer, Sampler& sampler, std::span<const float> logits, std::int64_t room,
                     const GenerateOptions& options, const OnText& on_text, Decode&& decode, Generated& result) {
  const auto start = std::chrono::steady_clock::now();
  Utf8Stream characters(tokenizer, /*skip_special=*/true);
  StopMatcher stop(options.stop);
  bool wanted = true;
  auto show = [&](std::string_view piece) {
    if (piece.empty()) return;
    result.text += piece;
    if (wanted && on_text) wanted = on_text(piece);
  };

  const auto is_stop = [&](std::int32_t token) {
    return std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end();
  };
  result.reason = StopReason::max_tokens;
  while (options.max_tokens < 0 || static_cast<std::int64_t>(result.tokens.size()) < options.max_tokens) {
    const std::int32_t token = sampler.sample(logits);
    result.tokens.push_back(token);
    if (is_stop(token)) {
      result.reason = StopReason::end_of_text;
      break;
    }
    show(stop.push(characters.push(token)));
    if (stop.stopped()) {
      result.reason = StopReason::stop_string;
      break;
    }
    if (!wanted) {
      result.reason = StopReason::cancelled;
      break;
    }
    if (room-- <= 0) {
      result.reason = StopReason::context_full;
      break;
    }
    if (options.max_tokens >= 0 && static_cast<std::int64_t>(result.tokens.size()) == options.max_tokens) break;
    logits = decode(token);
  }
  if (!stop.stopped()) {
    show(stop.push(characters.flush()));
    if (!stop.stopped()) show(stop.flush());
  }
  result.decode_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace qwen3next
