// The threads that share out operations, and how many of them there are.

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "backends/cpu/parallel.hpp"
#include "core/available_processors.hpp"
#include "tests/support/temp_folder.hpp"

using namespace qwen3next;
using test::write_file;

TEST_CASE("every share of every job is done once, however many threads") {
  for (const int threads : {1, 2, 3, 8, 64}) {
    CAPTURE(threads);
    const cpu::Team team(threads);
    REQUIRE(team.size() == threads);
    std::vector<int> done(static_cast<std::size_t>(threads));  // not atomic: run() orders what shares write
    constexpr int jobs = 500;
    for (int job = 0; job < jobs; ++job) {
      team.run(cpu::Team::worth_sharing, [&](int share, int shares) {
        if (shares == threads) ++done[static_cast<std::size_t>(share)];
      });
      for (const int n : done) REQUIRE(n == job + 1);
    }
  }
}

TEST_CASE("a team works after it slept, and may be given up asleep") {
  const cpu::Team team(4);
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(i % 2 ? 1 : 0));
    std::atomic<int> sum{0};
    team.run(cpu::Team::worth_sharing, [&](int share, int) { sum += share; });
    CHECK(sum == 6);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

TEST_CASE("threads that use one team at a time do not wait for each other") {
  const cpu::Team team(3);
  std::vector<std::thread> callers;
  std::vector<long> sums(4);
  for (std::size_t c = 0; c < sums.size(); ++c) {
    callers.emplace_back([&, c, mine = team] {
      std::vector<long> parts(100);
      for (int job = 0; job < 300; ++job) {
        mine.each(100, cpu::Team::worth_sharing, [&](int i, int) { parts[static_cast<std::size_t>(i)] += i; });
        mine.split(100, cpu::Team::worth_sharing, [&](int begin, int end) {
          for (int i = begin; i < end; ++i) ++parts[static_cast<std::size_t>(i)];
        });
      }
      for (const long part : parts) sums[c] += part;
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const long sum : sums) CHECK(sum == 300 * (4950 + 100));
}

TEST_CASE("a job in a job is done") {
  const cpu::Team team(2);
  std::atomic<int> inner{0};
  team.run(cpu::Team::worth_sharing, [&](int, int) { team.run(cpu::Team::worth_sharing, [&](int, int) { ++inner; }); });
  CHECK(inner == 4);
}

TEST_CASE("quotas of control groups") {
  const test::TempFolder folder;
  const std::filesystem::path root = folder.path();
  const auto proc = root / "proc/self", fs = root / "sys/fs/cgroup";
  CHECK(!cgroup_quota(root));  // no such system

  SUBCASE("version 2: the least of a group and those above it") {
    write_file(proc / "cgroup", "0::/a/b\n");
    write_file(proc / "mountinfo",
               "25 1 0:22 / /proc rw - proc proc rw\n30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    CHECK(!cgroup_quota(root));
    write_file(fs / "a/b/cpu.max", "max 100000\n");
    CHECK(!cgroup_quota(root));
    write_file(fs / "a/b/cpu.max", "350000 100000\n");
    CHECK(cgroup_quota(root) == 3.5);
    write_file(fs / "a/cpu.max", "100000 50000\n");
    CHECK(cgroup_quota(root) == 2);
  }
  SUBCASE("version 2 in a container: the group is the root") {
    write_file(proc / "cgroup", "0::/\n");
    write_file(proc / "mountinfo", "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
    write_file(fs / "cpu.max", "150000 100000\n");
    CHECK(cgroup_quota(root) == 1.5);
  }
  SUBCASE("version 1: the path is the host's, the mount shows its end") {
    write_file(proc / "cgroup", "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x/y\n0::/ignored\n");
    write_file(proc / "mountinfo",
               "31 23 0:27 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
               "32 23 0:28 /docker/x /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n");
    write_file(fs / "memory/cpu.cfs_quota_us", "1\n");
    write_file(fs / "cpu,cpuacct/cpu.cfs_quota_us", "400000\n");
    write_file(fs / "cpu,cpuacct/cpu.cfs_period_us", "100000\n");
    CHECK(cgroup_quota(root) == 4);
    write_file(fs / "cpu,cpuacct/y/cpu.cfs_quota_us", "-1\n");
    write_file(fs / "cpu,cpuacct/y/cpu.cfs_period_us", "100000\n");
    CHECK(cgroup_quota(root) == 4);
    write_file(fs / "cpu,cpuacct/y/cpu.cfs_quota_us", "50000\n");
    CHECK(cgroup_quota(root) == 0.5);
  }
  SUBCASE("nonsense is no quota") {
    write_file(proc / "cgroup", "0\n:::\n0::/../../x\n\xff\n");
    write_file(proc / "mountinfo", "- \n30 - cgroup2\n30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    for (const char* text : {"", "x y\n", "0 100000\n", "100000 0\n", "-5 100000\n", "nan 1\n", "100000\n"}) {
      write_file(fs / "cpu.max", text);
      CHECK(!cgroup_quota(root));
    }
  }
}

TEST_CASE("there is a processor to use") {
  CHECK(available_processors() >= 1);
  CHECK(available_processors() <= static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
}
