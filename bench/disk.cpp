// How fast a disk gives a file, by size and number of requests, around the system's cache.

#include <charconv>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/disk.hpp"
#include "core/message.hpp"

namespace {

using namespace qwen3next;
using Order = DiskPattern::Order;

constexpr std::string_view usage =
    "usage: bench_disk FILE [--sizes 4K,64K,1M] [--depths 1,8,64] [--queue io_uring|threads|best|both]\n"
    "                  [--order random|sequential|bursts|all] [--seconds S]\n"
    "\n"
    "Reads FILE around the system's cache and prints MB/s for requests of each size, so many of them at once.\n"
    "FILE should be much larger than what a disk itself keeps in memory.\n"
    "\n"
    "  --sizes    bytes of a request, multiples of 4K (default 4K,16K,64K,256K,1M,4M,16M)\n"
    "  --depths   requests under way at once (default 1,2,4,8,16,32,64); threads are at most 32\n"
    "  --queue    who reads (default both, where the kernel has io_uring)\n"
    "  --order    places that are read; bursts: at random, all of a depth submitted together and waited for, as a\n"
    "             layer needs its experts (default all)\n"
    "  --seconds  time for each number (default 0.5)\n";

struct Options {
  std::string file;
  std::vector<std::size_t> sizes{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20};
  std::vector<std::size_t> depths{1, 2, 4, 8, 16, 32, 64};
  std::vector<ReadQueueKind> queues;  // none: both where the kernel has both
  std::vector<Order> orders{Order::random, Order::sequential, Order::bursts};
  double seconds = 0.5;
};

std::size_t parse_size(std::string_view text) {
  std::size_t value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view unit(end, static_cast<std::size_t>(text.data() + text.size() - end));
  const int shift = unit.empty() ? 0 : unit == "K" ? 10 : unit == "M" ? 20 : -1;
  if (code != std::errc() || shift < 0 || value == 0 || value > (std::size_t{1} << 30) >> shift)
    throw_error("'", text, "': expected a number up to 1024M, as in 4096, 64K or 1M");
  return value << shift;
}

double parse_seconds(std::string_view text) {
  double value = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (code != std::errc() || end != text.data() + text.size() || !(value > 0) || value > 3600)
    throw_error("'", text, "': expected seconds, as in 0.5");
  return value;
}

std::vector<std::size_t> parse_list(std::string_view text) {
  std::vector<std::size_t> values;
  for (;;) {
    const std::size_t comma = text.find(',');
    values.push_back(parse_size(text.substr(0, comma)));
    if (comma == text.npos) return values;
    text.remove_prefix(comma + 1);
  }
}

template <class T>
T choose(std::string_view option, std::string_view word,
         std::initializer_list<std::pair<std::string_view, T>> choices) {
  std::string names;
  for (const auto& [name, value] : choices) {
    if (name == word) return value;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  throw_error(option, " is '", word, "', expected one of ", names);
}

// Nothing if help was asked for.
std::optional<Options> parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (word == "--help" || word == "-h") return {};
    if (word.substr(0, 1) != "-") {
      options.file = word;
      continue;
    }
    if (i + 1 == argc) throw_error(word, " wants a value; see --help");
    const std::string_view value = argv[++i];
    using enum ReadQueueKind;
    if (word == "--sizes")
      options.sizes = parse_list(value);
    else if (word == "--depths")
      options.depths = parse_list(value);
    else if (word == "--queue")
      options.queues = choose<std::vector<ReadQueueKind>>(
          word, value,
          {{"io_uring", {io_uring}}, {"threads", {threads}}, {"best", {best}}, {"both", {io_uring, threads}}});
    else if (word == "--order")
      options.orders = choose<std::vector<Order>>(word, value,
                                                  {{"random", {Order::random}},
                                                   {"sequential", {Order::sequential}},
                                                   {"bursts", {Order::bursts}},
                                                   {"all", {Order::random, Order::sequential, Order::bursts}}});
    else if (word == "--seconds")
      options.seconds = parse_seconds(value);
    else
      throw_error("unknown option ", word, "; see --help");
  }
  if (options.file.empty()) throw_error("no file; see --help");
  return options;
}

std::string_view name(Order order) {
  return order == Order::random ? "random" : order == Order::sequential ? "sequential" : "bursts";
}

std::string with_unit(std::size_t bytes) {
  if (bytes % (1 << 20) == 0) return concat(bytes >> 20, " MiB");
  if (bytes % (1 << 10) == 0) return concat(bytes >> 10, " KiB");
  return concat(bytes, " B");
}

void measure(const DirectFile& file, const Options& options, ReadQueueKind kind, Order order) {
  const std::string_view queue = make_read_queue(kind, 1, [](std::span<const ReadResult>) {})->kind();
  std::cout << '\n' << name(order) << " by " << queue << ", MB/s\n\n| request |";
  for (const std::size_t depth : options.depths) std::cout << " x" << depth << " |";
  std::cout << "\n|---|";
  for (std::size_t i = 0; i < options.depths.size(); ++i) std::cout << "---|";
  std::cout << '\n';
  std::uint64_t seed = 1;
  for (const std::size_t size : options.sizes) {
    std::cout << "| " << with_unit(size) << " |";
    for (const std::size_t depth : options.depths) {
      const DiskSpeed speed = measure_disk(file, kind, {size, static_cast<int>(depth), order}, options.seconds, ++seed);
      char text[32];
      std::snprintf(text, sizeof text, " %.0f |", speed.bytes_per_second / 1e6);
      std::cout << text << std::flush;
    }
    std::cout << '\n';
  }
}

void run(const Options& options) {
  const DirectFile file = DirectFile::open(std::filesystem::path(options.file));
  if (!file.direct()) std::cerr << "warning: " << file.name() << ": its file system has no reads around the cache\n";
  std::vector<ReadQueueKind> queues = options.queues;
  if (queues.empty()) {
    try {
      make_read_queue(ReadQueueKind::io_uring, 1, [](std::span<const ReadResult>) {});
      queues.push_back(ReadQueueKind::io_uring);
    } catch (const Error& e) {
      std::cerr << "warning: " << e.what() << '\n';
    }
    queues.push_back(ReadQueueKind::threads);
  }
  for (const ReadQueueKind kind : queues) {
    for (const Order order : options.orders) measure(file, options, kind, order);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::optional<Options> options = parse(argc, argv);
    if (options)
      run(*options);
    else
      std::cout << usage;
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
