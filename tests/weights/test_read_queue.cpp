// Reads around the cache: the right bytes or an error, each request answered once, whatever the system does meanwhile.

#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/temp_folder.hpp"
#include "weights/direct_file.hpp"
#include "weights/mapped_file.hpp"
#include "weights/read_queue.hpp"

#if defined(__linux__)
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

namespace {

using namespace qwen3next;
using doctest::Contains;

constexpr std::size_t page = 4096;

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// What a test file holds at `offset`: no two pages are alike.
std::byte byte_at(std::uint64_t offset) { return static_cast<std::byte>((offset * 0x9e3779b97f4a7c15u) >> 56); }

void write_file(const std::filesystem::path& path, std::size_t size) {
  std::string bytes(size, '\0');
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(byte_at(i));
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(size));
}

// Room for reads, with a page of marks behind it.
class Buffer {
 public:
  explicit Buffer(std::size_t size)
      : size_(size), data_(static_cast<std::byte*>(::operator new(size + page, std::align_val_t(page)))) {
    std::memset(data_.get(), 0xee, size + page);
  }
  std::byte* data() const { return data_.get(); }
  bool holds(std::uint64_t offset, std::size_t needed) const {
    for (std::size_t i = 0; i < needed; ++i) {
      if (data_[i] != byte_at(offset + i)) return false;
    }
    for (std::size_t i = size_; i < size_ + page; ++i) {
      if (data_[i] != std::byte{0xee}) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(page)); }
  };
  std::size_t size_;
  std::unique_ptr<std::byte[], Free> data_;
};

// Counts results, so that tests can wait for them.
class Results {
 public:
  ReadQueue::OnDone taker() {
    return [this](std::span<const ReadResult> results) {
      const std::lock_guard lock(mutex_);
      all_.insert(all_.end(), results.begin(), results.end());
      came_.notify_all();
    };
  }
  std::vector<ReadResult> wait_for(std::size_t n) {
    std::unique_lock lock(mutex_);
    REQUIRE(came_.wait_for(lock, std::chrono::minutes(2), [&] { return all_.size() >= n; }));
    return all_;
  }
  std::vector<ReadResult> now() {
    const std::lock_guard lock(mutex_);
    return all_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable came_;
  std::vector<ReadResult> all_;
};

// Those that this build and this kernel have.
std::vector<ReadQueueKind> kinds() {
  std::vector<ReadQueueKind> all{ReadQueueKind::threads};
  try {
    make_read_queue(ReadQueueKind::io_uring, 1, [](std::span<const ReadResult>) {});
    all.push_back(ReadQueueKind::io_uring);
  } catch (const Error& e) {
    MESSAGE("not tested: " << std::string(e.what()));
  }
  return all;
}

// Folders on a disk and, if there is one, in memory.
std::vector<std::unique_ptr<test::TempFolder>> folders() {
  std::vector<std::unique_ptr<test::TempFolder>> all;
  all.push_back(std::make_unique<test::TempFolder>());
#if defined(__linux__)
  if (std::error_code error; std::filesystem::is_directory("/dev/shm", error))
    all.push_back(std::make_unique<test::TempFolder>("/dev/shm"));
#endif
  return all;
}

// One request at `offset`, answered; the error of its result.
int read_one(ReadQueue& queue, Results& results, const DirectFile& file, std::uint64_t offset, std::size_t size,
             std::size_t needed, const Buffer& into) {
  const std::size_t before = results.now().size();
  const ReadRequest request{&file, offset, size, needed, into.data(), nullptr};
  queue.submit({&request, 1});
  return results.wait_for(before + 1).back().error;
}

}  // namespace

