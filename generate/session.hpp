#pragma once
// Definitions of Model and Session: the end of qwen3next.hpp, which includes this after declaring them.

#include <algorithm>
#include <chrono>

#include "core/linkage.hpp"
#include "generate/session_decode.hpp"
#include "generate/state_file.hpp"
#include "weights/model_identity.hpp"

namespace qwen3next {

// --- Model ----------------------------------------------------------------------------------------------------------

namespace detail {

// The budget to stream within, 0 for weights that are all mapped: those that the machine holds beside a session.
inline std::uint64_t streaming_memory(const Checkpoint& checkpoint, const Options& options) {
  if (options.memory) return std::max<std::uint64_t>(*options.memory, 1);
  if (options.backend != Backend::cpu) return 0;
  const std::optional<std::uint64_t> spare = spare_memory();
  const MemoryPlan session = plan_session(checkpoint.config, KvType::f16, 4096, SessionOptions{}.batch);
  return spare && checkpoint.weight_bytes() + session.session() > *spare ? *spare : 0;
}

// Of the states of prefixes, beside what sessions hold.
inline std::uint64_t prefix_cache_memory(const Checkpoint& checkpoint, const Options& options, std::uint64_t budget) {
  constexpr std::uint64_t most = std::uint64_t{8} << 30, unknown = std::uint64_t{1} << 30;
  constexpr std::uint64_t of_a_card = std::uint64_t{1} << 30;  // states lie where they are computed
  if (options.prefix_cache) return *options.prefix_cache;
  if (options.backend == Backend::cuda) return of_a_card;
  if (budget > 0) return budget / 16;
  const std::optional<std::uint64_t> spare = spare_memory();
  if (!spare) return unknown;
  return std::min(most, (*spare - std::min(*spare, checkpoint.weight_bytes())) / 2);
}

}  // namespace detail

QWEN3NEXT_INLINE Model Model::open(const std::filesystem::path& path, const Options& options) {
  auto shared = std::make_shared<Shared>(Checkpoint::open(path, options.mtp_path));
  Config& config = shared->checkpoint.config;
  if (options.yarn_factor != 0) config.extend_context(options.yarn_factor);
  shared->experts_of_model = config.num_experts_per_tok;
  if (options.experts_used != 0) config.use_experts(options.experts_used);
  EngineOptions engine{options.backend, options.isa,        options.threads,       {},
                       options.on_load, options.gpu_memory, options.expert_profile};
  const std::uint64_t memory = detail::streaming_memory(shared->checkpoint, options);
  PrefixCache::Charge charge;
  if (memory > 0) {
    engine.streaming = shared->streaming =
        std::make_shared<Streaming>(shared->checkpoint, memory, options.expert_profile);
    charge = [part = std::make_shared<Streaming::Charge>(*shared->streaming)](std::uint64_t bytes) {
      part->set(bytes);
    };
  }
  shared->prefixes = std::make_unique<PrefixCache>(detail::prefix_cache_memory(shared->checkpoint, options, memory),
                                                   std::move(charge));
  if (!options.cache_dir.empty()) shared->folder.emplace(options.cache_dir, options.cache_dir_bytes);
  shared->backend = options.backend;
  shared->engine = make_engine(config, shared->checkpoint.weights, engine);
  Model model;
  model.shared_ = std::move(shared);
  return model;
}

QWEN3NEXT_INLINE std::int64_t Model::checked_context(std::int64_t asked) const {
  const std::int64_t longest = config().max_position_embeddings, context = asked == 0 ? longest : asked;
  if (context < 1 || context > longest) {
    throw Error("context is " + std::to_string(context) + " tokens, expected 1.." + std::to_string(longest) +
                " (this model's length; YaRN extends it)");
  }
  return context;
}

QWEN3NEXT_INLINE MemoryPlan Model::plan(const SessionOptions& options) const {
  const std::int64_t context = checked_context(options.context);
  const KvType kv = options.kv.value_or(shared_->engine->default_kv());
  MemoryPlan plan = plan_session(config(), kv, context, options.batch);
  plan.weights_mapped = checkpoint().file_bytes();
  plan.weights_copied = checkpoint().copied_bytes();
  if (shared_->streaming) shared_->streaming->add_to(plan, config());
  shared_->engine->add_to(plan);
  return plan;
}

QWEN3NEXT_INLINE std::string Model::backend_description() const {
  std::string description = shared_->engine->description();
  if (shared_->experts_of_model != config().num_experts_per_tok) {
    description += ", " + std::to_string(config().num_experts_per_tok) + " of " +
                   std::to_string(shared_->experts_of_model) + " experts a token";
  }
  return description;
}

QWEN3NEXT_INLINE Session Model::session(const SessionOptions& options) const {
  return Session(*this, options, checked_context(options.context));
}

QWEN3NEXT_INLINE const Tokenizer& Model::tokenizer() const {
  std::call_once(shared_->tokenizer_once, [&] { shared_->tokenizer = load_tokenizer(checkpoint().path); });
  return *shared_->tokenizer;
}

QWEN3NEXT_INLINE const ChatTemplate& Model::chat_template() const {
  std::call_once(shared_->template_once, [&] { shared_->chat_template = load_chat_template(checkpoint().path); });
  return *shared_->chat_template;
}

QWEN3NEXT_INLINE const GenerationDefaults& Model::defaults() const {
  std::call_once(shared_->defaults_once, [&] { shared_->defaults = load_generation_defaults(checkpoint().path); });
  return shared_->defaults;
}

QWEN3NEXT_INLINE Sampling Model::sampling() const { return advised(defaults()); }

QWEN3NEXT_INLINE std::vector<std::int32_t> Model::stop_tokens() const {
  std::vector<std::int32_t> stop = defaults().eos_token_ids;
  for (std::string_view token : {"<|im_end|>", "<|endoftext|>"}) {
    const auto id = tokenizer().find(token);
    if (id && std::find(stop.begin(), stop.end(), *id) == stop.end()) stop.push_back(*id);
  }
  return stop;
}

QWEN3NEXT_INLINE std::optional<std::int32_t> Model::turn_token() const {
  try {
    return tokenizer().find("<|im_start|>");
  } catch (const Error&) {  // weights can be used without one
    return {};
  }
}

// --- Session: tokens -------------------------------------------------------------------------------------------------

QWEN3NEXT_INLINE Session::Session(Model model, const SessionOptions& options, std::int64_t context)
    : model_(std::move(model)),
      options_(options),
      context_(context),
      prefixes_(model_.shared_->prefixes.get(), Trim{model_.shared_}) {
  const Engine& engine = *model_.shared_->engine;
  if (options.snapshot_spacing < 1) {
    throw Error("snapshot_spacing is " + std::to_string(options.snapshot_spacing) + " tokens, expected at least 1");
  }
  options_.kv = options.kv.value_or(engine.default_kv());
  timeline_ =
      engine.timeline({options_.kv, static_cast<int>(std::min<std::int64_t>(options.batch, context)), options.mtp});
  tokens_.reserve(static_cast<std::size_t>(std::min<std::int64_t>(context, 1 << 14)));  // decoding allocates nothing
}

QWEN3NEXT_INLINE void Session::check_room(std::size_t count) const {
  if (static_cast<std::int64_t>(tokens_.size() + count) > context_) {
    throw Error(std::to_string(tokens_.size()) + " tokens and " + std::to_string(count) +
                " more do not fit a context of " + std::to_string(context_) +
                ": open the session with a larger context, or reset it");
  }
}

template <class Work>
void Session::append(std::span<const std::int32_t> tokens, Work work) {
  check_room(tokens.size());
  const std::size_t before = tokens_.size();
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  try {
    work();
  } catch (...) {  // some of the tokens are there, without logits of the last, or none
    const auto position = static_cast<std::size_t>(timeline_->position());
    if (position != before) logits_.clear();
    tokens_.resize(position);
    throw;
  }
}

QWEN3NEXT_INLINE std::span<const float> Session::prefill(std::span<const std::int32_t> tokens,
                                                         const Progress& progress) {
  append(tokens, [&] {
    const std::span<const float> logits = timeline_->append(tokens, progress);
    logits_.assign(logits.begin(), logits.end());
  });
  return logits_;
}

QWEN3NEXT_INLINE void Session::keep_timeline() {
  const auto held = static_cast<std::int64_t>(tokens_.size());
  if (held == 0 || held - prefixes_->find(kv(), tokens_, false).position < options_.snapshot_spacing / 16) return;
  prefixes_->insert(kv(), tokens_, {timeline_->snapshot(), logits_}, false);
}

QWEN3NEXT_INLINE PrefixCache::Found Session::read_folder(std::span<const std::int32_t> tokens, std::int64_t known) {
  PrefixCache::Found found;
  const auto& folder = model_.shared_->folder;
  if (!folder) return found;
  for (const StateFolder::Entry& entry : folder->find(model_.identity(), kv(), tokens)) {
    if (entry.position <= known || entry.position == static_cast<std::int64_t>(tokens.size())) continue;
    try {
      SavedStates saved = read_state_file(entry.path, model_.identity(), *model_.shared_->engine, kv(), context_,
                                          model_.config().vocab_size);
      const auto beginning = tokens.first(static_cast<std::size_t>(entry.position));
      if (!std::ranges::equal(saved.tokens, beginning)) continue;  // of the same hash
      StateFolder::touch(entry.path);
      found.position = found.known = written_ = entry.position;
      mine_ = false;
      found.state.snapshot = std::move(saved.states.back().snapshot);
      prefixes_->insert(kv(), beginning, found.state, true);
      return found;
    } catch (const Error& e) {  // damaged, or another process has just removed it: its tokens are read instead
      trouble_ = e.what();
    }
  }
  return found;
}

// A file holds all keys and values up to its state, so a conversation gets a new one when it has grown by an eighth.
QWEN3NEXT_INLINE void Session::remember(std::span<const std::int32_t> tokens, std::int64_t position, bool system,
                                        const std::shared_ptr<const TimelineSnapshot>& state) {
  constexpr std::int64_t least = 256;
  if (!model_.shared_->folder || position - (system ? 0 : written_) < std::max(least, position / 8)) return;
  const auto beginning = tokens.first(static_cast<std::size_t>(position));
  (system ? system_ : conversation_) =
      SavedStates{kv(), {beginning.begin(), beginning.end()}, {}, {{position, true, state}}};
}

QWEN3NEXT_INLINE void Session::write_folder() {
  const std::optional<SavedStates> system = std::exchange(system_, {}), conversation = std::exchange(conversation_, {});
  if (!system && !conversation) return;
  const StateFolder& folder = *model_.shared_->folder;
  try {
    if (system) folder.store(model_.identity(), *system);
    if (!conversation || !folder.store(model_.identity(), *conversation)) return;
    if (mine_)
      folder.remove(model_.identity(), kv(), std::span(conversation->tokens).first(static_cast<std::size_t>(written_)));
    written_ = static_cast<std::int64_t>(conversation->tokens.size());
    mine_ = true;
  } catch (const Error& e) {  // a full disk costs time later, not the answer now
    trouble_ = e.what();
  }
}

QWEN3NEXT_INLINE Session::Synced Session::sync(std::span<const std::int32_t> tokens, const Progress& progress) {
  std::vector<std::int64_t> turns;
  if (const std::optional<std::int32_t> start = model_.turn_token()) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] == *start) turns.push_back(static_cast<std::int64_t>(i));
    }
  }
  return sync(tokens, turns, progress);
}

