// Operations of the CPU backend at the shapes of the 80B model.
//
//   ops [--benchmark_filter=REGEX]        names: operation/type/.../threads
//
// Decode reads its weights from memory (each buffer is far larger than the last-level cache): compare bytes_per_second
// with read_bandwidth.  Prefill is bound by arithmetic: `ops` counts a multiply-add as two.

#include <benchmark/benchmark.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "blocks/codec.hpp"

namespace {

using namespace qwen3next;
using benchmark::Counter;
using benchmark::State;

CpuBackend make_backend(int threads, KvType kv = KvType::f16) {
  CpuOptions options = resolve_cpu_options("", threads);
  options.kv = kv;
  return CpuBackend(options);
}

// `bytes` of valid blocks, many times the cache; kept between benchmarks.
const std::byte* weights(DType type, std::size_t bytes) {
  static std::vector<std::byte> memory;
  static DType held = DType::f32;
  if (memory.size() >= bytes && held == type) return memory.data();
  held = type;
  memory = std::vector<std::byte>();
  memory.resize(bytes);
  const DTypeInfo& i = info(type);
  std::vector<std::byte> pattern(static_cast<std::size_t>(i.bytes) * 1024);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(static_cast<std::size_t>(i.elements) * 1024);
  for (float& v : values) v = normal(random);
  quantize_row(type, values.data(), pattern.data(), static_cast<std::int64_t>(values.size()));
  for (std::size_t at = 0; at < bytes; at += pattern.size())
    std::memcpy(&memory[at], pattern.data(), std::min(pattern.size(), bytes - at));
  return memory.data();
}

HostTensor random_tensor(CpuBackend& be, int rows, int cols) {
  HostTensor t = be.tensor(rows, cols);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int r = 0; r < rows; ++r) {
    for (float& x : t[r]) x = normal(random);
  }
  return t;
}

constexpr std::size_t large = std::size_t{1} << 29;  // 16 times a 32 MiB cache

void read_bandwidth(State& state) {
  const std::byte* data = weights(DType::q8_0, large);
  const cpu::Team team(static_cast<int>(state.range(0)));
  std::atomic<std::uint64_t> sink{0};
  for (auto _ : state) {
    team.run(cpu::Team::worth_sharing, [&](int thread, int threads) {
      const std::size_t part = large / static_cast<std::size_t>(threads) / 512 * 512;
      const std::byte* p = data + part * static_cast<std::size_t>(thread);
      std::uint64_t sum[64] = {};
      for (std::size_t i = 0; i < part; i += 512) {
        std::uint64_t words[64];
        std::memcpy(words, p + i, 512);
        for (int j = 0; j < 64; ++j) sum[j] ^= words[j];
      }
      std::uint64_t total = 0;
      for (std::uint64_t s : sum) total ^= s;
      sink ^= total;
    });
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * large));
}

// T tokens times a [rows, cols] matrix, a different one each time until `large` bytes are read.
void linear(State& state, DType type, int T, int rows, int cols, std::size_t footprint) {
  CpuBackend be = make_backend(static_cast<int>(state.range(0)));
  const WeightView one = WeightView::contiguous(nullptr, type, rows, cols);
  const std::size_t copies = std::max<std::size_t>(1, footprint / one.bytes());
  const std::byte* data = weights(type, copies * one.bytes());
  HostTensor x = random_tensor(be, T, cols), y = be.tensor(T, rows);
  std::size_t next = 0;
  for (auto _ : state) {
    const WeightView w = WeightView::contiguous(data + next * one.bytes(), type, rows, cols);
    be.linear(x, {{w, y}});
    next = (next + 1) % copies;
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * one.bytes()));
  state.counters["ops"] = Counter(2.0 * T * rows * cols, Counter::kIsIterationInvariantRate);
}

