#pragma once
// States of what sessions have read, by the tokens that led to them: a new prompt goes on from the longest beginning
// that is known.
//
// A recurrent state cannot be cut, so a prompt that differs from an earlier one anywhere must be read again from the
// last state before that place.  States are kept where prompts tend to differ, see snapshot_positions().

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "generate/engine.hpp"

namespace qwen3next {

// A place to keep a state at: after so many tokens.  `turn`: a prompt is likely to differ from there on.
struct SnapshotPosition {
  std::int64_t position;
  bool turn;
  bool operator==(const SnapshotPosition&) const = default;
};

// Where to keep states while tokens [from, to) are read, in order.  `turns` are the positions where turns begin, in
// order; `known` is the last place before `from` that has a state.
//   - The last turn is the answer that is asked for: where the next prompt differs if its template drops reasoning.
//   - The turn before, a user's or a tool's, is what is edited and asked again; the first is where system message and
//     tools end.  Either only if that saves `least` tokens.
//   - Of a text without turns, all but the last token, so that the same or a longer one goes on from there.
//   - In between so that no two states are more than `spacing` apart, where turns begin if possible.
inline std::vector<SnapshotPosition> snapshot_positions(std::int64_t known, std::int64_t from, std::int64_t to,
                                                        std::span<const std::int64_t> turns, std::int64_t spacing) {
  const std::int64_t least = std::max<std::int64_t>(1, spacing / 16);
  std::vector<SnapshotPosition> positions;
  std::int64_t last = known;
  const auto keep = [&](std::int64_t position, bool turn) {
    if (position <= from || position <= last || position >= to) return;
    positions.push_back({position, turn});
    last = position;
  };
  const auto first = std::upper_bound(turns.begin(), turns.end(), std::max<std::int64_t>(0, least - 1));
  const std::int64_t system = first != turns.end() ? *first : 0;
  const std::int64_t answer = turns.empty() ? to - 1 : turns.back();
  const std::int64_t message = turns.size() < 2 ? 0 : turns[turns.size() - 2];
  // The turns of interest, each at the end of a stretch to be filled.
  for (const auto& [stop, apart] :
       {std::pair{system, least}, {message, least}, {answer, turns.empty() ? least : 1}, {to, to + 1}}) {
    while (stop - last > spacing) {
      const auto after = std::upper_bound(turns.begin(), turns.end(), last + spacing);
      const std::int64_t turn = after == turns.begin() ? 0 : *(after - 1);
      const std::int64_t next = turn >= last + least ? turn : last + spacing;
      if (next <= from) {
        last = next;
      } else {
        keep(next, false);
      }
      if (next >= to) break;
    }
    if (stop - last >= apart) keep(stop, true);
  }
  return positions;
}

// What a Model keeps for Session::sync(): so many states, in so many bytes that nothing else holds, of at most so many.
struct PrefixStatistics {
  std::uint64_t snapshots = 0, bytes = 0, budget = 0;
};

// Thread-safe.  Holds at most a budget of memory that nothing but itself holds: blocks of KV caches that a session
// uses, too, are that session's.
class PrefixCache {
 public:
  // Told how much is held from now on, before it grows; throws Error if that is too much.
  using Charge = std::function<void(std::uint64_t bytes)>;

  explicit PrefixCache(std::uint64_t budget, Charge charge = {}) : budget_(budget), charge_(std::move(charge)) {}

  struct State {
    std::shared_ptr<const TimelineSnapshot> snapshot;
    std::vector<float> logits;  // that follow the last token; empty if they are not known
  };
  struct Found {
    std::int64_t position = 0;  // tokens of the longest beginning with a state; of all tokens only if it has logits
    State state;
    std::int64_t known = 0;  // so many tokens are the beginning of something that was kept
    std::int32_t next = -1;  // the token that came there, -1 if none did
  };
  // `use`: it will be, and is worth keeping.
  Found find(KvType kv, std::span<const std::int32_t> tokens, bool use = true) {
    const std::lock_guard lock(mutex_);
    Found found;
    Node* node = &root(kv);
    Node* best = nullptr;
    while (found.known < static_cast<std::int64_t>(tokens.size())) {
      Node* const child = node->child(tokens[static_cast<std::size_t>(found.known)]);
      if (!child) {
        found.next = node->children.empty() ? -1 : node->children.front()->edge.front();
        break;
      }
      const std::size_t same = common(child->edge, tokens.subspan(static_cast<std::size_t>(found.known)));
      found.known += static_cast<std::int64_t>(same);
      if (same < child->edge.size()) {
        found.next = child->edge[same];
        break;
      }
      node = child;
      const bool all = found.known == static_cast<std::int64_t>(tokens.size());
      if (node->state.snapshot && (!all || !node->state.logits.empty())) best = node, found.position = found.known;
    }
    if (best) {
      found.state = best->state;
      if (use) best->used = ++clock_;
    }
    return found;
  }

