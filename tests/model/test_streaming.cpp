// Experts that are read when they are needed: the same numbers as with all in memory, whatever the budget and the order
// in which reads come back; and nothing lost when one fails.

#include <doctest/doctest.h>

#include <cstdint>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "generate/engine.hpp"
#include "generate/streaming.hpp"
#include "tests/support/engine_logits.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/read_queues.hpp"
#include "tests/support/temp_folder.hpp"

using namespace qwen3next;

namespace {

const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";

using MakeQueue = ExpertStore::MakeQueue;

const MakeQueue threads = [](ReadQueue::OnDone done) { return make_read_queue(ReadQueueKind::threads, 4, done); };
const MakeQueue late = [](ReadQueue::OnDone done) { return std::make_unique<test::LateQueue>(std::move(done)); };

MemoryPlan plan(const Checkpoint& c, std::uint64_t memory, std::int64_t context = 1024, int batch = 64) {
  MemoryPlan p = plan_session(c.config, KvType::f16, context, batch);
  p.weights_copied = c.copied_bytes();
  Streaming(c, memory).add_to(p, c.config);
  return p;
}

std::uint64_t session_bytes(const Checkpoint& c) { return plan(c, 1).session() + plan(c, 1).state_copy; }

// Enough for a session and this part of the experts.
std::uint64_t budget(const Checkpoint& c, double part) {
  const MemoryPlan p = plan(c, 1);
  return p.needed +
         static_cast<std::uint64_t>(part * static_cast<double>(plan(c, std::uint64_t{1} << 40).experts_resident));
}

std::unique_ptr<const Engine> resident(const Checkpoint& c) {
  return make_engine(c.config, c.weights, {.backend = Backend::cpu, .threads = 2});
}
std::unique_ptr<const Engine> streamed(const Checkpoint& c, std::uint64_t memory, const MakeQueue& queue = {},
                                       int n_threads = 2) {
  return make_engine(c.config, c.weights,
                     {.backend = Backend::cpu,
                      .threads = n_threads,
                      .streaming = std::make_shared<Streaming>(c, memory, std::filesystem::path(), queue)});
}

using test::into;
using test::Rows;
using test::text;

// A long prompt in uneven passes, tokens one by one, several at once, the MTP head: all logits on the way.
Rows all_logits(const Engine& engine, const Checkpoint& c, int seed = 1) {
  Rows rows;
  const std::vector<std::int32_t> tokens = text(c, 150, seed);
  auto timeline = engine.timeline({.kv = {}, .batch = 64});
  timeline->append_all_logits(std::span(tokens).first(130), into(rows));
  for (std::size_t i = 130; i < 140; ++i) {
    const std::span<const float> row = timeline->append(std::span(tokens).subspan(i, 1), {});
    rows.emplace_back(row.begin(), row.end());
  }
  timeline->append_all_logits(std::span(tokens).subspan(140), into(rows));
  timeline.reset();
  if (c.config.has_mtp) engine.timeline({.kv = {}, .batch = 64})->append_mtp_logits(tokens, into(rows));
  return rows;
}

}  // namespace

TEST_CASE("streamed = resident, bit for bit: any budget, any number of threads, any order of reads") {
  for (const std::string name : {"", "release", "fused", "sharded", "fp8", "yarn"}) {
    CAPTURE(name);
    const Checkpoint c = name.empty() ? Checkpoint::open(tiny) : Checkpoint::open(test::golden(name));
    const Rows expected = all_logits(*resident(c), c);
    REQUIRE(expected.size() > 140);
    for (const double part : {0.0, 0.1, 0.4, 1.0}) {
      CAPTURE(part);
      CHECK(all_logits(*streamed(c, budget(c, part)), c) == expected);
    }
    CHECK(all_logits(*streamed(c, budget(c, 0.1), threads, 1), c) == expected);
    CHECK(all_logits(*streamed(c, budget(c, 0.1), late, 3), c) == expected);
  }
}

TEST_CASE("sessions in several threads share the least budget, without waiting for each other for ever") {
  const Checkpoint c = Checkpoint::open(tiny);
  const auto engine = streamed(c, budget(c, 0) + 2 * session_bytes(c), late);
  std::vector<Rows> found(3), expected(3);
  std::vector<std::thread> workers;
  for (int i = 0; i < 3; ++i)
    workers.emplace_back([&, i] { found[static_cast<std::size_t>(i)] = all_logits(*engine, c, i); });
  for (std::thread& worker : workers) worker.join();
  const auto other = resident(c);
  for (int i = 0; i < 3; ++i) {
    expected[static_cast<std::size_t>(i)] = all_logits(*other, c, i);
    CHECK(found[static_cast<std::size_t>(i)] == expected[static_cast<std::size_t>(i)]);
  }
}

