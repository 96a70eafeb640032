#pragma once
// JSON as Python reads and writes it.  Chat templates print tools and arguments through Python's json.dumps, and the
// model was trained on exactly that: ", " and ": ", keys in order, non-ASCII kept, 1e-05, 1.0, integers of any size.

#include <utf8proc.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "core/json.hpp"
#include "text/utf8.hpp"

namespace qwen3next {

using nlohmann::ordered_json;

inline constexpr std::size_t max_json_depth = 500;  // everything that recurses over JSON stops here

// What to do with an integer that fits neither int64 nor uint64.  `exact` keeps its digits, as a `binary` value (which
// JSON text cannot contain) that dump_python writes back; `rounded` makes it a double, as nlohmann::json does.
enum class BigInt { exact, rounded };

// The start of `text`, on one line, for an error message.
inline std::string excerpt(std::string_view text, std::size_t limit = 60) {
  std::string out;
  for (std::size_t pos = 0; pos < text.size();) {
    if (out.size() >= limit) return out + "...";
    const Decoded d = decode_utf8(text, pos);
    if (!d.ok())
      out += "?";
    else if (d.code < 0x20 || d.code == 0x7F)
      out += ' ';
    else
      out += text.substr(pos, d.size);
    pos += d.size;
  }
  return out;
}

// An object being filled: finds existing keys without scanning all of them, so that a hostile object of n keys costs
// n, not n^2, comparisons.  As in Python, a repeated key keeps its first place and its last value.
class ObjectFiller {
 public:
  explicit ObjectFiller(ordered_json& object) : object_(&object) {}

  ordered_json& slot(const std::string& key) {
    auto& members = object_->get_ref<ordered_json::object_t&>();
    if (members.size() < 16) return members[key];
    if (index_.empty())
      for (std::size_t i = 0; i < members.size(); ++i) index_.emplace(members.begin()[static_cast<std::ptrdiff_t>(i)].first, i);
    const auto [it, is_new] = index_.try_emplace(key, members.size());
    if (is_new) members.emplace_back(key, nullptr);
    return members.begin()[static_cast<std::ptrdiff_t>(it->second)].second;
  }

 private:
  ordered_json* object_;
  std::unordered_map<std::string, std::size_t> index_;
};

// Builds an ordered_json from nlohmann's SAX events.
class JsonBuilder final : public nlohmann::json_sax<nlohmann::json> {
 public:
  JsonBuilder(std::string what, BigInt big_int) : what_(std::move(what)), big_int_(big_int) {}

  ordered_json result;

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(std::int64_t value) override { return put(value); }
  bool number_unsigned(std::uint64_t value) override { return put(value); }
  bool number_float(double value, const std::string& digits) override {
    if (big_int_ == BigInt::exact && digits.find_first_of(".eE") == std::string::npos)
      return put(ordered_json::binary(std::vector<std::uint8_t>(digits.begin(), digits.end())));
    return put(value);
  }
  bool string(std::string& value) override { return put(std::move(value)); }
  bool binary(ordered_json::binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(ordered_json::object()); }
  bool start_array(std::size_t) override { return open(ordered_json::array()); }
  bool key(std::string& key) override {
    slot_ = &open_.back().filler.slot(key);
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  [[noreturn]] bool parse_error(std::size_t position, const std::string&,
                                const nlohmann::json::exception& error) override {
    throw Error(what_ + ": not valid JSON at byte " + std::to_string(position) + ": " + excerpt(error.what(), 200));
  }

 private:
  struct Level {
    ordered_json* node;
    ObjectFiller filler;
  };

  ordered_json& place(ordered_json value) {
    if (open_.empty()) return result = std::move(value);
    ordered_json& parent = *open_.back().node;
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return parent.back();
    }
    return *slot_ = std::move(value);
  }
  bool put(ordered_json value) {
    place(std::move(value));
    return true;
  }
  bool open(ordered_json value) {
    if (open_.size() >= max_json_depth)
      throw Error(what_ + ": JSON nested deeper than " + std::to_string(max_json_depth) + " levels");
    ordered_json& node = place(std::move(value));
    // The pointer stays good: while a child is open nothing is added to its parents.
    open_.push_back({&node, ObjectFiller(node)});
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  std::string what_;
  BigInt big_int_;
  std::vector<Level> open_;
  ordered_json* slot_ = nullptr;
};

// `what` names the text in errors ("messages.json").
inline ordered_json parse_json(std::string_view text, std::string_view what, BigInt big_int = BigInt::exact) {
  JsonBuilder builder{std::string(what), big_int};
  read_json_events(text, builder);
  return std::move(builder.result);
}

// Python's repr(float): the shortest digits that read back the same; exponent form below 1e-4 and from 1e16.
inline std::string python_float(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::array<char, 64> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::scientific);
  const std::string_view text(buffer.data(), static_cast<std::size_t>(end.ptr - buffer.data()));
  const std::size_t e = text.find('e');
  int exponent = 0;
  std::from_chars(text.data() + e + (text[e + 1] == '+' ? 2 : 1), text.data() + text.size(), exponent);
  std::string sign, digits;
  for (const char c : text.substr(0, e)) {
    if (c == '-')
      sign = "-";
    else if (c != '.')
      digits += c;
  }
  const auto count = [](int n) { return static_cast<std::size_t>(n); };
  if (exponent < -4 || exponent >= 16) {
    const std::string mantissa = digits.size() > 1 ? digits.substr(0, 1) + "." + digits.substr(1) : digits;
    const std::string power = std::to_string(std::abs(exponent));
    return sign + mantissa + (exponent < 0 ? "e-" : "e+") + (power.size() < 2 ? "0" : "") + power;
  }
  if (exponent < 0) return sign + "0." + std::string(count(-exponent - 1), '0') + digits;
  if (digits.size() <= count(exponent) + 1)
    return sign + digits + std::string(count(exponent) + 1 - digits.size(), '0') + ".0";
  return sign + digits.substr(0, count(exponent) + 1) + "." + digits.substr(count(exponent) + 1);
}

namespace detail {

inline void append_hex(std::string& out, char32_t code, int digits) {
  for (int shift = 4 * (digits - 1); shift >= 0; shift -= 4) out += "0123456789abcdef"[code >> shift & 15];
}

inline void append_json_string(std::string& out, std::string_view text) {
  out += '"';
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\b':
        out += "\\b";
        break;
      case '\f':
        out += "\\f";
        break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20) {
          out += c;
        } else {
          out += "\\u";
          append_hex(out, static_cast<unsigned char>(c), 4);
        }
    }
  }
  out += '"';
}