TEST_CASE("read queue: the bytes of the file, at any aligned place and to its very end") {
  std::mt19937 random(1);
  const std::size_t file_size = 40 * page + 123;
  for (const auto& folder : folders()) {
    const auto path = *folder / "bytes";
    write_file(path, file_size);
    const DirectFile file = DirectFile::open(path);
    CHECK(file.size() == file_size);
    CHECK(file.name() == display(path));
    CHECK((file.direct() ? file.alignment() >= page : file.alignment() == 1));
    if (folder->path().string().rfind("/dev/shm", 0) == 0) CHECK(!file.direct());
    for (const ReadQueueKind kind : kinds()) {
      for (const int depth : {1, 3, 64}) {
        Results results;
        const auto queue = make_read_queue(kind, depth, results.taker());
        CHECK(queue->kind() == (kind == ReadQueueKind::threads ? "threads" : "io_uring"));
        struct Wanted {
          std::uint64_t offset;
          std::size_t size, needed;
          Buffer buffer;
        };
        std::vector<std::unique_ptr<Wanted>> wanted;
        std::vector<ReadRequest> requests;
        for (int i = 0; i < 60; ++i) {
          const std::size_t begin = i == 0 ? 40 : random() % 41, pages = i == 0 ? 1 : 1 + random() % (41 - begin);
          const std::uint64_t offset = begin * page;
          const std::size_t size = pages * page, there = std::min<std::size_t>(size, file_size - offset);
          const std::size_t needed = i < 10 ? there : random() % (there + 1);
          wanted.push_back(std::make_unique<Wanted>(Wanted{offset, size, needed, Buffer(size)}));
          requests.push_back({&file, offset, size, needed, wanted.back()->buffer.data(), wanted.back().get()});
        }
        queue->submit(std::span(requests).first(25));
        queue->submit({});
        queue->submit(std::span(requests).subspan(25));
        std::set<void*> answered;
        for (const ReadResult& result : results.wait_for(requests.size())) {
          CHECK(result.error == 0);
          CHECK(answered.insert(result.owner).second);
        }
        CHECK(answered.size() == requests.size());
        for (const auto& w : wanted) CHECK(w->buffer.holds(w->offset, w->needed));
      }
    }
  }
}

TEST_CASE("read queue: one at a time, requests are answered in order") {
  const test::TempFolder folder;
  write_file(folder / "bytes", 64 * page);
  const DirectFile file = DirectFile::open(folder / "bytes");
  for (const ReadQueueKind kind : kinds()) {
    Results results;
    const auto queue = make_read_queue(kind, 1, results.taker());
    const Buffer buffer(page);
    std::vector<int> owners(64);
    std::vector<ReadRequest> requests;
    for (std::size_t i = 0; i < owners.size(); ++i)
      requests.push_back({&file, (i * 37 % 64) * page, page, page, buffer.data(), &owners[i]});
    queue->submit(requests);
    const auto all = results.wait_for(owners.size());
    for (std::size_t i = 0; i < owners.size(); ++i) CHECK(all[i].owner == &owners[i]);
  }
}

TEST_CASE("read queue: a file that ends early, by truncation or at once") {
  for (const auto& folder : folders()) {
    for (const ReadQueueKind kind : kinds()) {
      const auto path = folder->fresh() / "bytes";
      write_file(path, 8 * page);
      const DirectFile file = DirectFile::open(path);
      Results results;
      const auto queue = make_read_queue(kind, 4, results.taker());
      const Buffer buffer(8 * page);
      CHECK(read_one(*queue, results, file, 0, 8 * page, 8 * page, buffer) == 0);
      CHECK(read_one(*queue, results, file, 8 * page, page, 1, buffer) == -1);
      CHECK(read_one(*queue, results, file, 7 * page, 2 * page, page + 1, buffer) == -1);
#if !defined(_WIN32)  // it lets nobody truncate a file that is open
      std::filesystem::resize_file(path, 3 * page + 100);
      CHECK(read_one(*queue, results, file, 0, 8 * page, 8 * page, buffer) == -1);
      CHECK(read_one(*queue, results, file, 3 * page, page, 101, buffer) == -1);
      const Buffer good(4 * page);
      CHECK(read_one(*queue, results, file, 0, 4 * page, 3 * page + 100, good) == 0);
      CHECK(good.holds(0, 3 * page + 100));
#endif
    }
  }
}

