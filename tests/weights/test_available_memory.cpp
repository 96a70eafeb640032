// What memory is left, by the system's own files, made up; and memory that is given back or kept.

#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <string>

#include "backends/aligned_bytes.hpp"
#include "core/available_memory.hpp"
#include "tests/support/temp_folder.hpp"

#if defined(__linux__)
#include <unistd.h>
#endif

using namespace qwen3next;
using test::write_file;

TEST_CASE("available memory") {
  const test::TempFolder folder;
  const std::filesystem::path root = folder.path();
  const auto proc = root / "proc", fs = root / "sys/fs/cgroup";
  const auto bytes = [&] { return available_memory(root).value().bytes; };
  const auto limit = [&] { return available_memory(root).value().limit; };
#if !defined(_WIN32)               // it has a way of its own
  CHECK(!available_memory(root));  // no such system
#endif
  write_file(proc / "meminfo",
             "MemTotal:       24000 kB\nMemFree:         100 kB\nMemAvailable:   20000 kB\nBuffers: 1 kB\n");
  CHECK(bytes() == 20000 * 1024);
  CHECK(limit() == "free memory");

  SUBCASE("version 2: the least of a group and those above it") {
    write_file(proc / "self/cgroup", "0::/a/b\n");
    write_file(proc / "self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    CHECK(limit() == "free memory");
    write_file(fs / "a/b/memory.max", "max\n");
    write_file(fs / "a/b/memory.current", "3000000\n");
    CHECK(limit() == "free memory");
    write_file(fs / "a/b/memory.max", "10000000\n");
    CHECK(bytes() == 7000000);
    CHECK(limit() == "control group limit");
    // Files that lie in the cache are given up, unless they are used or dirty.
    write_file(fs / "a/b/memory.stat",
               "anon 1\nfile 2500000\nactive_file 500000\ninactive_file 2000000\ninactive_file_x 7\n");
    CHECK(bytes() == 9000000);
    write_file(fs / "a/memory.max", "8000000\n");
    CHECK(bytes() == 9000000);  // a limit without use is no group
    write_file(fs / "a/memory.current", "5000000\n");
    CHECK(bytes() == 3000000);
    write_file(fs / "a/memory.high", "6000000\n");
    CHECK(bytes() == 1000000);
    write_file(fs / "a/memory.high", "4000000\n");
    CHECK(bytes() == 0);
    write_file(fs / "a/memory.high", "max\n");
    CHECK(bytes() == 3000000);
    write_file(proc / "meminfo", "MemAvailable: 2000 kB\n");
    CHECK(bytes() == 2000 * 1024);
    CHECK(limit() == "free memory");
  }
  SUBCASE("version 1, in a container beside other controllers") {
    write_file(proc / "self/cgroup", "12:memory:/docker/x/y\n4:cpu,cpuacct:/docker/x\n0::/\n");
    write_file(proc / "self/mountinfo",
               "31 23 0:27 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
               "32 23 0:28 /docker/x /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n");
    write_file(fs / "memory/memory.limit_in_bytes", "9223372036854771712\n");
    write_file(fs / "memory/memory.usage_in_bytes", "4000000\n");
    write_file(fs / "cpu,cpuacct/memory.limit_in_bytes", "1\n");
    write_file(fs / "cpu,cpuacct/memory.usage_in_bytes", "0\n");
    CHECK(limit() == "free memory");
    write_file(fs / "memory/memory.limit_in_bytes", "5000000\n");
    CHECK(bytes() == 1000000);
    write_file(fs / "memory/memory.stat", "inactive_file 1\ntotal_inactive_file 300000\n");
    CHECK(bytes() == 1300000);
    write_file(fs / "memory/y/memory.limit_in_bytes", "500000\n");
    write_file(fs / "memory/y/memory.usage_in_bytes", "100000\n");
    write_file(fs / "memory/y/memory.stat", "total_inactive_file 100000000\n");  // more than there is in use
    CHECK(bytes() == 500000);
    CHECK(limit() == "control group limit");
  }
  SUBCASE("nonsense is no limit") {
    write_file(proc / "self/cgroup", "0::/../x\n");
    write_file(proc / "self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    write_file(fs / "memory.current", "1\n");
    for (const char* text : {"", "-5\n", "x\n", "99999999999999999999999\n"}) {
      write_file(fs / "memory.max", text);
      CHECK(limit() == "free memory");
    }
    write_file(proc / "meminfo", "MemAvailable: 99999999999999999 kB\n");
    CHECK(bytes() == UINT64_MAX / 1024 * 1024);
#if !defined(_WIN32)
    write_file(proc / "meminfo", "MemAvailable:\nMemAvailable: x kB\n\n:\n");
    CHECK(!available_memory(root));
#endif
  }
}

#if defined(__linux__) || defined(_WIN32)
TEST_CASE("available memory of this machine") {
  const auto memory = available_memory();
  REQUIRE(memory);
  CHECK(memory->bytes > 10 << 20);
  CHECK(memory->bytes < std::uint64_t{1} << 50);
}
#endif

#if defined(__linux__)
namespace {

std::uint64_t resident_bytes() {
  std::ifstream in("/proc/self/statm");
  std::uint64_t all = 0, resident = 0;
  in >> all >> resident;
  return resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace

TEST_CASE("discarded memory goes back to the system, but for pages that are shared with what stays") {
  constexpr std::size_t size = std::size_t{64} << 20, begin = 5000, discarded = size - 10000;
  AlignedBytes bytes(size, AlignedBytes::Uncleared());
  std::memset(bytes.data(), 7, size);
  const std::uint64_t before = resident_bytes();
  bytes.discard(begin, discarded);
  CHECK(before - resident_bytes() > size * 9 / 10);
  std::size_t changed = 0;
  for (std::size_t i = 0; i < size; ++i) changed += i - begin >= discarded && bytes.data()[i] != std::byte{7};
  CHECK(changed == 0);
  std::memset(bytes.data(), 9, size);  // it can be written again
  CHECK(bytes.data()[size / 2] == std::byte{9});
  bytes.discard(100, 0);
  bytes.discard(4097, 4000);
  for (std::size_t i = 0; i < 3 * 4096; ++i) changed += bytes.data()[i] != std::byte{9};
  CHECK(changed == 0);
}
#endif

TEST_CASE("memory is locked, or not, and can be let go") {
  AlignedBytes bytes(std::size_t{1} << 16);
  const bool locked = bytes.lock();
  bytes.data()[0] = std::byte{1};
  AlignedBytes moved = std::move(bytes);
  CHECK(moved.lock() == locked);  // again
  const AlignedBytes copy = moved;
  CHECK(copy.data()[0] == std::byte{1});
  CHECK(!AlignedBytes().lock());
}
