// The whole model on a GPU: against transformers' logits, the boxes of a layer against the operations they consist of,
// rows together against rows one by one.

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "backends/cuda/cuda_backend.hpp"
#include "backends/reference/reference_backend.hpp"
#include "model/forward.hpp"
#include "model/mtp.hpp"
#include "tests/cuda/gpu.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/observed.hpp"
#include "tests/support/run_model.hpp"
#include "weights/checkpoint.hpp"

using namespace qwen3next;
using test::nmse;

namespace {

const std::vector<std::string> goldens{"release", "fused", "sharded", "yarn", "fp8"};
const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";

// The operations alone, without the boxes that are more than one.
struct Plain : test::Gpu {
  using Gpu::Gpu;
  void norm_linear() = delete;
  void linear_add() = delete;
  void gated_norm_linear_add() = delete;
  void gated_attention() = delete;
  void delta_net() = delete;
  void experts_add() = delete;
};

// Starts each launch by itself.
struct Ungathered : test::Gpu {
  using Gpu::Gpu;
  bool begin_pass() { return false; }
};

std::vector<std::int32_t> some_tokens(int n, int vocabulary) {
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(static_cast<std::int32_t>((i * 7919 + 13) % vocabulary));
  return tokens;
}

template <class B>
std::vector<float> one_by_one(test::RunModel<B>& run, std::span<const std::int32_t> tokens, std::size_t together = 1) {
  auto state = run.state();
  std::vector<float> logits;
  for (std::size_t i = 0; i < tokens.size(); i += together) {
    const std::vector<float> some = run.step(state, tokens.subspan(i, std::min(together, tokens.size() - i)));
    logits.insert(logits.end(), some.begin(), some.end());
  }
  return logits;
}

}  // namespace

TEST_CASE("cuda gives transformers' logits") {
  for (const std::string& name : goldens) {
    for (const KvType kv : {KvType::f32, KvType::f16}) {
      CAPTURE(name);
      const double bound = 1e-5;
      const Checkpoint checkpoint = Checkpoint::open(test::golden(name));
      const test::Expected expected(name);
      test::RunModel<test::Observed<test::Gpu>> run(checkpoint, test::Observed<test::Gpu>(kv),
                                                    static_cast<int>(expected.tokens().size()));
      const std::vector<float> logits = run.logits(expected.tokens());
      for (std::size_t i = 0; i < run.be.residual.size(); ++i) {  // names the first layer that differs
        CAPTURE(i);
        REQUIRE(nmse(run.be.residual[i], expected.floats("hidden." + std::to_string(i))) < bound);
      }
      const double error = nmse(logits, expected.floats("logits"));
      MESSAGE(name << ": logits NMSE " << error);
      CHECK(error < bound);
      const double single = nmse(one_by_one(run, expected.tokens()), expected.floats("logits"));
      MESSAGE(name << ": one by one, logits NMSE " << single);
      CHECK(single < bound);
      if (!checkpoint.config.has_mtp) continue;
      const double mtp = nmse(run.mtp_logits(expected.tokens()), expected.floats("mtp_logits"));
      MESSAGE(name << ": MTP logits NMSE " << mtp);
      CHECK(mtp < bound);
    }
  }
}

TEST_CASE("cuda gives the bundled model's logits as the reference does") {
  const Checkpoint checkpoint = Checkpoint::open(tiny);
  const std::vector<std::int32_t> tokens = some_tokens(70, checkpoint.config.vocab_size);
  test::RunModel<ReferenceBackend> reference(checkpoint, ReferenceBackend(), 70);
  const std::vector<float> expected = reference.logits(tokens);
  for (const KvType kv : {KvType::f32, KvType::f16, KvType::q8_0}) {
    test::RunModel<test::Gpu> run(checkpoint, test::Gpu(kv), 70);
    const double together = nmse(run.logits(tokens), expected), single = nmse(one_by_one(run, tokens), expected);
    MESSAGE("bundled model, NMSE against the reference: together " << together << ", one by one " << single);
    CHECK(together < 1e-3);
    CHECK(single < 1e-3);
  }
}

