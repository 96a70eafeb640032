// Where states are kept, and which are given up.

#include "generate/prefix_cache.hpp"

#include <doctest/doctest.h>

#include <map>
#include <random>

using namespace qwen3next;

namespace {

using Tokens = std::vector<std::int32_t>;
using Positions = std::vector<SnapshotPosition>;

// Has a piece of its own, and one for every ten tokens that it shares with whoever has the same beginning.
class FakeSnapshot final : public TimelineSnapshot {
 public:
  FakeSnapshot(const Tokens& tokens, std::map<Tokens, std::shared_ptr<int>>& pieces) {
    for (std::size_t n = 10; n <= tokens.size(); n += 10) {
      auto& piece = pieces[Tokens(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(n))];
      if (!piece) piece = std::make_shared<int>(0);
      pieces_.push_back(piece);
    }
  }
  // `pieces` of the test holds each, too; that does not count.
  void memory(std::vector<SharedMemory>& out) const override {
    for (const auto& piece : pieces_) out.push_back({piece.get(), 10, piece.use_count() - 1});
    out.push_back({this, 100, 1});
  }
  void kv_bytes(const BytesSink&) const override {}
  void state_bytes(const BytesSink&) const override {}
  std::int64_t mtp_position() const override { return 0; }
  std::shared_ptr<const TimelineSnapshot> downloaded(bool) const override { return nullptr; }
  bool begins(const TimelineSnapshot&) const override { return true; }

 private:
  std::vector<std::shared_ptr<int>> pieces_;
};

Tokens numbers(int n, int first = 0) {
  Tokens tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(first + i);
  return tokens;
}

struct Fixture {
  std::map<Tokens, std::shared_ptr<int>> pieces;
  PrefixCache::State state(const Tokens& tokens, std::vector<float> logits = {}) {
    return {std::make_shared<FakeSnapshot>(tokens, pieces), std::move(logits)};
  }
};

}  // namespace

TEST_CASE("states are kept where turns begin at the end, and evenly in between") {
  const std::vector<std::int64_t> none;
  CHECK(snapshot_positions(0, 0, 1000, none, 400) == Positions{{400, false}, {800, false}, {999, true}});
  CHECK(snapshot_positions(0, 0, 400, none, 400) == Positions{{399, true}});
  CHECK(snapshot_positions(0, 600, 1000, none, 400) == Positions{{800, false}, {999, true}});
  // The system message, the user's turn, the answer's.
  CHECK(snapshot_positions(0, 0, 210, std::vector<std::int64_t>{0, 100, 200}, 400) ==
        Positions{{100, true}, {200, true}});
  // Turns that save little are left out, but for the answer's.
  CHECK(snapshot_positions(0, 0, 30, std::vector<std::int64_t>{0, 10, 20}, 400) == Positions{{20, true}});
  CHECK(snapshot_positions(100, 180, 230, std::vector<std::int64_t>{0, 100, 190, 220}, 400) ==
        Positions{{190, true}, {220, true}});
  // A long history: no gap over the spacing, at turns where there are some.
  const auto kept = snapshot_positions(0, 0, 2000, std::vector<std::int64_t>{0, 90, 350, 700, 1500, 1600, 1990}, 400);
  CHECK(kept ==
        Positions{{90, true}, {350, false}, {700, false}, {1100, false}, {1500, false}, {1600, true}, {1990, true}});
}

TEST_CASE("every prompt has a state within the spacing of its end, and none lies outside of what is read") {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    const auto to = static_cast<std::int64_t>(random() % 5000 + 1), from = static_cast<std::int64_t>(random()) % to;
    const std::int64_t known = from == 0 ? 0 : static_cast<std::int64_t>(random()) % (from + 1);
    const auto spacing = static_cast<std::int64_t>(random() % 600 + 1);
    std::vector<std::int64_t> turns;
    for (std::int64_t t = 0; t < to; t += static_cast<std::int64_t>(random() % 900 + 1)) turns.push_back(t);
    if (random() % 4 == 0) turns.clear();
    std::int64_t last = known;
    for (const SnapshotPosition& p : snapshot_positions(known, from, to, turns, spacing)) {
      CHECK(p.position > last);
      CHECK(p.position > from);
      CHECK(p.position < to);
      if (last >= from) CHECK(p.position - last <= spacing);
      last = p.position;
    }
    CHECK(to - std::max(last, from) <= spacing);
    if (!turns.empty() && turns.back() > from) CHECK(last >= turns.back());
  }
}

