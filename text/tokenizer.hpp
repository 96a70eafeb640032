#pragma once
// Qwen's tokenizer: added tokens, normal form C, the split regex, byte-level BPE.  Gives the ids of the `tokenizers`
// package, from a Hugging Face tokenizer.json or from GGUF metadata.
//
//   const auto tokenizer = Tokenizer::from_json(read("tokenizer.json"), "tokenizer.json");
//   std::vector<std::int32_t> ids = tokenizer.encode("Why is the sky blue?");
//   std::string text = tokenizer.decode(ids);

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "text/bpe.hpp"
#include "text/byte_level.hpp"
#include "text/pretokenizer.hpp"
#include "text/tokenizer_json.hpp"
#include "text/unicode.hpp"
#include "text/utf8.hpp"
#include "text/vocabulary.hpp"

namespace qwen3next {

// Whether control tokens (<|im_start|> and the like) spelled out in a text become those tokens.  What a user typed must
// not: `as_text`.  A rendered chat template must: `parse`.  Added tokens that are not control tokens (<think>,
// <tool_call>) are matched either way, as Hugging Face does.
enum class Special { as_text, parse };

// Text to token ids and back: Qwen's byte-level BPE.  Immutable after construction; any number of threads may use one
// at the same time.
class Tokenizer {
 public:
  // The text of a tokenizer.json; `file` is its name, for errors.  Throws Error if it is damaged or not Qwen's kind.
  static Tokenizer from_json(std::string_view json, std::string_view file) {
    return Tokenizer(read_tokenizer_json(json, file), file);
  }

  // GGUF's tokenizer.ggml.tokens, .token_type and .merges; `source` is the file's name, for errors.
  static Tokenizer from_parts(std::vector<std::string> tokens, std::vector<std::int32_t> types,
                              std::vector<std::string> merges, std::string_view source) {
    TokenizerParts parts;
    parts.vocabulary = {std::move(tokens), std::move(types), std::move(merges)};
    // The format cannot say that a token which looks like a control token is not one.
    auto& [names, kinds, unused] = parts.vocabulary;
    for (std::size_t id = 0; id < std::min(names.size(), kinds.size()); ++id)
      if (kinds[id] == static_cast<int>(TokenType::control) && control_only_in_gguf(names[id]))
        kinds[id] = static_cast<int>(TokenType::user_defined);
    return Tokenizer(parts, source);
  }

  // The ids of a text.  Throws Error if it has bytes that the vocabulary has no token for (Qwen's has all 256).
  std::vector<std::int32_t> encode(std::string_view text, Special special = Special::as_text) const {
    std::vector<std::int32_t> ids;
    ids.reserve(text.size() / 4 + 1);
    BpeMerger merger(merges_);
    const bool parse = special == Special::parse;
    const auto found = [&](const AddedTokens::Token& token) { ids.push_back(token.id); };
    const auto pieces = [&](std::string_view normal) {
      for (std::size_t pos = 0; pos < normal.size();) {
        const std::size_t end = piece_end(normal, pos);
        encode_piece(normal.substr(pos, end - pos), merger, ids);
        pos = end;
      }
    };
    const auto normalize = [&](std::string_view gap) {
      std::string buffer;
      if (nfc_ && may_need_nfc(gap)) gap = buffer = nfc(gap);
      if (added_normalized_.empty())
        pieces(gap);
      else
        added_normalized_.split(gap, parse, pieces, found);
    };
    added_.split(text, parse, normalize, found);
    return ids;
  }

  // The bytes of the tokens: UTF-8 wherever the tokens make whole characters.  Ids without a token give nothing.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special = false) const {
    std::string text;
    for (const std::int32_t id : ids)
      if (!skip_special || !is_special(id)) text += token_bytes(id);
    return text;
  }

  // What the token stands for; empty for unused ids and ids out of range (a model's rows are padded beyond size()).
  std::string_view token_bytes(std::int32_t id) const noexcept {
    return has(id) && type(id) != TokenType::unused ? table_[index(id)] : std::string_view();
  }

  // One more than the highest id.
  std::int32_t size() const noexcept { return static_cast<std::int32_t>(table_.size()); }

  // The token that stands for exactly these bytes ("<|im_end|>", " the").
  std::optional<std::int32_t> find(std::string_view bytes) const noexcept {
    for (const AddedTokens* added : {&added_, &added_normalized_})
      if (const auto* token = added->find(bytes)) return token->id;
    const std::int32_t id = table_.find(bytes);
    return id == TokenTable::none ? std::nullopt : std::optional(id);
  }

  // A control token, which never stands for text.
  bool is_special(std::int32_t id) const noexcept {
    return has(id) && (type(id) == TokenType::control || type(id) == TokenType::unknown);
  }

