// qwen3next: the whole of Qwen3-Next in one C++20 header.
//
//   #include "qwen3next.hpp"
//   #include <iostream>
//   int main() {
//     auto model = qwen3next::Model::open("Qwen3-Next-80B-A3B-Instruct");  // maps, validates, copies nothing
//     auto session = model.session({.context = 32768});                    // owns KV cache and delta state
//     session.generate("Why is the sky blue?", [](std::string_view s) { std::cout << s << std::flush; return true; });
//   }
//
//   g++ -std=c++20 -O3 -march=native -pthread app.cpp -lutf8proc         (header only: kernels for this machine)
//
// Model    a file or folder, opened: immutable, shared freely between threads.  Copies share it.
// Session  one timeline: what was read and said so far.  One thread at a time.  Its recurrent state cannot be rewound:
//          fork() it or take a snapshot() where you may want to return;
//          sync() and chat() do so by themselves.
// Error    thrown for everything that is not your program's fault: says what, where, expected, found, what to do.
//
// Text in, text out: Session::generate continues text, Session::chat answers a list of messages.
// Tokens in, logits out, with a sampling loop of your own: Session::prefill, Session::decode.
//
// The library never prints, never aborts, and reads no environment variables.
//
// Compile-time switches, the same in every file of a program:
//   QWEN3NEXT_COMPILED    the engine is compiled elsewhere, this header declares it: in the library that you link
//                         (CMake target qwen3next::qwen3next, pkg-config qwen3next; kernels for every machine, best
//                         first) or in the one file of yours that defines QWEN3NEXT_LIBRARY, too, before this header
//   QWEN3NEXT_QUANTIZE    quantize() and calibrate() as well, which write GGUFs
//   QWEN3NEXT_REFERENCE   the reference backend as well (needs Eigen; the library has it)
//   QWEN3NEXT_MULTI_ISA   kernels for every machine without the library: compile this header itself once for each ISA,
//                         g++ -std=c++20 -O3 -ffp-contract=off -x c++ -c qwen3next.hpp -DQWEN3NEXT_ISA=avx2 -mavx2 ...
//                         and link those objects (names and flags: above, or cmake/CpuKernels.cmake)
#pragma once

#include "backends/cpu/kernels.hpp"  // first: it is all that an object of kernels holds
#ifndef QWEN3NEXT_ISA

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "generate/chat.hpp"
#include "generate/engine.hpp"
#include "generate/generate.hpp"
#include "generate/prefix_cache.hpp"
#include "generate/reuse.hpp"
#include "generate/sampler.hpp"
#include "generate/speculate.hpp"
#include "generate/state_folder.hpp"
#include "model/config.hpp"
#include "model/memory_plan.hpp"
#include "text/chat_template.hpp"
#include "text/generation_defaults.hpp"
#include "text/load.hpp"
#include "text/tokenizer.hpp"
#include "weights/checkpoint.hpp"

namespace qwen3next {

// How a model is opened.
struct Options {
  Backend backend = Backend::cpu;
  std::string isa{};                 // cpu kernels by name (available_isas()); "": the best that this machine has
  int threads = 0;                   // 0: as many as this process may run on
  std::filesystem::path mtp_path{};  // a file or folder with the model's MTP block alone, if its own files have none
  double yarn_factor = 0;            // more than 1: YaRN context extension by this factor; 0: as the files say
  Progress on_load{};                // cuda: told of the bytes of weights that have reached the GPU, of how many
  int experts_used = 0;              // routed experts of a token, fewer than the model's: faster, worse; 0: the model's

  // Bytes for weights and sessions together: dense weights stay in memory, as many experts as fit beside them, the rest
  // is read as it is needed.  Nothing: weights are mapped, or streamed within what the machine can spare if that is
  // less than they take.
  std::optional<std::uint64_t> memory{};
  std::filesystem::path expert_profile{};  // what `qwen3next experts --save` wrote: a streamed cache starts with that,
                                           // and a GPU that does not hold all experts

  // cuda: bytes of the GPU's memory for weights and sessions together; nothing: what is free.  Dense weights and states
  // lie there, and as many experts as fit; the processor computes with the others, or they pass through the GPU.
  std::optional<std::uint64_t> gpu_memory{};

  // Most bytes for states of what sessions have read, see Session::sync(), beside what sessions themselves hold; 0:
  // none. Nothing: half of what the machine can spare beside the weights, 8 GiB at most; of `memory` a sixteenth,
  // within it; on cuda, where states are the GPU's, 1 GiB.
  std::optional<std::uint64_t> prefix_cache{};

