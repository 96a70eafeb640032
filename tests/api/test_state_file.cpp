// Sessions in files: what was saved comes back, and nothing else does.

#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "qwen3next.hpp"
#include "tests/support/open.hpp"
#include "tests/support/temp_folder.hpp"

using namespace qwen3next;

namespace {

const std::string tiny = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";

std::vector<std::int32_t> random_tokens(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(n);
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random() % 8000);
  return tokens;
}
std::vector<float> copy(std::span<const float> logits) { return {logits.begin(), logits.end()}; }

std::string read(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
void write(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

}  // namespace

TEST_CASE("a loaded session goes on bit for bit, whatever the KV type and the backend") {
  const test::TempFolder folder;
  struct Setting {
    Options options;
    std::optional<KvType> kv;
  };
  for (const Setting& s : {Setting{{}, KvType::f16}, Setting{{}, KvType::f32}, Setting{{}, KvType::q8_0},
                           Setting{{.backend = Backend::reference}, {}}, Setting{{.memory = 40u << 20}, KvType::f16}}) {
    const SessionOptions options{.context = 1024, .kv = s.kv, .batch = 64};
    const auto path = folder.fresh() / "a.state";
    const auto prompt = random_tokens(300, 1);
    std::vector<float> logits, after;
    {
      const Model model = test::open(tiny, s.options);
      Session session = model.session(options);
      session.sync(prompt, std::vector<std::int64_t>{0, 280});
      session.decode(7);
      logits = copy(session.decode(8));
      session.save(path);
      after = copy(session.decode(9));
    }
    const Model model = test::open(tiny, s.options);
    Session session = model.session(options);
    session.prefill(random_tokens(10, 2));
    session.load(path);
    CHECK(session.tokens().size() == 302);
    CHECK(std::equal(prompt.begin(), prompt.end(), session.tokens().begin()));
    CHECK(copy(session.sync(session.tokens().first(302)).logits) == logits);
    CHECK(copy(session.decode(9)) == after);
    // And the state where the answer began, for a template that rewrites it.
    auto rewritten = prompt;
    rewritten.resize(281);
    rewritten.push_back(5);
    CHECK(session.sync(rewritten, std::vector<std::int64_t>{0, 280}).reused == 280);
  }
}

TEST_CASE("files of other models, options and lengths are refused with a reason, and change nothing") {
  const test::TempFolder folder;
  const auto path = folder / "a.state";
  const Model model = test::open(tiny);
  Session session = model.session({.context = 512});
  CHECK_THROWS_WITH_AS(session.save(path), doctest::Contains("nothing to save"), Error);
  session.prefill(random_tokens(300, 3));
  session.save(path);
  const auto refuse = [&](Session other, const char* why) {
    other.prefill(random_tokens(5, 4));
    CHECK_THROWS_WITH_AS(other.load(path), doctest::Contains(why), Error);
    CHECK(std::ranges::equal(other.tokens(), random_tokens(5, 4)));
  };
  refuse(model.session({.context = 256}), "more than the context of 256");
  refuse(model.session({.context = 512, .kv = KvType::q8_0}), "another type");
  refuse(test::open(tiny, {.yarn_factor = 2}).session({.context = 512}), "another model");
  refuse(test::open(tiny, {.experts_used = 2}).session({.context = 512}), "another model");
  refuse(Model::open(tiny, {.backend = Backend::reference}).session({.context = 512}), "another model");
  CHECK_THROWS_AS(session.load(folder / "none.state"), Error);
  // The same weights but for one byte in the middle of a tensor of the sample.
  std::string changed = read(tiny);
  const Checkpoint checkpoint = Checkpoint::open(tiny);
  const TensorRecord& first = checkpoint.records.front();
  changed[first.offset + 1] = static_cast<char>(changed[first.offset + 1] + 1);
  write(folder / "changed.gguf", changed);
  refuse(test::open((folder / "changed.gguf").string()).session({.context = 512}), "another model");
}

TEST_CASE("a damaged file is never loaded") {
  const test::TempFolder folder;
  const Model model = test::open(tiny);
  Session session = model.session({.context = 512});
  const auto path = folder / "a.state";
  session.sync(random_tokens(300, 5), std::vector<std::int64_t>{0, 290});
  session.save(path);
  const std::string good = read(path);
  session.load(path);
  const auto before = copy(session.decode(1));
  session.load(path);
  std::mt19937 random(6);
  for (int round = 0; round < 60; ++round) {
    std::string bad = good;
    const std::size_t n = round < 30 ? 4500 : bad.size();  // the head, then anywhere
    switch (round % 3) {
      case 0:
        bad[random() % n] ^= static_cast<char>(1 << random() % 8);
        break;
      case 1:
        bad.resize(random() % n);
        break;
      case 2:
        bad.insert(random() % n, 1, 'x');
        break;
    }
    const auto name = folder.fresh() / "bad.state";
    write(name, bad);
    CAPTURE(round);
    CHECK_THROWS_AS(session.load(name), Error);
    std::filesystem::remove(name);
  }
  CHECK(copy(session.decode(1)) == before);
}
