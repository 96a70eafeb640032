#pragma once
// Definitions of Session's decoding, a part of session.hpp: guesses ahead, and passes that several sessions share.

#include <algorithm>
#include <chrono>

#include "core/linkage.hpp"

namespace qwen3next {

namespace detail {
inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
}  // namespace detail

QWEN3NEXT_INLINE std::span<const float> Session::decode(std::int32_t token) {
  if (foresees(token)) {
    take_guess();
  } else if (speculation_.sampler) {
    Turn turn{this, {&token, 1}};
    decode_together({&turn, 1});
  } else {
    prefill({&token, 1});
  }
  return logits_;
}

QWEN3NEXT_INLINE void Session::speculate(Sampler* sampler, int drafts) {
  if (drafts < auto_drafts || drafts > most_drafts) {
    throw Error("drafts is " + std::to_string(drafts) + ", expected 0.." + std::to_string(most_drafts) + ", or " +
                std::to_string(auto_drafts) + " for as many as pay");
  }
  if (sampler && drafts > 0 && timeline_->most_drafts() == 0) {
    throw Error(!model_.config().has_mtp
                    ? "this model has no MTP head to draft with: use 0 drafts, or leave them to auto"
                    : "this session, or a part of what it holds, was read without the MTP head: open it "
                      "with SessionOptions::mtp and a batch of 2 or more");
  }
  speculation_.sampler = sampler;
  speculation_.drafts = drafts;
}

QWEN3NEXT_INLINE bool Session::foresees(std::int32_t token) const noexcept {
  const Speculation& s = speculation_;
  return timeline_->guesses_left() > 0 && s.next < s.tokens.size() && s.tokens[s.next] == token;
}

QWEN3NEXT_INLINE int Session::drafts_possible() const {
  const std::int64_t room = context_ - static_cast<std::int64_t>(tokens_.size()) - 1;  // beside the token to be given
  return tokens_.empty() ? 0 : static_cast<int>(std::clamp<std::int64_t>(room, 0, timeline_->most_drafts()));
}

// Rows of a large vocabulary's head cost much of a draft, and few are needed, unless the text's tokens are others.
QWEN3NEXT_INLINE int Session::draft_vocabulary() const {
  constexpr std::ptrdiff_t recent = 256, most_rare = recent / 8;
  const int V = model_.config().vocab_size;
  if (V <= 2 * frequent_tokens) return V;
  const auto begin = tokens_.end() - std::min(recent, std::ssize(tokens_));
  const auto rare = std::count_if(begin, tokens_.end(), [](std::int32_t t) { return t >= frequent_tokens; });
  return rare > most_rare ? V : frequent_tokens;
}

QWEN3NEXT_INLINE void Session::take_guess() {
  Speculation& s = speculation_;
  timeline_->take();
  tokens_.push_back(s.tokens[s.next]);
  const auto V = static_cast<std::size_t>(model_.config().vocab_size);
  const auto row = s.logits.begin() + static_cast<std::ptrdiff_t>(s.next++ * V);
  logits_.assign(row, row + static_cast<std::ptrdiff_t>(V));
}

// Counts what came of the last pass, if it was not cut off.
QWEN3NEXT_INLINE void Session::end_round() {
  Speculation& s = speculation_;
  if (s.next > 0 && (s.next == s.tokens.size() || timeline_->guesses_left() > 0)) {
    const std::size_t drafts = s.tokens.size() - 1, right = s.next - 1;
    s.statistics.add(drafts, right);
    s.depth.note(static_cast<int>(drafts), static_cast<int>(right), s.seconds);
  }
  s.tokens.clear();
  s.next = s.rows = 0;
}

// Guesses for those of `turns` that want them; then what each has for the pass, but for those that need none.
QWEN3NEXT_INLINE void Session::prepare(std::span<const Turn> turns) {
  drafts_.clear(), parts_.clear(), turn_of_part_.clear(), foreseen_.clear(), choose_.clear();
  choose_.reserve(turns.size());
  int most = most_drafts, wanted = auto_drafts;
  for (std::size_t i = 0; i < turns.size(); ++i) {
    Session& session = *turns[i].session;
    const bool single = turns[i].tokens.size() == 1;
    if (single && session.foresees(turns[i].tokens.front())) {
      foreseen_.push_back(i);
      continue;
    }
    session.end_round();
    turn_of_part_.push_back(i);
    if (single && session.speculation_.sampler) {
      session.speculation_.tokens.push_back(turns[i].tokens.front());
      most = std::min(most, session.drafts_possible());
    }
  }
  for (const std::size_t i : turn_of_part_) {
    Session& session = *turns[i].session;
    Speculation& s = session.speculation_;
    if (s.tokens.empty()) continue;
    if (s.drafts == auto_drafts && wanted == auto_drafts) wanted = s.depth.choose(most);  // they share the pass
    const int drafts = std::min(most, s.drafts == auto_drafts ? wanted : s.drafts);
    if (drafts == 0) continue;
    choose_.push_back(
        [&sampler = *s.sampler](int ahead, std::span<const float> logits) { return sampler.guess(logits, ahead); });
    drafts_.push_back(
        {session.timeline_.get(), s.tokens.front(), drafts, session.draft_vocabulary(), &choose_.back(), &s.tokens});
  }
  if (!drafts_.empty()) drafts_.front().timeline->draft_together(drafts_);
  for (const std::size_t i : turn_of_part_) {
    const Speculation& s = turns[i].session->speculation_;
    const bool tentative = s.tokens.size() > 1;
    parts_.push_back({turns[i].session->timeline_.get(), tentative ? std::span(s.tokens) : turns[i].tokens, tentative});
  }
}

// The logits after the next token of `turn`.
QWEN3NEXT_INLINE void Session::keep_logits(const Turn& turn, std::span<const float> logits, bool tentative) {
  Speculation& s = speculation_;
  const bool first = !tentative || s.rows == 0;
  if (tentative) {
    s.logits.resize((most_drafts + 1) * logits.size());
    std::copy(logits.begin(), logits.end(), s.logits.begin() + static_cast<std::ptrdiff_t>(s.rows++ * logits.size()));
  }
  if (!first) return;
  logits_.assign(logits.begin(), logits.end());
  tokens_.insert(tokens_.end(), turn.tokens.begin(), turn.tokens.end());
  if (!s.tokens.empty()) s.next = 1;
}

QWEN3NEXT_INLINE void decode_together(std::span<Turn> turns) {
  if (turns.empty()) return;
  for (const Turn& turn : turns) {
    turn.session->check_room(turn.tokens.size());
    const auto same = [&](const Turn& other) { return other.session == turn.session; };
    if (std::count_if(turns.begin(), turns.end(), same) > 1)
      throw Error("a session is named twice in one pass: give all its tokens in one turn");
  }
  Session& leader = *turns.front().session;
  const std::vector<TimelineTurn>& parts = leader.parts_;
  const auto start = std::chrono::steady_clock::now();
  try {
    leader.prepare(turns);
    // In the scratch memory of one that has room for guesses, if there are any.
    const auto at = std::find_if(parts.begin(), parts.end(), [](const TimelineTurn& part) { return part.tentative; });
    if (!parts.empty()) {
      (at != parts.end() ? *at : parts.front())
          .timeline->append_together(parts, [&turns, &leader](std::size_t i, auto logits) {
            const Turn& turn = turns[leader.turn_of_part_[i]];
            turn.session->keep_logits(turn, logits, leader.parts_[i].tentative);
          });
    }
  } catch (...) {
    for (const std::size_t i : leader.turn_of_part_) {  // tokens of a pass before the one that failed
      Session& session = *turns[i].session;
      session.speculation_.tokens.clear();
      const auto done = static_cast<std::size_t>(session.timeline_->position()) - session.tokens_.size();
      if (done > 0) session.logits_.clear();
      session.tokens_.insert(session.tokens_.end(), turns[i].tokens.begin(),
                             turns[i].tokens.begin() + static_cast<std::ptrdiff_t>(done));
    }
    throw;
  }
  for (const std::size_t i : leader.turn_of_part_)
    turns[i].session->speculation_.seconds = detail::seconds_since(start);
  for (const std::size_t i : leader.foreseen_) turns[i].session->take_guess();
  for (Turn& turn : turns) turn.logits = turn.session->logits_;
}

}  // namespace qwen3next
