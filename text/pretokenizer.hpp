#pragma once
// Qwen's split regex as a hand-made scanner: one pass, no backtracking, no regex engine.

#include <cstddef>
#include <string_view>

#include "text/unicode.hpp"
#include "text/utf8.hpp"

namespace qwen3next {

// The pattern that the scanner below implements; a tokenizer.json with any other is refused.
inline constexpr std::string_view qwen_split_pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace detail {

struct ScannedChar {
  CharClass cls;
  std::size_t size;  // 0 at the end of the text
};

inline ScannedChar scan_char(std::string_view text, std::size_t pos) noexcept {
  if (pos >= text.size()) return {CharClass::other, 0};
  const auto byte = static_cast<unsigned char>(text[pos]);
  if (byte < 128) return {ascii_class[byte], 1};
  const Decoded d = decode_utf8(text, pos);
  return {char_class(d.code), d.size};
}

inline std::size_t skip_class(std::string_view text, std::size_t pos, CharClass cls) noexcept {
  for (ScannedChar c = scan_char(text, pos); c.size != 0 && c.cls == cls; c = scan_char(text, pos)) pos += c.size;
  return pos;
}

inline bool is_newline(std::string_view text, std::size_t pos) noexcept {
  return pos < text.size() && (text[pos] == '\r' || text[pos] == '\n');
}

// Bytes of 's 't 're 've 'm 'll 'd (any case) at `pos`, which holds the apostrophe; 0 if none.
inline std::size_t contraction_size(std::string_view text, std::size_t pos) noexcept {
  const auto lower = [&](std::size_t i) { return pos + i < text.size() ? text[pos + i] | 0x20 : 0; };
  const int a = lower(1), b = lower(2);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
  if (text.substr(pos + 1, 2) == "\xC5\xBF") return 3;  // U+017F, long s, which case folding makes an s
  return 0;
}

}  // namespace detail

// Where the piece that starts at `pos` (inside the text) ends.  The alternatives of the regex, in its order.
inline std::size_t piece_end(std::string_view text, std::size_t pos) noexcept {
  using namespace detail;
  const ScannedChar first = scan_char(text, pos);
  if (text[pos] == '\'') {
    if (const std::size_t size = contraction_size(text, pos)) return pos + size;
  }
  // [^\r\n\p{L}\p{N}]?\p{L}+
  if (first.cls == CharClass::letter) return skip_class(text, pos + first.size, CharClass::letter);
  if (first.cls == CharClass::number) return pos + first.size;  // \p{N}
  const ScannedChar second = scan_char(text, pos + first.size);
  if (!is_newline(text, pos) && second.size != 0 && second.cls == CharClass::letter)
    return skip_class(text, pos + first.size + second.size, CharClass::letter);
  //  ?[^\s\p{L}\p{N}]+[\r\n]*
  if (first.cls == CharClass::other || (text[pos] == ' ' && second.size != 0 && second.cls == CharClass::other)) {
    std::size_t end = skip_class(text, pos + first.size, CharClass::other);
    while (is_newline(text, end)) ++end;
    return end;
  }
  // Only white space is left: \s*[\r\n]+ takes it up to the last line break, \s+(?!\S) leaves its last character to
  // the word that follows, \s+ takes a single one.
  std::size_t end = pos, last = pos, after_newline = pos;
  for (ScannedChar c = first; c.size != 0 && c.cls == CharClass::space; c = scan_char(text, end)) {
    last = end;
    end += c.size;
    if (is_newline(text, last)) after_newline = end;
  }
  if (after_newline != pos) return after_newline;
  return end == text.size() || last == pos ? end : last;
}

}  // namespace qwen3next
