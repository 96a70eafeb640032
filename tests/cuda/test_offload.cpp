// Experts that are not all on the card: where they are, what brings them there, and that the model says the same.

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "generate/cuda_engine.hpp"
#include "generate/cuda_offload.hpp"
#include "tests/cuda/gpu.hpp"
#include "tests/support/golden.hpp"

using namespace qwen3next;
using cuda::OffloadRates;
using cuda::OffloadWay;
using detail::CardPlan;
using test::nmse;

namespace {

const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";

// Three layers of four experts; the last layer's are larger.
SlotClasses small_classes() {
  const std::size_t bytes[] = {100, 100, 150};
  return SlotClasses::of(bytes, 4);
}

int there(const ExpertPlacement& p, int layer) {
  int n = 0;
  for (int e = 0; e < p.experts(); ++e) n += p.is_there(layer, e);
  return n;
}

void record(ExpertPlacement& p, int layer, std::int32_t expert, int times) {
  const std::int32_t one = 1;
  for (int i = 0; i < times; ++i) p.record(layer, {&expert, 1}, {&one, 1}, 1);
}

}  // namespace

// --- without a card -------------------------------------------------------------------------------------------------

TEST_CASE("host: layers share the slots of a card evenly") {
  const SlotClasses classes = small_classes();
  CHECK(classes.count() == 2);
  CHECK(classes.all_bytes() == 8 * 100 + 4 * 150);
  CHECK(classes.slots(0) == std::vector<int>{0, 0});
  CHECK(classes.slots(700) == std::vector<int>{4, 2});
  CHECK(classes.slots(1u << 30) == std::vector<int>{8, 4});
  CHECK(classes.bytes({4, 2}) == 700);

  ExpertPlacement placement(classes, {4, 2});
  const auto placed = placement.fill(2, nullptr);
  CHECK(placed.size() == 6);
  for (int layer = 0; layer < 3; ++layer) {
    CHECK(there(placement, layer) == 2);
    CHECK(placement.missing(layer) == 2);
  }
}

TEST_CASE("host: a profile says which experts lie on a card first") {
  ExpertProfile profile(3, 4);
  for (int layer = 0; layer < 3; ++layer) {
    const std::int32_t ids[] = {2, 3}, counts[] = {50, layer == 1 ? 100 : 10};
    profile.add(layer, ids, counts, 100);
  }
  ExpertPlacement placement(small_classes(), {3, 1});
  const auto placed = placement.fill(2, &profile);
  REQUIRE(placed.size() == 4);
  CHECK(placement.is_there(1, 3));
  CHECK(placement.is_there(0, 2));
  CHECK(placement.is_there(1, 2));
  CHECK(placement.is_there(2, 2));
  CHECK(!placement.is_there(0, 3));
}

TEST_CASE("host: an expert that is missed often takes the place of one that is not picked") {
  ExpertPlacement placement(small_classes(), {4, 2});
  placement.fill(2, nullptr);
  CHECK(!placement.exchange());
  record(placement, 0, 0, 40);
  record(placement, 0, 3, 3);
  CHECK(!placement.exchange());  // that may be chance
  record(placement, 0, 3, 40);
  const auto exchange = placement.exchange();
  REQUIRE(exchange);
  CHECK(exchange->in == ExpertPlacement::Key{0, 3});
  CHECK(exchange->out != ExpertPlacement::Key{0, 0});
  CHECK(!placement.is_there(exchange->out.layer, exchange->out.expert));
  CHECK(!placement.is_there(0, 3));  // on its way
  CHECK(placement.missing(0) + placement.missing(1) == 5);
  CHECK(!placement.exchange());
  placement.arrived(exchange->slot);
  CHECK(placement.is_there(0, 3));
  CHECK(placement.missing(0) + placement.missing(1) == 4);

  const auto gone = placement.retire(exchange->slot);
  CHECK(gone == ExpertPlacement::Key{0, 3});
  CHECK(placement.missing(0) + placement.missing(1) == 5);
}

