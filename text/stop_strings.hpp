#pragma once
// Stop strings over streamed text.

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.hpp"

namespace qwen3next {

// Lets text through until one of the stop strings has appeared, however it was cut into pieces.  Holds back only what
// may still become a stop string.  Linear time (Knuth-Morris-Pratt, one automaton per stop string).
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops) {
    for (std::string& stop : stops) {
      if (stop.empty()) throw Error("a stop string is empty: it would end every answer before its first word");
      stops_.emplace_back(std::move(stop));
    }
  }

  // The text that may be shown now.  After a stop string has been completed: the text before it, then nothing more.
  std::string push(std::string_view text) {
    for (std::size_t i = 0; i < text.size() && !stopped_; ++i) {
      pending_ += text[i];
      std::size_t longest = 0;
      for (std::size_t s = 0; s < stops_.size(); ++s) {
        if (!stops_[s].advance(text[i])) continue;
        if (stops_[s].text.size() < longest) continue;
        longest = stops_[s].text.size();  // of several that end here, the one that began first
        stopped_ = s;
      }
      if (stopped_) pending_.resize(pending_.size() - longest);
    }
    std::size_t held = 0;
    if (!stopped_)
      for (const Stop& stop : stops_) held = std::max(held, stop.matched);
    std::string out = pending_.substr(0, pending_.size() - held);
    pending_.erase(0, out.size());
    return out;
  }

  // The end of the answer: what was held back was no stop string.
  std::string flush() {
    for (Stop& stop : stops_) stop.matched = 0;
    return std::exchange(pending_, {});
  }

  // The index of the stop string that was hit.
  std::optional<std::size_t> stopped() const noexcept { return stopped_; }

 private:
  struct Stop {
    std::string text;
    std::vector<std::size_t> border;  // border[i]: longest proper prefix of text[0..i] that is also its suffix
    std::size_t matched = 0;

    explicit Stop(std::string stop) : text(std::move(stop)), border(text.size(), 0) {
      for (std::size_t i = 1, k = 0; i < text.size(); ++i) {
        while (k > 0 && text[i] != text[k]) k = border[k - 1];
        if (text[i] == text[k]) ++k;
        border[i] = k;
      }
    }

    // True when `c` completes the string.
    bool advance(char c) noexcept {
      while (matched > 0 && text[matched] != c) matched = border[matched - 1];
      if (text[matched] == c) ++matched;
      return matched == text.size();
    }
  };

  std::vector<Stop> stops_;
  std::string pending_;
  std::optional<std::size_t> stopped_;
};

}  // namespace qwen3next
