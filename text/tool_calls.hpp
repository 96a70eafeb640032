#pragma once
// Takes a model's answer apart while it streams: reasoning, content, tool calls.
//
// Two spellings of a tool call are understood:
//   <tool_call>\n{"name": "f", "arguments": {..}}\n</tool_call>                                        (Instruct,
//   Thinking) <tool_call>\n<function=f>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call> (Coder)
// What only looks like one stays text.  The events do not depend on how the text was cut into pieces (neighbouring text
// events of one kind taken together), and nothing is held back but what may still become a tag.

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "text/chat_template.hpp"
#include "text/python_json.hpp"
#include "text/tool_call_syntax.hpp"

namespace qwen3next {

// A piece of an answer, or a whole tool call.
struct AnswerEvent {
  enum Kind { reasoning, content, tool_call };
  Kind kind;
  std::string text;  // of reasoning and content
  ToolCall call;     // of tool_call
};

class AnswerParser {
 public:
  // `tools` (as given to ChatTemplate::render) types the values of Coder's calls.  With `tool_calls` false, calls stay
  // content as they stand.
  explicit AnswerParser(TemplateKind kind, ordered_json tools = nullptr, bool tool_calls = true)
      : tools_(std::move(tools)),
        tool_calls_(tool_calls),
        state_(kind == TemplateKind::thinking ? State::before_reasoning : State::content) {}

  std::vector<AnswerEvent> push(std::string_view text) {
    buffer_ += text;
    return drain();
  }

  // The end of the answer: what was held back comes out, as what it has turned out to be.
  std::vector<AnswerEvent> finish() {
    finished_ = true;
    return drain();
  }

 private:
  enum class State { before_reasoning, reasoning, content, json_call, function_call, after_function };
  static constexpr std::string_view tool_open = "<tool_call>", tool_close = "</tool_call>";
  static constexpr std::string_view think_open = "<think>", think_close = "</think>";
  static constexpr std::string_view function_open = "<function=", function_close = "</function>";
  static constexpr std::string_view parameter_open = "<parameter=", parameter_close = "</parameter>";

  std::vector<AnswerEvent> drain() {
    while (step()) {
    }
    buffer_.erase(0, begin_);
    scan_ -= std::min(scan_, begin_);
    begin_ = 0;
    if (finished_) {
      if (state_ == State::reasoning)
        emit(AnswerEvent::reasoning, std::string(newlines_, '\n'));
      else if (!after_call_)
        emit(AnswerEvent::content, held_);
      newlines_ = 0;
      held_.clear();
    }
    return std::exchange(events_, {});
  }

  // Does one thing; false when more text is needed.
  bool step() {
    switch (state_) {
      case State::before_reasoning:
        return before_reasoning();
      case State::reasoning:
        return in_reasoning();
      case State::content:
        return in_content();
      case State::json_call:
        return in_json_call();
      case State::function_call:
        return in_function_call();
      case State::after_function:
        return after_function();
    }
    return false;
  }

  std::string_view rest() const { return std::string_view(buffer_).substr(begin_); }

  enum class Match { no, maybe, yes };
  // Whether `tag` stands at `pos` of `text`; maybe: its beginning does, then the text ends.
  Match match(std::string_view text, std::size_t pos, std::string_view tag) const {
    const std::string_view here = text.substr(std::min(pos, text.size()), tag.size());
    if (here == tag) return Match::yes;
    return !finished_ && tag.starts_with(here) ? Match::maybe : Match::no;
  }

  // The prompt ended with <think>; a model that says it once more is forgiven.
  bool before_reasoning() {
    const std::string_view text = rest();
    const std::size_t begin = text.find_first_not_of(" \n");
    const std::size_t spaces = std::min(begin, text.size());
    const Match open = spaces <= 64 ? match(text, spaces, think_open) : Match::no;
    if (open == Match::maybe) return false;
    if (open == Match::yes) begin_ += spaces + think_open.size();
    state_ = State::reasoning;
    return true;
  }

  bool in_reasoning() {
    const std::string_view text = rest();
    for (std::size_t pos = text.find('<'); pos != std::string_view::npos; pos = text.find('<', pos + 1)) {
      const Match close = match(text, pos, think_close);
      if (close == Match::no) continue;
      emit_reasoning(text.substr(0, pos));
      begin_ += pos;
      if (close == Match::maybe) return false;
      begin_ += think_close.size();
      newlines_ = 0;
      strip_newlines_ = true;
      state_ = State::content;
      return true;
    }
    emit_reasoning(text);
    begin_ = buffer_.size();
    return false;
  }

