#pragma once
// Experts on a card that does not hold them all: tables that say which are there, memory through which others pass, and
// the exchange of rows with the processor, which computes where the rest is.  Mechanism alone: see offload_backend.hpp.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "backends/cuda/device.hpp"
#include "backends/cuda/router.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/cuda/weights.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next::cuda {

// A moment of a stream.
class StreamEvent {
 public:
  StreamEvent();
  ~StreamEvent();
  StreamEvent(StreamEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  StreamEvent& operator=(StreamEvent&& other) noexcept { return std::swap(event_, other.event_), *this; }

  void record(const Device& device);  // after all that was launched there
  bool passed() const;                // true, too, if it was never recorded

 private:
  CUevent_st* event_ = nullptr;
};

// Throws Error if work on the card failed; does not wait for it.
void check_running(const Device& device);

// In the order of the stream, to pinned memory.
void download(const Device& device, void* to, const void* from, std::size_t bytes);

// One entry of a table of slots [experts], null for an expert that is not on the card.
struct SlotEntry {
  std::int32_t expert;
  const std::byte* slot;
};
inline constexpr int most_slot_entries = 64;

// table [experts] = base (null: `absent`), but for `entries`, of which null ones are `absent`, too.  base may be the
// table itself.
void write_slots(const Device& device, const std::byte** table, const std::byte* const* base, int experts,
                 std::span<const SlotEntry> entries, const std::byte* absent = nullptr);

// counts [experts] += the picks of a routing.
void count_picks(const Device& device, const Routing& routing, std::int32_t* counts);

// The slots of all layers and their tables: for many rows, whose products leave out experts without a slot, and for few
// rows, which take zeros for such an expert.  Slots come in chunks, which can be given back one by one.
class ExpertSlots {
 public:
  static constexpr int chunk_slots = 16;

  // Slots [first, first + count) of `bytes` each for every class, in order.  Throws Error if they do not fit.
  struct Class {
    int count;
    std::size_t bytes;
  };
  ExpertSlots(std::shared_ptr<Device> device, std::span<const Class> classes, int layers, int experts);

  const std::byte* const* table(int layer) const noexcept { return row(layer); }
  const std::byte* const* table_with_zeros(int layer) const noexcept { return row(layers_ + layer); }
  std::byte* slot(int i) const noexcept { return slots_[static_cast<std::size_t>(i)]; }
  void set(int layer, std::span<const SlotEntry> entries) {
    write_slots(*device_, row(layer), row(layer), experts_, entries);
    write_slots(*device_, row(layers_ + layer), row(layers_ + layer), experts_, entries, zeros_.data());
  }
  void set(int layer, int expert, const std::byte* slot_or_null) {
    const SlotEntry entry{expert, slot_or_null};
    set(layer, {&entry, 1});
  }

  // The last chunk of the class of which most is left: its slots; none if all are gone.  give_back() frees it.
  struct Chunk {
    int first, count;
    std::size_t bytes;
  };
  Chunk last_chunk() const noexcept;
  void give_back(const Chunk& chunk);

 private:
  struct Part {
    Chunk chunk;
    int cls;
    DeviceBytes memory;
  };
  const std::byte** row(int layer) const noexcept {
    return tables_.data<const std::byte*>() + static_cast<std::ptrdiff_t>(layer) * experts_;
  }

  std::shared_ptr<Device> device_;
  int layers_, experts_;
  DeviceBytes tables_;  // [2, layers, experts]
  DeviceBytes zeros_;   // the slot of an expert that makes nothing of anything
  std::vector<std::byte*> slots_;
  std::vector<Part> parts_;
};

// Experts on their way through the card.  They cross the link in a stream of its own, while products run; slots change
// in the order of the device's stream.
class Transit {
 public:
  struct Expert {
    std::int32_t id;
    ExpertView view;
    bool shared;  // the card may read it itself (host_experts.hpp)
  };

  Transit(std::shared_ptr<Device> device, int slots, std::size_t slot_bytes, int experts);
  static std::size_t bytes(int slots, std::size_t slot_bytes, int experts);

  int slots() const noexcept { return slots_; }

  // What is launched after this finds these experts in the table that it returns, beside those of `base` (null: none);
  // they take the slots from `first` on, of slots().  Views that are not shared are not needed any more then.
  const std::byte* const* bring(const std::byte* const* base, const ExpertMatrices& layer,
                                std::span<const Expert> experts, int first = 0);
  // The same, to a slot of its own.
  void bring(std::byte* slot, const ExpertMatrices& layer, const Expert& expert);

  std::mutex mutex;  // whoever brings experts holds it until he has launched what needs them

 private:
  std::shared_ptr<Device> device_;
  int slots_;
  std::size_t slot_bytes_;
  int experts_;
  DeviceBytes memory_, table_;
  Uploader uploader_;
};

// Rows that miss experts go to the processor, and what these make of them comes back, through pinned memory that the
// card's kernels write and read: nothing is launched or copied for it but these kernels.  One exchange at a time, in
// the order of the stream.  Of each row there are two flags: the card sets one when it sends the row and clears the
// other when it has read the answer, the processor the other way round.
class RowExchange {
 public:
  struct Rows {
    int rows = 0, k = 0, width = 0;
    std::ptrdiff_t stride = 0;          // of x and sums
    const std::int32_t* ids = nullptr;  // [rows, k]; ~id of an expert that is on the card
    const float* weights = nullptr;     // [rows, k]
    float* x = nullptr;                 // [rows, width]
    float* sums = nullptr;              // [rows, width]: what is to be added
  };

  // Room for exchanges of such a size; none is under way.
  void reserve(int rows, int k, int width);
  bool holds(int rows, int k, int width) const noexcept { return rows <= rows_ && k <= k_ && width <= width_; }

  // Launches the way there, for a processor that answers or just looks (take() then).
  void send(const Device& device, CudaTensor x, const Routing& routing, const std::byte* const* table) const;
  // Launches the way back: waits for the answer and adds it to x.
  void add_answer(const Device& device, CudaTensor x) const;

  // The processor's side: whether so many rows are here; where; they were read; that and the answer.
  bool arrived(int rows) const noexcept;
  Rows rows(int rows, int k, int width) const noexcept;
  void take(int rows) noexcept;
  void answer(int rows, bool with_sums) noexcept;

 private:
  std::uint32_t* sent() const noexcept { return memory_.data<std::uint32_t>(); }  // [rows_]
  std::uint32_t* answered() const noexcept { return reinterpret_cast<std::uint32_t*>(memory_.data() + answered_); }

  PinnedBytes memory_;
  int rows_ = 0, k_ = 0, width_ = 0;
  std::size_t answered_ = 0, ids_ = 0, weights_ = 0, x_ = 0, sums_ = 0;  // where they begin
  std::size_t stride_ = 0;                                               // of x and sums, in floats
};

}  // namespace qwen3next::cuda
