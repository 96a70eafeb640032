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
#include "tests/support/engine_logits.hpp"
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
  for (int i = 0; i < 200; ++i) rates.processor_took(15e-6 + 2000 * bytes / 300e9, 200 * bytes, 2000 * bytes);
  CHECK(rates.on_processor({5, 5}, bytes) == doctest::Approx(15e-6 + 5 * bytes / 150e9).epsilon(0.01));
  CHECK(rates.way(1, 5, 280, bytes) == OffloadWay::processor);
  CHECK(rates.way(5, 5, 280, bytes) == OffloadWay::processor);
  CHECK(rates.way(2048, 5, 280, bytes) == OffloadWay::stream);
  for (int i = 0; i < 200; ++i) rates.processor_took(15e-6 + 5 * bytes / 20e9, 5 * bytes, 5 * bytes);
  CHECK(rates.way(1, 5, 280, bytes) == OffloadWay::copy);  // few cores

  // A first pass that reading alone explains says nothing for products of many rows.
  OffloadRates fresh(50e9);
  for (int i = 0; i < 48; ++i) fresh.processor_took(200 * bytes / 80e9, 200 * bytes, 350 * bytes);
  CHECK(fresh.way(64, 5, 280, bytes) == OffloadWay::processor);
  CHECK(fresh.way(4096, 5, 280, bytes) == OffloadWay::stream);

  const auto few = cuda::missed_experts(1, 5, 280), many = cuda::missed_experts(4096, 5, 280);
  CHECK(few.experts == doctest::Approx(5).epsilon(0.02));
  CHECK(many.experts == doctest::Approx(280));
  CHECK(many.picks == doctest::Approx(5 * 4096));
  CHECK(cuda::missed_experts(4, 5, 0).experts == 0);
}

TEST_CASE("host: what a card's memory is planned for") {
  const std::size_t bytes[] = {100 << 10, 100 << 10, 150 << 10};
  const SlotClasses classes = SlotClasses::of(bytes, 4);
  const std::uint64_t dense = 1000, session = 2000, fixed = dense + session + detail::card_slack;
  const CardPlan all = detail::plan_card(fixed + (1400 << 10), dense, session, classes, 6);
  CHECK(all.complete());
  CHECK(all.slots == std::vector<int>{8, 4});
  const std::uint64_t transit = cuda::Transit::bytes(4, 150 << 10, 4);
  const CardPlan some = detail::plan_card(fixed + transit + (350 << 10), dense, session, classes, 6);
  CHECK(!some.complete());
  CHECK(some.transit_slots == 4);
  CHECK(some.slots == std::vector<int>{2, 1});
  CHECK(some.text(classes).find("3 of 12 experts") != std::string::npos);
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
  plan.transit_slots = std::min(c.config.num_experts, cuda::max_few_rows * c.config.num_experts_per_tok);
  plan.transit = 1;
  plan.slots = classes.slots(static_cast<std::uint64_t>(part * static_cast<double>(classes.all_bytes())));
  plan.experts = classes.bytes(plan.slots);
  CpuOptions cpu = resolve_cpu_options("", 0);
  cpu.team.emplace(cpu.threads);
  detail::CudaOffload offload(
      test::gpu(), c.config, plan, classes, cpu,
      {.way = way, .streaming = streaming, .copy_to_host = !streaming && way != OffloadWay::copy});
  return std::make_unique<BackendEngine<OffloadCudaBackend, detail::CudaOffload>>(
      c.config, c.weights, KvType::f16, std::move(offload), "offload", streaming);
}

using test::into;
using test::Rows;
using test::text;

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

// NMSE that nine of ten rows stay below.  Where two experts are nearly as probable, the smallest difference makes the
// router pick another: random models have such rows.
double typical(const Rows& a, const Rows& b) {
  REQUIRE(a.size() == b.size());
  std::vector<double> errors;
  for (std::size_t i = 0; i < a.size(); ++i) errors.push_back(nmse(a[i], b[i]));
  std::ranges::sort(errors);
  return errors[errors.size() * 9 / 10];
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
      const Rows rows = all_logits(*offloaded(c, part, OffloadWay::processor), c, true);
      const double error = typical(rows, whole);
      MESSAGE(path << ", " << part << " of the experts on the card: NMSE " << error << ", worst row "
                   << worst(rows, whole));
      CHECK(error < 1e-3);
      if (part == 1.0) CHECK(first_difference(rows, whole) == -1);
    }
  }
}

