#pragma once
// The tables behind the tokenizer: a vocabulary as files carry it, the tokens as bytes, and the added tokens.

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qwen3next {

enum class TokenType : std::uint8_t { normal = 1, unknown, control, user_defined, unused, byte };  // GGUF's numbers

// A vocabulary in GGUF's convention, the parts of tokenizer.ggml.*.
struct Vocabulary {
  std::vector<std::string> tokens;  // by id: normal tokens in byte-level spelling, all others as literal text
  std::vector<std::int32_t> types;  // TokenType
  std::vector<std::string> merges;  // "a b" in byte-level spelling, lowest rank first
};

// The bytes of every token, in one block of memory, and the way back from bytes to id.
class TokenTable {
 public:
  static constexpr std::int32_t none = -1;

  void reserve(std::size_t count, std::size_t bytes) {
    offsets_.reserve(count + 1);
    bytes_.reserve(bytes);
    slots_.assign(std::bit_ceil(2 * count + 1), Slot{});
  }

  std::size_t size() const noexcept { return offsets_.size() - 1; }
  std::string_view operator[](std::size_t id) const noexcept {
    return std::string_view(bytes_).substr(offsets_[id], offsets_[id + 1] - offsets_[id]);
  }

  // Gives the next id to `bytes`.
  void add(std::string_view bytes) {
    bytes_ += bytes;
    offsets_.push_back(bytes_.size());
  }

  // Makes find() know the last token added; false if another of the same bytes is known.
  bool index_last() {
    const auto id = static_cast<std::int32_t>(size() - 1);
    const std::string_view bytes = (*this)[size() - 1];
    const std::size_t hash = std::hash<std::string_view>{}(bytes);
    Slot& slot = slots_[slot_of(bytes, hash)];
    if (slot.id != none) return false;
    slot = {static_cast<std::uint32_t>(hash >> 32), id};
    longest_ = std::max(longest_, bytes.size());
    return true;
  }

  std::int32_t find(std::string_view bytes) const noexcept {
    if (bytes.size() > longest_) return none;
    return slots_[slot_of(bytes, std::hash<std::string_view>{}(bytes))].id;
  }

 private:
  struct Slot {
    std::uint32_t tag = 0;  // upper half of the hash, so that most comparisons need no look at the bytes
    std::int32_t id = none;
  };

  std::size_t slot_of(std::string_view bytes, std::size_t hash) const noexcept {
    std::size_t i = hash & (slots_.size() - 1);
    while (slots_[i].id != none && (slots_[i].tag != static_cast<std::uint32_t>(std::uint64_t{hash} >> 32) ||
                                    (*this)[static_cast<std::size_t>(slots_[i].id)] != bytes))
      i = (i + 1) & (slots_.size() - 1);
    return i;
  }

  std::string bytes_;
  std::vector<std::size_t> offsets_{0};
  std::vector<Slot> slots_{Slot{}};
  std::size_t longest_ = 0;
};

// Tokens that are matched as literal text before anything else: at each place the longest one.  Sorted, so that a file
// with a hundred thousand of them costs n log n to read, and each place of a text no more than the longest match.
class AddedTokens {
 public:
  struct Token {
    std::string text;
    std::int32_t id;
    bool special;
  };

  // No text may be empty; of equal ones the first counts.
  AddedTokens() = default;
  explicit AddedTokens(std::vector<Token> tokens) : tokens_(std::move(tokens)) {
    std::stable_sort(tokens_.begin(), tokens_.end(), [](const Token& a, const Token& b) { return a.text < b.text; });
    for (std::size_t byte = 0, i = 0; byte < 256; ++byte) {
      while (i < tokens_.size() && static_cast<unsigned char>(tokens_[i].text.front()) <= byte) ++i;
      end_[byte] = i;
    }
  }

  bool empty() const noexcept { return tokens_.empty(); }

  // The token that is exactly `text`.
  const Token* find(std::string_view text) const noexcept {
    const auto found = std::lower_bound(tokens_.begin(), tokens_.end(), text,
                                        [](const Token& token, std::string_view t) { return token.text < t; });
    return found != tokens_.end() && found->text == text ? &*found : nullptr;
  }

  // Cuts `text` at the tokens found: gap(std::string_view) for what lies between, token(const Token&).  Special tokens
  // are seen only if `parse_special`.
  template <class Gap, class Found>
  void split(std::string_view text, bool parse_special, Gap&& gap, Found&& found) const {
    std::size_t gap_begin = 0;
    for (std::size_t pos = 0; pos < text.size();) {
      const Token* token = match(text.substr(pos), parse_special);
      if (token == nullptr) {
        ++pos;
        continue;
      }
      if (pos > gap_begin) gap(text.substr(gap_begin, pos - gap_begin));
      found(*token);
      pos += token->text.size();
      gap_begin = pos;
    }
    if (gap_begin < text.size()) gap(text.substr(gap_begin));
  }

 private:
  // Narrows the range of tokens that begin as the text does, a byte at a time; the shortest of a range comes first.
  const Token* match(std::string_view text, bool parse_special) const noexcept {
    const std::size_t first = static_cast<unsigned char>(text.front());
    const Token* begin = tokens_.data() + (first == 0 ? 0 : end_[first - 1]);
    const Token* end = tokens_.data() + end_[first];
    const Token* best = nullptr;
    for (std::size_t size = 1; begin != end; ++size) {
      for (; begin != end && begin->text.size() == size; ++begin)
        if ((parse_special || !begin->special) && (best == nullptr || best->text.size() != size)) best = begin;
      if (size == text.size()) break;
      const auto byte = [size](const Token& token) { return static_cast<unsigned char>(token.text[size]); };
      const auto next = static_cast<unsigned char>(text[size]);
      begin = std::partition_point(begin, end, [&](const Token& token) { return byte(token) < next; });
      end = std::partition_point(begin, end, [&](const Token& token) { return byte(token) == next; });
    }
    return best;
  }

  std::vector<Token> tokens_;
  std::array<std::size_t, 256> end_{};  // of those that begin with this byte or a lower one
};

}  // namespace qwen3next
