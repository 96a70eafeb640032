#pragma once
// States of a sequence in a file: of all its tokens, and of beginnings of them that share its keys and values.
//
//   head      magic, version, KV type, identity of the model, sizes, a checksum of the head; tokens i32[n];
//             m states, ascending: position, position of the MTP layer, whether a turn begins there, u64[3] each;
//             logits f32[V] that follow the last token, or none; zeros up to a multiple of 4096
//   body      keys and values of the last state, layer by layer; then the rest of each state.  See TimelineSnapshot
//   checksums u64 for each 4 MiB of the body, and one of these
// Everything is little-endian and the same for all backends.  The size follows from the head, and is checked before
// memory is taken.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "backends/aligned_bytes.hpp"
#include "core/message.hpp"
#include "core/xxhash64.hpp"
#include "generate/engine.hpp"
#include "weights/atomic_file.hpp"
#include "weights/direct_file.hpp"
#include "weights/read_request.hpp"

namespace qwen3next {

struct SavedStates {
  struct State {
    std::int64_t position;
    bool turn;  // one begins there
    std::shared_ptr<const TimelineSnapshot> snapshot;
  };
  KvType kv = KvType::f16;
  std::vector<std::int32_t> tokens;
  std::vector<float> logits;  // after the last token; empty if they are not known
  std::vector<State> states;  // ascending; the last is of all tokens, the others begin it
};

namespace detail {

struct StateFileHead {
  static constexpr std::array<char, 8> expected_magic{'q', '3', 'n', 's', 't', 'a', 't', 'e'};
  static constexpr std::uint32_t expected_version = 1;

  std::array<char, 8> magic = expected_magic;
  std::uint32_t version = expected_version, kv = 0;
  std::uint64_t identity = 0, tokens = 0, states = 0, logits = 0, body = 0;
  std::uint64_t checksum = 0;  // of the head with 0 here

  static constexpr std::uint64_t most_tokens = std::uint64_t{1} << 30, most_states = 64, most_logits = 1 << 24;
  std::uint64_t size() const noexcept { return sizeof *this + tokens * 4 + states * 24 + logits * 4; }
  std::uint64_t body_begin() const noexcept { return (size() + 4095) / 4096 * 4096; }
};
static_assert(sizeof(StateFileHead) == 64);

constexpr std::size_t state_piece = std::size_t{4} << 20;  // of the body: what is read at once, and has a checksum
constexpr std::uint64_t state_pieces(std::uint64_t body) noexcept { return (body + state_piece - 1) / state_piece; }

// The body of these states, span by span.
inline std::vector<std::span<const std::byte>> state_body(const SavedStates& saved) {
  std::vector<std::span<const std::byte>> spans;
  const auto add = [&](std::span<const std::byte> bytes) {
    if (!bytes.empty()) spans.push_back(bytes);
  };
  saved.states.back().snapshot->kv_bytes(add);
  for (const SavedStates::State& state : saved.states) state.snapshot->state_bytes(add);
  return spans;
}

// To read `size` bytes of the file into, wherever they begin: large pieces of memory lie at large pages' boundaries.
inline AlignedBytes read_buffer(const DirectFile& file, std::size_t size) {
  return AlignedBytes(std::max(size + 2 * file.alignment(), AlignedBytes::large_page), AlignedBytes::Uncleared());
}

// Bytes of a file, whatever its alignment; `scratch` is a read_buffer() for so many.
inline std::span<const std::byte> read_exactly(const DirectFile& file, std::uint64_t offset, std::size_t size,
                                               AlignedBytes& scratch) {
  const std::size_t unit = file.alignment(), before = static_cast<std::size_t>(offset % unit);
  const ReadRequest request{&file,         offset - before, (before + size + unit - 1) / unit * unit,
                            before + size, scratch.data(),  nullptr};
  ReadUnderWay read(request);
  while (!read.take(file.read_at(read.into(), read.size(), read.offset()))) {
  }
  if (const int error = read.result().error; error != 0) throw Error(read_error(file, offset, size, error));
  return std::span(scratch.data() + before, size);
}

// Fills `spans`, which follow each other in the file, by several threads: memory that is touched for the first time
// costs more than the disk.
inline void read_state_body(const DirectFile& file, std::uint64_t begin,
                            const std::vector<std::span<const std::byte>>& spans,
                            std::span<const std::uint64_t> checksums) {
  std::vector<std::uint64_t> ends;  // of the spans, from the body's beginning
  for (const auto& span : spans) ends.push_back((ends.empty() ? 0 : ends.back()) + span.size());
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&]() noexcept {
    try {
      AlignedBytes scratch = read_buffer(file, state_piece);
      for (std::size_t i; (i = next++) < checksums.size();) {
        std::uint64_t at = std::uint64_t{i} * state_piece;
        std::span<const std::byte> piece =
            read_exactly(file, begin + at,
                         static_cast<std::size_t>(std::min<std::uint64_t>(state_piece, ends.back() - at)), scratch);
        if (xxhash64(piece) != checksums[i]) {
          throw_error(file.name(), ": damaged: the bytes from ", begin + at,
                      " on do not match their checksum; what it held is to be read again");
        }
        for (auto s = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), at) - ends.begin());
             !piece.empty(); ++s) {
          const std::size_t n = std::min<std::size_t>(piece.size(), static_cast<std::size_t>(ends[s] - at));
          // The memory is the blank snapshots', whom nobody else knows yet.
          std::memcpy(const_cast<std::byte*>(spans[s].data()) + (spans[s].size() - (ends[s] - at)), piece.data(), n);
          piece = piece.subspan(n), at += n;
        }
      }
    } catch (const std::exception& e) {
      const std::lock_guard lock(mutex);
      if (error.empty()) error = e.what();
      next = checksums.size();
    }
  };
  std::vector<std::thread> threads;
  try {
    while (threads.size() + 1 < std::min<std::size_t>(4, checksums.size())) threads.emplace_back(work);
  } catch (const std::system_error&) {  // fewer do it as well
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (!error.empty()) throw Error(error);
}

}  // namespace detail

