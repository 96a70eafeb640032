#pragma once
// Reads from files that go on while others compute: what is asked for, and what each kind of queue needs.

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "core/message.hpp"
#include "weights/direct_file.hpp"

namespace qwen3next {

struct ReadRequest {
  const DirectFile* file;
  std::uint64_t offset;  // a multiple of file->alignment()
  std::size_t size;      // a multiple of it; may pass the end of the file by less than that
  std::size_t needed;    // of these bytes, how many must arrive; at most `size`
  std::byte* into;       // room for `size` bytes, at a multiple of it
  void* owner;           // comes back with the result
};

struct ReadResult {
  void* owner;
  int error;  // 0: good; an errno value (ECANCELED: the queue was destroyed first); -1: the file ended early
};

// Reads up to `depth` requests at once, begun in the order in which they were submitted; more of them wait.
class ReadQueue {
 public:
  // Called with the results of requests in any order, on a thread of the queue, once at a time.  It may submit; it must
  // not wait for a read, nor throw.
  using OnDone = std::function<void(std::span<const ReadResult>)>;

  ReadQueue() = default;
  ReadQueue(const ReadQueue&) = delete;
  ReadQueue& operator=(const ReadQueue&) = delete;
  // Cancels requests that have not begun, waits for the others, and gives every result.  Not on a thread of the queue.
  virtual ~ReadQueue() = default;

  // From any thread; returns at once.  Each request has one result.  Allocates only where more requests wait than ever.
  virtual void submit(std::span<const ReadRequest> requests) = 0;
  virtual std::string_view kind() const noexcept = 0;  // "io_uring" or "threads"
};

// "FILE: cannot read 4096 bytes at 8192: Input/output error; ...", the text of an Error for a result that is not good.
inline std::string read_error(const DirectFile& file, std::uint64_t offset, std::size_t size, int error) {
  std::string text = concat(file.name(), ": cannot read ", size, " bytes at ", offset, ": ");
  if (error == -1) {
    return text + concat("the file ends before that (", file.size(),
                         " bytes when it was opened): it was truncated, get it again");
  }
  text += std::generic_category().message(error);
  if (error == EIO) text += "; the disk or its connection fails: see the system's log, then copy the file elsewhere";
  return text;
}

namespace detail {

// A request while it is read.  The system may give fewer bytes than it was asked for; what it gave up to the last
// multiple of the alignment is kept, and the rest asked for again.
class ReadUnderWay {
 public:
  ReadUnderWay() = default;
  explicit ReadUnderWay(const ReadRequest& request) noexcept : request_(request) {}

  // What to ask the system for next.
  const DirectFile& file() const noexcept { return *request_.file; }
  std::uint64_t offset() const noexcept { return request_.offset + begin_; }
  std::size_t size() const noexcept { return std::min(request_.size - begin_, most_at_once); }
  std::byte* into() const noexcept { return request_.into + begin_; }

  // Takes the system's answer, a number of bytes or minus an errno value.  Whether result() is there.
  bool take(std::int64_t answer) noexcept {
    if (answer < 0) {
      const int error = static_cast<int>(-answer);
      // ECANCELED: the thread that handed it to the kernel has ended.
      const bool passing = error == EINTR || error == EAGAIN || error == ECANCELED;
      if (passing && ++refusals_ < most_refusals) return false;
      error_ = error;
      return true;
    }
    const std::size_t arrived = begin_ + static_cast<std::size_t>(answer);
    if (arrived >= request_.needed) return true;
    if (arrived <= arrived_) {
      error_ = -1;
      return true;
    }
    arrived_ = arrived;
    begin_ = arrived / file().alignment() * file().alignment();
    refusals_ = 0;
    return false;
  }
  ReadResult result() const noexcept { return {request_.owner, error_}; }
  ReadResult failed(int error) const noexcept { return {request_.owner, error}; }

 private:
  static constexpr std::size_t most_at_once = std::size_t{1} << 30;  // Linux gives at most 2 GiB less a page
  static constexpr int most_refusals = 1000;

  ReadRequest request_{};
  std::size_t begin_ = 0, arrived_ = 0;  // bytes of the request
  int refusals_ = 0, error_ = 0;
};

// Requests that wait, first in, first out.
class WaitingReads {
 public:
  bool empty() const noexcept { return count_ == 0; }
  std::size_t size() const noexcept { return count_; }
  void append(std::span<const ReadRequest> requests) {
    if (count_ + requests.size() > ring_.size()) grow(count_ + requests.size());
    for (const ReadRequest& request : requests) ring_[(first_ + count_++) % ring_.size()] = request;
  }
  ReadRequest take() noexcept {
    const ReadRequest request = ring_[first_];
    first_ = (first_ + 1) % ring_.size();
    --count_;
    return request;
  }

 private:
  void grow(std::size_t size) {
    std::vector<ReadRequest> larger(std::max(size, 2 * ring_.size()));
    for (std::size_t i = 0; i < count_; ++i) larger[i] = ring_[(first_ + i) % ring_.size()];
    ring_.swap(larger);
    first_ = 0;
  }

  std::vector<ReadRequest> ring_;
  std::size_t first_ = 0, count_ = 0;
};

}  // namespace detail

}  // namespace qwen3next