  bool in_content() {
    const std::string_view text = rest();
    for (std::size_t pos = tool_calls_ ? text.find('<') : text.npos; pos != text.npos; pos = text.find('<', pos + 1)) {
      const Match tool = match(text, pos, tool_open), function = match(text, pos, function_open);
      if (tool == Match::no && function == Match::no) continue;
      emit_content(text.substr(0, pos));
      begin_ += pos;
      if (tool != Match::yes && function != Match::yes) return false;
      scan_ = begin_ + (tool == Match::yes ? tool_open : function_open).size();
      state_ = tool == Match::yes ? State::json_call : State::function_call;
      body_ = scan_ - begin_;
      stage_ = Stage::start;
      return true;
    }
    emit_content(text);
    begin_ = buffer_.size();
    return false;
  }

  // From here on the block stays in the buffer, begin_ at its first tag, until it is known to be a call or text.

  bool in_json_call() {
    const std::string_view text = rest();
    std::size_t pos = scan_ - begin_;
    const auto wait = [&] { return scan_ = begin_ + pos, false; };
    if (stage_ == Stage::start) {
      while (pos < text.size() && is_jinja_space(text[pos])) ++pos;
      const Match function = match(text, pos, function_open);
      if (function == Match::maybe) return wait();
      if (function == Match::yes) {
        body_ = pos + function_open.size();
        scan_ = begin_ + body_;
        state_ = State::function_call;
        return true;
      }
      // Only an object can be a call: "the <tool_call> tag" in a sentence streams on.
      if (pos >= text.size() || text[pos] != '{') return reject(tool_open.size());
      stage_ = Stage::outside;
    }
    // Tags inside a JSON string are part of an argument, unless the string is broken (a raw line break) anyway.
    for (; pos < text.size(); ++pos) {
      const char c = text[pos];
      if (stage_ == Stage::string) {
        if (c == '\\') {
          if (pos + 1 >= text.size()) return finished_ ? finish_json_call() : wait();
          ++pos;
        } else if (c == '"') {
          stage_ = Stage::outside;
        } else if (static_cast<unsigned char>(c) < 0x20) {
          stage_ = Stage::broken;
        }
      } else if (c == '"' && stage_ == Stage::outside) {
        stage_ = Stage::string;
      } else if (c == '<') {
        const Match close = match(text, pos, tool_close), open = match(text, pos, tool_open);
        if (close == Match::yes || open == Match::yes) {
          const std::size_t end = close == Match::yes ? pos + tool_close.size() : pos;
          auto call = parse_json_call(text.substr(body_, pos - body_));
          return call ? accept(std::move(*call), end, State::content) : reject(end);
        }
        if (close == Match::maybe || open == Match::maybe) return wait();
      }
    }
    return finished_ ? finish_json_call() : wait();
  }

  // The closing tag never came; a complete object counts all the same.
  bool finish_json_call() {
    auto call = parse_json_call(rest().substr(body_));
    return call ? accept(std::move(*call), rest().size(), State::content) : reject(rest().size());
  }

  bool in_function_call() {
    const std::string_view text = rest();
    std::size_t pos = scan_ - begin_;
    const auto wait = [&] { return scan_ = begin_ + pos, false; };
    if (stage_ == Stage::start) {
      for (; pos < text.size() && text[pos] != '>'; ++pos)
        if (pos - body_ >= 128 || std::string_view(" \n\t\r<\"'").find(text[pos]) != text.npos) return reject(body_);
      if (pos >= text.size()) return finished_ ? reject(text.size()) : wait();
      if (pos == body_) return reject(body_);
      ++pos;
      stage_ = Stage::named;
    }
    if (stage_ == Stage::named) {  // "<function=f> is .." in a sentence streams on
      while (pos < text.size() && is_jinja_space(text[pos])) ++pos;
      if (pos >= text.size()) return finished_ ? reject(text.size()) : wait();
      if (text[pos] != '<') return reject(body_);
      stage_ = Stage::outside;
    }
    for (; (pos = std::min(text.find('<', pos), text.size())) < text.size(); ++pos) {
      const auto here = [&](std::string_view tag) { return match(text, pos, tag); };
      if (stage_ == Stage::string) {  // inside a value: its own closing tag, or the end of it all
        if (here(parameter_close) == Match::yes) stage_ = Stage::outside;
        if (lenient_ && here(function_close) == Match::yes) return end_function(pos, pos + function_close.size());
        const Match end = end_of_call(text, pos);
        if (end == Match::yes) return end_function(pos, pos + function_close.size());
        if (end == Match::maybe || here(parameter_close) == Match::maybe) return wait();
      } else {
        if (here(function_close) == Match::yes) return end_function(pos, pos + function_close.size());
        if (here(tool_close) == Match::yes) return end_function(pos, pos);
        if (here(tool_open) == Match::yes) return reject(pos);
        if (here(parameter_open) == Match::yes) stage_ = Stage::string;
        for (const std::string_view tag : {function_close, tool_close, tool_open, parameter_open})
          if (here(tag) == Match::maybe) return wait();
      }
    }
    if (!finished_) return wait();
    // A value was never closed: now any </function> ends its call, for this block and, so that they are not all read to
    // the end in vain, for those behind it.
    lenient_ = true;
    const std::size_t close = text.find(function_close, body_);
    return close == text.npos ? reject(text.size()) : end_function(close, close + function_close.size());
  }

