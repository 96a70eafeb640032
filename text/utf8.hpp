#pragma once
// UTF-8, decoded with care: nothing here trusts its input, reads past its end or throws.

#include <cstddef>
#include <string>
#include <string_view>

namespace qwen3next {

inline constexpr char32_t utf8_invalid = 0xFFFFFFFF;    // bytes that can begin no well-formed sequence
inline constexpr char32_t utf8_truncated = 0xFFFFFFFE;  // a well-formed beginning, cut off by the end of the text
inline constexpr std::string_view utf8_replacement = "\xEF\xBF\xBD";  // U+FFFD

struct Decoded {
  char32_t code;     // a scalar value, utf8_invalid or utf8_truncated
  std::size_t size;  // bytes taken, 1..4; for broken input the "maximal subpart" that one U+FFFD stands for
  bool ok() const noexcept { return code < 0x110000; }
};

// One code point at `pos`, which must be inside `text`.  Well-formed is Table 3-7 of the Unicode standard: no overlong
// forms, no surrogates, nothing above U+10FFFF.
inline Decoded decode_utf8(std::string_view text, std::size_t pos) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[pos + i]); };
  const unsigned lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xC2 || lead > 0xF4) return {utf8_invalid, 1};
  const std::size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // Only the second byte has a range that depends on the first.
  unsigned low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  char32_t code = lead & (0x7Fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if (pos + i >= text.size()) return {utf8_truncated, i};
    if (byte(i) < low || byte(i) > high) return {utf8_invalid, i};
    code = code << 6 | (byte(i) & 0x3Fu);
    low = 0x80, high = 0xBF;
  }
  return {code, length};
}

// `code` must be a scalar value (what decode_utf8 gives when ok()).
inline void append_utf8(std::string& out, char32_t code) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else {
    if (code < 0x10000) {
      put(0xE0 | code >> 12);
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
    }
    put(0x80 | (code >> 6 & 0x3F));
  }
  put(0x80 | (code & 0x3F));
}

inline bool is_valid_utf8(std::string_view text) noexcept {
  for (std::size_t pos = 0; pos < text.size();) {
    const Decoded d = decode_utf8(text, pos);
    if (!d.ok()) return false;
    pos += d.size;
  }
  return true;
}

// Bytes in, whole characters out: what has arrived of an unfinished character waits for the rest, broken sequences
// become U+FFFD.  However the bytes are cut, the concatenated output is the same, and equals Python's
// bytes.decode(errors="replace").
class Utf8Assembler {
 public:
  std::string push(std::string_view bytes) {
    pending_ += bytes;
    std::string out;
    std::size_t pos = 0;
    while (pos < pending_.size()) {
      const Decoded d = decode_utf8(pending_, pos);
      if (d.code == utf8_truncated) break;
      out += d.ok() ? std::string_view(pending_).substr(pos, d.size) : utf8_replacement;
      pos += d.size;
    }
    pending_.erase(0, pos);
    return out;
  }

  // The end: a dangling beginning becomes one U+FFFD.
  std::string flush() {
    std::string out(pending_.empty() ? std::string_view() : utf8_replacement);
    pending_.clear();
    return out;
  }

 private:
  std::string pending_;  // at most three bytes between calls
};

}  // namespace qwen3next