  // All that a GGUF wants to know, filled up with [PAD] tokens to the rows of the embedding.
  Vocabulary vocabulary(std::size_t padded_size = 0) const {
    Vocabulary out;
    for (std::int32_t id = 0; id < size(); ++id) {
      const bool control = control_only_in_gguf(table_[index(id)]);
      out.tokens.push_back(spelling(id));
      out.types.push_back(static_cast<int>(control ? TokenType::control : type(id)));
    }
    for (std::size_t id = out.tokens.size(); id < padded_size; ++id) {
      out.tokens.push_back(pad_token(id));
      out.types.push_back(static_cast<int>(TokenType::unused));
    }
    out.merges.reserve(merge_pairs_.size());
    for (const auto& [left, right] : merge_pairs_) out.merges.push_back(spelling(left) + " " + spelling(right));
    return out;
  }

 private:
  Tokenizer(const TokenizerParts& parts, std::string_view source) : source_(source), nfc_(parts.nfc) {
    const auto& [tokens, types, merges] = parts.vocabulary;
    if (tokens.empty()) throw Error(source_ + ": tokenizer without tokens");
    if (types.size() != tokens.size())
      throw Error(source_ + ": " + std::to_string(tokens.size()) + " tokens but " + std::to_string(types.size()) +
                  " token types");
    if (tokens.size() > std::size_t{1} << 24) throw Error(source_ + ": more than 2^24 tokens");
    std::size_t bytes = 0;
    for (const std::string& token : tokens) bytes += token.size();
    table_.reserve(tokens.size(), bytes);
    std::vector<AddedTokens::Token> added, added_normalized;
    std::unordered_set<std::string_view> known;  // the texts of both
    for (std::size_t id = 0; id < tokens.size(); ++id) {
      if (types[id] < 1 || types[id] > 6)
        throw Error(source_ + ": token " + std::to_string(id) + " has type " + std::to_string(types[id]) +
                    ", expected 1 to 6");
      const auto type = static_cast<TokenType>(types[id]);
      add_token(tokens[id], type);
      if (type == TokenType::normal || type == TokenType::byte || type == TokenType::unused || tokens[id].empty())
        continue;
      if (!known.insert(tokens[id]).second) fail_token(id, tokens[id], "occurs twice");
      const bool normalized = parts.normalized.contains(static_cast<std::int32_t>(id));
      const bool special = type != TokenType::user_defined;
      (normalized ? added_normalized : added)
          .push_back({normalized && nfc_ ? nfc(tokens[id]) : tokens[id], static_cast<std::int32_t>(id), special});
    }
    added_ = AddedTokens(std::move(added));
    added_normalized_ = AddedTokens(std::move(added_normalized));
    whole_ = std::make_unique<std::atomic<std::uint8_t>[]>(tokens.size());
    for (unsigned byte = 0; byte < 256; ++byte) {
      const char c = static_cast<char>(byte);
      byte_ids_[byte] = find_mergeable(std::string_view(&c, 1));
    }
    merges_ = MergeTable(merges.size());
    merge_pairs_.reserve(merges.size());
    for (std::size_t rank = 0; rank < merges.size(); ++rank) add_merge(merges[rank], rank);
  }

  [[noreturn]] void fail_token(std::size_t id, std::string_view token, std::string_view what) const {
    throw Error(source_ + ": token " + std::to_string(id) + " \"" + excerpt(token) + "\" " + std::string(what));
  }

  void add_token(const std::string& token, TokenType type) {
    const std::size_t id = table_.size();
    types_.push_back(type);
    if (type == TokenType::normal) {
      const auto bytes = unspell_bytes(token);
      if (!bytes)
        fail_token(id, token, "is not spelled in the byte-level alphabet, so this is not Qwen's kind of tokenizer");
      table_.add(*bytes);
      if (!table_.index_last()) fail_token(id, token, "occurs twice");
    } else if (type == TokenType::byte) {
      unsigned value = 0;
      const char* digits = token.data() + 3;
      const bool shaped = token.size() == 6 && token.starts_with("<0x") && token.ends_with(">");
      if (!shaped || std::from_chars(digits, digits + 2, value, 16).ptr != digits + 2)
        fail_token(id, token, "is not of the form <0x41>");
      table_.add(std::string(1, static_cast<char>(value)));
    } else {
      table_.add(token);
    }
  }

