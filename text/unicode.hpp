#pragma once
// What the tokenizer asks of Unicode: the class of a character, and normal form C.
//
// Token ids must equal those of the `tokenizers` package, and that package mixes two ages of Unicode: its regex engine
// knows version 16, its normaliser version 9.  utf8proc (15 in Debian 12) sits between, so two short tables make up
// the difference.  Both were found by trying every code point; tests/text/test_unicode.cpp protects them.

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.hpp"
#include "text/utf8.hpp"

namespace qwen3next {

enum class CharClass : std::uint8_t { other, letter, number, space };  // \p{L}, \p{N}, \s of the split regex

namespace detail {

struct CodeRange {
  char32_t first, last;
};

inline bool in_ranges(std::span<const CodeRange> sorted, char32_t code) noexcept {
  const auto it =
      std::lower_bound(sorted.begin(), sorted.end(), code, [](CodeRange r, char32_t c) { return r.last < c; });
  return it != sorted.end() && it->first <= code;
}

// Letters and numbers of Unicode 15.1 and 16 (a newer utf8proc says the same of them).
inline constexpr CodeRange new_letters[] = {
    {0x1C89, 0x1C8A},   {0xA7CB, 0xA7CD},   {0xA7DA, 0xA7DC},   {0x105C0, 0x105F3}, {0x10D4A, 0x10D65},
    {0x10D6F, 0x10D85}, {0x10EC2, 0x10EC4}, {0x11380, 0x11389}, {0x1138B, 0x1138B}, {0x1138E, 0x1138E},
    {0x11390, 0x113B5}, {0x113B7, 0x113B7}, {0x113D1, 0x113D1}, {0x113D3, 0x113D3}, {0x11BC0, 0x11BE0},
    {0x13460, 0x143FA}, {0x16100, 0x1611D}, {0x16D40, 0x16D6C}, {0x18CFF, 0x18CFF}, {0x1E5D0, 0x1E5ED},
    {0x1E5F0, 0x1E5F0}, {0x2EBF0, 0x2EE5D}};
inline constexpr CodeRange new_numbers[] = {{0x10D40, 0x10D49}, {0x116D0, 0x116E3}, {0x11BF0, 0x11BF9},
                                            {0x16130, 0x16139}, {0x16D70, 0x16D79}, {0x1CCF0, 0x1CCF9},
                                            {0x1E5F1, 0x1E5FA}};

// Characters younger than Unicode 9 that a newer normaliser would reorder, take apart or compose.  To `tokenizers`
// they are unassigned, so normalisation leaves them where they are and never looks across them.
// U+11A7 is here because utf8proc would swallow it after a Hangul syllable.
inline constexpr CodeRange inert_ranges[] = {
    {0x7FD, 0x7FD},     {0x897, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x11A7, 0x11A7},   {0x1715, 0x1715},   {0x1ABF, 0x1ACE},
    {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x105C0, 0x105FF}, {0x10D24, 0x10D27}, {0x10D69, 0x10D6D},
    {0x10EAB, 0x10EAC}, {0x10EFA, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070},
    {0x1133B, 0x1133B}, {0x11380, 0x113FF}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930},
    {0x11938, 0x11938}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16100, 0x1613F}, {0x16D40, 0x16D7F}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}};

inline CharClass slow_char_class(char32_t code) noexcept {
  switch (code) {
    case 0x85:
    case 0xA0:
    case 0x1680:
    case 0x2028:
    case 0x2029:
    case 0x202F:
    case 0x205F:
    case 0x3000:
      return CharClass::space;
    default:
      break;
  }
  if (code >= 0x2000 && code <= 0x200A) return CharClass::space;
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(code));
  if (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO) return CharClass::letter;
  if (category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO) return CharClass::number;
  if (category == UTF8PROC_CATEGORY_CN) {
    if (in_ranges(new_letters, code)) return CharClass::letter;
    if (in_ranges(new_numbers, code)) return CharClass::number;
  }
  return CharClass::other;
}

inline constexpr std::array<CharClass, 128> ascii_class = [] {
  std::array<CharClass, 128> table{};
  for (unsigned c = 0; c < 128; ++c) {
    if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z')) table[c] = CharClass::letter;
    if (c >= '0' && c <= '9') table[c] = CharClass::number;
    if (c == ' ' || (c >= '\t' && c <= '\r')) table[c] = CharClass::space;
  }
  return table;
}();

}  // namespace detail

// The class of a decoded character; broken bytes are `other`, like any symbol.
inline CharClass char_class(char32_t code) noexcept {
  if (code < 128) return detail::ascii_class[code];
  return code < 0x110000 ? detail::slow_char_class(code) : CharClass::other;
}

// False when the text is surely in normal form C already: everything below U+0300 is.
inline bool may_need_nfc(std::string_view text) noexcept {
  return std::any_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 0xCC; });
}

namespace detail {

// Appends the normal form C of `run`; `scratch` is working memory.  utf8proc's own NFC sorts combining marks by
// swapping neighbours, which is quadratic on a megabyte of marks, so this sorts them itself.
inline void append_nfc(std::string& out, std::span<const char32_t> run, std::vector<utf8proc_int32_t>& scratch) {
  const auto ccc = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  scratch.clear();
  for (const char32_t code : run) {
    std::array<utf8proc_int32_t, 32> parts{};  // the longest canonical decomposition is 4
    int boundary = 0;
    const auto n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(code), parts.data(), parts.size(),
                                           UTF8PROC_DECOMPOSE, &boundary);
    if (n <= 0 || static_cast<std::size_t>(n) > parts.size()) throw Error("utf8proc failed to decompose a character");
    scratch.insert(scratch.end(), parts.begin(), parts.begin() + n);
  }
  for (auto it = scratch.begin(); it != scratch.end();) {
    it = std::find_if(it, scratch.end(), [&](auto c) { return ccc(c) != 0; });
    const auto end = std::find_if(it, scratch.end(), [&](auto c) { return ccc(c) == 0; });
    const auto before = [&](auto a, auto b) { return ccc(a) < ccc(b); };
    if (!std::is_sorted(it, end, before)) std::stable_sort(it, end, before);
    it = end;
  }
  const auto length = utf8proc_normalize_utf32(scratch.data(), static_cast<utf8proc_ssize_t>(scratch.size()),
                                               static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
  if (length < 0) throw Error("utf8proc failed to compose characters");
  for (utf8proc_ssize_t i = 0; i < length; ++i)
    append_utf8(out, static_cast<char32_t>(scratch[static_cast<std::size_t>(i)]));
}

}  // namespace detail

// Normal form C in linear time (n log n within a run of marks).  Bytes that are not UTF-8 pass unchanged and, like the
// inert characters, nothing composes or moves across them.
inline std::string nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size() + text.size() / 16);
  std::vector<char32_t> run;  // one character below U+0300 (maybe), then what could attach to it
  std::vector<utf8proc_int32_t> scratch;
  const auto flush = [&] {
    if (run.size() == 1 && run[0] < 0x300)
      append_utf8(out, run[0]);
    else if (!run.empty())
      detail::append_nfc(out, run, scratch);
    run.clear();
  };
  for (std::size_t pos = 0; pos < text.size();) {
    const Decoded d = decode_utf8(text, pos);
    const bool inert = !d.ok() || (d.code >= 0x7FD && detail::in_ranges(detail::inert_ranges, d.code));
    if (inert || d.code < 0x300) flush();
    if (inert)
      out += text.substr(pos, d.size);
    else
      run.push_back(d.code);
    pos += d.size;
  }
  flush();
  return out;
}

}  // namespace qwen3next