TEST_CASE("host: experts go where they are estimated to be sooner") {
  constexpr double bytes = 2e6;
  OffloadRates rates(50e9);
  for (int i = 0; i < 200; ++i) rates.processor_took(15e-6 + 5 * bytes / 150e9, 5 * bytes, 5 * bytes);
  for (int i = 0; i < 200; ++i) {
    rates.processor_took(15e-6 + 200 * bytes / 150e9 + 1800 * bytes / 400e9, 200 * bytes, 2000 * bytes);
  }
  CHECK(rates.on_processor({5, 5}, bytes) == doctest::Approx(15e-6 + 5 * bytes / 150e9).epsilon(0.01));
  CHECK(rates.way(1, 5, 280, bytes) == OffloadWay::processor);
  CHECK(rates.way(5, 5, 280, bytes) == OffloadWay::processor);
  CHECK(rates.way(2048, 5, 280, bytes) == OffloadWay::stream);
  for (int i = 0; i < 200; ++i) rates.processor_took(15e-6 + 5 * bytes / 20e9, 5 * bytes, 5 * bytes);
  CHECK(rates.way(1, 5, 280, bytes) == OffloadWay::copy);  // few cores

  const auto few = cuda::missed_experts(1, 5, 280), many = cuda::missed_experts(4096, 5, 280);
  CHECK(few.experts == doctest::Approx(5).epsilon(0.02));
  CHECK(many.experts == doctest::Approx(280));
  CHECK(many.picks == doctest::Approx(5 * 4096));
  CHECK(cuda::missed_experts(4, 5, 0).experts == 0);
}

TEST_CASE("host: what a card's memory is planned for") {
  const SlotClasses classes = small_classes();
  const std::uint64_t dense = 1000, session = 2000, fixed = dense + session + detail::card_slack;
  const CardPlan all = detail::plan_card(fixed + 1400, dense, session, classes, 6);
  CHECK(all.complete());
  CHECK(all.slots == std::vector<int>{8, 4});
  const std::uint64_t transit = cuda::Transit::bytes(3, 150, 4);
  const CardPlan some = detail::plan_card(fixed + transit + 700, dense, session, classes, 6);
  CHECK(!some.complete());
  CHECK(some.transit_slots == 3);
  CHECK(some.slots == std::vector<int>{4, 2});
  CHECK(some.text(classes).find("6 of 12 experts") != std::string::npos);
  const CardPlan none = detail::plan_card(fixed + transit, dense, session, classes, 6);
  CHECK(none.slots == std::vector<int>{0, 0});
  CHECK_THROWS_WITH_AS(detail::plan_card(fixed, dense, session, classes, 6), doctest::Contains("--gpu-memory"), Error);
}

TEST_CASE("host: picks are counted by expert, and those that are missed") {
  const std::int32_t ids[] = {7, ~3, 7, ~3, 1, ~9};
  cuda::PickCounter counter;
  counter.count(ids, 6);
  REQUIRE(counter.all().size() == 4);
  REQUIRE(counter.missed().size() == 2);
  CHECK(counter.all()[1].expert == 3);
  CHECK(counter.all()[1].tokens == 2);
  CHECK(counter.missed()[0].expert == 1);
  CHECK(counter.missed()[1].expert == 7);
  CHECK(counter.missed()[1].tokens == 2);
}

// --- on a card ------------------------------------------------------------------------------------------------------

