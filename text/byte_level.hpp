#pragma once
// GPT-2's byte-level alphabet: in vocabulary files each byte is spelled as one printable character, the printable
// Latin-1 bytes as themselves and the other 68 as U+0100..U+0143 (a space is U+0120).

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "text/utf8.hpp"

namespace qwen3next {

namespace detail {

struct ByteAlphabet {
  std::array<char16_t, 256> code_of_byte{};
  std::array<std::int16_t, 0x144> byte_of_code{};  // -1: not in the alphabet
};

inline constexpr ByteAlphabet byte_alphabet = [] {
  ByteAlphabet alphabet;
  alphabet.byte_of_code.fill(-1);
  unsigned next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    const unsigned code = printable ? byte : next++;
    alphabet.code_of_byte[byte] = static_cast<char16_t>(code);
    alphabet.byte_of_code[code] = static_cast<std::int16_t>(byte);
  }
  return alphabet;
}();

}  // namespace detail

inline std::string spell_bytes(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) append_utf8(out, detail::byte_alphabet.code_of_byte[static_cast<unsigned char>(c)]);
  return out;
}

// The bytes that `spelling` stands for, or nothing if it has a character outside the alphabet.
inline std::optional<std::string> unspell_bytes(std::string_view spelling) {
  std::string out;
  for (std::size_t pos = 0; pos < spelling.size();) {
    const Decoded d = decode_utf8(spelling, pos);
    if (d.code >= detail::byte_alphabet.byte_of_code.size() || detail::byte_alphabet.byte_of_code[d.code] < 0)
      return {};
    out += static_cast<char>(detail::byte_alphabet.byte_of_code[d.code]);
    pos += d.size;
  }
  return out;
}

}  // namespace qwen3next