TEST_CASE("read queue: many threads submit, some of which end before their reads do") {
  const test::TempFolder folder;
  constexpr int threads = 6, each = 100;
  write_file(folder / "bytes", 256 * page);
  const DirectFile file = DirectFile::open(folder / "bytes");
  for (const ReadQueueKind kind : kinds()) {
    struct Wanted {
      std::uint64_t offset = 0;
      std::unique_ptr<Buffer> buffer;
      std::atomic<int> answers{0};
    };
    std::vector<Wanted> wanted(threads * each);
    std::atomic<int> errors{0};
    {
      const auto queue = make_read_queue(kind, 8, [&](std::span<const ReadResult> results) {
        for (const ReadResult& result : results) {
          static_cast<Wanted*>(result.owner)->answers++;
          errors += result.error != 0 && result.error != ECANCELED;
        }
      });
      std::vector<std::thread> callers;
      for (int t = 0; t < threads; ++t) {
        callers.emplace_back([&, t] {
          std::mt19937 random(static_cast<unsigned>(t));
          std::vector<ReadRequest> batch;
          for (int i = 0; i < each; ++i) {
            Wanted& w = wanted[static_cast<std::size_t>(t * each + i)];
            w.offset = random() % 250 * page;
            w.buffer = std::make_unique<Buffer>(4 * page);
            batch.push_back({&file, w.offset, 4 * page, 4 * page, w.buffer->data(), &w});
            if (random() % 4 == 0 || i + 1 == each) queue->submit(batch), batch.clear();
          }
        });
      }
      for (std::thread& caller : callers) caller.join();
      if (kind == ReadQueueKind::threads) {  // the other kind is destroyed with reads in flight
        for (const Wanted& w : wanted) {
          while (w.answers == 0) std::this_thread::yield();
          CHECK(w.buffer->holds(w.offset, 4 * page));
        }
      }
    }
    CHECK(errors == 0);
    for (const Wanted& w : wanted) CHECK(w.answers == 1);
  }
}

TEST_CASE("read queue: destroyed with reads in flight, each request is still answered once") {
  const test::TempFolder folder;
  write_file(folder / "bytes", 64 * page);
  const DirectFile file = DirectFile::open(folder / "bytes");
  for (const ReadQueueKind kind : kinds()) {
    for (const int n : {0, 1, 40, 500}) {
      Results results;
      std::vector<Buffer> owners;
      for (int i = 0; i < n; ++i) owners.emplace_back(8 * page);
      {
        const auto queue = make_read_queue(kind, 4, results.taker());
        std::vector<ReadRequest> requests;
        for (Buffer& owner : owners) requests.push_back({&file, 0, 8 * page, 8 * page, owner.data(), &owner});
        queue->submit(requests);
      }
      std::set<void*> answered;
      for (const ReadResult& result : results.now()) {
        CHECK((result.error == 0 || result.error == ECANCELED));
        if (result.error == 0) CHECK(static_cast<Buffer*>(result.owner)->holds(0, 8 * page));
        CHECK(answered.insert(result.owner).second);
      }
      CHECK(answered.size() == owners.size());
    }
  }
}

TEST_CASE("read queue: results may submit more") {
  const test::TempFolder folder;
  write_file(folder / "bytes", 16 * page);
  const DirectFile file = DirectFile::open(folder / "bytes");
  const Buffer buffer(page);
  for (const ReadQueueKind kind : kinds()) {
    std::atomic<int> left{200};
    std::unique_ptr<ReadQueue> queue;
    const auto next = [&] {
      const ReadRequest request{&file, page, page, page, buffer.data(), nullptr};
      queue->submit({&request, 1});
    };
    queue = make_read_queue(kind, 2, [&](std::span<const ReadResult> results) {
      for (std::size_t i = 0; i < results.size(); ++i) {
        if (--left > 0) next();
        left.notify_all();
      }
    });
    next();
    for (int now = left; now > 0; now = left) left.wait(now);
    CHECK(left == 0);
  }
}