namespace {

std::unique_ptr<const Engine> on_card(const Checkpoint& c) {
  return std::make_unique<BackendEngine<CudaBackend, detail::CudaBackends>>(
      c.config, c.weights, KvType::f16, detail::CudaBackends(test::gpu(), {}), "cuda", nullptr);
}

// With this part of the experts on the card.
std::unique_ptr<const Engine> offloaded(const Checkpoint& c, double part, OffloadWay way,
                                        std::shared_ptr<Streaming> streaming = {}) {
  SlotClasses classes = detail::card_classes(c.weights);
  CardPlan plan;
  plan.budget = test::gpu()->free_memory();
  plan.dense = detail::dense_card_bytes(c.weights);
  plan.transit_slots = std::min(c.config.num_experts, cuda::max_few_rows * c.config.num_experts_per_tok / 2);
  plan.transit = 1;
  plan.slots = classes.slots(static_cast<std::uint64_t>(part * static_cast<double>(classes.all_bytes())));
  plan.experts = classes.bytes(plan.slots);
  CpuOptions cpu = resolve_cpu_options("", 0);
  cpu.team.emplace(cpu.threads);
  detail::CudaOffload offload(test::gpu(), c.config, plan, classes, cpu, {.way = way, .streaming = streaming});
  return std::make_unique<BackendEngine<OffloadCudaBackend, detail::CudaOffload>>(
      c.config, c.weights, KvType::f16, std::move(offload), "offload", streaming);
}

std::vector<std::int32_t> text(const Checkpoint& c, int n, int seed = 1) {
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back((i * i * 7 + i * 31 + seed * 101) % c.config.vocab_size);
  return tokens;
}

using Rows = std::vector<std::vector<float>>;
LogitsSink into(Rows& rows) {
  return [&rows](std::span<const float> row) { rows.emplace_back(row.begin(), row.end()); };
}

// A prompt in passes of 64; with `few` also tokens one by one, a few at once, guesses, the MTP head.
Rows all_logits(const Engine& engine, const Checkpoint& c, bool few) {
  Rows rows;
  const std::vector<std::int32_t> tokens = text(c, 150);
  auto timeline = engine.timeline({.kv = {}, .batch = 64});
  timeline->append_all_logits(std::span(tokens).first(128), into(rows));
  if (!few) return rows;
  for (std::size_t i = 128; i < 136; ++i) {
    const std::span<const float> row = timeline->append(std::span(tokens).subspan(i, 1), {});
    rows.emplace_back(row.begin(), row.end());
  }
  timeline->append_all_logits(std::span(tokens).subspan(136, 8), into(rows));
  const TimelineTurn guesses{timeline.get(), std::span(tokens).subspan(144, 4), true};
  timeline->append_together({&guesses, 1}, [&](std::size_t, std::span<const float> row) { into(rows)(row); });
  timeline->take();
  timeline->append_all_logits(std::span(tokens).subspan(146, 2), into(rows));
  if (c.config.has_mtp) {
    timeline->reset();
    timeline->append_mtp_logits(std::span(tokens).first(20), into(rows));
  }
  return rows;
}

double worst(const Rows& a, const Rows& b) {
  REQUIRE(a.size() == b.size());
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) most = std::max(most, nmse(a[i], b[i]));
  return most;
}

int first_difference(const Rows& a, const Rows& b) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i]) return static_cast<int>(i);
  return -1;
}

std::vector<std::string> models() {
  return {tiny, test::golden("release").string(), test::golden("fp8").string(), test::golden("sharded").string()};
}

}  // namespace

TEST_CASE("cuda offload: experts that are copied give the same bits as on the card") {
  for (const std::string& path : models()) {
    CAPTURE(path);
    const Checkpoint c = Checkpoint::open(path);
    const auto whole_engine = on_card(c);
    const Rows whole = all_logits(*whole_engine, c, true);
    for (const double part : {0.0, 0.4, 0.9}) {
      CAPTURE(part);
      CHECK(first_difference(all_logits(*offloaded(c, part, OffloadWay::copy), c, true), whole) == -1);
      CHECK(first_difference(all_logits(*offloaded(c, part, OffloadWay::stream), c, false),
                             Rows(whole.begin(), whole.begin() + 128)) == -1);
    }
  }
}

