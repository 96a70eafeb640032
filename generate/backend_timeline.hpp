#pragma once
// A Timeline over any backend: the model's template, instantiated once per backend, and what guesses need.

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "generate/engine.hpp"
#include "generate/streaming.hpp"
#include "model/forward.hpp"
#include "model/memory_plan.hpp"
#include "model/mtp.hpp"

namespace qwen3next {

// A backend with memory of its own keeps states there, and names a backend that keeps the same in this machine's:
// B::Host.
template <class B>
concept KeepsStatesElsewhere = requires {
  typename B::Host;
};

template <BackendOps B>
struct BackendSnapshot final : TimelineSnapshot {
  BackendSnapshot(const void* m, KvType k, SequenceState<B> s) : model(m), kv(k), state(std::move(s)) {}
  const void* model;  // which model's weights, by identity
  KvType kv;
  SequenceState<B> state;

  void memory(std::vector<SharedMemory>& out) const override {
    for (const LayerState<B>* layer : state.all_layers()) {
      if (layer->kv) layer->kv->blocks(out);
      if (layer->delta) out.push_back({&*layer->delta, layer->delta->size_in_bytes(), 1});
    }
  }
  void kv_bytes(const BytesSink& sink) const override {
    for (const LayerState<B>* layer : state.all_layers()) {
      if (layer->kv) layer->kv->bytes(sink);
    }
  }
  void state_bytes(const BytesSink& sink) const override {
    for (const LayerState<B>* layer : state.all_layers()) {
      if (layer->delta) layer->delta->bytes(sink);
    }
    if (!state.hidden.empty()) sink(std::as_bytes(std::span(state.hidden)));
  }
  std::int64_t mtp_position() const override { return state.mtp_position; }
  std::shared_ptr<const TimelineSnapshot> downloaded([[maybe_unused]] bool with_kv) const override {
    if constexpr (KeepsStatesElsewhere<B>) {
      using Host = typename B::Host;
      SequenceState<Host> host(state.layers.size());
      const auto download = [&](const LayerState<B>& from, LayerState<Host>& to) {
        if (from.delta) to.delta = from.delta->to_host();
        if (from.kv && with_kv) to.kv = from.kv->to_host();
      };
      for (std::size_t i = 0; i < state.layers.size(); ++i) download(state.layers[i], host.layers[i]);
      download(state.mtp, host.mtp);
      host.position = state.position, host.mtp_position = state.mtp_position, host.hidden = state.hidden;
      return std::make_shared<BackendSnapshot<Host>>(model, kv, std::move(host));
    } else {
      return nullptr;
    }
  }
  bool begins(const TimelineSnapshot& longer) const override {
    const auto* same_memory = dynamic_cast<const BackendSnapshot*>(&longer);
    if (!same_memory) return false;
    const SequenceState<B>& other = same_memory->state;
    if (state.position > other.position || state.mtp_position > other.mtp_position) return false;
    const auto mine = state.all_layers(), theirs = other.all_layers();
    for (std::size_t i = 0; i < mine.size(); ++i) {
      if (mine[i]->kv && !mine[i]->kv->begins(*theirs[i]->kv)) return false;
    }
    return true;
  }
};

// What a session of `positions` tokens takes in passes of `rows` while experts are streamed: its states twice, since a
// pass may fail.
inline std::uint64_t session_bytes(const Config& c, KvType kv, std::int64_t positions, int rows) {
  const MemoryPlan plan = plan_session(c, kv, positions, rows);
  return plan.session() + plan.delta_state;
}

template <BackendOps B>
class BackendTimeline final : public Timeline {
 public:
  // `streaming` is null where all weights are in memory.
  BackendTimeline(B backend, const Config& config, const ModelWeights<B>& weights, KvType kv, int batch, bool mtp,
                  Streaming* streaming = nullptr, std::unique_ptr<Streaming::Charge> charge = {})
      : streaming_(streaming),
        charge_(std::move(charge)),
        be_(std::move(backend)),
        kv_(kv),
        c_(config),
        w_(weights),
        state_(be_, config),
        a_(be_, config, batch, std::min(batch, logit_rows), 1) {
    if (mtp && weights.mtp) unseen_.emplace(be_, config);
  }