TEST_CASE("a read under way: whatever portions come, requests stay aligned and the bytes are right") {
  std::mt19937 random(7);
  const test::TempFolder folder;
  const std::size_t file_size = 16 * page + 1234;
  write_file(folder / "bytes", file_size);
  const DirectFile file = DirectFile::open(folder / "bytes");
  for (int round = 0; round < 300; ++round) {
    const std::size_t begin = random() % 17, pages = 1 + random() % (17 - begin), size = pages * page;
    const std::uint64_t offset = begin * page;
    const bool too_much = round % 5 == 0;  // needed: more than there is
    const std::size_t there = std::min<std::size_t>(size, file_size - offset);
    const std::size_t needed = too_much ? there + 1 : random() % (there + 1);
    if (needed > size) continue;
    const Buffer buffer(size);
    detail::ReadUnderWay read({&file, offset, size, needed, buffer.data(), nullptr});
    std::int64_t answer = 0;
    int calls = 0;
    do {
      REQUIRE(++calls < 100000);
      CHECK(read.offset() % file.alignment() == 0);
      CHECK(read.size() % file.alignment() == 0);
      CHECK(read.into() == buffer.data() + (read.offset() - offset));
      CHECK(read.offset() + read.size() == offset + size);
      if (random() % 3 == 0) {
        answer = random() % 2 == 0 ? -EINTR : -EAGAIN;
        continue;
      }
      // A device that gives at least a block unless the file ends.
      const auto rest = static_cast<std::size_t>(file_size > read.offset() ? file_size - read.offset() : 0);
      const std::size_t most = std::min(read.size(), rest);
      const std::size_t least = std::min(most, file.alignment());
      const std::size_t got = least + (most > least ? random() % (most - least + 1) : 0);
      for (std::size_t i = 0; i < got; ++i) read.into()[i] = byte_at(read.offset() + i);
      answer = static_cast<std::int64_t>(got);
    } while (!read.take(answer));
    CHECK(read.result().error == (too_much ? -1 : 0));
    if (!too_much) CHECK(buffer.holds(offset, needed));
  }
}

TEST_CASE("threads that read: faults of the system reach the owner, and passing ones do not") {
  const test::TempFolder folder;
  write_file(folder / "bytes", 8 * page);
  const DirectFile file = DirectFile::open(folder / "bytes");
  const Buffer buffer(8 * page);
  Results results;
  const auto with = [&](const ThreadReadQueue::ReadAt& read_at) {
    ThreadReadQueue queue(2, results.taker(), read_at);
    return read_one(queue, results, file, 0, 8 * page, 8 * page, buffer);
  };
  SUBCASE("interrupted, then a page at a time") {
    std::atomic<int> calls{0};
    CHECK(with([&](const DirectFile& f, std::byte* into, std::size_t, std::uint64_t offset) -> std::int64_t {
            const int call = calls++;
            return call % 3 == 0 ? -EINTR : call % 3 == 1 ? -EAGAIN : f.read_at(into, page, offset);
          }) == 0);
    CHECK(buffer.holds(0, 8 * page));
    CHECK(calls == 24);
  }
  SUBCASE("the disk fails") {
    CHECK(with([](const DirectFile&, std::byte*, std::size_t, std::uint64_t) -> std::int64_t { return -EIO; }) == EIO);
  }
  SUBCASE("the disk fails half way") {
    CHECK(with([](const DirectFile& f, std::byte* into, std::size_t, std::uint64_t offset) -> std::int64_t {
            return offset < 4 * page ? f.read_at(into, 4 * page, offset) : -EIO;
          }) == EIO);
  }
  SUBCASE("nothing but refusals comes to an end") {
    CHECK(with([](const DirectFile&, std::byte*, std::size_t, std::uint64_t) -> std::int64_t { return -EAGAIN; }) ==
          EAGAIN);
  }
  SUBCASE("a good read after a bad one") {
    std::atomic<int> calls{0};
    ThreadReadQueue queue(1, results.taker(),
                          [&](const DirectFile& f, std::byte* into, std::size_t size, std::uint64_t offset) {
                            return calls++ == 0 ? -EIO : f.read_at(into, size, offset);
                          });
    CHECK(read_one(queue, results, file, 0, 8 * page, 8 * page, buffer) == EIO);
    CHECK(read_one(queue, results, file, 0, 8 * page, 8 * page, buffer) == 0);
    CHECK(buffer.holds(0, 8 * page));
  }
}