// The same states in this machine's memory, as files need them.
inline SavedStates downloaded(SavedStates saved) {
  for (std::size_t i = 0; i < saved.states.size(); ++i) {
    auto& snapshot = saved.states[i].snapshot;
    if (auto here = snapshot->downloaded(i + 1 == saved.states.size())) snapshot = std::move(here);
  }
  return saved;
}

// Bytes that write_state_file() writes.
inline std::uint64_t state_file_size(const SavedStates& saved) {
  detail::StateFileHead head;
  head.tokens = saved.tokens.size(), head.states = saved.states.size(), head.logits = saved.logits.size();
  std::uint64_t body = 0;
  for (const auto& span : detail::state_body(saved)) body += span.size();
  return head.body_begin() + body + 8 * (detail::state_pieces(body) + 1);
}

// Replaces what is there, all or nothing.
inline void write_state_file(const std::filesystem::path& path, std::uint64_t identity, const SavedStates& states) {
  const SavedStates saved = downloaded(states);
  const std::vector<std::span<const std::byte>> body = detail::state_body(saved);
  detail::StateFileHead head;
  head.kv = static_cast<std::uint32_t>(saved.kv);
  head.identity = identity, head.tokens = saved.tokens.size(), head.states = saved.states.size();
  head.logits = saved.logits.size();
  for (const auto& span : body) head.body += span.size();

  std::vector<std::byte> front(head.body_begin());
  const auto write_front = [&] {
    std::byte* to = front.data();
    const auto put = [&](const void* from, std::size_t size) {
      if (size > 0) std::memcpy(to, from, size);
      to += size;
    };
    put(&head, sizeof head);
    put(saved.tokens.data(), 4 * saved.tokens.size());
    for (const SavedStates::State& state : saved.states) {
      const std::uint64_t numbers[] = {static_cast<std::uint64_t>(state.position),
                                       static_cast<std::uint64_t>(state.snapshot->mtp_position()),
                                       state.turn ? 1u : 0u};
      put(numbers, sizeof numbers);
    }
    put(saved.logits.data(), 4 * saved.logits.size());
  };
  write_front();
  head.checksum = xxhash64(front);
  write_front();

  AtomicFile file(path);
  file.expect_room(front.size() + head.body);
  file.write(front);
  std::vector<std::uint64_t> checksums;
  std::vector<std::byte> piece;
  piece.reserve(detail::state_piece);
  const auto flush = [&] {
    checksums.push_back(xxhash64(piece));
    file.write(piece);
    piece.clear();
  };
  for (std::span<const std::byte> span : body) {
    while (!span.empty()) {
      const std::size_t n = std::min(span.size(), detail::state_piece - piece.size());
      piece.insert(piece.end(), span.begin(), span.begin() + static_cast<std::ptrdiff_t>(n));
      span = span.subspan(n);
      if (piece.size() == detail::state_piece) flush();
    }
  }
  if (!piece.empty()) flush();
  checksums.push_back(xxhash64(std::as_bytes(std::span(checksums))));
  file.write(std::as_bytes(std::span(checksums)));
  file.commit();
}