// repr(str): single quotes unless only those occur inside, and \x \u \U for what str.isprintable() denies.
inline void append_python_repr(std::string& out, std::string_view text) {
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  out += quote;
  for (std::size_t pos = 0; pos < text.size();) {
    const Decoded d = decode_utf8(text, pos);
    const std::string_view bytes = text.substr(pos, d.size);
    pos += d.size;
    if (d.code == '\n')
      out += "\\n";
    else if (d.code == '\r')
      out += "\\r";
    else if (d.code == '\t')
      out += "\\t";
    else if (d.code == '\\' || d.code == static_cast<unsigned char>(quote))
      (out += '\\') += bytes;
    else if (!d.ok() || d.code == ' ')
      out += bytes;
    else {
      const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(d.code));
      const bool printable = category != UTF8PROC_CATEGORY_CN && category < UTF8PROC_CATEGORY_ZS;
      if (printable)
        out += bytes;
      else if (d.code < 0x100)
        append_hex(out += "\\x", d.code, 2);
      else if (d.code < 0x10000)
        append_hex(out += "\\u", d.code, 4);
      else
        append_hex(out += "\\U", d.code, 8);
    }
  }
  out += quote;
}

enum class PythonStyle { json, repr };  // json.dumps(ensure_ascii=False), or repr()

inline void append_python(std::string& out, const ordered_json& value, PythonStyle style, std::size_t depth) {
  if (depth > max_json_depth)
    throw Error("cannot print JSON nested deeper than " + std::to_string(max_json_depth) + " levels");
  const bool json = style == PythonStyle::json;
  const auto string = [&](std::string_view text) {
    if (json)
      append_json_string(out, text);
    else
      append_python_repr(out, text);
  };
  switch (value.type()) {
    case ordered_json::value_t::null:
      out += json ? "null" : "None";
      break;
    case ordered_json::value_t::boolean:
      if (value.get<bool>())
        out += json ? "true" : "True";
      else
        out += json ? "false" : "False";
      break;
    case ordered_json::value_t::number_integer:
      out += std::to_string(value.get<std::int64_t>());
      break;
    case ordered_json::value_t::number_unsigned:
      out += std::to_string(value.get<std::uint64_t>());
      break;
    case ordered_json::value_t::number_float: {
      const double number = value.get<double>();
      if (json && std::isnan(number))
        out += "NaN";
      else if (json && std::isinf(number))
        out += number < 0 ? "-Infinity" : "Infinity";
      else
        out += python_float(number);
      break;
    }
    case ordered_json::value_t::binary:  // the digits of a big integer, see BigInt
      out.append(value.get_binary().begin(), value.get_binary().end());
      break;
    case ordered_json::value_t::string:
      string(value.get_ref<const std::string&>());
      break;
    case ordered_json::value_t::array: {
      out += '[';
      bool first = true;
      for (const ordered_json& item : value) {
        if (!std::exchange(first, false)) out += ", ";
        append_python(out, item, style, depth + 1);
      }
      out += ']';
      break;
    }
    case ordered_json::value_t::object: {
      out += '{';
      bool first = true;
      for (const auto& [key, item] : value.get_ref<const ordered_json::object_t&>()) {
        if (!std::exchange(first, false)) out += ", ";
        string(key);
        out += ": ";
        append_python(out, item, style, depth + 1);
      }
      out += '}';
      break;
    }
    default:
      throw Error("cannot print a discarded JSON value");
  }
}

}  // namespace detail

// json.dumps(value, ensure_ascii=False)
inline std::string dump_python(const ordered_json& value) {
  std::string out;
  detail::append_python(out, value, detail::PythonStyle::json, 0);
  return out;
}

// str(value)
inline std::string python_str(const ordered_json& value) {
  if (value.is_string()) return value.get<std::string>();
  std::string out;
  detail::append_python(out, value, detail::PythonStyle::repr, 0);
  return out;
}

}  // namespace qwen3next