  // Keeps the state after `tokens`, unless it is known already; others may have to go.
  void insert(KvType kv, std::span<const std::int32_t> tokens, State state, bool turn) {
    if (tokens.empty() || budget_ == 0) return;
    const std::lock_guard lock(mutex_);
    Node& node = place(root(kv), tokens);
    if (!node.state.snapshot || (node.state.logits.empty() && !state.logits.empty())) node.state = std::move(state);
    node.turn = node.turn || turn;
    node.used = ++clock_;
    fit();
  }

  // The states of beginnings of `tokens` where turns begin, shortest first.
  std::vector<std::pair<std::int64_t, std::shared_ptr<const TimelineSnapshot>>> turns(
      KvType kv, std::span<const std::int32_t> tokens) {
    const std::lock_guard lock(mutex_);
    std::vector<std::pair<std::int64_t, std::shared_ptr<const TimelineSnapshot>>> states;
    const Node* node = &root(kv);
    while (!tokens.empty() && (node = node->child(tokens.front()))) {
      const std::size_t same = common(node->edge, tokens);
      if (same < node->edge.size()) break;
      if (node->state.snapshot && node->turn) states.push_back({node->position, node->state.snapshot});
      tokens = tokens.subspan(same);
    }
    return states;
  }

  // Gives up what is too much by now: when a session has ended, what it shared is the cache's alone.
  void trim() {
    const std::lock_guard lock(mutex_);
    fit();
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    roots_.clear();
    fit();
  }

  PrefixStatistics statistics() const {
    const std::lock_guard lock(mutex_);
    PrefixStatistics s{0, held(), budget_};
    for (const auto& [kv, node] : roots_) for_each_state(*node, 0, [&](const Node&, std::int64_t) { ++s.snapshots; });
    return s;
  }

 private:
  struct Node {
    Node* parent = nullptr;
    std::vector<std::int32_t> edge;  // tokens from the parent to here
    std::vector<std::unique_ptr<Node>> children;
    std::int64_t position = 0;
    State state;  // with or without
    bool turn = false;
    std::uint64_t used = 0;  // by the clock

    Node* child(std::int32_t token) const {
      const auto found =
          std::find_if(children.begin(), children.end(), [&](const auto& c) { return c->edge.front() == token; });
      return found == children.end() ? nullptr : found->get();
    }
  };

  static std::size_t common(std::span<const std::int32_t> a, std::span<const std::int32_t> b) {
    const std::size_t n = std::min(a.size(), b.size());
    return static_cast<std::size_t>(
        std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()).first - a.begin());
  }

  Node& root(KvType kv) {
    std::unique_ptr<Node>& node = roots_[kv];
    if (!node) node = std::make_unique<Node>();
    return *node;
  }