TEST_CASE("timelines in one pass = each alone, streamed, too") {
  const Checkpoint c = Checkpoint::open(tiny);
  Rows rows[2];
  for (int i = 0; i < 2; ++i) {
    const auto engine = i == 0 ? resident(c) : streamed(c, budget(c, 0.05) + session_bytes(c));
    const auto a = engine->timeline({.kv = {}, .batch = 64}), b = engine->timeline({.kv = {}, .batch = 64});
    const std::vector<std::int32_t> first = text(c, 100, 1), second = text(c, 9, 2);
    const TimelineTurn turns[] = {{a.get(), first}, {b.get(), second}};
    for (int again = 0; again < 3; ++again)
      a->append_together(
          turns, [&](std::size_t, std::span<const float> row) { rows[i].emplace_back(row.begin(), row.end()); });
  }
  CHECK(rows[0] == rows[1]);
}

TEST_CASE("a read that fails is an error that says where; the timeline is as before, and goes on") {
  const Checkpoint c = Checkpoint::open(tiny);
  const auto fault = std::make_shared<test::FaultyQueue::Fault>();
  const MakeQueue faulty = [&](ReadQueue::OnDone done) {
    return std::make_unique<test::FaultyQueue>(fault, std::move(done));
  };
  const auto engine = streamed(c, budget(c, 0.1), faulty);
  const std::vector<std::int32_t> tokens = text(c, 130);

  fault->good = 0;  // of the dense weights
  CHECK_THROWS_WITH_AS(engine->timeline({}), doctest::Contains("tiny.gguf: cannot read"), Error);
  const auto timeline = engine->timeline({.kv = {}, .batch = 64});
  const auto other = resident(c);
  const auto whole = other->timeline({.kv = {}, .batch = 64});

  int failed = 0;
  std::size_t done = 0;
  for (int good = 0; done < tokens.size(); good = std::min(good * 2 + 1, 1 << 20)) {
    const std::span<const std::int32_t> rest = std::span(tokens).subspan(done);
    const std::span<const std::int32_t> next = rest.first(std::min<std::size_t>(done < 64 ? 64 : 1, rest.size()));
    fault->good = good;
    try {
      timeline->append(next, {});
    } catch (const Error& error) {
      ++failed;
      const std::string what = error.what();
      CAPTURE(what);
      CHECK(what.find("tiny.gguf") != std::string::npos);
      CHECK(what.find("(tensor blk.") != std::string::npos);
      CHECK(timeline->position() == static_cast<std::int64_t>(done));
      fault->good = -1;
      timeline->append(next, {});
    }
    fault->good = -1;
    const std::span<const float> expected = whole->append(next, {});
    done += next.size();
    const auto snapshot = timeline->snapshot();
    const std::span<const float> row = timeline->append(std::span(tokens).first(1), {});
    const auto before = whole->snapshot();
    const std::span<const float> right = whole->append(std::span(tokens).first(1), {});
    CHECK(std::equal(row.begin(), row.end(), right.begin(), right.end()));
    (void)expected;
    timeline->restore(*snapshot);
    whole->restore(*before);
  }
  CHECK(failed >= 3);
}

TEST_CASE("a model can be closed while its cache is still being filled by a profile") {
  const test::TempFolder folder;
  const Checkpoint c = Checkpoint::open(tiny);
  ExpertProfile profile(c.config.num_hidden_layers + 1, c.config.num_experts);
  const std::vector<std::int32_t> ids = [&] {
    std::vector<std::int32_t> all(static_cast<std::size_t>(c.config.num_experts));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int32_t>(i);
    return all;
  }();
  const std::vector<std::int32_t> once(ids.size(), 1);
  for (int layer = 0; layer <= c.config.num_hidden_layers; ++layer) profile.add(layer, ids, once, 8);
  profile.save(folder / "profile");
  for (const MakeQueue& queue : {threads, late, MakeQueue()}) {
    for (int again = 0; again < 5; ++again) {
      const auto engine =
          make_engine(c.config, c.weights,
                      {.backend = Backend::cpu,
                       .threads = 1,
                       .streaming = std::make_shared<Streaming>(c, budget(c, 0.9), folder / "profile", queue)});
      const auto timeline = engine->timeline({.kv = {}, .batch = 64});
      CHECK(engine->expert_statistics()->slots > 200);
    }
  }
}

