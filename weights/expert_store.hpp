#pragma once
// Weights of a model that does not fit into memory: the dense ones resident, of the routed experts as many as a budget
// allows, the others read from the files when a pass needs them.
//
// Memory of the experts is an arena of slots (expert_layout.hpp); which expert is in which slot, and who has to go, is
// ExpertCache's to say; reads go around the page cache through a ReadQueue, all misses of a layer at once.  A pass of
// one layer works through an ExpertReader: picks are pinned as long as it computes with them, in waves where the slots
// do not hold them all.  One mutex guards the books; it is never held while something is read or computed.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backends/aligned_bytes.hpp"
#include "backends/expert_supply.hpp"
#include "core/message.hpp"
#include "weights/checkpoint.hpp"
#include "weights/dense_weights.hpp"
#include "weights/direct_file.hpp"
#include "weights/expert_cache.hpp"
#include "weights/expert_layout.hpp"
#include "weights/expert_statistics.hpp"
#include "weights/read_queue.hpp"

namespace qwen3next {

class ExpertStore {
 public:
  // Makes the queue that reads; tests put faults there.
  using MakeQueue = std::function<std::unique_ptr<ReadQueue>(ReadQueue::OnDone)>;

  // The slots of one class that it cannot do without.
  static constexpr int least_slots = 4;

  // Plans; takes no memory for weights yet.  `checkpoint` outlives the store.  Throws Error if a file cannot be opened
  // for reading, or is not the one any more that was mapped.
  explicit ExpertStore(const Checkpoint& checkpoint, MakeQueue make_queue = {})
      : checkpoint_(checkpoint),
        files_(open_files(checkpoint)),
        layout_(checkpoint, alignment_of(files_)),
        dense_(checkpoint, layout_, alignment_of(files_)),
        make_queue_(std::move(make_queue)) {}
  ~ExpertStore() {
    const std::lock_guard lock(mutex_);
    fill_.clear();  // a queue that is going away takes no more reads
  }
  ExpertStore(const ExpertStore&) = delete;

  const ExpertLayout& layout() const noexcept { return layout_; }
  std::uint64_t dense_bytes() const noexcept { return dense_.bytes(); }

  // Reads the dense weights, points `weights` to them, and makes slots of `memory` bytes for the experts.  Once, before
  // anything else below.  Throws Error if memory or a file does not give what it should.
  void load(ModelWeights<Views>& weights, std::uint64_t memory);

  // What the experts may take from now on, at most what load() was given: slots are given back, or taken again.
  void resize(std::uint64_t memory);

  // For one backend instance.  The store outlives it.
  std::unique_ptr<StreamedExperts> reader();

  // Warms the cache by what was needed before: reads the experts that were used most, in the background.
  void warm(const ExpertProfile& profile);

  // True while every expert is in memory.
  bool complete() const noexcept { return filled_ == layout_.layers() * layout_.experts(); }

  ExpertStatistics statistics() const;

 private:
  friend class ExpertReader;
  using Clock = std::chrono::steady_clock;

  // A read, known by its address.
  struct Part {
    int slot;  // none: dense
    int piece;
  };
  struct Slot {
    std::byte* memory = nullptr;
    std::array<Part, 3> parts{};
    int pending = 0;  // pieces that are still being read: it is pinned meanwhile
    int owed = 0;     // how often it is to be unpinned after that
    int error = 0;    // of a piece that failed
    int bad_piece = 0;
    bool filled = false;   // an expert is there
    bool guessed = false;  // read ahead, and not used yet
    bool filling = false;  // read in the background
    bool ready() const noexcept { return pending == 0 && error == 0; }
  };
  static constexpr int none = ExpertCache::none;
  static constexpr int queue_depth = 64;
  static constexpr int fill_depth = 8;  // experts: others must not wait long behind them

  static std::vector<DirectFile> open_files(const Checkpoint& checkpoint) {
    std::vector<DirectFile> files;
    for (const MappedFile& file : checkpoint.files) files.push_back(DirectFile::open(file));
    return files;
  }
  static std::size_t alignment_of(const std::vector<DirectFile>& files) {
    std::size_t alignment = 64;  // a cache line, and every type's own
    for (const DirectFile& file : files) alignment = std::max(alignment, file.alignment());
    return alignment;
  }

  void read_dense();
  // The books, with mutex_ held.
  void add_reads(int slot, std::vector<ReadRequest>& requests);
  void empty(int slot) {
    if (std::exchange(slots_[static_cast<std::size_t>(slot)].filled, false)) --filled_;
  }
  void unpin(int slot);
  void fill_more(std::vector<ReadRequest>& requests);
  void pass_time();
  [[noreturn]] void fail(int slot) const;

  // Without it.
  void submit(std::span<const ReadRequest> requests) {
    if (!requests.empty()) queue_->submit(requests);
  }
  void on_done(std::span<const ReadResult> results);