  // The node for all of `tokens`, made if there is none.
  static Node& place(Node& root, std::span<const std::int32_t> tokens) {
    Node* node = &root;
    while (!tokens.empty()) {
      Node* child = node->child(tokens.front());
      if (!child) return add(*node, tokens);
      const std::size_t same = common(child->edge, tokens);
      if (same < child->edge.size()) child = &split(*child, same);
      node = child;
      tokens = tokens.subspan(same);
    }
    return *node;
  }
  static Node& add(Node& parent, std::span<const std::int32_t> edge) {
    auto node = std::make_unique<Node>();
    node->parent = &parent;
    node->edge.assign(edge.begin(), edge.end());
    node->position = parent.position + static_cast<std::int64_t>(edge.size());
    parent.children.push_back(std::move(node));
    return *parent.children.back();
  }
  // A node after the first `tokens` of the edge to `below`, which becomes its child.
  static Node& split(Node& below, std::size_t tokens) {
    const auto slot = std::find_if(below.parent->children.begin(), below.parent->children.end(),
                                   [&](const auto& c) { return c.get() == &below; });
    auto node = std::make_unique<Node>();
    node->parent = below.parent;
    node->position = below.position - static_cast<std::int64_t>(below.edge.size() - tokens);
    const auto middle = below.edge.begin() + static_cast<std::ptrdiff_t>(tokens);
    node->edge.assign(below.edge.begin(), middle);
    below.edge.erase(below.edge.begin(), middle);
    below.parent = node.get();
    node->children.push_back(std::exchange(*slot, nullptr));
    *slot = std::move(node);
    return **slot;
  }
  // Takes the state away, and nodes that lead nowhere then.
  static void forget(Node* node) {
    node->state = {};
    while (node->parent && !node->state.snapshot && node->children.empty()) {
      Node* const parent = node->parent;
      std::erase_if(parent->children, [&](const auto& c) { return c.get() == node; });
      node = parent;
    }
    if (!node->parent || node->state.snapshot || node->children.size() != 1) return;
    Node& below = *node->children.front();
    below.edge.insert(below.edge.begin(), node->edge.begin(), node->edge.end());
    below.parent = node->parent;
    const auto slot = std::find_if(node->parent->children.begin(), node->parent->children.end(),
                                   [&](const auto& c) { return c.get() == node; });
    std::unique_ptr<Node> kept = std::move(node->children.front());
    *slot = std::move(kept);
  }

  // visit(node with a state, how many tokens lie between it and the state before)
  template <class Visit>
  static void for_each_state(const Node& top, std::int64_t before, const Visit& visit) {
    std::vector<std::pair<const Node*, std::int64_t>> open{{&top, before}};
    while (!open.empty()) {
      const auto [node, last] = open.back();
      open.pop_back();
      if (node->state.snapshot) visit(*node, node->position - last);
      for (const auto& child : node->children)
        open.push_back({child.get(), node->state.snapshot ? node->position : last});
    }
  }

  // Bytes that nothing else holds.
  std::uint64_t held() const {
    struct Piece {
      std::uint64_t bytes = 0;
      long holders = 0, mine = 0;
    };
    std::unordered_map<const void*, Piece> pieces;
    std::vector<SharedMemory> memory;
    std::uint64_t sum = 0;
    for (const auto& [kv, top] : roots_) {
      for_each_state(*top, 0, [&](const Node& node, std::int64_t) {
        memory.clear();
        node.state.snapshot->memory(memory);
        for (const SharedMemory& m : memory) {
          Piece& piece = pieces[m.identity];
          piece.bytes = m.bytes, piece.holders = m.holders, ++piece.mine;
        }
        sum += node.state.logits.size() * sizeof(float);
      });
    }
    for (const auto& [identity, piece] : pieces) {
      if (piece.mine >= piece.holders) sum += piece.bytes;
    }
    return sum;
  }

  // Gives up states until the rest fits the budget, and what is charged for it.
  void fit() {
    for (std::uint64_t bytes = held();; bytes = held()) {
      if (bytes <= budget_) {
        try {
          if (charge_) charge_(bytes);
          return;
        } catch (const Error&) {  // others need the memory
          if (bytes == 0) throw;
        }
      }
      Node* const worst = least_wanted();
      if (!worst) return;
      forget(worst);
    }
  }

  // What is lost with a state is reading the tokens since the one before, should it be asked for: likelier for those
  // used lately, and where turns begin.
  Node* least_wanted() {
    const Node* worst = nullptr;
    double least = 0;
    for (const auto& [kv, top] : roots_) {
      for_each_state(*top, 0, [&](const Node& node, std::int64_t gap) {
        const double worth = static_cast<double>(gap) * (node.turn ? 4 : 1) * (node.children.size() > 1 ? 2 : 1) /
                             static_cast<double>(1 + clock_ - node.used);
        if (!worst || worth < least) worst = &node, least = worth;
      });
    }
    return const_cast<Node*>(worst);
  }

  const std::uint64_t budget_;
  const Charge charge_;
  mutable std::mutex mutex_;
  std::unordered_map<KvType, std::unique_ptr<Node>> roots_;
  std::uint64_t clock_ = 0;
};

}  // namespace qwen3next
