// A folder of states: within its size, least lately used out first, whole files or none, whoever shares it.

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <fstream>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "generate/engine.hpp"
#include "generate/state_folder.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/temp_folder.hpp"
#include "weights/checkpoint.hpp"

using namespace qwen3next;

namespace {

constexpr std::uint64_t identity = 7;

struct Small {
  Checkpoint checkpoint = Checkpoint::open(test::golden("release"));
  std::unique_ptr<const Engine> engine = make_engine(checkpoint.config, checkpoint.weights, {.threads = 1});

  // What a session that read `tokens` saves.
  SavedStates saved(const std::vector<std::int32_t>& tokens) const {
    const auto timeline = engine->timeline({.kv = {}, .batch = 16});
    timeline->append(tokens, {}, {}, {});
    return {
        engine->default_kv(), tokens, {}, {{static_cast<std::int64_t>(tokens.size()), false, timeline->snapshot()}}};
  }
  SavedStates read(const std::filesystem::path& path) const {
    return read_state_file(path, identity, *engine, engine->default_kv(), 1024, checkpoint.config.vocab_size);
  }
};

const Small& small() {
  static const Small s;
  return s;
}

std::vector<std::int32_t> text(int n, int seed = 0) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
  std::iota(tokens.begin(), tokens.end(), seed + 1);
  return tokens;
}

std::uint64_t size_of(const std::filesystem::path& folder) {
  std::uint64_t sum = 0;
  for (const auto& file : std::filesystem::directory_iterator(folder)) sum += file.file_size();
  return sum;
}

}  // namespace

TEST_CASE("beginnings are found, the longest first; other files are left alone") {
  const test::TempFolder place;
  const StateFolder folder(place / "new/deep", 1 << 20);
  const KvType kv = small().engine->default_kv();
  for (const int n : {3, 9, 6}) CHECK(folder.store(identity, small().saved(text(n))));
  CHECK(folder.store(identity, small().saved(text(5, 50))));
  CHECK_FALSE(folder.store(identity, small().saved(text(6))));  // it is there
  std::ofstream(place / "new/deep/notes.txt") << "mine";
  std::ofstream(place / "new/deep/0000000000000007-0-x.q3nstate") << "not a count";
  std::filesystem::create_directory(place / "new/deep/folder.q3nstate");

  const auto found = folder.find(identity, kv, text(8));
  REQUIRE(found.size() == 2);
  CHECK(found[0].position == 6);
  CHECK(found[1].position == 3);
  CHECK(small().read(found[0].path).tokens == text(6));
  CHECK(folder.find(identity + 1, kv, text(8)).empty());
  CHECK(folder.find(identity, KvType::q8_0, text(8)).empty());
  folder.remove(identity, kv, text(6));
  CHECK(folder.find(identity, kv, text(8)).size() == 1);
  CHECK(std::filesystem::exists(place / "new/deep/notes.txt"));
}

TEST_CASE("files that were not used for longest make room; what is too large is not written") {
  const test::TempFolder place;
  const std::uint64_t one = state_file_size(small().saved(text(5)));
  const StateFolder folder(place.path(), 3 * one);
  const KvType kv = small().engine->default_kv();
  const auto there = [&](int seed) { return std::filesystem::exists(folder.path(identity, kv, text(5, seed))); };
  const auto age = [&](int seed, int hours) {
    std::filesystem::last_write_time(folder.path(identity, kv, text(5, seed)),
                                     std::filesystem::file_time_type::clock::now() - std::chrono::hours(hours));
  };
  for (const int seed : {0, 10, 20}) CHECK(folder.store(identity, small().saved(text(5, seed))));
  age(0, 3), age(10, 2), age(20, 1);
  StateFolder::touch(folder.path(identity, kv, text(5, 0)));
  CHECK(folder.store(identity, small().saved(text(5, 30))));
  CHECK(there(0));
  CHECK_FALSE(there(10));
  CHECK(there(20));
  CHECK(there(30));
  CHECK(size_of(place.path()) <= 3 * one);
  CHECK_FALSE(StateFolder(place.path(), one - 1).store(identity, small().saved(text(5, 40))));
  CHECK_FALSE(there(40));
}

TEST_CASE("a name that stands for other tokens is no harm: the file says what it holds") {
  const test::TempFolder place;
  const StateFolder folder(place.path(), 1 << 20);
  const KvType kv = small().engine->default_kv();
  folder.store(identity, small().saved(text(5)));
  std::filesystem::rename(folder.path(identity, kv, text(5)), folder.path(identity, kv, text(5, 60)));
  const auto found = folder.find(identity, kv, text(9, 60));
  REQUIRE(found.size() == 1);
  CHECK(small().read(found[0].path).tokens == text(5));
}

TEST_CASE("several processes in one folder meet whole files of theirs or none") {
  const test::TempFolder place;
  const KvType kv = small().engine->default_kv();
  std::vector<SavedStates> states;
  for (int i = 0; i < 6; ++i) states.push_back(small().saved(text(4 + i % 3, 20 * i)));
  const std::uint64_t limit = 3 * state_file_size(states[2]);
  std::atomic<int> wrong{0}, right{0};
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      const StateFolder folder(place.path(), limit);  // as a process has one of its own
      for (std::size_t i = 0; i < 30; ++i) {
        const SavedStates& mine = states[(i * (t + 1) + t) % states.size()];
        folder.store(identity, mine);
        for (const StateFolder::Entry& entry : folder.find(identity, kv, mine.tokens)) {
          try {
            small().read(entry.path).tokens == mine.tokens ? ++right : ++wrong;
          } catch (const Error& e) {  // removed by another one in between
            if (std::string_view(e.what()).find("damaged") != std::string_view::npos) ++wrong;
          }
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(right > 0);
  StateFolder(place.path(), limit).store(identity, small().saved(text(5, 150)));
  CHECK(size_of(place.path()) <= limit);
}
