#pragma once
// Experts side by side in this machine's memory, in large pages: the processor reads those faster than a mapped file's,
// and the card reads them itself.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

#include "backends/aligned_bytes.hpp"
#include "backends/cpu/parallel.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next::cuda {

// Lets the card read memory of this machine, which is kept where it is meanwhile.  False if the system does not.
bool share_with_card(std::byte* data, std::size_t size) noexcept;
void take_from_card(std::byte* data) noexcept;

class HostExperts {
 public:
  HostExperts() = default;
  HostExperts(const HostExperts&) = delete;
  ~HostExperts() {
    for (Part& part : parts_)
      if (part.shared) take_from_card(part.memory.data());
  }

  static std::size_t bytes_of(const ExpertView& e) noexcept {
    return whole(e) ? aligned(e.gate.bytes()) + aligned(e.up.bytes()) + aligned(e.down.bytes()) : 0;
  }

  // Copies these here; the views point to the copies then.  Experts that do not lie in one piece each stay where they
  // are.
  void take(std::span<ExpertView* const> experts, const cpu::Team& team) {
    for (std::size_t begin = 0, end = 0; begin < experts.size(); begin = end) {
      std::size_t bytes = 0;
      for (end = begin; end < experts.size() && bytes < part_bytes; ++end) bytes += bytes_of(*experts[end]);
      if (bytes == 0) continue;
      Part& part = parts_.emplace_back(Part{AlignedBytes(bytes, AlignedBytes::Uncleared()), false});
      std::vector<std::byte*> places;
      std::byte* at = part.memory.data();
      for (std::size_t i = begin; i < end; ++i) places.push_back(at), at += bytes_of(*experts[i]);
      team.each(static_cast<int>(end - begin), std::int64_t{1} << 20, [&](int i, int) {
        ExpertView& e = *experts[begin + static_cast<std::size_t>(i)];
        if (whole(e)) e = copy(e, places[static_cast<std::size_t>(i)]);
      });
      part.shared = share_with_card(part.memory.data(), part.memory.size());
    }
  }

  // Whether the card can read the expert itself.
  bool shares(const ExpertView& e) const noexcept {
    const Part* part = part_of(e.gate.data);
    return part && part->shared;
  }
  bool holds(const ExpertView& e) const noexcept { return part_of(e.gate.data) != nullptr; }

  // `to` in the place of `from`, which nobody reads any more: they take as many bytes.
  ExpertView replace(const ExpertView& from, const ExpertView& to, const cpu::Team& team) const {
    auto* const at = const_cast<std::byte*>(from.gate.data);
    ExpertView e = to;
    std::byte* places[3];
    std::byte* place = at;
    int i = 0;
    for (WeightView* w : {&e.gate, &e.up, &e.down}) places[i++] = place, w->data = place, place += aligned(w->bytes());
    const WeightView* const from_file[3] = {&to.gate, &to.up, &to.down};
    team.run(std::int64_t{1} << 20, [&](int share, int shares) {
      for (int k = 0; k < 3; ++k) {
        const auto size = from_file[k]->bytes(), n = static_cast<std::size_t>(shares),
                   s = static_cast<std::size_t>(share);
        const std::size_t begin = size * s / n, end = size * (s + 1) / n;
        std::memcpy(places[k] + begin, from_file[k]->data + begin, end - begin);
      }
    });
    return e;
  }
  bool replaceable(const ExpertView& from, const ExpertView& to) const noexcept {
    return holds(from) && whole(to) && bytes_of(from) == bytes_of(to);
  }

 private:
  static constexpr std::size_t part_bytes = std::size_t{256} << 20;
  struct Part {
    AlignedBytes memory;
    bool shared;
  };

  static std::size_t aligned(std::size_t bytes) noexcept { return (bytes + 255) / 256 * 256; }
  static bool whole(const ExpertView& e) noexcept {
    return std::ranges::all_of(std::initializer_list<const WeightView*>{&e.gate, &e.up, &e.down},
                               [](const WeightView* w) { return w->group_rows == w->rows; });
  }
  static ExpertView copy(ExpertView e, std::byte* at) {
    for (WeightView* w : {&e.gate, &e.up, &e.down}) {
      std::memcpy(at, w->data, w->bytes());
      w->data = at, at += aligned(w->bytes());
    }
    return e;
  }
  const Part* part_of(const std::byte* data) const noexcept {
    for (const Part& part : parts_)
      if (data >= part.memory.data() && data < part.memory.data() + part.memory.size()) return &part;
    return nullptr;
  }

  std::vector<Part> parts_;
};

}  // namespace qwen3next::cuda
