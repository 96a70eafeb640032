#pragma once
// A prompt that remembers which control tokens are its template's own: what a user wrote can look like one, but never
// becomes one.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.hpp"
#include "text/tokenizer.hpp"

namespace qwen3next {

class RenderedPrompt {
 public:
  // Text that somebody gave: never a control token.
  RenderedPrompt& operator+=(std::string_view given) {
    text_ += given;
    return *this;
  }
  RenderedPrompt& operator+=(char given) {
    text_ += given;
    return *this;
  }
  // The template's own text, whose <|im_start|> and <|im_end|> are the tokens.
  RenderedPrompt& markup(std::string_view own) {
    for (std::size_t pos = own.find("<|im_"); pos != std::string_view::npos; pos = own.find("<|im_", pos + 1)) {
      const std::size_t end = own.find("|>", pos) + 2;
      controls_.push_back({text_.size() + pos, end - pos});
    }
    text_ += own;
    return *this;
  }

  const std::string& text() const noexcept { return text_; }

  // The same ids as encoding text() with Special::parse, unless somebody's text spells control tokens.
  std::vector<std::int32_t> encode(const Tokenizer& tokenizer) const {
    std::vector<std::int32_t> ids;
    std::size_t pos = 0;
    const auto text_until = [&](std::size_t end) {
      if (end == pos) return;
      const std::vector<std::int32_t> part = tokenizer.encode(std::string_view(text_).substr(pos, end - pos));
      ids.insert(ids.end(), part.begin(), part.end());
    };
    for (const Control& control : controls_) {
      text_until(control.begin);
      const std::string_view token = std::string_view(text_).substr(control.begin, control.size);
      const auto id = tokenizer.find(token);
      if (!id) throw Error("the tokenizer has no token " + std::string(token) + ", which the chat template needs");
      ids.push_back(*id);
      pos = control.begin + control.size;
    }
    text_until(text_.size());
    return ids;
  }

 private:
  struct Control {
    std::size_t begin, size;
  };
  std::string text_;
  std::vector<Control> controls_;
};

}  // namespace qwen3next