TEST_CASE("threads that read: as many at once as asked for, and no more") {
  const test::TempFolder folder;
  write_file(folder / "bytes", page);
  const DirectFile file = DirectFile::open(folder / "bytes");
  const Buffer buffer(page);
  std::mutex mutex;
  std::condition_variable changed;
  int now = 0, most = 0;
  Results results;
  {
    ThreadReadQueue queue(5, results.taker(),
                          [&](const DirectFile&, std::byte*, std::size_t size, std::uint64_t) -> std::int64_t {
                            std::unique_lock lock(mutex);
                            most = std::max(most, ++now);
                            changed.notify_all();
                            // All five must come together once, or this waits in vain.
                            CHECK(changed.wait_for(lock, std::chrono::minutes(1), [&] { return most == 5; }));
                            --now;
                            return static_cast<std::int64_t>(size);
                          });
    const std::vector<ReadRequest> requests(50, {&file, 0, page, page, buffer.data(), nullptr});
    queue.submit(requests);
    results.wait_for(50);
  }
  CHECK(most == 5);
}

TEST_CASE("read queue: impossible depths") {
  for (const int depth : {-1, 0, 1025}) {
    CHECK_THROWS_WITH_AS(make_read_queue(ReadQueueKind::best, depth, {}), Contains("expected 1 to 1024"), Error);
  }
}

#if defined(QWEN3NEXT_IO_URING)

namespace {
std::atomic<int> refusals;
int refuse_some(::io_uring* ring) { return refusals-- > 0 ? -EAGAIN : ::io_uring_submit(ring); }
int refuse_all(::io_uring*) { return -ENOMEM; }
}  // namespace

TEST_CASE("io_uring: a kernel that has no room now is asked again, one that never has is given up") {
  if (kinds().size() < 2) return;
  const test::TempFolder folder;
  write_file(folder / "bytes", 8 * page);
  const DirectFile file = DirectFile::open(folder / "bytes");
  const Buffer buffer(8 * page);
  Results results;
  {
    refusals = 20;
    UringReadQueue queue(2, results.taker(), refuse_some);
    CHECK(read_one(queue, results, file, 0, 8 * page, 8 * page, buffer) == 0);
    CHECK(buffer.holds(0, 8 * page));
    CHECK(refusals < 0);
  }
  {
    UringReadQueue queue(2, results.taker(), refuse_all);
    const std::vector<ReadRequest> requests(9, {&file, 0, page, page, buffer.data(), nullptr});
    queue.submit(requests);
    const auto all = results.wait_for(10);
    for (std::size_t i = 1; i < 10; ++i) CHECK(all[i].error == ENOMEM);
    CHECK(read_one(queue, results, file, 0, page, page, buffer) == ENOMEM);  // and at once
  }
}