  void add_merge(std::string_view merge, std::size_t rank) {
    const auto fail = [&](std::string_view what) {
      throw Error(source_ + ": merge " + std::to_string(rank) + " \"" + excerpt(merge) + "\" " + std::string(what));
    };
    const std::size_t space = merge.find(' ');
    if (space == std::string_view::npos) fail("is not of the form \"a b\"");
    const auto left_bytes = unspell_bytes(merge.substr(0, space)), right_bytes = unspell_bytes(merge.substr(space + 1));
    if (!left_bytes || !right_bytes) fail("is not spelled in the byte-level alphabet");
    const std::int32_t left = find_mergeable(*left_bytes), right = find_mergeable(*right_bytes);
    const std::int32_t merged = find_mergeable(*left_bytes + *right_bytes);
    // A control token found here would let plain text produce it.
    if (left < 0 || right < 0 || merged < 0) fail("names or makes a token that the vocabulary lacks");
    const auto u32 = [](auto value) { return static_cast<std::uint32_t>(value); };
    if (!merges_.insert({u32(left), u32(right), u32(rank), u32(merged)})) fail("occurs twice");
    merge_pairs_.emplace_back(left, right);
  }

  // Tokens that BPE may work with: normal ones, and added ones that are no control tokens.
  std::int32_t find_mergeable(std::string_view bytes) const noexcept {
    if (const std::int32_t id = table_.find(bytes); id != TokenTable::none) return id;
    for (const AddedTokens* added : {&added_, &added_normalized_})
      if (const auto* token = added->find(bytes); token != nullptr && !token->special) return token->id;
    return TokenTable::none;
  }

  void encode_piece(std::string_view piece, BpeMerger& merger, std::vector<std::int32_t>& ids) const {
    // Most pieces are one token.  Whether BPE arrives at it is remembered per token, so the cache is as large as the
    // vocabulary, and threads share it without locks: whoever computes the answer computes the same one.
    enum : std::uint8_t { untried, yes, no };
    const std::int32_t whole = table_.find(piece);
    std::atomic<std::uint8_t>* memory = whole == TokenTable::none ? nullptr : &whole_[index(whole)];
    if (memory != nullptr && memory->load(std::memory_order_relaxed) == yes) return ids.push_back(whole);
    if (piece.size() >= std::size_t{1} << 32) throw Error("cannot tokenize 4 GiB without a single break");
    merger.ids.clear();
    for (const char c : piece) {
      const std::int32_t id = byte_ids_[static_cast<unsigned char>(c)];
      if (id == TokenTable::none)
        throw Error(source_ + ": the vocabulary has no token for byte " +
                    std::to_string(static_cast<unsigned>(static_cast<unsigned char>(c))) + ", which the text contains");
      merger.ids.push_back(static_cast<std::uint32_t>(id));
    }
    merger.merge();
    if (memory != nullptr) memory->store(merger.ids.size() == 1 ? yes : no, std::memory_order_relaxed);
    for (const std::uint32_t id : merger.ids) ids.push_back(static_cast<std::int32_t>(id));
  }

  // special:false in Qwen's tokenizer.json, yet type 3 (control) in every GGUF, as llama.cpp's converter takes all
  // <|...|> for control tokens.
  static bool control_only_in_gguf(std::string_view token) noexcept {
    for (const std::string_view name :
         {"<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"})
      if (token == name) return true;
    return false;
  }

  std::string spelling(std::int32_t id) const {
    const std::string_view bytes = table_[index(id)];
    if (type(id) == TokenType::normal) return spell_bytes(bytes);
    if (type(id) != TokenType::byte) return std::string(bytes);
    std::string text = "<0x";
    for (const int shift : {4, 0}) text += "0123456789ABCDEF"[static_cast<unsigned char>(bytes[0]) >> shift & 15];
    return text + ">";
  }

  static std::size_t index(std::int32_t id) noexcept { return static_cast<std::size_t>(id); }
  bool has(std::int32_t id) const noexcept { return id >= 0 && id < size(); }
  TokenType type(std::int32_t id) const noexcept { return types_[index(id)]; }

  std::string source_;
  bool nfc_;
  TokenTable table_;
  std::vector<TokenType> types_;
  AddedTokens added_, added_normalized_;  // matched in the text as it came, or after normalisation
  std::array<std::int32_t, 256> byte_ids_{};
  MergeTable merges_;
  std::vector<std::pair<std::int32_t, std::int32_t>> merge_pairs_;  // by rank
  std::unique_ptr<std::atomic<std::uint8_t>[]> whole_;
};

// Tokens in, text out, as they are generated: only whole characters leave, the same text however the tokens fall.
// One thread at a time; the tokenizer must outlive it.
class Utf8Stream {
 public:
  // With skip_special, control tokens give no text.
  explicit Utf8Stream(const Tokenizer& tokenizer, bool skip_special = false)
      : tokenizer_(&tokenizer), skip_special_(skip_special) {}

  // push() gives what the token completes, "" if a character is still open; flush() what is left at the end.
  std::string push(std::int32_t id) {
    if (skip_special_ && tokenizer_->is_special(id)) return {};
    return assembler_.push(tokenizer_->token_bytes(id));
  }
  std::string flush() { return assembler_.flush(); }

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  Utf8Assembler assembler_;
};

}  // namespace qwen3next
