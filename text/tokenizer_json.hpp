#pragma once
// Reads tokenizer.json (Hugging Face `tokenizers`) and refuses whatever the tokenizer here would not reproduce.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "core/json.hpp"
#include "text/pretokenizer.hpp"
#include "text/python_json.hpp"
#include "text/vocabulary.hpp"

namespace qwen3next {

struct TokenizerParts {
  Vocabulary vocabulary;
  bool nfc = true;
  std::unordered_set<std::int32_t> normalized;  // added tokens to be matched after normalisation
};

inline std::string pad_token(std::size_t id) { return "[PAD" + std::to_string(id) + "]"; }

namespace detail {

// Takes the two long lists, model.vocab and model.merges, straight from the parser (a DOM of them would take longer
// than all the rest) and builds everything else as usual.
class TokenizerSax final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit TokenizerSax(std::string file) : file_(file), builder_(std::move(file), BigInt::rounded) {}

  std::vector<std::pair<std::string, std::int64_t>> vocab;
  std::vector<std::string> merges;
  ordered_json& rest() { return builder_.result; }

  bool null() override { return list_ == List::none ? builder_.null() : misplaced(); }
  bool boolean(bool value) override { return list_ == List::none ? builder_.boolean(value) : misplaced(); }
  bool number_integer(std::int64_t value) override {
    return list_ == List::none ? builder_.number_integer(value) : misplaced();
  }
  bool number_unsigned(std::uint64_t value) override {
    if (list_ == List::none) return builder_.number_unsigned(value);
    if (list_ != List::vocab || depth_ != 3 || value > std::numeric_limits<std::int32_t>::max()) return misplaced();
    vocab.emplace_back(std::move(key_), value);
    return true;
  }
  bool number_float(double value, const std::string& digits) override {
    return list_ == List::none ? builder_.number_float(value, digits) : misplaced();
  }
  bool string(std::string& value) override {
    if (list_ == List::none) return builder_.string(value);
    if (list_ != List::merges) return misplaced();
    if (depth_ == 3) {
      merges.push_back(std::move(value));
    } else if (depth_ == 4) {  // ["a", "b"], the newer form
      if (++parts_ > 2 || value.find(' ') != std::string::npos) return misplaced();
      if (parts_ == 1)
        merges.push_back(value + " ");
      else
        merges.back() += value;
    } else {
      return misplaced();
    }
    return true;
  }
  bool binary(nlohmann::json::binary_t&) override { return false; }

  bool start_object(std::size_t size) override {
    return open(List::vocab, [&] { return builder_.start_object(size); });
  }
  bool end_object() override {
    return close([&] { return builder_.end_object(); });
  }
  bool start_array(std::size_t size) override {
    return open(List::merges, [&] { return builder_.start_array(size); });
  }
  bool end_array() override {
    return close([&] { return builder_.end_array(); });
  }
  bool key(std::string& key) override {
    if (list_ == List::vocab) {
      key_ = std::move(key);
      return true;
    }
    if (list_ != List::none) return misplaced();
    if (depth_ == 1) in_model_ = key == "model";
    const bool inside = in_model_ && depth_ == 2;
    next_ = inside && key == "vocab" ? List::vocab : inside && key == "merges" ? List::merges : List::none;
    return builder_.key(key);
  }
  bool parse_error(std::size_t position, const std::string& token, const nlohmann::json::exception& error) override {
    return builder_.parse_error(position, token, error);
  }

 private:
  enum class List { none, vocab, merges };

  template <class Forward>
  bool open(List kind, Forward&& forward) {
    ++depth_;
    if (list_ == List::none && (next_ != kind || depth_ != 3)) return next_ = List::none, forward();
    if (list_ == List::none)
      list_ = kind;
    else if (list_ != List::merges || kind != List::merges || depth_ != 4)
      return misplaced();
    parts_ = 0;
    return true;
  }
  template <class Forward>
  bool close(Forward&& forward) {
    --depth_;
    if (list_ == List::none) return forward();
    if (depth_ == 3 && parts_ != 2) return misplaced();
    if (depth_ == 2) {
      list_ = next_ = List::none;
      builder_.null();  // keeps the key, with nothing in it
    }
    return true;
  }
  [[noreturn]] bool misplaced() const {
    if (list_ == List::vocab) throw Error(file_ + ": model.vocab must map tokens to ids from 0 to 2^31 - 1");
    throw Error(file_ + ": model.merges must list pairs of tokens");
  }

  std::string file_;
  JsonBuilder builder_;
  std::string key_;
  std::size_t depth_ = 0;
  int parts_ = 0;
  bool in_model_ = false;
  List list_ = List::none, next_ = List::none;
};

// Tests of single settings; an absent key is null.
class TokenizerChecks {
 public:
  TokenizerChecks(const ordered_json& root, std::string file) : root_(root), file_(std::move(file)) {}

  const ordered_json& at(const char* pointer) const {
    static const ordered_json null;
    const ordered_json::json_pointer p(pointer);
    return root_.contains(p) ? root_.at(p) : null;
  }
  void expect(const char* pointer, bool ok, const std::string& expected) const {
    if (!ok)
      throw Error(file_ + ": " + pointer + " is " + excerpt(dump_python(at(pointer)), 120) + ", expected " + expected);
  }
  void expect_value(const char* pointer, const ordered_json& value) const {
    expect(pointer, at(pointer) == value, dump_python(value));
  }
  // Absent, null, false, "" and 0 all mean that the feature is off.
  void expect_off(const char* pointer) const {
    const ordered_json& v = at(pointer);
    expect(pointer, v.is_null() || v == false || v == "" || v == 0, "null");
  }