QWEN3NEXT_INLINE Session::Synced Session::sync(std::span<const std::int32_t> tokens,
                                               std::span<const std::int64_t> turns, const Progress& progress) {
  const auto asked = static_cast<std::int64_t>(tokens.size()), held = static_cast<std::int64_t>(tokens_.size());
  if (asked > context_) {
    throw Error(std::to_string(asked) + " tokens do not fit a context of " + std::to_string(context_) +
                ": open the session with a larger context, or shorten what it is to read");
  }
  const auto n = static_cast<std::ptrdiff_t>(std::min(asked, held));
  const std::int64_t same = std::mismatch(tokens_.begin(), tokens_.begin() + n, tokens.begin()).first - tokens_.begin();
  const bool goes_on = held > 0 && same == held && (held < asked || !logits_.empty());
  write_folder();
  if (same < written_) written_ = 0, mine_ = false;
  PrefixCache::Found found = prefixes_->find(kv(), tokens);
  const PrefixCache::Found on_disk = read_folder(tokens, std::max(found.position, goes_on ? held : 0));
  if (on_disk.position > 0) found.position = on_disk.position, found.state = on_disk.state;
  if (on_disk.position > found.known) found.known = on_disk.position, found.next = -1;

  Reuse how{.tokens = asked, .known = found.known, .was = found.next, .trouble = std::exchange(trouble_, {})};
  if (same >= found.known && held > 0) {
    how.known = same;
    how.was = same < held ? tokens_[static_cast<std::size_t>(same)] : -1;
  }
  if (how.known < asked) how.is = tokens[static_cast<std::size_t>(how.known)];

  if (goes_on && held >= found.position) {
    how.source = Reuse::Source::timeline;
  } else {
    keep_timeline();
    if (found.state.snapshot) {
      how.source = on_disk.position > 0 ? Reuse::Source::disk : Reuse::Source::memory;
      timeline_->restore(*found.state.snapshot);
      tokens_.assign(tokens.begin(), tokens.begin() + found.position);
      logits_ = found.state.logits;
    } else {
      reset();
    }
  }
  how.reused = static_cast<std::int64_t>(tokens_.size());
  if (how.reused == asked && !logits_.empty()) return {logits_, asked, how};

  std::vector<std::int64_t> keep;
  std::vector<bool> turn;
  for (const SnapshotPosition& p :
       snapshot_positions(found.position, how.reused, asked, turns, options_.snapshot_spacing)) {
    keep.push_back(p.position - how.reused);
    turn.push_back(p.turn);
  }
  found = {};
  std::size_t kept = 0;
  const std::int64_t system = turns.size() < 3 ? 0 : turns[1];  // where its turn ends
  const std::span<const std::int32_t> missing = tokens.subspan(static_cast<std::size_t>(how.reused));
  append(missing, [&] {
    const std::span<const float> logits =
        timeline_->append(missing, progress, keep, [&](std::int64_t count, auto snapshot) {
          const std::int64_t position = how.reused + count;
          const bool begins_turn = turn[kept++];
          if (begins_turn) remember(tokens, position, position == system, snapshot);
          prefixes_->insert(kv(), tokens.first(static_cast<std::size_t>(position)), {std::move(snapshot), {}},
                            begins_turn);
        });
    logits_.assign(logits.begin(), logits.end());
  });
  return {logits_, how.reused, how};
}