void experts(State& state, DType type, int T) {
  CpuBackend be = make_backend(static_cast<int>(state.range(0)));
  const int D = 2048, width = 512, E = 512, k = 10;
  const std::size_t bytes = static_cast<std::size_t>(width) * row_bytes(type, D);
  const std::byte* data = weights(type, bytes * 3 * E);
  ExpertViews views;
  for (int e = 0; e < E; ++e) {
    const std::byte* p = data + static_cast<std::size_t>(e) * 3 * bytes;
    views.push_back({WeightView::contiguous(p, type, width, D), WeightView::contiguous(p + bytes, type, width, D),
                     WeightView::contiguous(p + 2 * bytes, type, D, width)});
  }
  HostTensor x = random_tensor(be, T, D), out = be.tensor(T, D);
  HostRouting routing = be.routing(T, k);
  routing.rows = T;
  std::mt19937 random(3);
  std::size_t read = 0;
  for (auto _ : state) {
    state.PauseTiming();
    std::vector<bool> used(static_cast<std::size_t>(E));
    for (std::size_t i = 0; i < routing.ids.size(); ++i) {
      routing.ids[i] = static_cast<std::int32_t>(random() % static_cast<unsigned>(E));
      routing.weights[i] = 0.1f;
      if (!used[static_cast<std::size_t>(routing.ids[i])]) read += 3 * bytes;
      used[static_cast<std::size_t>(routing.ids[i])] = true;
    }
    state.ResumeTiming();
    be.experts(out, x, views, routing);
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(read));
  state.counters["ops"] = Counter(2.0 * T * k * 3 * D * width, Counter::kIsIterationInvariantRate);
}

// Bytes: the states, read and written.
void delta_rule(State& state, int T) {
  CpuBackend be = make_backend(static_cast<int>(state.range(0)));
  const DeltaShape s{16, 32, 128, 128, 4};
  std::vector<HostDeltaState> states(T == 1 ? 36 : 1, be.delta_state(s));
  HostTensor qkv = random_tensor(be, T, s.conv_dim()), out = be.tensor(T, 32 * 128);
  HostTensor beta = be.tensor(T, 32), g = be.tensor(T, 32);
  for (int t = 0; t < T; ++t) {
    for (float& x : beta[t]) x = 0.5f;
    for (float& x : g[t]) x = -0.1f;
  }
  std::size_t next = 0;
  for (auto _ : state) {
    const Segment<HostDeltaState> segment{0, T, 0, &states[next]};
    be.gated_delta_rule(out, qkv, beta, g, s, {&segment, 1});
    next = (next + 1) % states.size();
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(2 * state.iterations() * states[0].S.size()));
  state.counters["tokens"] = Counter(T, Counter::kIsIterationInvariantRate);
}

void conv(State& state, int T) {
  CpuBackend be = make_backend(static_cast<int>(state.range(0)));
  const DeltaShape s{16, 32, 128, 128, 4};
  HostDeltaState memory = be.delta_state(s);
  HostTensor x = random_tensor(be, T, s.conv_dim()), out = be.tensor(T, s.conv_dim());
  std::vector<float> taps(static_cast<std::size_t>(s.conv_dim()) * 4, 0.3f);
  const VectorView view{taps.data(), static_cast<int>(taps.size()), 4};
  const Segment<HostDeltaState> segment{0, T, 0, &memory};
  for (auto _ : state) be.causal_conv1d(out, x, view, {&segment, 1});
  state.counters["tokens"] = Counter(T, Counter::kIsIterationInvariantRate);
}