TEST_CASE("cuda offload: whichever way is sooner; experts that are picked come to the card") {
  const Checkpoint c = Checkpoint::open(tiny);
  const auto engine = offloaded(c, 0.5, OffloadWay::measured);
  const Rows whole = all_logits(*on_card(c), c, true);
  CHECK(typical(all_logits(*engine, c, true), whole) < 1e-3);

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
  CHECK(typical(all_logits(*offloaded(c, 0.3, OffloadWay::processor, streaming()), c, true), whole) < 1e-3);
}

TEST_CASE("cuda offload: sessions in threads of their own") {
  const Checkpoint c = Checkpoint::open(tiny);
  const Rows whole = all_logits(*on_card(c), c, true);
  const auto engine = offloaded(c, 0.5, OffloadWay::measured);
  std::vector<std::thread> threads;
  std::vector<double> errors(4, 1);
  for (std::size_t i = 0; i < errors.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int n = 0; n < 3; ++n) errors[i] = typical(all_logits(*engine, c, true), whole);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const double error : errors) CHECK(error < 1e-3);
}

TEST_CASE("cuda offload: where memory runs out, experts make room") {
  const Checkpoint c = Checkpoint::open(tiny);
  const Rows whole = all_logits(*on_card(c), c, true);
  const auto engine = offloaded(c, 0.9, OffloadWay::processor);
  CHECK(typical(all_logits(*engine, c, true), whole) < 1e-3);
  const std::uint64_t slots = engine->expert_statistics()->slots;
  {
    std::vector<cuda::DeviceBytes> all;
    const auto take = [&](std::size_t bytes) { all.emplace_back(test::gpu(), bytes, "a test"); };
    constexpr std::size_t gibi = std::size_t{1} << 30;
    while (test::gpu()->free_memory() > 2 * gibi) take(gibi);
    CHECK_THROWS_WITH_AS(
        [&] {
          for (;;) take(std::size_t{1} << 20);
        }(),
        doctest::Contains("no room for a test"), Error);
  }
  CHECK(engine->expert_statistics()->slots < slots);
  CHECK(typical(all_logits(*engine, c, true), whole) < 1e-3);
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

// --- how fast -------------------------------------------------------------------------------------------------------

TEST_CASE("bench: offload: layers of 80B's shape, 45 % of their experts on the card" * doctest::skip()) {
  constexpr int H = 2048, I = 512, E = 512, k = 10, layers = 16;
  Config config;
  config.num_experts_per_tok = k;
  // Every second layer's down is Q6_K; layers share their bytes.
  const auto kind = [&](DType down, std::vector<std::byte>& bytes) {
    const auto at = [&](std::size_t i) { return bytes.data() + i; };
    const std::size_t gate = I * row_bytes(DType::q4_k, H), last = H * row_bytes(down, I), each = 2 * gate + last;
    bytes.assign(E * each, std::byte{0x11});
    ExpertViews views;
    for (std::size_t e = 0; e < E; ++e) {
      views.push_back({WeightView::contiguous(at(e * each), DType::q4_k, I, H),
                       WeightView::contiguous(at(e * each + gate), DType::q4_k, I, H),
                       WeightView::contiguous(at(e * each + 2 * gate), down, H, I)});
    }
    return views;
  };
  std::vector<std::byte> memory[2];
  const ExpertViews views[2] = {kind(DType::q4_k, memory[0]), kind(DType::q6_k, memory[1])};
  ModelWeights<Views> weights;
  weights.layers.resize(layers);
  for (std::size_t i = 0; i < layers; ++i) weights.layers[i].mlp.experts = views[i % 2];
  const SlotClasses classes = detail::card_classes(weights);
  CardPlan plan;
  plan.transit_slots = cuda::max_few_rows * k;
  plan.slots = classes.slots(static_cast<std::uint64_t>(0.45 * static_cast<double>(classes.all_bytes())));
  double layer_bytes = 0;
  for (const auto& v : views) layer_bytes += 0.5 * E * static_cast<double>(detail::PlacedExperts::bytes_of(v[0]));

  CpuOptions cpu = resolve_cpu_options("", 0);
  cpu.team.emplace(cpu.threads);
  std::printf("%s, %d threads\n", std::string(cpu.kernels->name).c_str(), cpu.threads);
  cuda::Uploader uploader(test::gpu());
  const cuda::CudaWeight gate = uploader.weight(views[0][0].gate), up = uploader.weight(views[0][0].up),
                         down = uploader.weight(views[0][0].down);
  uploader.finish();

  // The processor alone: experts in a mapped file's small pages, then in large ones.
  ExpertViews copies[2] = {views[0], views[1]};
  cuda::HostExperts host;
  const auto paged = std::chrono::steady_clock::now();
  for (ExpertViews& v : copies) {
    std::vector<ExpertView*> all;
    for (ExpertView& e : v) all.push_back(&e);
    host.take(all, *cpu.team);
  }
  std::printf("%.2f GB to large pages in %.2f s, the card reads them: %d\n", layer_bytes * 2 / 1e9,
              std::chrono::duration<double>(std::chrono::steady_clock::now() - paged).count(),
              host.shares(copies[1].back()));
  CpuBackend alone(cpu);
  auto row = alone.tensor(1, H), out = alone.tensor(1, H);
  std::fill_n(row.data, H, 0.5f);
  for (const ExpertViews* of : {views, static_cast<const ExpertViews*>(copies)}) {
    for (const int n : {1, 3, 5, 10}) {
      auto routing = alone.routing(1, n);
      routing.rows = 1;
      std::uint32_t random = 1;
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < 2000; ++i) {
        for (int j = 0; j < n; ++j)
          routing.ids[static_cast<std::size_t>(j)] = static_cast<int>((random = random * 1664525 + 1013904223) >> 23);
        alone.experts(out, row, of[i % 2], routing);
      }
      const double each = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / 2000;
      std::printf("processor alone, %2d experts: %.1f us, %.1f GB/s\n", n, each * 1e6,
                  n * layer_bytes / E / each / 1e9);
    }
  }

  for (const OffloadWay way : {OffloadWay::measured, OffloadWay::processor, OffloadWay::copy, OffloadWay::stream}) {
    // The first time all are on the card.
    plan.slots = classes.slots(static_cast<std::uint64_t>((way == OffloadWay::measured ? 1 : 0.45) *
                                                          static_cast<double>(classes.all_bytes())));
    const auto start = std::chrono::steady_clock::now();
    auto placed = std::make_shared<detail::PlacedExperts>(test::gpu(), weights, k, classes, plan, way);
    placed->fill(nullptr, way == OffloadWay::copy ? nullptr : &*cpu.team, [](std::uint64_t) {});
    std::printf("filled in %.2f s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    OffloadCudaBackend be(test::gpu(), KvType::f16, placed, cpu);
    for (const int T : {1, 4, 64, 512, 2048, 4096}) {
      if (T > 64 ? way != OffloadWay::stream : way == OffloadWay::stream) continue;
      if (way == OffloadWay::copy && T > 4) continue;
      const int banks = T == 1 ? 61 : 7;
      auto x = be.tensor(T, H), h = be.tensor(T, H), logits = be.tensor(banks * T, E), shared_gate = be.tensor(T, 1);
      auto a = be.tensor(T, I), b = be.tensor(T, I), y = be.tensor(T, H);
      std::vector<float> values(H);
      std::uint32_t random = 1;
      const auto next = [&] { return static_cast<float>((random = random * 1664525 + 1013904223) >> 16) / 65536; };
      const auto fill = [&](CudaBackend::Tensor t) {
        for (int r = 0; r < t.n_rows; ++r) {
          for (int c = 0; c < t.n_cols; ++c) values[static_cast<std::size_t>(c)] = next();
          be.set_host(t.rows(r, 1), std::span(values).first(static_cast<std::size_t>(t.n_cols)));
        }
      };
      fill(h), fill(logits);
      auto routing = be.routing(T, k);
      int bank = 0;
      const auto pass = [&] {
        for (int layer = 0; layer < layers; ++layer, bank = (bank + 1) % banks) {
          be.experts_add(x, h, logits.rows(bank * T, T), routing, {layer}, {gate, up, down, shared_gate, a, b, y}, k,
                         true);
        }
        be.host(x.rows(0, 1));
      };
      pass();
      const int rounds = T == 1 ? 60 : T < 64 ? 20 : 2;
      const ExpertStatistics before = placed->statistics();
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < rounds; ++i) pass();
      const double each =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / rounds / layers;
      const ExpertStatistics after = placed->statistics();
      const double missed = static_cast<double>(after.misses - before.misses) / rounds / layers;
      std::printf(
          "way %d, %4d rows: %9.1f us a layer (%.1f us with what is missed), %6.1f missed, %6.1f GB/s of them\n",
          static_cast<int>(way), T, each * 1e6, (after.read_seconds - before.read_seconds) / rounds / layers * 1e6,
          missed, (way == OffloadWay::stream ? 0.55 * layer_bytes : missed * layer_bytes / E) / each / 1e9);
    }
  }
}