  std::span<const float> append(std::span<const std::int32_t> tokens, const Progress& progress,
                                std::span<const std::int64_t> keep, const SnapshotSink& sink) override {
    check(tokens);
    drop_guesses();
    const auto total = static_cast<std::int64_t>(tokens.size());
    std::int64_t done = 0;
    int T = 0;
    for (std::span<const std::int32_t> step : steps(tokens)) {
      T = static_cast<int>(step.size());
      std::function<void(int)> after_layer;
      if (progress && T >= guarded_tokens) {
        after_layer = [&](int layer) {
          if (!progress(done + std::int64_t{T} * (layer + 1) / (c_.num_hidden_layers + 1), total)) throw Cancelled();
        };
      }
      order_states(keep, done, T);
      step_forward(step, after_layer, kept_rows_);
      done += T;
      give_states(sink, done - T, T);
      if (progress && !progress(done, total)) throw Cancelled();
    }
    return be_.host(head(be_, w_.lm_head, a_, T - 1, 1));
  }

  // Turns share passes of at most a_.max_rows rows, in their order; one that does not fit goes on in the next pass.
  void append_together(std::span<const TimelineTurn> turns, const TurnSink& sink) override {
    others_.clear();
    for (const TimelineTurn& turn : turns) {
      check(turn.tokens);
      if (turn.tentative && static_cast<int>(turn.tokens.size()) > std::min(max_tentative_rows, a_.max_rows))
        throw Error("more guesses than fit a pass");
      others_.push_back(&of_this_model(turn.timeline));
    }
    for (BackendTimeline* t : others_) t->drop_guesses();
    std::size_t turn = 0, done = 0;  // the next token's place
    while (turn < turns.size()) {
      rows_.clear(), sequences_.clear();
      const std::size_t first = turn;
      while (turn < turns.size() && rows_.size() < static_cast<std::size_t>(a_.max_rows)) {
        const std::span<const std::int32_t> rest = turns[turn].tokens.subspan(done);
        const std::size_t room = static_cast<std::size_t>(a_.max_rows) - rows_.size(), n = std::min(rest.size(), room);
        const bool tentative = turns[turn].tentative;
        if (tentative && n < rest.size()) break;  // guesses are checked in one pass
        SequenceState<B>& state = others_[turn]->state_;
        sequences_.push_back({static_cast<int>(rows_.size()), static_cast<int>(n), state.position, &state, tentative});
        rows_.insert(rows_.end(), rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(n));
        done = n < rest.size() ? done + n : 0;
        if (done == 0) ++turn;
      }
      for (std::size_t i = 0; i < sequences_.size(); ++i) others_[first + i]->make_room(sequences_[i].count);
      guarded([&] { forward<B>(be_, c_, w_, rows_, sequences_, a_); },
              std::span(others_).subspan(first, sequences_.size()), may_fail());
      for (std::size_t i = 0; i < sequences_.size(); ++i) {
        const SequenceRows<B>& s = sequences_[i];
        const auto begin = static_cast<std::size_t>(s.begin), count = static_cast<std::size_t>(s.count);
        others_[first + i]->passed(*this, std::span(rows_).subspan(begin, count), s.begin);
        if (s.tentative) others_[first + i]->guessed_ = s.count, others_[first + i]->taken_ = 1;
      }
      give_turn_logits(first, turn - first, sink);
    }
  }

  void append_all_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink) override {
    check(tokens);
    drop_guesses();
    for (std::span<const std::int32_t> step : steps(tokens)) give_logits(w_.lm_head, step_forward(step), sink);
  }

  void append_mtp_logits(std::span<const std::int32_t> tokens, const LogitsSink& sink) override {
    if (!w_.mtp) throw Error("this model has no MTP head (no mtp.* or nextn tensors in its files)");
    if (!unseen_) throw Error("this session was opened without the MTP head: leave SessionOptions::mtp true");
    check(tokens);
    drop_guesses();
    std::size_t begin = 0;
    for (std::span<const std::int32_t> step : steps(tokens)) {
      pass(step, {}, {});
      unseen_->follow(step.front());
      feed(*this, unseen_->count);
      const int T = static_cast<int>(step.size());
      unseen_->keep(be_, a_.h.rows(T - 1, 1));
      const std::size_t rows = std::min(step.size(), tokens.size() - 1 - begin);  // the last token has no next one
      if (rows == 0) break;
      const SequenceRows<B> sequence{0, static_cast<int>(rows), state_.mtp_position, &state_};
      BackendTimeline* const self = this;
      guarded(
          [&] {
            mtp_forward<B>(be_, c_, *w_.mtp, tokens.subspan(begin + 1, rows), a_.h.rows(0, static_cast<int>(rows)),
                           {&sequence, 1}, a_);
          },
          {&self, 1}, may_fail());
      if (rows == step.size()) unseen_->clear();
      give_logits(w_.mtp->lm_head, static_cast<int>(rows), sink);
      begin += step.size();
    }
  }