// T tokens of each of several sequences, after `depth` others or up to 1/64 more; bytes: what is cached.
void attention(State& state, KvType kv, int depth, int T, int sequences = 1) {
  CpuBackend be = make_backend(static_cast<int>(state.range(0)), kv);
  const AttentionShape s{16, 2, 256};
  const int rows = T * sequences;
  HostTensor q = random_tensor(be, rows, 16 * 256), k = random_tensor(be, rows, 512), out = be.tensor(rows, 16 * 256);
  std::vector<HostKvCache> past(static_cast<std::size_t>(sequences), be.kv_cache(s));
  const HostTensor old = random_tensor(be, 256, 512);
  for (HostKvCache& cache : past) {
    for (std::int64_t p = cache.extend(depth); p < depth; ++p) {
      for (int h = 0; h < 2; ++h) {
        be.kernels().store_kv(stored_type(kv), old.row(static_cast<int>(p * 7 % 256)) + h * 256, 256,
                              cache.key_row(p, h));
        be.kernels().store_kv(stored_type(kv), old.row(static_cast<int>(p * 11 % 256)) + h * 256, 256,
                              cache.value_row(p, h));
      }
    }
  }
  std::vector<HostKvCache> caches = past;
  std::vector<Segment<HostKvCache>> segments;
  for (int i = 0; i < sequences; ++i) segments.push_back({i * T, T, depth, &caches[static_cast<std::size_t>(i)]});
  for (auto _ : state) {
    if (caches[0].length() > depth + depth / 64) {
      state.PauseTiming();
      caches = past;
      state.ResumeTiming();
    }
    be.attention(out, q, k, k, s, segments);
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(
      state.iterations() * static_cast<std::size_t>(sequences * (depth + T) * 4) * past[0].row_bytes()));
  state.counters["tokens"] = Counter(rows, Counter::kIsIterationInvariantRate);
  state.counters["ops"] = Counter(4.0 * 16 * 256 * rows * (depth + (T + 1) / 2.0), Counter::kIsIterationInvariantRate);
}

template <class F>
void add(const std::string& name, F f) {
  auto* b = benchmark::RegisterBenchmark(name.c_str(), [f](State& state) { f(state); });
  b->ArgName("threads")->UseRealTime()->MeasureProcessCPUTime();
  const int all = resolve_cpu_options("", 0).threads;
  b->Arg(1);
  if (all > 1) b->Arg(all);
}

}  // namespace

int main(int argc, char** argv) {
  add("read_bandwidth", read_bandwidth);
  for (const DTypeInfo& i : dtype_table) {
    const DType type = i.type;
    const std::string name(i.name);
    add("linear_decode/" + name, [=](State& s) { linear(s, type, 1, 8192, 2048, large); });
    for (int T : {2, 4, 8})
      add("linear_batch" + std::to_string(T) + "/" + name, [=](State& s) { linear(s, type, T, 8192, 2048, large); });
    add("linear_prefill512/" + name, [=](State& s) { linear(s, type, 512, 2048, 2048, 1); });
    if (!i.quantised) continue;
    add("experts_decode/" + name, [=](State& s) { experts(s, type, 1); });
    add("experts_prefill512/" + name, [=](State& s) { experts(s, type, 512); });
  }
  for (int T : {1, 8, 512}) add("delta_rule/" + std::to_string(T), [=](State& s) { delta_rule(s, T); });
  for (int T : {1, 512}) add("causal_conv1d/" + std::to_string(T), [=](State& s) { conv(s, T); });
  for (KvType kv : {KvType::f16, KvType::q8_0}) {
    const std::string name = kv == KvType::f16 ? "F16" : "Q8_0";
    for (int depth : {32768, 131072})
      add("attention_decode/depth:" + std::to_string(depth) + "/" + name,
          [=](State& s) { attention(s, kv, depth, 1); });
    add("attention_batch8/depth:32768/" + name, [=](State& s) { attention(s, kv, 32768, 1, 8); });
    add("attention_prefill512/depth:0/" + name, [=](State& s) { attention(s, kv, 0, 512); });
    add("attention_prefill512/depth:32768/" + name, [=](State& s) { attention(s, kv, 32768, 512); });
    add("attention_prefill512/depth:131072/" + name, [=](State& s) { attention(s, kv, 131072, 512); });
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