// Throws Error if the file is damaged, of another version, model or KV type, or of more than `context` tokens, of which
// there are `vocabulary` different ones.
inline SavedStates read_state_file(const std::filesystem::path& path, std::uint64_t identity, const Engine& engine,
                                   KvType kv, std::int64_t context, int vocabulary) {
  const DirectFile file = DirectFile::open(path);
  const auto refuse = [&](const auto&... why) { throw_error(file.name(), ": ", why...); };
  AlignedBytes scratch = detail::read_buffer(file, detail::state_piece);
  using Head = detail::StateFileHead;
  Head head;
  if (file.size() < sizeof head) refuse("not a saved state: ", file.size(), " bytes");
  std::memcpy(&head, detail::read_exactly(file, 0, sizeof head, scratch).data(), sizeof head);
  if (head.magic != Head::expected_magic) refuse("not a saved state of this program");
  if (head.version != Head::expected_version)
    refuse("version ", head.version, ", expected ", Head::expected_version,
           ": saved by another version of this program");
  if (head.tokens < 1 || head.tokens > Head::most_tokens || head.states < 1 || head.states > Head::most_states ||
      head.logits > Head::most_logits || head.body > file.size() ||
      head.body_begin() + head.body + 8 * (detail::state_pieces(head.body) + 1) != file.size())
    refuse("damaged: its head does not fit its size of ", file.size(), " bytes");

  AlignedBytes front = detail::read_buffer(file, static_cast<std::size_t>(head.body_begin()));
  const std::span<const std::byte> bytes =
      detail::read_exactly(file, 0, static_cast<std::size_t>(head.body_begin()), front);
  const std::uint64_t checksum = std::exchange(head.checksum, 0);
  std::memcpy(front.data(), &head, sizeof head);
  if (xxhash64(bytes) != checksum) refuse("damaged: its head does not match its checksum");
  if (head.identity != identity)
    refuse("of another model, or of the same with other options (backend, YaRN, number of experts)");
  if (head.kv != static_cast<std::uint32_t>(kv)) refuse("its KV cache is of another type than the session's");
  if (head.tokens > static_cast<std::uint64_t>(context))
    refuse("holds ", head.tokens, " tokens, more than the context of ", context);

  SavedStates saved;
  saved.kv = kv;
  const std::byte* from = bytes.data() + sizeof head;
  const auto take = [&](void* to, std::size_t size) {
    if (size > 0) std::memcpy(to, from, size);
    from += size;
  };
  saved.tokens.resize(static_cast<std::size_t>(head.tokens));
  take(saved.tokens.data(), 4 * saved.tokens.size());
  std::vector<std::array<std::uint64_t, 3>> places(static_cast<std::size_t>(head.states));
  take(places.data(), 24 * places.size());
  saved.logits.resize(static_cast<std::size_t>(head.logits));
  take(saved.logits.data(), 4 * saved.logits.size());

  const auto wrong = [&](std::int32_t token) { return token < 0 || token >= vocabulary; };
  if (std::any_of(saved.tokens.begin(), saved.tokens.end(), wrong) ||
      (head.logits != 0 && head.logits != static_cast<std::uint64_t>(vocabulary)))
    refuse("damaged: its tokens are not of a vocabulary of ", vocabulary);

  std::uint64_t expected = 0;
  for (std::size_t i = 0; i < places.size(); ++i) {
    const auto [position, mtp, turn] = places[i];
    const bool last = i + 1 == places.size();
    if (position < 1 || mtp > position || turn > 1 || (last ? position != head.tokens : position >= places[i + 1][0]))
      refuse("damaged: its states are at impossible positions");
    expected += engine.state_bytes();
    if (last) expected += engine.kv_bytes(kv, static_cast<std::int64_t>(position), static_cast<std::int64_t>(mtp));
  }
  if (expected != head.body) refuse("its states take ", head.body, " bytes, expected ", expected, " for this model");
  const std::uint64_t pieces = detail::state_pieces(head.body);
  std::vector<std::uint64_t> checksums(static_cast<std::size_t>(pieces + 1));
  AlignedBytes table = detail::read_buffer(file, 8 * checksums.size());
  std::memcpy(checksums.data(),
              detail::read_exactly(file, head.body_begin() + head.body, 8 * checksums.size(), table).data(),
              8 * checksums.size());
  if (xxhash64(std::as_bytes(std::span(checksums)).first(static_cast<std::size_t>(8 * pieces))) != checksums.back())
    refuse("damaged: its checksums do not match theirs");
  checksums.pop_back();

  saved.states.resize(places.size());
  std::shared_ptr<const TimelineSnapshot> longest;
  for (std::size_t i = places.size(); i-- > 0;) {
    const auto position = static_cast<std::int64_t>(places[i][0]), mtp = static_cast<std::int64_t>(places[i][1]);
    saved.states[i] = {position, places[i][2] == 1, engine.blank_snapshot(kv, position, mtp, longest.get())};
    if (!longest) longest = saved.states[i].snapshot;
  }
  const std::vector<std::span<const std::byte>> body = detail::state_body(saved);
  std::uint64_t room = 0;
  for (const auto& span : body) room += span.size();
  if (room != head.body) throw Error("a state takes other bytes than it says: this is a defect of the program");
  detail::read_state_body(file, head.body_begin(), body, checksums);
  return saved;
}

}  // namespace qwen3next