  // A folder for states of long prompts, so that later processes go on from them: of system messages and conversations
  // that were synced, in files of 80B's shape of 72 MiB and 24 KiB a token.  Processes may share it.  Most bytes of it.
  std::filesystem::path cache_dir{};
  std::uint64_t cache_dir_bytes = std::uint64_t{16} << 30;
};

// How a session is opened.
struct SessionOptions {
  std::int64_t context = 0;    // most tokens it may hold; 0: as many as the model was made for.  Memory grows as needed
  std::optional<KvType> kv{};  // KV cache type; nothing: f16 on cpu, f32 on reference
  int batch = 2048;            // most tokens that go through the layers at a time: more is faster and takes more memory
  std::int64_t snapshot_spacing = 4096;  // most tokens of a long prompt between two states that sync() keeps
  bool mtp = true;                       // be ready to guess ahead with the MTP head, if the model has one
};

class Session;
struct Turn;

// A model's files, mapped and bound to a backend.  Immutable: any number of threads may use one at the same time.
// Copies share everything; the files stay mapped until the last copy and session are gone.
class Model {
 public:
  // Opens a Hugging Face folder (config.json and *.safetensors) or a GGUF file (the first, if it is split).  Reads the
  // headers and checks every tensor's name, type and shape; weights are mapped, not read.  Throws Error if the files
  // are no Qwen3-Next or damaged, or if the options ask for what is not there.
  static Model open(const std::filesystem::path& path, const Options& options = {});

  // The memory that a session with these options needs at its full context, in bytes.  Allocates nothing.  Throws Error
  // if the options do not fit the model; a budget that is too small only shows.
  MemoryPlan plan(const SessionOptions& options = {}) const;
  // The same before the model is opened.
  static MemoryPlan plan(const std::filesystem::path& path, const Options& options,
                         const SessionOptions& session = {}) {
    return open(path, options).plan(session);
  }

  // A new, empty timeline, independent of all others.  Throws Error if the options do not fit the model.
  Session session(const SessionOptions& options = {}) const;

  // The states that Session::sync() can go back to, of all sessions.
  PrefixStatistics prefix_statistics() const { return shared_->prefixes->statistics(); }

  // How streaming goes, since the model was opened; nothing if weights are mapped, or no session was opened yet.
  std::optional<ExpertStatistics> expert_statistics() const { return shared_->engine->expert_statistics(); }

  // The shape, the files, and "cpu, avx512, 8 threads": what computes.
  const Config& config() const noexcept { return shared_->checkpoint.config; }
  const Checkpoint& checkpoint() const noexcept { return shared_->checkpoint; }
  std::string backend_description() const;
  int experts_of_model() const noexcept { return shared_->experts_of_model; }  // of a token, unless Options say less

  // Loaded when first asked for (by whichever thread), since weights can be used without.  Throw Error if the files
  // hold none, or one that is not Qwen's.
  const Tokenizer& tokenizer() const;
  const ChatTemplate& chat_template() const;

  // Sampling that the model's files advise (generation_config.json or GGUF metadata), Qwen's Instruct values elsewhere.
  Sampling sampling() const;
  // Tokens that end a text: those that the files name, and <|im_end|> and <|endoftext|>.
  std::vector<std::int32_t> stop_tokens() const;

 private:
  friend class Session;
  struct Shared {
    explicit Shared(Checkpoint c) : checkpoint(std::move(c)) {}
    Checkpoint checkpoint;
    int experts_of_model = 0;  // of a token, before Options::experts_used
    std::shared_ptr<Streaming> streaming;
    std::unique_ptr<const Engine> engine;
    std::unique_ptr<PrefixCache> prefixes;
    std::optional<StateFolder> folder;
    Backend backend = Backend::cpu;
    mutable std::once_flag tokenizer_once, template_once, defaults_once, identity_once;
    mutable std::uint64_t identity = 0;
    mutable std::optional<Tokenizer> tokenizer;
    mutable std::optional<ChatTemplate> chat_template;
    mutable GenerationDefaults defaults;
  };
  const GenerationDefaults& defaults() const;
  std::uint64_t identity() const;                  // see weights/model_identity.hpp
  std::optional<std::int32_t> turn_token() const;  // that begins a turn of a conversation
  // 0: the model's length; throws Error if it is longer.
  std::int64_t checked_context(std::int64_t asked) const;

  std::shared_ptr<const Shared> shared_;
};

// A session's state at some moment: KV cache, DeltaNet states, tokens, logits.  Immutable, cheap to copy; outlives its
// session, and any session of the same Model and KV type may restore it.
class Snapshot {
 public:
  // The number of tokens that it holds.
  std::int64_t position() const noexcept { return static_cast<std::int64_t>(tokens_.size()); }

