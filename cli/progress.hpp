#pragma once
// How far long work has come, on stderr: one line that is rewritten on a terminal, now and then a line elsewhere.

#include <chrono>
#include <cstdint>
#include <iostream>
#include <string>
#include <utility>

#include "cli/format.hpp"
#include "cli/terminal.hpp"

namespace qwen3next::cli {

class Progress {
 public:
  enum class Unit { tokens, bytes };

  Progress(std::string what, Unit unit, bool shown = true)
      : what_(std::move(what)), unit_(unit), shown_(shown), terminal_(is_terminal(stderr)) {}
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(std::int64_t done, std::int64_t total) {
    const double now = seconds();
    if (begun_ < 0) begun_ = done;  // what was there before has no rate
    // Nothing for work that is over at once; a log file wants few lines.
    if (!shown_ || now < next_) return;
    next_ = now + (terminal_ ? 0.1 : 10);
    const double rate = static_cast<double>(done - begun_) / now;
    std::string line = what_ + " " + amount(done) + " / " + amount(total);
    if (total > 0) line += format(" (%.0f %%)", 100. * static_cast<double>(done) / static_cast<double>(total));
    if (done > begun_) {
      line += unit_ == Unit::tokens ? ", " + rate_text(rate) + " t/s" : ", " + bytes_text(rate) + "/s";
      line += ", " + duration_text(static_cast<double>(total - done) / rate) + " left";
    }
    if (terminal_) {
      std::cerr << '\r' << line << "\x1b[K" << std::flush;
      drawn_ = true;
    } else {
      std::cerr << line << std::endl;
    }
  }

  // Makes room for other output.
  void clear() {
    if (std::exchange(drawn_, false)) std::cerr << "\r\x1b[K" << std::flush;
  }

  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::string amount(std::int64_t n) const {
    return unit_ == Unit::tokens ? count_text(n) : bytes_text(static_cast<double>(n));
  }

  std::string what_;
  Unit unit_;
  bool shown_, terminal_;
  bool drawn_ = false;
  std::int64_t begun_ = -1;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double next_ = is_terminal(stderr) ? 0.5 : 10;
};

}  // namespace qwen3next::cli
