// Properties of the forward pass that hold for any weights: how tokens are cut into steps and sequences into batches
// does not matter, and a copy of the state is a snapshot.

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/reference/reference_backend.hpp"
#include "tests/support/backends.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/run_model.hpp"

using namespace qwen3next;
using test::nmse;

namespace {

struct Case {
  Checkpoint checkpoint;
  std::vector<std::int32_t> tokens;
  explicit Case(const std::string& name)
      : checkpoint(Checkpoint::open(test::golden(name))), tokens(test::Expected(name).tokens()) {}
};

template <class F>
void on_every_backend(F f) {
  f([] { return ReferenceBackend(); });
  for (std::string_view isa : cpu::available_isas()) {
    CAPTURE(isa);
    f([&] { return CpuBackend(test::cpu(isa, 2, KvType::f16)); });
  }
}

}  // namespace

TEST_CASE("T tokens at once = T single steps = uneven pieces") {
  for (const std::string name : {"release", "fused", "sharded", "yarn"}) {
    CAPTURE(name);
    const Case c(name);
    on_every_backend([&](auto make) {
      const int T = static_cast<int>(c.tokens.size());
      test::RunModel run(c.checkpoint, make(), T);
      const std::vector<float> at_once = run.logits(c.tokens);
      std::vector<float> stepwise, pieces;
      auto s = run.state();
      for (std::int32_t token : c.tokens) {
        const auto row = run.step(s, {&token, 1});
        stepwise.insert(stepwise.end(), row.begin(), row.end());
      }
      auto p = run.state();
      for (std::size_t begin = 0, n = 1; begin < c.tokens.size(); begin += n, n = n * 2 + 1) {
        n = std::min(n, c.tokens.size() - begin);
        const auto rows = run.step(p, std::span(c.tokens).subspan(begin, n));
        pieces.insert(pieces.end(), rows.begin(), rows.end());
      }
      CHECK(nmse(stepwise, at_once) < 1e-8);
      CHECK(nmse(pieces, at_once) < 1e-8);
      CHECK(s.position == T);
    });
  }
}

TEST_CASE("sequences in one batch = each alone") {
  const Case c("release");
  on_every_backend([&](auto make) {
    test::RunModel run(c.checkpoint, make(), 100, 3);
    const std::vector<std::vector<std::int32_t>> prompts{{c.tokens.begin(), c.tokens.begin() + 70},
                                                         {c.tokens.begin() + 20, c.tokens.begin() + 21},
                                                         {c.tokens.begin() + 30, c.tokens.begin() + 47}};
    auto s0 = run.state(), s1 = run.state(), s2 = run.state();
    SequenceState<typename decltype(run)::BackendType>* states[] = {&s0, &s1, &s2};
    const std::vector<std::vector<std::int32_t>> next{{3}, {4}, {5}};
    std::vector<float> batched = run.step(states, prompts);
    const std::vector<float> second = run.step(states, next);
    batched.insert(batched.end(), second.begin(), second.end());

    std::vector<float> alone, alone_next;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      auto s = run.state();
      const auto a = run.step(s, prompts[i]), b = run.step(s, next[i]);
      alone.insert(alone.end(), a.begin(), a.end());
      alone_next.insert(alone_next.end(), b.begin(), b.end());
    }
    alone.insert(alone.end(), alone_next.begin(), alone_next.end());
    CHECK(nmse(batched, alone) < 1e-8);
  });
}

TEST_CASE("a copy of the state is a snapshot, bit for bit") {
  const Case c("release");
  on_every_backend([&](auto make) {
    test::RunModel run(c.checkpoint, make(), 150);
    auto s = run.state();
    run.step(s, std::span(c.tokens).first(70));
    const auto snapshot = s;
    const auto first = run.step(s, std::span(c.tokens).subspan(70, 30));
    auto diverged = snapshot;
    run.step(diverged, std::span(c.tokens).subspan(10, 20));  // writes over shared KV blocks if they were not copied
    auto again = snapshot;
    CHECK(run.step(again, std::span(c.tokens).subspan(70, 30)) == first);
    CHECK(snapshot.position == 70);
  });
}

TEST_CASE("results do not depend on the number of threads") {
  const Case c("release");
  test::RunModel one(c.checkpoint, CpuBackend(test::cpu("", 1, KvType::f16)), 150);
  test::RunModel three(c.checkpoint, CpuBackend(test::cpu("", 3, KvType::f16)), 150);
  CHECK(one.logits(c.tokens) == three.logits(c.tokens));
  auto s1 = one.state(), s3 = three.state();
  for (int i = 0; i < 5; ++i) {
    const std::span token = std::span(c.tokens).subspan(static_cast<std::size_t>(i), 1);
    CHECK(one.step(s1, token) == three.step(s3, token));
  }
}

TEST_CASE("KV cache types stay close to f32") {
  const Case c("release");
  test::RunModel exact(c.checkpoint, CpuBackend(test::cpu("", 2, KvType::f32)), 150);
  test::RunModel half(c.checkpoint, CpuBackend(test::cpu("", 2, KvType::f16)), 150);
  test::RunModel q8(c.checkpoint, CpuBackend(test::cpu("", 2, KvType::q8_0)), 150);
  const auto expected = exact.logits(c.tokens);
  CHECK(nmse(half.logits(c.tokens), expected) < 1e-6);
  CHECK(nmse(q8.logits(c.tokens), expected) < 1e-3);
}
