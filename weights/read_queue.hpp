#pragma once
// Reads from files that go on while others compute: by io_uring where there is one, else by threads.
//
// io_uring needs liburing: define QWEN3NEXT_IO_URING and link it (-luring); CMake does so where it finds it.

#include <memory>
#include <utility>

#include "core/message.hpp"
#include "weights/read_queue_threads.hpp"
#include "weights/read_request.hpp"

#if defined(QWEN3NEXT_IO_URING)
#include "weights/read_queue_uring.hpp"
#endif

namespace qwen3next {

enum class ReadQueueKind { best, io_uring, threads };

// `depth`, 1 to 1024: how many requests are read at once (by threads at most 32).  best: io_uring where it can be used,
// else threads.  Throws Error if io_uring is asked for where it can't be, or if the system gives no thread.
inline std::unique_ptr<ReadQueue> make_read_queue(ReadQueueKind kind, int depth, ReadQueue::OnDone on_done) {
  if (depth < 1 || depth > 1024) throw_error("a queue of ", depth, " reads: expected 1 to 1024");
#if defined(QWEN3NEXT_IO_URING)
  if (kind != ReadQueueKind::threads) {
    try {
      return std::make_unique<UringReadQueue>(depth, on_done);
    } catch (const Error&) {
      if (kind == ReadQueueKind::io_uring) throw;
    }
  }
#else
  if (kind == ReadQueueKind::io_uring) {
    throw_error(
        "io_uring cannot be used: this program was built without liburing (apt-get install liburing-dev); reading "
        "by threads works everywhere");
  }
#endif
  return std::make_unique<ThreadReadQueue>(depth, std::move(on_done));
}

}  // namespace qwen3next