TEST_CASE("a file that lost its end is an error, not a crash") {
  const test::TempFolder folder;
  const auto path = folder.path() / "copy.gguf";
  std::filesystem::copy_file(tiny, path);
  const Checkpoint c = Checkpoint::open(path);
  const auto engine = streamed(c, budget(c, 0.1));
  const auto timeline = engine->timeline({});
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 3);
  CHECK_THROWS_WITH_AS(timeline->append(text(c, 64), {}), doctest::Contains("copy.gguf"), Error);
  CHECK(timeline->position() == 0);
  CHECK_THROWS_WITH_AS(streamed(c, budget(c, 0.1))->timeline({}), doctest::Contains("copy.gguf"), Error);
}

TEST_CASE("a long pass can be cancelled between layers, and leaves the timeline as it was") {
  const Checkpoint c = Checkpoint::open(tiny);
  const auto whole = resident(c);
  const auto expected = whole->timeline({});
  const std::vector<std::int32_t> tokens = text(c, 700);
  const std::span<const float> right = expected->append(tokens, {});
  const std::unique_ptr<const Engine> engines[] = {resident(c), streamed(c, plan(c, 1, 1024, 1024).needed)};
  for (const auto& engine : engines) {
    const auto timeline = engine->timeline({});
    std::int64_t told = 0;
    CHECK_THROWS_AS(timeline->append(tokens, [&](std::int64_t done, std::int64_t) { return (told = done) < 300; }),
                    Cancelled);
    CHECK(told < 700);
    CHECK(timeline->position() == 0);
    const std::span<const float> row = timeline->append(tokens, {});
    CHECK(std::equal(row.begin(), row.end(), right.begin(), right.end()));
  }
}

TEST_CASE("sessions that were cancelled hold nothing that others wait for") {
  const Checkpoint c = Checkpoint::open(tiny);
  const std::vector<std::int32_t> tokens = text(c, 512);
  const MemoryPlan wide = plan(c, 1, 1024, 512);
  const auto engine = streamed(c, budget(c, 0.2) + 12 * (wide.session() + wide.state_copy), late);
  std::vector<std::unique_ptr<Timeline>> cancelled;
  for (int i = 0; i < 12; ++i) {
    cancelled.push_back(engine->timeline({.kv = {}, .batch = 512}));
    int layers = 0;
    CHECK_THROWS_AS(cancelled.back()->append(tokens, [&](std::int64_t, std::int64_t) { return ++layers < 3 + i % 4; }),
                    Cancelled);
  }
  CHECK(all_logits(*engine, c) == all_logits(*resident(c), c));
}

TEST_CASE("a budget is kept: too small is said with what it takes, a growing session takes slots from the experts") {
  const Checkpoint c = Checkpoint::open(tiny);
  const MemoryPlan least = plan(c, 1);
  CHECK_THROWS_WITH_AS(streamed(c, least.weights_resident)->timeline({}), doctest::Contains("MiB or more"), Error);
  CHECK(plan(c, least.needed).experts_held >= 4);

  const std::uint64_t memory = budget(c, 0.3);
  const auto engine = streamed(c, memory);
  const auto timeline = engine->timeline({.kv = {}, .batch = 64});
  const std::uint64_t before = engine->expert_statistics()->slots;
  timeline->append(text(c, 1024), {});
  const ExpertStatistics after = *engine->expert_statistics();
  CHECK(after.slots < before);
  CHECK(static_cast<std::int64_t>(after.slots) >= plan(c, memory).experts_held);
  CHECK(after.slots_filled <= after.slots);
  CHECK(after.picks() == after.hits + after.awaited + after.misses);
  CHECK(after.misses > 0);
  CHECK(after.bytes_read > 0);

  const auto other = resident(c);
  const auto whole = other->timeline({.kv = {}, .batch = 64});
  whole->append(text(c, 1024), {});
  const std::vector<std::int32_t> one{5};
  const std::span<const float> row = timeline->append(one, {}), right = whole->append(one, {});
  CHECK(std::equal(row.begin(), row.end(), right.begin(), right.end()));
}