 private:
  friend class Session;
  std::shared_ptr<const TimelineSnapshot> state_;
  std::vector<std::int32_t> tokens_;
  std::vector<float> logits_;
};

// One timeline: what was read and said so far, and the state that the model keeps of it.  One thread at a time;
// sessions of one Model may run in different threads.  Movable, not copyable: fork() and snapshot() branch.
class Session {
 public:
  // --- text ---------------------------------------------------------------------------------------------------------

  // Continues the timeline with `prompt`, then with what the model makes of it, until something of `options` ends it.
  // Control tokens spelled out in the prompt are text.  Throws Error if the prompt does not fit the context or is empty
  // in an empty session, Cancelled if options.on_prefill returns false.  Without options: default_options().
  Generated generate(std::string_view prompt, const OnText& on_text, const GenerateOptions& options);
  Generated generate(std::string_view prompt, const OnText& on_text = {}) {
    return generate(prompt, on_text, default_options());
  }

  // Answers a conversation: OpenAI-style messages (role, content, tool_calls ...), rendered by the model's template.
  // Give the whole list each time; what the session already holds of it is not computed again.  `tools` is null or a
  // list of {"type": "function", "function": {...}}.  Throws Error if the list is not such a conversation, does not fit
  // the context, or the model has no chat template that is known.
  Answer chat(const nlohmann::ordered_json& messages, const OnEvent& on_event, const GenerateOptions& options,
              const nlohmann::ordered_json& tools = nullptr);
  Answer chat(const nlohmann::ordered_json& messages, const OnEvent& on_event = {}) {
    return chat(messages, on_event, default_options());
  }

  // Sampling and stop tokens as the model's files advise.
  GenerateOptions default_options() const {
    return {.sampling = model_.sampling(), .stop_tokens = model_.stop_tokens()};
  }

  // --- tokens -------------------------------------------------------------------------------------------------------

  // Appends tokens; returns the logits [vocab_size] that follow the last one, valid until the next call.  decode() is
  // prefill() of one token and allocates nothing once it is warm.
  // Throws Error if they do not fit the context or are not in the vocabulary, Cancelled if `progress` returns false
  // (tokens done until then stay: see tokens()).
  std::span<const float> prefill(std::span<const std::int32_t> tokens, const Progress& progress = {});
  std::span<const float> decode(std::int32_t token);

  // From now on, decode() and decode_together() guess ahead: the MTP head drafts up to `drafts` tokens (1..4;
  // auto_drafts: as many as pay) that `sampler`, which belongs to the caller and samples from this session's logits,
  // would choose, and the model reads them along with the one that is given.  For a token that was guessed, the logits
  // are there without a pass: bit for bit those of a pass.  nullptr: no more guesses.
  // Throws Error if the session cannot: no MTP head, or not for all that the session holds; auto_drafts then does
  // without.
  void speculate(Sampler* sampler, int drafts = auto_drafts);
  // Whether decode() of this token would need no pass.
  bool foresees(std::int32_t token) const noexcept;
  MtpStatistics mtp_statistics() const noexcept { return speculation_.statistics; }  // of all guesses until now

  // Makes the timeline hold exactly `tokens`, computing only what no session of this Model has read: it goes on from
  // the timeline if that is a beginning of `tokens`, else from the longest beginning whose state was kept.  States are
  // kept of what sync() reads, where prompts tend to differ later: where the last turn begins, the one before it and
  // the second, and every `snapshot_spacing` tokens.  `turns` are the positions where turns begin, in order; without
  // them, every <|im_start|>, if the model's files have a tokenizer.  Throws as prefill() does; what was read until
  // then can be gone on from.
  struct Synced {
    std::span<const float> logits;  // [vocab_size], after the last token
    std::int64_t reused;            // tokens whose state was there
    Reuse how;                      // and where from
  };
  Synced sync(std::span<const std::int32_t> tokens, const Progress& progress = {});
  Synced sync(std::span<const std::int32_t> tokens, std::span<const std::int64_t> turns, const Progress& progress = {});

