#pragma once
// How streaming goes: counted by ExpertStore, shown by the program.

#include <cstdint>

namespace qwen3next {

// Since the model was opened.  An expert counts once for each layer and pass that picks it.
struct ExpertStatistics {
  std::uint64_t hits = 0;              // were in memory
  std::uint64_t awaited = 0;           // were being read already: guessed right, or read for another session
  std::uint64_t misses = 0;            // had to be read
  std::uint64_t bytes_read = 0;        // of experts, guessed ones included
  std::uint64_t guessed = 0;           // looked ahead for, whether read or not
  std::uint64_t guessed_right = 0;     // of these, picked
  std::uint64_t could_guess = 0;       // picks in layers that were looked ahead for
  std::uint64_t read_ahead = 0;        // were read by a guess
  std::uint64_t read_ahead_right = 0;  // of these, picked
  double stall_seconds = 0;            // computing waited for reads
  double read_seconds = 0;             // something was being read
  double depth_seconds = 0;            // integral of the number of reads in flight
  std::uint64_t slots = 0, slots_filled = 0;
  std::uint64_t experts = 0;  // of all layers

  std::uint64_t picks() const noexcept { return hits + awaited + misses; }
  double hit_rate() const noexcept { return ratio(hits, picks()); }
  double precision() const noexcept { return ratio(guessed_right, guessed); }
  double recall() const noexcept { return ratio(guessed_right, could_guess); }
  double bandwidth() const noexcept { return read_seconds > 0 ? static_cast<double>(bytes_read) / read_seconds : 0; }
  double queue_depth() const noexcept { return read_seconds > 0 ? depth_seconds / read_seconds : 0; }
  // The part of reading during which computing went on.
  double overlap() const noexcept { return read_seconds > 0 ? 1 - stall_seconds / read_seconds : 0; }

 private:
  static double ratio(std::uint64_t a, std::uint64_t b) noexcept {
    return b > 0 ? static_cast<double>(a) / static_cast<double>(b) : 0;
  }
};

}  // namespace qwen3next
