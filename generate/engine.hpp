#pragma once
// A model on a backend, behind one virtual call per forward pass: the seam between what a user holds (Model, Session)
// and the templates below.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backends/backend.hpp"
#include "backends/backend_kind.hpp"
#include "model/config.hpp"
#include "model/memory_plan.hpp"
#include "model/weights.hpp"
#include "weights/expert_statistics.hpp"

namespace qwen3next {

class Streaming;

// Told after each step of long work, done so far, of how much: tokens of a prefill, bytes of weights that are loaded.
// Returning false stops it there: Cancelled is thrown.
using Progress = std::function<bool(std::int64_t done, std::int64_t total)>;

struct EngineOptions {
  Backend backend = Backend::cpu;
  std::string isa{};                          // cpu: "" for the best that the machine has
  int threads = 0;                            // cpu: 0 for as many as the process may run on
  std::shared_ptr<Streaming> streaming{};     // cpu: null for weights that are all mapped
  Progress on_load{};                         // cuda: told as weights reach the GPU
  std::optional<std::uint64_t> gpu_memory{};  // cuda: most of it that may be taken; nothing: what is free
  std::filesystem::path expert_profile{};     // cuda: which experts lie on the GPU first, if not all do
};

struct TimelineOptions {
  std::optional<KvType> kv{};  // nothing: f16 on cpu, f32 on reference
  int batch = 2048;            // most tokens that go through the layers at a time
  bool mtp = true;             // keep what the MTP head needs for drafting, if the model has one
};

// The CPU kernels that this program holds and this machine can run, by name, best first: values of Options::isa.
std::vector<std::string_view> available_isas();

// Given one row of logits [V] at a time, in order.
using LogitsSink = std::function<void(std::span<const float> logits)>;

// The state of a sequence at some moment; immutable, usable with any timeline of the same engine and KV type.
class TimelineSnapshot {
 public:
  virtual ~TimelineSnapshot() = default;
  // What it holds, some of it together with other snapshots and timelines.
  virtual void memory(std::vector<SharedMemory>& out) const = 0;

  // For files, the same of every backend: keys and values of the layers in order, rows of the KV type; then what does
  // not grow, f32.  The MTP layer comes last.
  // Of what lies in this machine's memory alone: see downloaded().
  virtual void kv_bytes(const BytesSink& sink) const = 0;
  virtual void state_bytes(const BytesSink& sink) const = 0;
  virtual std::int64_t mtp_position() const = 0;
  // The same state in this machine's memory, if it lies elsewhere, else null; keys and values only if asked for.
  virtual std::shared_ptr<const TimelineSnapshot> downloaded(bool with_kv) const = 0;
  // Whether its keys and values are those of `longer`'s beginning, bit for bit; false if one of them was downloaded.
  virtual bool begins(const TimelineSnapshot& longer) const = 0;
};

// Given the state after the first `count` tokens of an append.
using SnapshotSink = std::function<void(std::int64_t count, std::shared_ptr<const TimelineSnapshot> snapshot)>;

class Timeline;

// What one of several timelines is to append in a common pass.  If `tentative`, tokens after the first are guesses, and
// stay only as far as Timeline::take() says so.
struct TimelineTurn {
  Timeline* timeline;
  std::span<const std::int32_t> tokens;  // tentative: at most max_tentative_rows
  bool tentative = false;
};

// Given the logits [V] that follow the last token of turn `i`, or each of its tokens in order if they are tentative;
// valid until the sink returns.
using TurnSink = std::function<void(std::size_t i, std::span<const float> logits)>;

// Picks a guess from the MTP head's logits [vocabulary]; it is the one that many tokens after DraftTurn::token.
using ChooseDraft = std::function<std::int32_t(int ahead, std::span<const float> logits)>;

// Guesses of what follows `token`, which is about to be appended to a timeline.
struct DraftTurn {
  Timeline* timeline;
  std::int32_t token;
  int count;
  int vocabulary;  // guesses are among the first so many tokens
  const ChooseDraft* choose;
  std::vector<std::int32_t>* drafts;  // appended to
};

// One sequence and its scratch memory.  For one thread at a time.
class Timeline {
 public:
  virtual ~Timeline() = default;

  // Appends tokens; returns the logits [V] of the last one, valid until the next call.  If `progress` stops it, throws
  // Cancelled; what was done until then stays (see position).  The same holds if a file cannot be read.
  // Gives the states after so many tokens as `keep` says, 1 to all of them, in order: passes are not split for it.
  virtual std::span<const float> append(std::span<const std::int32_t> tokens, const Progress& progress,
                                        std::span<const std::int64_t> keep = {}, const SnapshotSink& sink = {}) = 0;

  // Appends tokens to several timelines of one engine, each named once, as rows of the same passes and in this one's
  // scratch memory: weights are read once for all.  Gives the logits of each turn's last token.
  virtual void append_together(std::span<const TimelineTurn> turns, const TurnSink& sink) = 0;

  // Appends tokens and gives the logits of each of them.
  virtual void append_all_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink) = 0;

  // Appends tokens and gives the MTP head's logits for rows 0..T-2: row t is made of the final hidden state of token t
  // and the embedding of token t+1, and guesses token t+2.
  virtual void append_mtp_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink) = 0;

  // The most guesses that draft_together() and a tentative turn may be asked for here; 0 without an MTP head that saw
  // all of this timeline.
  virtual int most_drafts() const = 0;

  // Guesses for several timelines of one engine, each named once, by rows of the same passes of the MTP layer in this
  // one's scratch memory.  Changes no timeline.
  virtual void draft_together(std::span<const DraftTurn> turns) = 0;

  // After a tentative turn: one more of its tokens, in order, stays; the first does anyway.  With the next call of
  // anything that appends, copies or restores, the rest is forgotten.
  virtual void take() = 0;
  virtual int guesses_left() const = 0;

  virtual std::int64_t position() const = 0;
  virtual std::shared_ptr<const TimelineSnapshot> snapshot() = 0;
  virtual void restore(const TimelineSnapshot& snapshot) = 0;
  virtual void reset() = 0;
};

// Weights bound to a backend; immutable, shared between threads.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual std::unique_ptr<Timeline> timeline(const TimelineOptions& options) const = 0;
  virtual std::string description() const = 0;  // backend, ISA, threads
  virtual KvType default_kv() const = 0;

  // Snapshots out of files: what TimelineSnapshot::state_bytes() and kv_bytes() will give in all, and one whose bytes
  // are yet to be written there.  With `longer`, it shares that one's keys and values.
  virtual std::uint64_t state_bytes() const = 0;
  virtual std::uint64_t kv_bytes(KvType kv, std::int64_t position, std::int64_t mtp_position) const = 0;
  virtual std::shared_ptr<const TimelineSnapshot> blank_snapshot(KvType kv, std::int64_t position,
                                                                 std::int64_t mtp_position,
                                                                 const TimelineSnapshot* longer) const = 0;

  // Of experts that are streamed, or not all on the GPU; nothing if none are, or no timeline was made yet.
  virtual std::optional<ExpertStatistics> expert_statistics() const = 0;

  // Says in a session's plan what lies on a graphics card.
  virtual void add_to(MemoryPlan&) const {}
};

// The views must outlive the engine.  Throws Error if the backend or the ISA is not there.
std::unique_ptr<const Engine> make_engine(const Config& config, const ModelWeights<Views>& weights,
                                          const EngineOptions& options);

}  // namespace qwen3next