  int most_drafts() const override {
    const bool ready = unseen_ && state_.mtp_position + unseen_->count == state_.position;
    return ready ? std::min(max_tentative_rows, a_.max_rows) - 1 : 0;
  }

  void draft_together(std::span<const DraftTurn> turns) override {
    std::vector<Draft>& drafts = drafts_;
    drafts.clear();
    for (const DraftTurn& turn : turns) {
      BackendTimeline& timeline = of_this_model(turn.timeline);
      timeline.drop_guesses();
      timeline.feed(*this, timeline.unseen_->count - 1);
      drafts.push_back({&turn, &timeline, timeline.state_.mtp_position, turn.token});
    }
    try {
      for (int ahead = 1;; ++ahead) {
        std::erase_if(drafts, [&](const Draft& d) {
          if (ahead > d.turn->count) d.forget();
          return ahead > d.turn->count;
        });
        if (drafts.empty()) break;
        const auto most = static_cast<std::size_t>(a_.max_logit_rows);
        for (std::size_t i = 0; i < drafts.size(); i += most)
          draft_pass(std::span(drafts).subspan(i, std::min(most, drafts.size() - i)), ahead);
      }
    } catch (...) {
      if constexpr (requires { be_.give_up(); }) be_.give_up();
      for (const Draft& d : drafts) d.forget();
      throw;
    }
  }

  void take() override { ++taken_; }
  int guesses_left() const override { return guessed_ - taken_; }

  std::int64_t position() const override { return state_.position - (guessed_ - taken_); }
  std::shared_ptr<const TimelineSnapshot> snapshot() override {
    drop_guesses();
    state_.settle(be_, c_);
    if (unseen_) feed(*this, unseen_->count - 1);
    keep_hidden(state_, unseen_ && unseen_->count > 0 ? std::optional(unseen_->hidden.rows(0, 1)) : std::nullopt);
    return std::make_shared<BackendSnapshot<B>>(&w_, kv_, state_);
  }
  void restore(const TimelineSnapshot& snapshot) override {
    if (const auto* mine = dynamic_cast<const BackendSnapshot<B>*>(&snapshot)) {
      check_mine(*mine);
      forget_guesses();
      state_ = mine->state;
    } else if (!upload(snapshot)) {
      throw Error("this snapshot is another model's: it fits sessions of its own Model");
    }
    if (unseen_) unseen_->clear();
    if (unseen_ && !state_.hidden.empty() && state_.mtp_position + 1 == state_.position) {
      be_.set_host(unseen_->hidden.rows(0, 1), state_.hidden);
      unseen_->count = 1;
    }
  }
  void reset() override {
    forget_guesses();
    state_ = SequenceState<B>(be_, c_);
    if (unseen_) unseen_->clear();
  }

 private:
  static constexpr int logit_rows = 16;  // a vocabulary of 151936 makes a row 600 KB

  void check_mine(const auto& snapshot) const {
    if (snapshot.model != &w_) throw Error("this snapshot is another model's: it fits sessions of its own Model");
    if (snapshot.kv != kv_)
      throw Error("this snapshot's KV cache is of another type than the session's: open both alike");
  }

  // A state out of a file lies in this machine's memory yet.
  bool upload([[maybe_unused]] const TimelineSnapshot& snapshot) {
    if constexpr (KeepsStatesElsewhere<B>) {
      using Host = typename B::Host;
      const auto* host = dynamic_cast<const BackendSnapshot<Host>*>(&snapshot);
      if (!host) return false;
      check_mine(*host);
      forget_guesses();
      state_ = SequenceState<B>(be_, c_);
      const auto take = [](const LayerState<Host>& from, LayerState<B>& to) {
        if (from.delta) to.delta->from_host(*from.delta);
        if (from.kv) to.kv->from_host(*from.kv);
      };
      for (std::size_t i = 0; i < state_.layers.size(); ++i) take(host->state.layers[i], state_.layers[i]);
      take(host->state.mtp, state_.mtp);
      state_.position = host->state.position, state_.mtp_position = host->state.mtp_position;
      state_.hidden = host->state.hidden;
      return true;
    } else {
      return false;
    }
  }

