#pragma once
// A fingerprint of a Jinja template that ignores how it is laid out and sees everything that can change its output.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace qwen3next {

namespace detail {

inline bool is_jinja_space(char c) noexcept { return c == ' ' || (c >= '\t' && c <= '\r'); }
inline bool is_jinja_word(char c) noexcept {
  return c == '_' || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c & 0x80) != 0;
}

// Rewrites a template in one canonical layout: tags without needless white space, comments gone, and between the tags
// only the text that Jinja would print, with the settings of transformers (trim_blocks, lstrip_blocks, no trailing
// newline).  Control characters mark the borders.
class JinjaCanonicalizer {
 public:
  explicit JinjaCanonicalizer(std::string_view source) {
    for (std::size_t i = 0; i < source.size(); ++i) {
      const bool crlf = source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n';
      if (!crlf) source_ += source[i] == '\r' ? '\n' : source[i];
    }
    if (source_.ends_with('\n')) source_.pop_back();
  }

  std::string run() {
    std::size_t pos = 0;
    while (pos < source_.size()) {
      const std::size_t tag = find_tag(pos);
      std::string_view data = std::string_view(source_).substr(pos, tag - pos);
      if (tag < source_.size()) data = strip_before(data, tag);
      text(data);
      pos = tag < source_.size() ? read_tag(tag) : tag;
    }
    return std::move(out_);
  }

 private:
  std::size_t find_tag(std::size_t pos) const noexcept {
    for (; pos + 1 < source_.size(); ++pos)
      if (source_[pos] == '{' && (source_[pos + 1] == '%' || source_[pos + 1] == '{' || source_[pos + 1] == '#'))
        return pos;
    return source_.size();
  }

  char at(std::size_t pos) const noexcept { return pos < source_.size() ? source_[pos] : '\0'; }

  // White space that the tag at `tag` takes away from the text before it.
  std::string_view strip_before(std::string_view data, std::size_t tag) const noexcept {
    const char sign = at(tag + 2);
    if (sign == '-') {
      while (!data.empty() && is_jinja_space(data.back())) data.remove_suffix(1);
    } else if (sign != '+' && at(tag + 1) != '{') {  // lstrip_blocks
      std::size_t begin = data.size();
      while (begin > 0 && data[begin - 1] != '\n' && is_jinja_space(data[begin - 1])) --begin;
      if (begin > 0 ? data[begin - 1] == '\n' : line_start_) data = data.substr(0, begin);
    }
    return data;
  }

  void text(std::string_view data) {
    if (data.empty()) return;
    if (!in_text_) out_ += '\x01';
    in_text_ = true;
    out_ += data;
  }

  // Copies the tag at `pos` to the output; returns where the text after it begins.
  std::size_t read_tag(std::size_t pos) {
    const char kind = source_[pos + 1], close = kind == '{' ? '}' : kind;
    const bool comment = kind == '#';
    pos += 2;
    if (at(pos) == '-' || (at(pos) == '+' && kind != '{')) ++pos;
    if (!comment) {
      (out_ += '\x02') += kind;
      in_text_ = false;
    }
    bool space = false;
    while (pos < source_.size()) {
      const char c = source_[pos];
      const bool sign = (c == '-' || c == '+') && at(pos + 1) == close && at(pos + 2) == '}';
      if (sign || (c == close && at(pos + 1) == '}')) return after_tag(pos + (sign ? 3 : 2), sign ? c : '\0', kind);
      if (comment) {
        ++pos;
      } else if (is_jinja_space(c)) {
        space = true;
        ++pos;
      } else {
        if (space && is_jinja_word(c) && is_jinja_word(out_.back())) out_ += ' ';
        space = false;
        pos = c == '"' || c == '\'' ? read_string(pos) : (out_ += c, pos + 1);
      }
    }
    return pos;
  }

  std::size_t read_string(std::size_t pos) {
    const char quote = source_[pos];
    out_ += quote;
    for (++pos; pos < source_.size(); ++pos) {
      out_ += source_[pos];
      if (source_[pos] == quote) return pos + 1;
      if (source_[pos] == '\\' && pos + 1 < source_.size()) out_ += source_[++pos];
    }
    return pos;
  }

  std::size_t after_tag(std::size_t pos, char sign, char kind) {
    const std::size_t begin = pos;
    if (sign == '-') {
      while (pos < source_.size() && is_jinja_space(source_[pos])) ++pos;
    } else if (sign != '+' && kind != '{' && at(pos) == '\n') {  // trim_blocks
      ++pos;
    }
    line_start_ = pos > begin && source_[pos - 1] == '\n';
    return pos;
  }

  std::string source_, out_;
  bool in_text_ = false;
  bool line_start_ = true;  // the text to come starts a line
};

}  // namespace detail

// FNV-1a, 64 bits, of the canonical form.
inline std::uint64_t jinja_fingerprint(std::string_view source) {
  std::uint64_t hash = 0xCBF29CE484222325u;
  for (const char c : detail::JinjaCanonicalizer(source).run())
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  return hash;
}

}  // namespace qwen3next