  const Checkpoint& checkpoint_;
  std::vector<DirectFile> files_;
  ExpertLayout layout_;
  DenseWeights dense_;
  MakeQueue make_queue_;
  std::vector<AlignedBytes> arenas_;       // of each class
  std::vector<int> first_slot_;            // likewise
  std::vector<std::vector<int>> retired_;  // likewise: slots out of use

  mutable std::mutex mutex_;         // guards what follows
  std::condition_variable changed_;  // something was read, or unpinned
  std::optional<ExpertCache> cache_;
  std::vector<Slot> slots_;
  std::atomic<int> filled_{0};  // slots with an expert that is there; changed with mutex_ held
  ExpertStatistics statistics_;
  int in_flight_ = 0;
  Clock::time_point counted_until_{};
  std::vector<ExpertCache::Key> fill_;  // still to be read in the background, the last first
  int filling_ = 0;                     // reads of it in flight
  std::vector<ReadRequest> fill_requests_;
  std::vector<Part> dense_parts_;
  std::size_t dense_pending_ = 0;
  std::optional<std::size_t> dense_bad_;  // a piece that failed
  int dense_error_ = 0;

  std::unique_ptr<ReadQueue> queue_;  // last: gone before what it reads into
};

// --- loading --------------------------------------------------------------------------------------------------------

inline void ExpertStore::load(ModelWeights<Views>& weights, std::uint64_t memory) {
  const std::vector<int> counts = layout_.slots(memory, least_slots);
  try {
    dense_.allocate();
    for (int cls = 0; cls < layout_.classes(); ++cls) {
      const auto n = static_cast<std::size_t>(counts[static_cast<std::size_t>(cls)]);
      arenas_.emplace_back(std::max(n * layout_.slot_bytes(cls), AlignedBytes::large_page), AlignedBytes::Uncleared());
    }
  } catch (const std::bad_alloc&) {
    throw_error(display(checkpoint_.path), ": no memory for ", dense_.bytes(), " bytes of dense weights and ", memory,
                " of experts: give a smaller budget");
  }
  for (int cls = 0; cls < layout_.classes(); ++cls) {
    first_slot_.push_back(static_cast<int>(slots_.size()));
    for (int i = 0; i < counts[static_cast<std::size_t>(cls)]; ++i) {
      Slot& slot = slots_.emplace_back();
      slot.memory =
          arenas_[static_cast<std::size_t>(cls)].data() + static_cast<std::size_t>(i) * layout_.slot_bytes(cls);
      for (int piece = 0; piece < 3; ++piece)
        slot.parts[static_cast<std::size_t>(piece)] = {static_cast<int>(slots_.size()) - 1, piece};
    }
  }
  retired_.resize(counts.size());
  cache_.emplace(layout_.layers(), layout_.experts(), layout_.class_of_layer(), counts);
  statistics_.experts = static_cast<std::uint64_t>(layout_.layers()) * static_cast<std::uint64_t>(layout_.experts());
  const auto done = [this](std::span<const ReadResult> results) { on_done(results); };
  queue_ = make_queue_ ? make_queue_(done) : make_read_queue(ReadQueueKind::best, queue_depth, done);
  read_dense();
  dense_.lock();
  dense_.adopt(weights);
}

inline void ExpertStore::read_dense() {
  const std::span<const ExpertLayout::Piece> pieces = dense_.pieces();
  dense_parts_.resize(pieces.size());
  std::vector<ReadRequest> requests;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const ExpertLayout::Piece& piece = pieces[i];
    dense_parts_[i] = {none, static_cast<int>(i)};
    requests.push_back({&files_[static_cast<std::size_t>(piece.file)], piece.offset, piece.size, piece.needed,
                        dense_.memory() + piece.into, &dense_parts_[i]});
  }
  dense_pending_ = pieces.size();
  submit(requests);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return dense_pending_ == 0; });
  if (!dense_bad_) return;
  const ExpertLayout::Piece& bad = pieces[*dense_bad_];
  throw Error(read_error(files_[static_cast<std::size_t>(bad.file)], bad.offset, bad.size, dense_error_));
}

// --- the books -------------------------------------------------------------------------------------------------------

inline void ExpertStore::pass_time() {
  const Clock::time_point now = Clock::now();
  if (in_flight_ > 0) {
    const double seconds = std::chrono::duration<double>(now - counted_until_).count();
    statistics_.read_seconds += seconds;
    statistics_.depth_seconds += seconds * in_flight_;
  }
  counted_until_ = now;
}

inline void ExpertStore::add_reads(int slot, std::vector<ReadRequest>& requests) {
  Slot& s = slots_[static_cast<std::size_t>(slot)];
  const ExpertCache::Key key = cache_->key_of(slot);
  const ExpertLayout::Place& place = layout_.place(key.layer, key.expert);
  pass_time();
  empty(slot);
  s.pending = place.count, s.owed = 0, s.error = 0;
  s.guessed = s.filling = false;
  in_flight_ += place.count;
  for (std::size_t i = 0; i < static_cast<std::size_t>(place.count); ++i) {
    const ExpertLayout::Piece& piece = place.pieces[i];
    requests.push_back({&files_[static_cast<std::size_t>(piece.file)], piece.offset, piece.size, piece.needed,
                        s.memory + piece.into, &s.parts[i]});
  }
}