  void check(std::span<const std::int32_t> tokens) const {
    if (tokens.empty()) throw Error("no tokens given: a forward pass needs at least one");
    for (std::int32_t token : tokens) {
      if (token < 0 || token >= c_.vocab_size) {
        throw Error("token id " + std::to_string(token) + " is not in the vocabulary, expected 0.." +
                    std::to_string(c_.vocab_size - 1));
      }
    }
  }

  BackendTimeline& of_this_model(Timeline* timeline) const {
    auto* other = dynamic_cast<BackendTimeline*>(timeline);
    if (!other || &other->w_ != &w_) throw Error("sessions of different models cannot share a pass");
    return *other;
  }

  // The tokens in as few pieces as a_.max_rows allows, of about equal size: a short one costs nearly as much as a long
  // one.
  struct Steps {
    std::span<const std::int32_t> tokens;
    std::size_t size;
    struct Iterator {
      const Steps* steps;
      std::size_t begin;
      std::span<const std::int32_t> operator*() const {
        return steps->tokens.subspan(begin, std::min(steps->size, steps->tokens.size() - begin));
      }
      Iterator& operator++() { return begin += steps->size, *this; }
      bool operator!=(std::nullptr_t) const { return begin < steps->tokens.size(); }
    };
    Iterator begin() const { return {this, 0}; }
    std::nullptr_t end() const { return nullptr; }
  };
  Steps steps(std::span<const std::int32_t> tokens) const {
    const auto most = static_cast<std::size_t>(a_.max_rows), pieces = (tokens.size() + most - 1) / most;
    return {tokens, (tokens.size() + pieces - 1) / pieces};
  }

  // Final hidden states that the MTP layer has not seen, because nobody asked for a guess yet.
  struct Unseen {
    Unseen(B& be, const Config& c) : hidden(be.tensor(max_unseen_states, c.hidden_size)) {
      next.reserve(max_unseen_states);
    }

    void follow(std::int32_t token) {
      if (count > 0) next.push_back(token);
    }
    void keep(B& be, typename B::Tensor rows) {
      be.copy(hidden.rows(count, rows.n_rows), rows);
      count += rows.n_rows;
    }
    void clear() { count = 0, next.clear(); }

    typename B::Tensor hidden;       // [max_unseen_states, H], of the last `count` tokens
    std::vector<std::int32_t> next;  // the token after each but the last
    int count = 0;
  };

  // Shows the MTP layer the first `count` unseen rows, in scratch memory of `at`.
  void feed(BackendTimeline& at, int count) {
    if (count <= 0) return;
    for (int begin = 0; begin < count; begin += at.a_.max_rows)
      feed_rows(at, std::span(unseen_->next).subspan(static_cast<std::size_t>(begin)),
                unseen_->hidden.rows(begin, std::min(at.a_.max_rows, count - begin)));
    const int rest = unseen_->count - count;
    for (int i = 0; i < rest; ++i) at.be_.copy(unseen_->hidden.rows(i, 1), unseen_->hidden.rows(count + i, 1));
    unseen_->next.erase(unseen_->next.begin(), unseen_->next.begin() + count);
    unseen_->count = rest;
  }
  void feed_rows(BackendTimeline& at, std::span<const std::int32_t> next, typename B::Tensor hidden) {
    const SequenceRows<B> sequence{0, hidden.n_rows, state_.mtp_position, &state_};
    mtp_feed<B>(at.be_, c_, *w_.mtp, next.first(static_cast<std::size_t>(hidden.n_rows)), hidden, {&sequence, 1},
                at.a_);
  }

  // `tokens` of this timeline went through the layers, as rows `begin` and on of `at`'s scratch memory.
  void passed(BackendTimeline& at, std::span<const std::int32_t> tokens, int begin) {
    if (!unseen_) return;
    const int T = static_cast<int>(tokens.size());
    unseen_->follow(tokens.front());
    if (unseen_->count + T > max_unseen_states) {
      feed(at, unseen_->count);
      if (T > 1) feed_rows(at, tokens.subspan(1), at.a_.h.rows(begin, T - 1));
      unseen_->keep(at.be_, at.a_.h.rows(begin + T - 1, 1));
    } else {
      unseen_->next.insert(unseen_->next.end(), tokens.begin() + 1, tokens.end());
      unseen_->keep(at.be_, at.a_.h.rows(begin, T));
    }
  }

  // Of a tentative turn: what was not taken.
  void drop_guesses() {
    if (guessed_ == 0) return;
    state_.accept(guessed_, taken_);
    if (unseen_) {
      unseen_->count -= guessed_ - taken_;
      unseen_->next.resize(static_cast<std::size_t>(std::max(0, unseen_->count - 1)));
    }
    forget_guesses();
  }
  void forget_guesses() { guessed_ = taken_ = 0; }