TEST_CASE("cuda offload: what the processor computes agrees") {
  for (const std::string& path : models()) {
    CAPTURE(path);
    const Checkpoint c = Checkpoint::open(path);
    const Rows whole = all_logits(*on_card(c), c, true);
    for (const double part : {0.0, 0.5, 1.0}) {
      const double error = worst(all_logits(*offloaded(c, part, OffloadWay::processor), c, true), whole);
      MESSAGE(path << ", " << part << " of the experts on the card: NMSE of the worst row " << error);
      CHECK(error < 1e-3);
      if (part == 1.0) CHECK(error == 0);
    }
  }
}

TEST_CASE("cuda offload: whichever way is sooner; experts that are picked come to the card") {
  const Checkpoint c = Checkpoint::open(tiny);
  const auto engine = offloaded(c, 0.5, OffloadWay::measured);
  const Rows whole = all_logits(*on_card(c), c, true);
  CHECK(worst(all_logits(*engine, c, true), whole) < 1e-3);

  auto timeline = engine->timeline({.kv = {}, .batch = 64});
  const auto hit_rate = [&] {
    const ExpertStatistics before = *engine->expert_statistics();
    for (int i = 0; i < 300; ++i) {
      const std::int32_t token = 17 + i % 3;
      timeline->append({&token, 1}, {});
    }
    const ExpertStatistics after = *engine->expert_statistics();
    CHECK(after.picks() - before.picks() >= 300u * static_cast<unsigned>(c.config.num_experts_per_tok));
    return static_cast<double>(after.hits - before.hits) / static_cast<double>(after.picks() - before.picks());
  };
  const double first = hit_rate(), second = hit_rate();
  MESSAGE("hit rate " << first << ", then " << second);
  CHECK(second > first);
}

TEST_CASE("cuda offload: the other experts within a budget of this machine's memory") {
  const Checkpoint c = Checkpoint::open(tiny);
  MemoryPlan plan = plan_session(c.config, KvType::f16, 1024, 64);
  plan.weights_copied = c.copied_bytes();
  Streaming(c, 1).add_to(plan, c.config);
  const std::uint64_t budget = plan.needed + (std::uint64_t{2} << 20);
  const auto streaming = [&] { return std::make_shared<Streaming>(c, budget); };
  const Rows whole = all_logits(*on_card(c), c, true);
  CHECK(first_difference(all_logits(*offloaded(c, 0.3, OffloadWay::copy, streaming()), c, true), whole) == -1);
  CHECK(first_difference(all_logits(*offloaded(c, 0.3, OffloadWay::stream, streaming()), c, false),
                         Rows(whole.begin(), whole.begin() + 128)) == -1);
  CHECK(worst(all_logits(*offloaded(c, 0.3, OffloadWay::processor, streaming()), c, true), whole) < 1e-3);
}

TEST_CASE("cuda offload: sessions in threads of their own") {
  const Checkpoint c = Checkpoint::open(tiny);
  const Rows whole = all_logits(*on_card(c), c, true);
  const auto engine = offloaded(c, 0.5, OffloadWay::measured);
  std::vector<std::thread> threads;
  std::vector<double> errors(4, 1);
  for (std::size_t i = 0; i < errors.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int n = 0; n < 3; ++n) errors[i] = worst(all_logits(*engine, c, true), whole);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double error : errors) CHECK(error < 1e-3);
}

TEST_CASE("cuda offload: a budget of the card's memory that is too small, or more than there is") {
  const Checkpoint c = Checkpoint::open(tiny);
  const auto open = [&](std::uint64_t bytes) {
    EngineOptions options;
    options.backend = Backend::cuda;
    options.gpu_memory = bytes;
    return detail::make_offload_engine(test::gpu(), c.config, c.weights, options);
  };
  CHECK_THROWS_WITH_AS(open(1 << 20), doctest::Contains("is too small: dense weights take"), Error);
  CHECK_THROWS_WITH_AS(open(std::uint64_t{1} << 50), doctest::Contains("more than there is"), Error);
  CHECK(!open(std::uint64_t{8} << 30));  // all of it fits
}
