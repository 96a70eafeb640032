// A saved session of which any bytes are others, checksums made to fit or not: it is refused, or what is read can be
// gone on from.

#include "generate/state_file.hpp"

#include "generate/make_engine.hpp"
#include "target.hpp"
#include "weights/checkpoint.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

namespace {

constexpr std::uint64_t identity = 42;
constexpr int context = 64;

// A small model with random weights, and what it saved of two states.
struct Saved {
  Checkpoint checkpoint = Checkpoint::open(QWEN3NEXT_SOURCE_DIR "/tests/golden/model/release");
  std::unique_ptr<const Engine> engine = make_engine(checkpoint.config, checkpoint.weights, {.threads = 1});
  std::unique_ptr<Timeline> timeline = engine->timeline({.kv = {}, .batch = 16});
  std::string bytes;

  Saved() {
    SavedStates saved{.kv = engine->default_kv(), .tokens = {1, 2, 3, 4, 5, 6, 7}, .logits = {}, .states = {}};
    const std::span<const float> logits =
        timeline->append(saved.tokens, {}, std::array<std::int64_t, 1>{4}, [&](std::int64_t count, auto snapshot) {
          saved.states.push_back({count, true, std::move(snapshot)});
        });
    saved.logits.assign(logits.begin(), logits.end());
    saved.states.push_back({7, false, timeline->snapshot()});
    const std::filesystem::path path = folder() / "good.state";
    write_state_file(path, identity, saved);
    std::ifstream in(path, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
};

}  // namespace

// u8: whether the head's checksum is made to fit, u16: bytes cut off at the end; then u32 offset, u64 what stands
// there.
FUZZ_TARGET(state_file) {
  static const Saved saved;
  Numbers numbers(input);
  const bool fits = numbers.take<std::uint8_t>() % 2 == 1;
  std::string bytes = saved.bytes;
  bytes.resize(bytes.size() - numbers.take<std::uint16_t>() % bytes.size());
  while (!input.empty()) {
    const std::size_t at = numbers.take<std::uint32_t>() % (saved.bytes.size() + 1);
    const auto value = numbers.take<std::uint64_t>();
    if (at + sizeof value <= bytes.size()) std::memcpy(bytes.data() + at, &value, sizeof value);
  }
  detail::StateFileHead head;
  if (fits && bytes.size() >= sizeof head) {
    std::memcpy(&head, bytes.data(), sizeof head);
    head.checksum = 0;
    std::memcpy(bytes.data(), &head, sizeof head);
    const bool small = head.tokens < 1024 && head.states < 64 && head.logits < 4096;
    if (small && head.body_begin() <= bytes.size()) {
      head.checksum = xxhash64(std::as_bytes(std::span(bytes)).first(static_cast<std::size_t>(head.body_begin())));
      std::memcpy(bytes.data(), &head, sizeof head);
    }
  }
  const std::filesystem::path path = write_file("a.state", bytes);
  const SavedStates read = read_state_file(path, identity, *saved.engine, saved.engine->default_kv(), context,
                                           saved.checkpoint.config.vocab_size);
  const auto timeline = saved.engine->timeline({.kv = {}, .batch = 16});
  for (const SavedStates::State& state : read.states) {
    timeline->restore(*state.snapshot);
    expect(timeline->position() == state.position, "the state is where the file says");
    timeline->append(std::array<std::int32_t, 1>{8}, {}, {}, {});
  }
}