  // A draft in the making; a guess's hidden state is row 1 of the unseen ones, of which there is one.
  struct Draft {
    const DraftTurn* turn;
    BackendTimeline* timeline;
    std::int64_t position;  // of the MTP layer before
    std::int32_t token;     // the last guess, or what is known to follow

    void forget() const {
      timeline->state_.mtp.kv->truncate(position);
      timeline->state_.mtp_position = position;
    }
  };
  // One more guess each; as many as logits have room for.
  void draft_pass(std::span<Draft> drafts, int ahead) {
    const int T = static_cast<int>(drafts.size());
    rows_.clear(), sequences_.clear();
    int vocabulary = 0;
    auto hidden = a_.mix.rows(0, T);
    for (int i = 0; i < T; ++i) {
      const Draft& d = drafts[static_cast<std::size_t>(i)];
      rows_.push_back(d.token);
      sequences_.push_back({i, 1, d.timeline->state_.mtp_position, &d.timeline->state_});
      vocabulary = std::max(vocabulary, d.turn->vocabulary);
      be_.copy(hidden.rows(i, 1), d.timeline->unseen_->hidden.rows(ahead == 1 ? 0 : 1, 1));
    }
    mtp_forward<B>(be_, c_, *w_.mtp, rows_, hidden, sequences_, a_);
    auto logits = a_.logits.rows(0, T).columns(0, vocabulary);
    be_.linear(a_.h.rows(0, T), {{w_.mtp->lm_head.slice(0, vocabulary), logits}});
    for (int i = 0; i < T; ++i) {
      Draft& d = drafts[static_cast<std::size_t>(i)];
      const auto mine = static_cast<std::size_t>(d.turn->vocabulary);
      d.token = (*d.turn->choose)(ahead, be_.host(logits.rows(i, 1)).first(mine));
      d.turn->drafts->push_back(d.token);
      be_.copy(d.timeline->unseen_->hidden.rows(1, 1), a_.h.rows(i, 1));
    }
  }

  int step_forward(std::span<const std::int32_t> tokens, const std::function<void(int)>& after_layer = {},
                   std::span<const KeptState<B>> kept = {}) {
    pass(tokens, after_layer, kept);
    passed(*this, tokens, 0);
    return static_cast<int>(tokens.size());
  }

  void pass(std::span<const std::int32_t> tokens, const std::function<void(int)>& after_layer,
            std::span<const KeptState<B>> kept) {
    const int T = static_cast<int>(tokens.size());
    const SequenceRows<B> sequence{0, T, state_.position, &state_, false, kept};
    make_room(T);
    BackendTimeline* const self = this;
    guarded(
        [&] {
          forward<B>(be_, c_, w_, tokens, {&sequence, 1}, a_, after_layer);
        },
        {&self, 1}, after_layer || may_fail());
  }

  // Those of `keep` that a pass of T tokens, `done` before it, will reach.
  void order_states(std::span<const std::int64_t> keep, std::int64_t done, int T) {
    kept_rows_.clear(), kept_snapshots_.clear();
    for (const std::int64_t count : keep) {
      if (count <= done || count > done + T) continue;
      kept_snapshots_.push_back(std::make_shared<BackendSnapshot<B>>(&w_, kv_, SequenceState<B>(state_.layers.size())));
      kept_rows_.push_back({static_cast<int>(count - done), &kept_snapshots_.back()->state});
    }
  }
  // After the pass: what lies beyond a kept state is cut from copies of the KV caches.
  void give_states(const SnapshotSink& sink, std::int64_t done, int T) {
    if (kept_snapshots_.empty()) return;
    if (unseen_) feed(*this, unseen_->count - 1);
    for (std::size_t i = 0; i < kept_snapshots_.size(); ++i) {
      SequenceState<B>& s = kept_snapshots_[i]->state;
      s.position = state_.position - T + kept_rows_[i].row;
      s.settle(be_, c_);
      s.mtp_position = std::min(state_.mtp_position, s.position - 1);
      keep_hidden(s, unseen_ ? std::optional(a_.h.rows(kept_rows_[i].row - 1, 1)) : std::nullopt);
      for (std::size_t l = 0; l < s.layers.size(); ++l) {
        if (!state_.layers[l].kv) continue;
        s.layers[l].kv = state_.layers[l].kv;
        s.layers[l].kv->truncate(s.position);
      }
      s.mtp.kv = state_.mtp.kv;
      if (s.mtp.kv) s.mtp.kv->truncate(s.mtp_position);
      sink(done + kept_rows_[i].row, kept_snapshots_[i]);
    }
    kept_rows_.clear(), kept_snapshots_.clear();
  }