 private:
  const ordered_json& root_;
  std::string file_;
};

// Returns whether text is to be normalised.
inline bool read_settings(const TokenizerChecks& checks) {
  checks.expect_value("/model/type", "BPE");
  // TokenizerSax leaves null where it has read the lists.
  checks.expect("/model/vocab", checks.at("/model/vocab").is_null(), "a map from tokens to ids");
  checks.expect("/model/merges", checks.at("/model/merges").is_null(), "a list of pairs of tokens");
  for (const char* off : {"/model/dropout", "/model/continuing_subword_prefix", "/model/end_of_word_suffix",
                          "/model/byte_fallback", "/model/ignore_merges"})
    checks.expect_off(off);
  checks.expect_value("/pre_tokenizer/type", "Sequence");
  const ordered_json& steps = checks.at("/pre_tokenizer/pretokenizers");
  checks.expect("/pre_tokenizer/pretokenizers", steps.is_array() && steps.size() == 2, "a Split and a ByteLevel step");
  checks.expect_value("/pre_tokenizer/pretokenizers/0/type", "Split");
  checks.expect_value("/pre_tokenizer/pretokenizers/0/pattern/Regex", std::string(qwen_split_pattern));
  checks.expect_value("/pre_tokenizer/pretokenizers/0/behavior", "Isolated");
  checks.expect_off("/pre_tokenizer/pretokenizers/0/invert");
  checks.expect_value("/pre_tokenizer/pretokenizers/1/type", "ByteLevel");
  checks.expect_off("/pre_tokenizer/pretokenizers/1/add_prefix_space");
  checks.expect_value("/pre_tokenizer/pretokenizers/1/use_regex", false);
  for (const char* step : {"/post_processor/type", "/decoder/type"})
    checks.expect(step, checks.at(step).is_null() || checks.at(step) == "ByteLevel", "\"ByteLevel\" or nothing");
  const ordered_json& normalizer = checks.at("/normalizer");
  if (normalizer.is_null()) return false;
  const bool sequence = checks.at("/normalizer/type") == "Sequence";
  checks.expect_value(sequence ? "/normalizer/normalizers/0/type" : "/normalizer/type", "NFC");
  if (sequence) checks.expect("/normalizer", normalizer["normalizers"].size() == 1, "NFC alone");
  return true;
}

}  // namespace detail

inline TokenizerParts read_tokenizer_json(std::string_view json, std::string_view file) {
  const std::string name(file);
  detail::TokenizerSax sax(name);
  read_json_events(json, sax);
  if (!sax.rest().is_object()) throw Error(name + ": not a tokenizer.json, expected an object");
  const ordered_json& root = sax.rest();

  TokenizerParts parts;
  const detail::TokenizerChecks checks(root, name);
  parts.nfc = detail::read_settings(checks);
  parts.vocabulary.merges = std::move(sax.merges);
  std::vector<std::string>& tokens = parts.vocabulary.tokens;
  std::vector<std::int32_t>& types = parts.vocabulary.types;

  // The table has a row per id; a file must not make it much larger than what it holds.
  const ordered_json& added = checks.at("/added_tokens");
  const std::size_t limit = 2 * (sax.vocab.size() + added.size()) + 65536;
  const auto row = [&](std::size_t id, std::string_view token) {
    if (id >= limit)
      throw Error(name + ": token \"" + excerpt(token) + "\" has id " + std::to_string(id) + ", far beyond the " +
                  std::to_string(sax.vocab.size()) + " tokens of the vocabulary");
    for (std::size_t next = tokens.size(); next <= id; ++next) {
      tokens.push_back(pad_token(next));
      types.push_back(static_cast<int>(TokenType::unused));
    }
    return id;
  };
  tokens.reserve(sax.vocab.size() + added.size());
  for (auto& [token, id] : sax.vocab) {
    const std::size_t i = row(static_cast<std::size_t>(id), token);
    if (types[i] != static_cast<int>(TokenType::unused))
      throw Error(name + ": tokens \"" + excerpt(tokens[i]) + "\" and \"" + excerpt(token) + "\" share id " +
                  std::to_string(id));
    tokens[i] = std::move(token);
    types[i] = static_cast<int>(TokenType::normal);
  }

  for (const ordered_json& entry : added) {
    const auto flag = [&](const char* key) { return entry.contains(key) && entry[key] == true; };
    if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_unsigned() ||
        !entry.contains("content") || !entry["content"].is_string())
      throw Error(name + ": added_tokens has an entry without id and content: " + excerpt(dump_python(entry)));
    const std::string content = entry["content"];
    for (const char* key : {"single_word", "lstrip", "rstrip"})
      if (flag(key))
        throw Error(name + ": added token \"" + excerpt(content) + "\" has " + key + " set, not supported");
    if (content.empty()) continue;  // matches nothing
    const std::size_t id = row(entry["id"].get<std::size_t>(), content);
    if (types[id] != static_cast<int>(TokenType::unused) && tokens[id] != content)
      throw Error(name + ": added token \"" + excerpt(content) + "\" has the id of \"" + excerpt(tokens[id]) + "\"");
    tokens[id] = content;
    types[id] = static_cast<int>(flag("special") ? TokenType::control : TokenType::user_defined);
    if (flag("normalized")) parts.normalized.insert(static_cast<std::int32_t>(id));
  }
  return parts;
}

}  // namespace qwen3next