  // </function></tool_call>, which ends a call even inside a value that was never closed.
  Match end_of_call(std::string_view text, std::size_t pos) const {
    const Match function = match(text, pos, function_close);
    if (function != Match::yes) return function;
    pos += function_close.size();
    for (int spaces = 0; spaces < 16 && pos < text.size() && is_jinja_space(text[pos]); ++spaces) ++pos;
    return match(text, pos, tool_close);
  }

  bool end_function(std::size_t body_end, std::size_t end) {
    return accept(parse_function_call(rest().substr(body_, body_end - body_), tools_), end, State::after_function);
  }

  // Coder may or may not close what it may or may not have opened.
  bool after_function() {
    const std::string_view text = rest();
    std::size_t pos = 0;
    while (pos < text.size() && is_jinja_space(text[pos])) ++pos;
    held_ += text.substr(0, pos);
    begin_ += pos;
    const Match close = match(text, pos, tool_close);
    if (close == Match::maybe) return false;
    if (close == Match::yes) {
      begin_ += tool_close.size();
      held_.clear();
    }
    state_ = State::content;
    return true;
  }

  // The block was a call: the white space around it was layout.
  bool accept(ToolCall call, std::size_t size, State next) {
    events_.push_back({AnswerEvent::tool_call, {}, std::move(call)});
    held_.clear();
    after_call_ = true;
    strip_newlines_ = false;
    begin_ += size;
    state_ = next;
    return true;
  }

  // The block was none: `size` bytes of it are text, what follows is looked at afresh.
  bool reject(std::size_t size) {
    emit_content(rest().substr(0, size));
    begin_ += size;
    state_ = State::content;
    return true;
  }

  // Reasoning loses the line breaks at both ends, which belong to the template.
  void emit_reasoning(std::string_view text) {
    if (!reasoning_started_) text = detail::lstrip_newlines(text);
    const std::string_view body = detail::rstrip_newlines(text);
    if (!body.empty()) {
      emit(AnswerEvent::reasoning, std::string(newlines_, '\n') += body);
      newlines_ = 0;
      reasoning_started_ = true;
    }
    newlines_ += text.size() - body.size();
  }

  // Content loses the line breaks after </think>, the one before a call, and white space between and after calls: all
  // that the template puts there.  Such space waits in held_ until it is clear what follows.
  void emit_content(std::string_view text) {
    if (strip_newlines_) text = detail::lstrip_newlines(text);
    if (text.empty()) return;
    strip_newlines_ = false;
    if (after_call_) {
      const auto is_space = [](char c) { return is_jinja_space(c); };
      const auto begin = std::find_if_not(text.begin(), text.end(), is_space);
      held_.append(text.begin(), begin);
      text.remove_prefix(static_cast<std::size_t>(begin - text.begin()));
      if (text.empty()) return;
      after_call_ = false;
    }
    std::string out = std::exchange(held_, {});
    out += text;
    if (tool_calls_ && out.ends_with('\n')) {
      out.pop_back();
      held_ = "\n";
    }
    emit(AnswerEvent::content, out);
  }

  void emit(AnswerEvent::Kind kind, std::string_view text) {
    if (text.empty()) return;
    if (events_.empty() || events_.back().kind != kind) events_.push_back({kind, {}, {}});
    events_.back().text += text;
  }

  static bool is_jinja_space(char c) noexcept { return detail::is_jinja_space(c); }

  ordered_json tools_;
  bool tool_calls_;
  State state_;
  bool finished_ = false;
  bool lenient_ = false;  // about unclosed values in Coder's calls

  std::string buffer_;
  std::size_t begin_ = 0;  // of what has not been dealt with
  std::size_t scan_ = 0;   // inside a block: how far it has been read
  std::size_t body_ = 0;   // inside a block: where its content begins, counted from begin_
  enum class Stage { start, named, outside, string, broken } stage_ = Stage::start;

  bool reasoning_started_ = false;
  std::size_t newlines_ = 0;     // at the end of the reasoning so far
  bool strip_newlines_ = false;  // content begins after </think>
  bool after_call_ = false;      // nothing but white space since a call
  std::string held_;
  std::vector<AnswerEvent> events_;
};

}  // namespace qwen3next