TEST_CASE("the longest beginning with a state is found, and where a prompt departs from what is known") {
  Fixture f;
  PrefixCache cache(1 << 20);
  CHECK(cache.find(KvType::f16, numbers(50)).known == 0);
  cache.insert(KvType::f16, numbers(30), f.state(numbers(30)), true);
  cache.insert(KvType::f16, numbers(50), f.state(numbers(50), {1.f}), false);
  Tokens other = numbers(40);
  other[35] = 99;
  cache.insert(KvType::f16, other, f.state(other), false);
  auto found = cache.find(KvType::f16, numbers(60));
  CHECK(found.position == 50);
  CHECK(found.known == 50);
  CHECK(found.next == -1);
  found = cache.find(KvType::f16, numbers(50));  // all of it, with logits
  CHECK(found.position == 50);
  CHECK(found.state.logits == std::vector<float>{1.f});
  CHECK(cache.find(KvType::f16, numbers(30)).position == 0);  // without
  CHECK(cache.find(KvType::f16, numbers(31)).position == 30);
  Tokens departs = numbers(60);
  departs[45] = 99;
  found = cache.find(KvType::f16, departs);
  CHECK(found.position == 30);
  CHECK(found.known == 45);
  CHECK(found.next == 45);
  CHECK(cache.find(KvType::f32, numbers(60)).known == 0);
  CHECK(cache.statistics().snapshots == 3);
  CHECK(cache.statistics().bytes == 3 * 100 + 5 * 10 + 10 + 4);  // 5 shared pieces, one of `other`'s, a logit
}

TEST_CASE("what others hold as well is not counted until they let go") {
  Fixture f;
  PrefixCache cache(300);
  auto timeline = std::make_unique<FakeSnapshot>(numbers(200), f.pieces);
  cache.insert(KvType::f16, numbers(200), f.state(numbers(200)), true);
  CHECK(cache.statistics().bytes == 100);
  timeline.reset();
  CHECK(cache.statistics().bytes == 300);
  for (int i = 0; i < 40; ++i) cache.find(KvType::f16, numbers(1, 1000));
  const Tokens used = numbers(60, 1000);
  cache.insert(KvType::f16, used, f.state(used), true);
  cache.insert(KvType::f16, used, f.state(used), true);
  CHECK(cache.statistics().bytes <= 300);
}

TEST_CASE("a tree of random prompts finds what a plain list finds, whatever is given up meanwhile") {
  std::mt19937 random(2);
  Fixture f;
  PrefixCache cache(2500);
  std::vector<std::pair<Tokens, std::weak_ptr<const TimelineSnapshot>>> list;
  int hits = 0;
  for (int round = 0; round < 3000; ++round) {
    Tokens tokens;
    for (std::size_t n = random() % 40 + 1; n > 0; --n) tokens.push_back(static_cast<std::int32_t>(random() % 2));
    std::size_t longest = 0, known = 0;
    for (const auto& [kept, snapshot] : list) {
      if (snapshot.expired()) continue;
      const std::size_t n = std::min(kept.size(), tokens.size());
      std::size_t same = 0;
      while (same < n && kept[same] == tokens[same]) ++same;
      known = std::max(known, same);
      if (same == kept.size() && same < tokens.size()) longest = std::max(longest, same);
    }
    const auto found = cache.find(KvType::f16, tokens);
    REQUIRE(found.position == static_cast<std::int64_t>(longest));
    REQUIRE(found.known == static_cast<std::int64_t>(known));
    REQUIRE((found.position > 0) == (found.state.snapshot != nullptr));
    if (known < tokens.size()) REQUIRE(found.next != tokens[known]);
    hits += longest > 0;
    PrefixCache::State state = f.state(tokens);
    list.push_back({tokens, state.snapshot});
    cache.insert(KvType::f16, tokens, std::move(state), random() % 2 == 0);
    REQUIRE(cache.statistics().bytes <= 2500);
  }
  CHECK(hits > 500);
  cache.clear();
  CHECK(cache.statistics().bytes == 0);
}

TEST_CASE("turns outlive the states between them, and what is used what is not") {
  Fixture f;
  PrefixCache cache(1400);
  const Tokens chat = numbers(400);
  const auto part = [&](int n) { return Tokens(chat.begin(), chat.begin() + n); };
  cache.insert(KvType::f16, part(200), f.state(part(200)), true);
  for (int n = 210; n <= 390; n += 10) {
    cache.insert(KvType::f16, part(n), f.state(part(n)), false);
    cache.find(KvType::f16, part(205));
  }
  cache.insert(KvType::f16, part(400), f.state(part(400)), true);
  CHECK(cache.find(KvType::f16, part(205)).position == 200);
  Tokens next = part(400);
  next.push_back(9);
  CHECK(cache.find(KvType::f16, next).position == 400);
}

TEST_CASE("where others need the memory, states are given up") {
  Fixture f;
  std::uint64_t most = 1000;
  PrefixCache cache(2000, [&](std::uint64_t bytes) {
    if (bytes > most) throw Error("no room");
  });
  for (int i = 0; i < 20; ++i) cache.insert(KvType::f16, numbers(20, 100 * i), f.state(numbers(20, 100 * i)), true);
  CHECK(cache.statistics().bytes <= 1000);
  most = 300;
  cache.trim();
  CHECK(cache.statistics().bytes <= 300);
}