TEST_CASE("io_uring: where it is forbidden, threads read; asked for by name, the reason is given") {
  std::string best, error;
  bool forbidden = false;
  std::thread([&] {  // the filter holds for this thread and those that it makes
    ::sock_filter filter[] = {
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, 0},  // the number of the call
        {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, SYS_io_uring_setup},
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | EPERM},
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
    };
    const ::sock_fprog program{4, filter};
    forbidden =
        ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
    best = make_read_queue(ReadQueueKind::best, 4, [](std::span<const ReadResult>) {})->kind();
    try {
      make_read_queue(ReadQueueKind::io_uring, 4, [](std::span<const ReadResult>) {});
    } catch (const Error& e) {
      error = e.what();
    }
  })
      .join();
  if (!forbidden) return;
  CHECK(best == "threads");
  CHECK(has(error, "io_uring cannot be used"));
  CHECK(has(error, "Operation not permitted"));
}

#else

TEST_CASE("io_uring: asked for in a build without it") {
  CHECK_THROWS_WITH_AS(make_read_queue(ReadQueueKind::io_uring, 4, {}), Contains("liburing-dev"), Error);
}

#endif

TEST_CASE("messages of reads that fail") {
  const test::TempFolder folder;
  write_file(folder / "bytes", 100);
  const DirectFile file = DirectFile::open(folder / "bytes");
  CHECK(read_error(file, 8192, 4096, EIO) ==
        display(folder / "bytes") + ": cannot read 4096 bytes at 8192: " + std::generic_category().message(EIO) +
            "; the disk or its connection fails: see the system's log, then copy the file elsewhere");
  CHECK(has(read_error(file, 0, 4096, -1), "ends before that (100 bytes when it was opened)"));
  CHECK(has(read_error(file, 0, 4096, ENOMEM), std::generic_category().message(ENOMEM)));
}

TEST_CASE("a direct file is the one that was mapped") {
  const test::TempFolder folder;
  CHECK_THROWS_WITH_AS(DirectFile::open(folder / "none"), Contains("no such file"), Error);
  CHECK_THROWS_WITH_AS(DirectFile::open(folder.path()), Contains("is a folder"), Error);
  const auto path = folder / "bytes";
  write_file(path, 3 * page);
  const MappedFile mapped = MappedFile::open(path);
  CHECK(DirectFile::open(mapped).size() == 3 * page);
#if QWEN3NEXT_MMAP
  // Some kernels' io_uring gives EAGAIN for such a file where it would have to wait.
  CHECK((::fcntl(DirectFile::open(mapped).descriptor(), F_GETFL) & O_NONBLOCK) == 0);
  // Windows lets nobody change a file that is mapped, and a copy does not know.
  SUBCASE("truncated") {
    std::filesystem::resize_file(path, page);
    CHECK_THROWS_WITH_AS(DirectFile::open(mapped), Contains("12288 bytes when it was opened, 4096 now"), Error);
  }
  SUBCASE("written to") {
    std::filesystem::last_write_time(path, std::filesystem::last_write_time(path) + std::chrono::seconds(1));
    CHECK_THROWS_WITH_AS(DirectFile::open(mapped), Contains("was changed"), Error);
  }
  SUBCASE("replaced") {
    write_file(folder / "other", 3 * page);
    std::filesystem::rename(folder / "other", path);
    CHECK_THROWS_WITH_AS(DirectFile::open(mapped), Contains("was replaced"), Error);
  }
  SUBCASE("deleted") {
    std::filesystem::remove(path);
    CHECK_THROWS_WITH_AS(DirectFile::open(mapped), Contains("no such file"), Error);
  }
#endif
}

TEST_CASE("a direct file keeps its file when it is moved") {
  const test::TempFolder folder;
  write_file(folder / "a", page);
  write_file(folder / "b", 2 * page);
  DirectFile file = DirectFile::open(folder / "a");
  DirectFile other = std::move(file);
  file = DirectFile::open(folder / "b");
  const Buffer buffer(page);
  CHECK(other.read_at(buffer.data(), page, page) == 0);
  CHECK(file.read_at(buffer.data(), page, page) == static_cast<std::int64_t>(page));
  CHECK(buffer.data()[0] == byte_at(page));
}
