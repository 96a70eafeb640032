#pragma once
// Experts that are not on the card: what they cost where, and so which way they go.  Plain arithmetic.

#include <algorithm>
#include <cmath>

namespace qwen3next::cuda {

// How the experts that rows miss are brought together with these.
enum class OffloadWay {
  measured,   // whichever is estimated sooner
  processor,  // rows go to the processor, which computes where the experts are
  copy,       // the experts that are picked come to the card
  stream      // all of the layer's come, wave by wave; nobody waits to know which are picked
};

// What a pass of `rows` rows needs in a layer, on average.
struct MissedExperts {
  double experts;  // different ones, of `missing` that are not on the card
  double picks;    // each by so many rows in all
};
inline MissedExperts missed_experts(int rows, double picks_per_row, double missing) noexcept {
  if (missing <= 0) return {0, 0};
  const double picks = rows * picks_per_row;
  return {missing * -std::expm1(-picks / missing), picks};
}

// Seconds, from what was measured before.  All means forget.
class OffloadRates {
 public:
  // `bytes_per_second` over the link, through staging memory.
  explicit OffloadRates(double bytes_per_second) : link_(1 / bytes_per_second) {}

  // The processor took so long for experts of so many bytes, and products (an expert's bytes for each of its rows).
  // It reads and multiplies at the same time: neither is slower than this, and whichever it waited for is as slow.
  void processor_took(double seconds, double bytes, double products) noexcept {
    seconds = std::max(0.0, seconds - processor_start);
    const double read = seconds / bytes, multiply = seconds / products;
    const bool one_row_each = products < 1.5 * bytes;  // reading is all
    const bool more_than_reading = !one_row_each && read > 1.5 * read_;
    if (one_row_each || read < read_) follow(read_, read);
    if (more_than_reading || multiply < multiply_) follow(multiply_, multiply);
  }
  void link_took(double seconds, double bytes) noexcept { follow(link_, seconds / bytes); }

  double on_processor(MissedExperts m, double expert_bytes) const noexcept {
    // Reading for one row includes its products.
    return processor_start + expert_bytes * std::max(m.experts * read_, m.picks * std::min(read_, multiply_));
  }
  double over_link(double experts, double expert_bytes) const noexcept { return experts * expert_bytes * link_; }

  OffloadWay way(int rows, double picks_per_row, double missing, double expert_bytes) const noexcept {
    const MissedExperts m = missed_experts(rows, picks_per_row, missing);
    const double processor = on_processor(m, expert_bytes), copy = copy_start + over_link(m.experts, expert_bytes);
    // While these come the card is busy with the layers before.
    const double stream = over_link(missing, expert_bytes);
    if (stream <= std::min(processor, copy)) return OffloadWay::stream;
    return copy < processor ? OffloadWay::copy : OffloadWay::processor;
  }

 private:
  static constexpr double processor_start = 15e-6;  // to the processor and back
  static constexpr double copy_start = 60e-6;       // the same, and launches that nothing hides

  static void follow(double& mean, double value) noexcept { mean += 0.1 * (value - mean); }

  double read_ = 1 / 60e9, multiply_ = 1 / 300e9;  // seconds a byte, until the first measurements
  double link_;
};

}  // namespace qwen3next::cuda