QWEN3NEXT_INLINE void Session::all_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink) {
  append(tokens, [&] {
    timeline_->append_all_logits(tokens, [&](std::span<const float> row) {
      logits_.assign(row.begin(), row.end());
      sink(row);
    });
  });
}

QWEN3NEXT_INLINE void Session::mtp_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink) {
  append(tokens, [&] { timeline_->append_mtp_logits(tokens, sink); });
  logits_.clear();
}

QWEN3NEXT_INLINE Snapshot Session::snapshot() const {
  Snapshot s;
  s.state_ = timeline_->snapshot();
  s.tokens_ = tokens_;
  s.logits_ = logits_;
  return s;
}

QWEN3NEXT_INLINE void Session::restore(const Snapshot& snapshot) {
  if (!snapshot.state_) throw Error("this snapshot is empty: take one with Session::snapshot()");
  if (snapshot.position() > context_) {
    throw Error("a snapshot of " + std::to_string(snapshot.position()) + " tokens does not fit a context of " +
                std::to_string(context_));
  }
  timeline_->restore(*snapshot.state_);
  tokens_ = snapshot.tokens_;
  logits_ = snapshot.logits_;
}

QWEN3NEXT_INLINE std::uint64_t Model::identity() const {
  std::call_once(shared_->identity_once, [&] { shared_->identity = model_identity(checkpoint(), shared_->backend); });
  return shared_->identity;
}