  // What the MTP layer is yet to see, in a snapshot; zeros if nobody knows.
  void keep_hidden(SequenceState<B>& s, std::optional<typename B::Tensor> row) {
    s.hidden.assign(c_.has_mtp ? static_cast<std::size_t>(c_.hidden_size) : 0, 0.0f);
    if (!row) return;
    const std::span<const float> hidden = be_.host(*row);
    std::copy(hidden.begin(), hidden.end(), s.hidden.begin());
  }

  // Takes from the budget what T more tokens need.
  void make_room(int T) {
    if (!charge_) return;
    longest_ = std::max(longest_, T);
    const std::int64_t positions = (state_.position + T + kv_step - 1) / kv_step * kv_step;
    charge_->at_least(session_bytes(c_, kv_, positions, longest_));
  }

  // A file can fail as long as experts are missing.
  bool may_fail() const { return streaming_ && !streaming_->complete(); }

  // Does `pass`; if it `may_fail` and does, the timelines are left as they were.
  template <class Pass>
  void guarded(Pass pass, std::span<BackendTimeline* const> timelines, bool may_fail) {
    if (!may_fail) return pass();
    for (BackendTimeline* t : timelines) t->guard_.keep(t->state_);
    try {
      pass();
    } catch (...) {
      if constexpr (requires { be_.give_up(); }) be_.give_up();
      for (BackendTimeline* t : timelines) t->guard_.put_back(t->state_);
      throw;
    }
  }

  void give_logits(const typename B::Weight& lm_head, int T, const LogitsSink& sink) {
    for (int begin = 0; begin < T; begin += a_.max_logit_rows) {
      const int n = std::min(a_.max_logit_rows, T - begin);
      auto logits = head(be_, lm_head, a_, begin, n);
      for (int i = 0; i < n; ++i) sink(be_.host(logits.rows(i, 1)));
    }
  }

  // Of the first `count` sequences of a pass, which are turns `first` and on: rows that are neighbours share a product.
  void give_turn_logits(std::size_t first, std::size_t count, const TurnSink& sink) {
    wanted_.clear();
    for (std::size_t i = 0; i < count; ++i) {
      const SequenceRows<B>& s = sequences_[i];
      for (int row = s.tentative ? 0 : s.count - 1; row < s.count; ++row) wanted_.push_back({s.begin + row, first + i});
    }
    for (std::size_t i = 0, n = 0; i < wanted_.size(); i += n) {
      for (n = 1; i + n < wanted_.size() && n < static_cast<std::size_t>(a_.max_logit_rows);) {
        if (wanted_[i + n].row != wanted_[i].row + static_cast<int>(n)) break;
        ++n;
      }
      auto logits = head(be_, w_.lm_head, a_, wanted_[i].row, static_cast<int>(n));
      for (std::size_t j = 0; j < n; ++j) sink(wanted_[i + j].turn, be_.host(logits.rows(static_cast<int>(j), 1)));
    }
  }

  static constexpr int guarded_tokens = 512;  // a pass of so many can be cancelled in the middle
  static constexpr std::int64_t kv_step = 1024;

  Streaming* streaming_;
  std::unique_ptr<Streaming::Charge> charge_;
  int longest_ = 0;  // pass until now
  SequenceGuard<B> guard_;
  B be_;
  KvType kv_;
  const Config& c_;
  const ModelWeights<B>& w_;
  SequenceState<B> state_;
  std::optional<Unseen> unseen_;  // nothing: there is no MTP head, or it is not wanted
  int guessed_ = 0, taken_ = 0;   // rows of a tentative turn, and of those what stays
  Activations<B> a_;
  std::vector<KeptState<B>> kept_rows_;                              // of the pass at hand
  std::vector<std::shared_ptr<BackendSnapshot<B>>> kept_snapshots_;  // what they are to become
  std::vector<BackendTimeline*> others_;  // of append_together(), like the next two: rows of a pass and whose they are
  std::vector<std::int32_t> rows_;
  std::vector<SequenceRows<B>> sequences_;
  struct WantedLogits {
    int row;
    std::size_t turn;
  };
  std::vector<WantedLogits> wanted_;
  std::vector<Draft> drafts_;
};

}  // namespace qwen3next