// Whoever let go of a slot that is being read leaves the unpinning to on_done().
inline void ExpertStore::unpin(int slot) {
  Slot& s = slots_[static_cast<std::size_t>(slot)];
  if (s.pending > 0) {
    ++s.owed;
    return;
  }
  cache_->unpin(slot);
  if (s.error != 0 && !cache_->pinned(slot)) {
    s.error = 0;
    cache_->erase(slot);
  }
}

inline void ExpertStore::on_done(std::span<const ReadResult> results) {
  bool changed = false;
  fill_requests_.clear();
  {
    const std::lock_guard lock(mutex_);
    pass_time();
    for (const ReadResult& result : results) {
      const Part& part = *static_cast<const Part*>(result.owner);
      if (part.slot == none) {
        if (result.error != 0) dense_bad_ = static_cast<std::size_t>(part.piece), dense_error_ = result.error;
        changed |= --dense_pending_ == 0;
        continue;
      }
      Slot& s = slots_[static_cast<std::size_t>(part.slot)];
      const ExpertCache::Key key = cache_->key_of(part.slot);
      if (result.error != 0) s.error = result.error, s.bad_piece = part.piece;
      statistics_.bytes_read += layout_.place(key.layer, key.expert).pieces[static_cast<std::size_t>(part.piece)].size;
      --in_flight_;
      if (--s.pending > 0) continue;
      changed = true;
      if (s.error == 0) s.filled = true, ++filled_;
      if (s.filling) s.filling = false, --filling_;
      for (; s.owed > 0; --s.owed) unpin(part.slot);
    }
    fill_more(fill_requests_);
  }
  if (changed) changed_.notify_all();
  submit(fill_requests_);
}

inline void ExpertStore::fill_more(std::vector<ReadRequest>& requests) {
  while (!fill_.empty() && filling_ < fill_depth) {
    const ExpertCache::Key key = fill_.back();
    fill_.pop_back();
    if (cache_->slot_of(key.layer, key.expert) != none) continue;
    const int slot = cache_->insert_if_better(key.layer, key.expert);
    if (slot == none) continue;  // of its layer, all that is there is worth more
    add_reads(slot, requests);
    slots_[static_cast<std::size_t>(slot)].filling = true;
    ++filling_;
    unpin(slot);
  }
}

inline void ExpertStore::fail(int slot) const {
  const Slot& s = slots_[static_cast<std::size_t>(slot)];
  const ExpertCache::Key key = cache_->key_of(slot);
  const ExpertLayout::Piece& piece = layout_.place(key.layer, key.expert).pieces[static_cast<std::size_t>(s.bad_piece)];
  std::string_view tensor;
  for (const TensorRecord& record : checkpoint_.records) {
    if (record.file == piece.file && record.offset < piece.offset + piece.needed &&
        piece.offset < record.offset + record.bytes)
      tensor = record.name;
  }
  throw_error(read_error(files_[static_cast<std::size_t>(piece.file)], piece.offset, piece.size, s.error), " (tensor ",
              printable(tensor), ", expert ", key.expert, ")");
}

inline void ExpertStore::resize(std::uint64_t memory) {
  const std::vector<int> wanted = layout_.slots(memory, least_slots);
  const std::lock_guard lock(mutex_);
  for (int cls = 0; cls < layout_.classes(); ++cls) {
    const auto c = static_cast<std::size_t>(cls);
    while (cache_->slots_in_use(cls) > wanted[c]) {
      const int slot = cache_->retire(cls);
      if (slot == none) break;  // all are pinned: the next call goes on
      empty(slot);
      retired_[c].push_back(slot);
      arenas_[c].discard(static_cast<std::size_t>(slot - first_slot_[c]) * layout_.slot_bytes(cls),
                         layout_.slot_bytes(cls));
    }
    while (cache_->slots_in_use(cls) < wanted[c] && !retired_[c].empty()) {
      cache_->restore(retired_[c].back());
      retired_[c].pop_back();
    }
  }
}

inline void ExpertStore::warm(const ExpertProfile& profile) {
  std::vector<ReadRequest> requests;
  {
    const std::lock_guard lock(mutex_);
    cache_->warm(profile);
    fill_ = cache_->wanted();
    std::reverse(fill_.begin(), fill_.end());
    fill_more(requests);
  }
  submit(requests);
}

inline ExpertStatistics ExpertStore::statistics() const {
  const std::lock_guard lock(mutex_);
  ExpertStatistics s = statistics_;
  for (int cls = 0; cls < layout_.classes(); ++cls) s.slots += static_cast<std::uint64_t>(cache_->slots_in_use(cls));
  s.slots_filled = static_cast<std::uint64_t>(filled_);
  return s;
}

}  // namespace qwen3next
