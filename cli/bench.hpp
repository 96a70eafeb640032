#pragma once
// What the parts of `bench` share: options, results, and the machine's limits.

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "backends/traced_backend.hpp"
#include "cli/common.hpp"

namespace qwen3next::cli {

struct BenchOptions {
  ModelOptions model;
  std::int64_t prefill = 512, decode = 128;
  std::vector<std::int64_t> depths{0};
  std::vector<std::int64_t> parallel;  // numbers of sequences
  int repeats = 3;
  int turns = 0;
  bool ops = false, mtp = false, json = false;
  double accept = -1;  // of the MTP head's guesses: forced to be right with this probability; -1: as they are
};

// What the machine can do at most, all processors together; with the cuda backend, what the GPU can.
struct Roofs {
  double bandwidth = 0;                        // bytes per second: read by processors, copied by a GPU
  double experts = 0;                          // bytes per second of streamed experts; 0: they are mapped
  double integer_macs = 0, floating_macs = 0;  // per second, with the kernels in use; 0: not measured

  // The least time that this work can take, in seconds.
  double seconds(const OpCost& c) const {
    return std::max(c.bytes() / bandwidth, c.integer_macs / integer_macs + c.floating_macs / floating_macs);
  }
};

inline double median(std::vector<double> s) {
  std::sort(s.begin(), s.end());
  const std::size_t middle = s.size() / 2;
  return s.size() % 2 ? s[middle] : (s[middle - 1] + s[middle]) / 2;
}

// One line of the table: tokens per second of all sequences together.
struct BenchResult {
  std::string kind;  // prefill, decode or parallel
  std::int64_t tokens, depth, sequences;
  std::vector<double> samples;  // tokens per second
  double bytes_per_token;
  double read_per_token = 0;  // bytes of streamed experts, mean of all runs
  double hit_rate = 0;        // likewise

  double median() const { return cli::median(samples); }
};

// Decoding with guesses of the MTP head beside decoding without, in turns.
struct MtpResult {
  int drafts;
  double accept;
  std::int64_t tokens, depth;
  std::vector<double> guessing{}, plain{};  // tokens per second
  double bytes = 0, plain_bytes = 0;        // moved for a token: what was guessed and checked, experts as picked
  MtpStatistics statistics{};

  double gain() const { return median(guessing) / median(plain); }
  // At the same bytes per second.
  double possible_gain() const { return plain_bytes / bytes; }
};

// The operations of `passes` forward passes, all together.
struct OpsResult {
  std::string kind;
  std::int64_t tokens, depth, sequences;
  int passes;
  double seconds;  // with what lies between the operations
  std::vector<Trace::Op> ops;
};

// What a turn of a conversation took until its first token could be chosen.
struct TurnResult {
  std::int64_t depth;  // of the history before the first turn
  int turn;            // from 1
  std::int64_t tokens, reused, known;
  double seconds, plain_seconds;  // and reading as many tokens by prefill() at that place; 0: not measured
};

// The same tokens every time.
class RandomTokens {
 public:
  explicit RandomTokens(const Config& c) : RandomTokens(c.vocab_size, 1) {}
  RandomTokens(int vocabulary, std::uint64_t seed)
      : random_(seed), vocabulary_(static_cast<std::uint64_t>(vocabulary)) {}
  std::vector<std::int32_t> operator()(std::int64_t n) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
    for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random_() % vocabulary_);
    return tokens;
  }

 private:
  std::mt19937_64 random_;
  std::uint64_t vocabulary_;
};

struct TracedResults {
  std::vector<BenchResult> parallel;
  std::vector<OpsResult> ops;
};

// What o.parallel and o.ops ask for, on a traced backend (bench_traced.cpp).
TracedResults run_traced(const Model& model, const BenchOptions& o, KvType kv);
// o.turns turns after a history of each depth: -p tokens asked, -n tokens answered (bench_turns.cpp); the context that
// they need.
std::vector<TurnResult> run_turns(const Model& model, const BenchOptions& o);
std::int64_t turns_context(const BenchOptions& o);
void print_turns(const std::vector<TurnResult>& results);
nlohmann::ordered_json turns_json(const std::vector<TurnResult>& results);
// What o.model.mtp and o.accept ask for (bench_mtp.cpp).
std::vector<MtpResult> run_mtp(const Model& model, const BenchOptions& o, KvType kv);
void print_mtp(const std::vector<MtpResult>& results);
nlohmann::ordered_json mtp_json(const std::vector<MtpResult>& results);
// The multiply-adds of the kernels that o names, on as many threads as it names.
void measure_peaks(Roofs& roofs, const BenchOptions& o);
// A GPU's bandwidth and, if asked for, its multiply-adds, of which integers are no others (traced_cuda.cpp).
Roofs cuda_roofs(bool products);

void print_operations(const std::vector<OpsResult>& results, const BenchOptions& o, const Roofs& roofs);
nlohmann::ordered_json operations_json(const std::vector<OpsResult>& results, const Roofs& roofs);

}  // namespace qwen3next::cli