TEST_CASE("cuda: up to 5 rows at once are single rows bit for bit; more agree") {
  const Checkpoint checkpoint = Checkpoint::open(tiny);
  const std::vector<std::int32_t> tokens = some_tokens(60, checkpoint.config.vocab_size);
  test::RunModel<test::Gpu> run(checkpoint, test::Gpu(), 60);
  const std::vector<float> single = one_by_one(run, tokens);
  for (const std::size_t together : {2, 3, 5}) {
    CAPTURE(together);
    CHECK(one_by_one(run, tokens, together) == single);
  }
  for (const std::size_t together : {6, 8, 12, 60}) {
    CAPTURE(together);
    CHECK(nmse(one_by_one(run, tokens, together), single) < 1e-4);
  }
}

TEST_CASE("cuda: passes that are gathered into graphs are those that are started launch by launch") {
  const Checkpoint checkpoint = Checkpoint::open(tiny);
  const std::vector<std::int32_t> tokens = some_tokens(40, checkpoint.config.vocab_size);
  test::RunModel<test::Gpu> gathered(checkpoint, test::Gpu(), 40);
  test::RunModel<Ungathered> ungathered(checkpoint, Ungathered(), 40);
  auto one = gathered.state();
  auto other = ungathered.state();
  const auto read = [](auto& run, auto tensor) {
    const std::span<const float> row = run.be.host(tensor.rows(0, 1));
    return std::vector<float>(row.begin(), row.end());
  };
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    CAPTURE(i);
    const auto token = std::span(tokens).subspan(i, 1);
    const bool same = gathered.step(one, token) == ungathered.step(other, token);
    CHECK(same);
    if (same) continue;
    MESSAGE("angles " << nmse(read(gathered, gathered.a.angles), read(ungathered, ungathered.a.angles)) << ", x "
                      << nmse(read(gathered, gathered.a.x), read(ungathered, ungathered.a.x)) << ", h "
                      << nmse(read(gathered, gathered.a.h), read(ungathered, ungathered.a.h)) << ", qkv "
                      << nmse(read(gathered, gathered.a.qkv), read(ungathered, ungathered.a.qkv)) << ", o "
                      << nmse(read(gathered, gathered.a.o), read(ungathered, ungathered.a.o)) << ", logits "
                      << nmse(read(gathered, gathered.a.logits), read(ungathered, ungathered.a.logits)) << ", x[0] "
                      << read(gathered, gathered.a.x)[0] << " " << read(ungathered, ungathered.a.x)[0]);
    if (i > 3) break;
  }
}

TEST_CASE("cuda: the boxes of a layer are the operations they consist of") {
  for (const std::string& path : {test::golden("release").string(), test::golden("sharded").string(), tiny}) {
    CAPTURE(path);
    const Checkpoint checkpoint = Checkpoint::open(path);
    const std::vector<std::int32_t> tokens = some_tokens(40, checkpoint.config.vocab_size);
    test::RunModel<test::Gpu> whole(checkpoint, test::Gpu(), 40);
    test::RunModel<Plain> plain(checkpoint, Plain(), 40);
    CHECK(nmse(whole.logits(tokens), plain.logits(tokens)) < 1e-5);
    CHECK(nmse(one_by_one(whole, tokens), one_by_one(plain, tokens)) < 1e-5);
  }
}

TEST_CASE("cuda: sequences in one batch are those sequences alone") {
  const Checkpoint checkpoint = Checkpoint::open(tiny);
  test::RunModel<test::Gpu> run(checkpoint, test::Gpu(), 80, 70);
  std::vector<SequenceState<test::Gpu>> states;
  std::vector<SequenceState<test::Gpu>*> pointers;
  std::vector<std::vector<std::int32_t>> tokens;
  std::vector<float> alone;
  for (int i = 0; i < 70; ++i) {
    states.push_back(run.state());
    const auto history = some_tokens(1 + i % 9, checkpoint.config.vocab_size);
    run.step(states.back(), history);
    tokens.push_back({i * 31 % checkpoint.config.vocab_size});
  }
  for (std::size_t i = 0; i < 70; ++i) {
    auto copy = states[i];
    const auto logits = run.step(copy, tokens[i]);
    alone.insert(alone.end(), logits.begin(), logits.end());
    pointers.push_back(&states[i]);
  }
  const std::vector<float> together = run.step(pointers, tokens);
  CHECK(nmse(together, alone) < 1e-4);
}