QWEN3NEXT_INLINE void Session::save(const std::filesystem::path& path) const {
  if (tokens_.empty()) throw Error("nothing to save: the session has read no tokens");
  constexpr std::size_t most_turns = 4;
  SavedStates saved{kv(), tokens_, logits_, {}};
  const std::shared_ptr<const TimelineSnapshot> now = timeline_->snapshot();
  for (auto& [position, snapshot] : prefixes_->turns(kv(), tokens_)) {
    if (position < static_cast<std::int64_t>(tokens_.size()) && snapshot->begins(*now))
      saved.states.push_back({position, true, std::move(snapshot)});
  }
  if (saved.states.size() > most_turns) saved.states.erase(saved.states.begin(), saved.states.end() - most_turns);
  saved.states.push_back({static_cast<std::int64_t>(tokens_.size()), false, now});
  write_state_file(path, model_.identity(), saved);
}

QWEN3NEXT_INLINE void Session::load(const std::filesystem::path& path) {
  SavedStates saved =
      read_state_file(path, model_.identity(), *model_.shared_->engine, kv(), context_, model_.config().vocab_size);
  timeline_->restore(*saved.states.back().snapshot);
  tokens_ = std::move(saved.tokens);
  logits_ = std::move(saved.logits);
  saved.states.pop_back();
  for (SavedStates::State& state : saved.states) {
    prefixes_->insert(kv(), std::span(tokens_).first(static_cast<std::size_t>(state.position)),
                      {std::move(state.snapshot), {}}, state.turn);
  }
}