  // Appends tokens and gives the logits [vocab_size] of every one, in order; mtp_logits() those of the MTP head, for
  // every one but the last (row t guesses token t + 2).  Throw Error as prefill() does, or if there is no MTP head.
  void all_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink);
  void mtp_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink);

  // --- the timeline -------------------------------------------------------------------------------------------------

  // What the session holds, how much it may hold (in tokens), and of which model.
  std::span<const std::int32_t> tokens() const noexcept { return tokens_; }
  std::int64_t context() const noexcept { return context_; }
  const Model& model() const noexcept { return model_; }

  // Exact: what follows a restore is bit for bit what followed the snapshot.  restore() throws Error if the snapshot is
  // of another model's session, of another KV type or longer than the context.  reset() empties the timeline.
  Snapshot snapshot() const;
  void restore(const Snapshot& snapshot);
  void reset();
  // Another session that holds the same: the KV cache is shared until one of them goes on, nothing is computed.
  Session fork() const;

  // The same in a file, for any session of the same model files, backend, KV type, YaRN and number of experts, in this
  // process or a later one: the timeline, with the states of its last turns.  load() reads at the disk's speed what was
  // saved, bit for bit; it throws Error, and changes nothing, if the file is damaged, another model's, another
  // version's, or longer than the context.
  void save(const std::filesystem::path& path) const;
  void load(const std::filesystem::path& path);

 private:
  friend class Model;
  friend void decode_together(std::span<Turn> turns);
  Session(Model model, const SessionOptions& options, std::int64_t context);

  // Guesses ahead of what the session holds.
  struct Speculation {
    Sampler* sampler = nullptr;
    int drafts = auto_drafts;
    DraftDepth depth;
    MtpStatistics statistics;
    std::vector<std::int32_t> tokens;  // of the last pass: one, and guesses of those after it
    std::vector<float> logits;         // [tokens, V] that follow them
    std::size_t rows = 0, next = 0;    // rows of logits that are there; the first token that was not asked for yet
    double seconds = 0;                // that they took
  };
  int drafts_possible() const;
  int draft_vocabulary() const;
  void take_guess();
  void end_round();
  void prepare(std::span<const Turn> turns);
  void keep_logits(const Turn& turn, std::span<const float> logits, bool tentative);

  void check_room(std::size_t count) const;
  template <class Work>
  void append(std::span<const std::int32_t> tokens, Work work);
  // Samples until something ends it; `on_text` sees the answer.
  void run(std::span<const float> logits, const GenerateOptions& options, const OnText& on_text, Generated& result);

  KvType kv() const noexcept { return *options_.kv; }
  // Keeps the timeline's state, if it would take long to read again.
  void keep_timeline();
  // The longest beginning of `tokens` in the folder, if it is longer than `known`; else of 0 tokens.
  PrefixCache::Found read_folder(std::span<const std::int32_t> tokens, std::int64_t known);
  // Chooses among the states that a sync() of `tokens` keeps what is worth a file, and writes it when there is time.
  void remember(std::span<const std::int32_t> tokens, std::int64_t position, bool system,
                const std::shared_ptr<const TimelineSnapshot>& state);
  void write_folder();

  // At the end, when the timeline is gone, what it shared with the cache is the cache's alone.
  struct Trim {
    std::shared_ptr<const void> model{};  // whose cache it is
    void operator()(PrefixCache* cache) const noexcept {
      try {
        cache->trim();
      } catch (const std::exception&) {  // no memory to think about it: the next one will
      }
    }
  };

  Model model_;
  SessionOptions options_;  // as asked for, `kv` filled in
  std::int64_t context_;
  std::unique_ptr<PrefixCache, Trim> prefixes_;  // the model's
  std::unique_ptr<Timeline> timeline_;
  std::vector<std::int32_t> tokens_;
  std::vector<float> logits_;  // those that follow the last token
  Speculation speculation_;
  // Of decode_together(), if this session is the first: what takes part in the pass, what needs none.
  std::vector<TimelineTurn> parts_;
  std::vector<std::size_t> turn_of_part_, foreseen_;
  std::vector<ChooseDraft> choose_;
  std::vector<DraftTurn> drafts_;

  std::optional<SavedStates> system_, conversation_;  // to be written to the folder
  std::int64_t written_ = 0;                          // tokens of the timeline that a file holds
  bool mine_ = false;                                 // this session wrote it, for a conversation
  std::string trouble_;                               // with the folder
};

// What a session is to read together with others, and the logits that follow.
struct Turn {
  Session* session;
  std::span<const std::int32_t> tokens;  // one, or more if it still reads its prompt
  std::span<const float> logits{};       // [vocab_size], set by decode_together(); valid until the session's next call
};

// Session::prefill() of several sessions of one Model in the same forward passes: weights are read once for all, so
// that 8 sequences take much less time than 8 times one.  Each gets what it would get alone, up to rounding.  Passes
// have as many rows as the first session's `batch`.  Sessions that speculate() guess ahead together; take what they
// foresee by decode() first, so that all have work for the next pass.  All sessions belong to the caller's thread
// meanwhile. Throws Error if the turns are of different models, name a session twice, do not fit a context or are not
// in the vocabulary; nothing has changed then.
void decode_together(std::span<Turn> turns);

}  // namespace qwen3next

#if QWEN3NEXT_DEFINITIONS
#include "generate/make_engine.hpp"
#include "generate/session.hpp"
#endif
#ifdef QWEN3NEXT_QUANTIZE
#include "generate/calibrate.hpp"
#include "weights/quantize.hpp"
#endif

#endif  // QWEN3NEXT_ISA