QWEN3NEXT_INLINE void Session::reset() {
  timeline_->reset();
  tokens_.clear();
  logits_.clear();
  prefixes_->trim();
}

QWEN3NEXT_INLINE Session Session::fork() const {
  Session other(model_, options_, context_);
  other.restore(snapshot());
  return other;
}

// --- Session: text ------------------------------------------------------------------------------------------------

QWEN3NEXT_INLINE void Session::run(std::span<const float> logits, const GenerateOptions& options, const OnText& on_text,
                                   Generated& result) {
  Sampler sampler(options.sampling);
  for (std::int32_t token : tokens_) sampler.observe_prompt(token);
  const std::int64_t room = context_ - static_cast<std::int64_t>(tokens_.size());
  const MtpStatistics before = speculation_.statistics;
  struct Guessing {  // as long as the sampler lives
    Session& session;
    ~Guessing() { session.speculation_.sampler = nullptr; }
  } const guessing{*this};
  if (options.drafts != 0) speculate(&sampler, options.drafts);
  generate_tokens(
      model_.tokenizer(), sampler, logits, room, options, on_text, [&](std::int32_t token) { return decode(token); },
      result);
  result.mtp = speculation_.statistics - before;
}

QWEN3NEXT_INLINE Generated Session::generate(std::string_view prompt, const OnText& on_text,
                                             const GenerateOptions& options) {
  Generated result;
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::int32_t> tokens = model_.tokenizer().encode(prompt);
  if (tokens.empty() && logits_.empty()) throw Error("the prompt is empty: give at least one character of text");
  std::span<const float> logits = logits_;
  if (!tokens.empty()) logits = prefill(tokens, options.on_prefill);
  result.prompt_tokens = static_cast<std::int64_t>(tokens.size());
  result.prompt_seconds = detail::seconds_since(start);
  run(logits, options, on_text, result);
  write_folder();
  return result;
}

QWEN3NEXT_INLINE Answer Session::chat(const nlohmann::ordered_json& messages, const OnEvent& on_event,
                                      const GenerateOptions& options, const nlohmann::ordered_json& tools) {
  Answer answer;
  const auto start = std::chrono::steady_clock::now();
  const ChatTemplate& chat_template = model_.chat_template();
  const std::vector<std::int32_t> prompt = chat_template.render_prompt(messages, tools).encode(model_.tokenizer());
  const Synced synced = sync(prompt, options.on_prefill);
  answer.generated.prompt_tokens = static_cast<std::int64_t>(prompt.size());
  answer.generated.reused_tokens = synced.reused;
  answer.generated.reuse = synced.how;
  answer.generated.prompt_seconds = detail::seconds_since(start);

  AnswerParser parser(chat_template.kind(), tools);
  bool wanted = true;
  auto give = [&](std::vector<AnswerEvent> events) {
    for (AnswerEvent& event : events) {
      if (event.kind == AnswerEvent::reasoning) answer.reasoning += event.text;
      if (event.kind == AnswerEvent::content) answer.content += event.text;
      if (wanted && on_event) wanted = on_event(event);
      if (event.kind == AnswerEvent::tool_call) answer.tool_calls.push_back(std::move(event.call));
    }
    return wanted;
  };
  run(
      synced.logits, options, [&](std::string_view piece) { return give(parser.push(piece)); }, answer.generated);
  give(parser.finish());
  write_folder();
  return answer;
}

}  // namespace qwen3next
