// Attention and its caches on the card, against the reference.

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backends/cuda/attention.hpp"
#include "backends/cuda/device.hpp"
#include "backends/cuda/kv_cache.hpp"
#include "backends/cuda/launch_record.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/reference/reference_backend.hpp"
#include "blocks/codec.hpp"

using namespace qwen3next;
using cuda::CudaKvCache;
using cuda::CudaTensor;

namespace {

using Values = std::vector<float>;  // [rows, cols]

const std::shared_ptr<cuda::Device>& card() {
  static const auto device = cuda::Device::open();
  return device;
}

Values normals(std::size_t n, unsigned seed, float scale = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, scale);
  Values v(n);
  for (float& x : v) x = normal(engine);
  return v;
}

double nmse(const Values& found, const Values& expected) {
  double error = 0, power = 0;
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double e = expected[i], d = static_cast<double>(found[i]) - e;
    error += d * d, power += e * e;
  }
  return std::isfinite(error) ? error / std::max(power, 1e-30) : 1e30;
}

// The first place where two results differ, in words.
std::string difference(const Values& found, const Values& expected, std::size_t cols) {
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (std::memcmp(&found[i], &expected[i], 4) == 0) continue;
    return "row " + std::to_string(i / cols) + " column " + std::to_string(i % cols) + ": " + std::to_string(found[i]) +
           ", expected " + std::to_string(expected[i]) + ", difference " + std::to_string(found[i] - expected[i]);
  }
  return "";
}

// Activations on the card that live as long as this.
struct Memory {
  std::deque<cuda::DeviceBytes> memory;

  CudaTensor tensor(int rows, int cols) {
    const std::ptrdiff_t stride = (cols + 63) / 64 * 64;
    const std::size_t count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride);
    memory.emplace_back(card(), count * 6, "a test");
    card()->clear(memory.back().data(), memory.back().size());
    auto* data = memory.back().data<float>();
    return {data, reinterpret_cast<std::uint16_t*>(data + count), rows, cols, stride};
  }
  CudaTensor tensor(const Values& values, int cols) {
    const CudaTensor t = tensor(static_cast<int>(values.size()) / cols, cols);
    Values padded(static_cast<std::size_t>(t.n_rows) * static_cast<std::size_t>(t.stride));
    for (int r = 0; r < t.n_rows; ++r)
      std::copy_n(values.begin() + std::ptrdiff_t{r} * cols, cols, padded.begin() + r * t.stride);
    card()->copy_to_device(t.data, padded.data(), padded.size() * 4);
    return t;
  }
};
Values read(const CudaTensor& t) {
  Values padded(static_cast<std::size_t>(t.n_rows) * static_cast<std::size_t>(t.stride)), values;
  card()->copy_to_host(padded.data(), t.data, padded.size() * 4);
  for (int r = 0; r < t.n_rows; ++r)
    values.insert(values.end(), padded.begin() + r * t.stride, padded.begin() + r * t.stride + t.n_cols);
  return values;
}
Values read_half(const CudaTensor& t) {
  std::vector<std::uint16_t> padded(static_cast<std::size_t>(t.n_rows) * static_cast<std::size_t>(t.stride));
  card()->copy_to_host(padded.data(), t.half, padded.size() * 2);
  Values values;
  for (int r = 0; r < t.n_rows; ++r) {
    for (int i = 0; i < t.n_cols; ++i) values.push_back(f16_to_f32(padded[static_cast<std::size_t>(r * t.stride + i)]));
  }
  return values;
}

template <class Cache>
std::vector<std::byte> bytes_of(const Cache& cache) {
  std::vector<std::byte> all;
  cache.bytes([&](std::span<const std::byte> piece) { all.insert(all.end(), piece.begin(), piece.end()); });
  return all;
}

std::vector<double> frequencies(int pairs) {
  std::vector<double> f(static_cast<std::size_t>(pairs));
  for (int i = 0; i < pairs; ++i) f[static_cast<std::size_t>(i)] = std::pow(1e7, -double(i) / pairs);
  return f;
}

// One attention layer, on the card and in the reference.
struct Layer {
  AttentionShape shape;
  KvType type;
  int pairs;
  Values q_norm, k_norm;
  Memory memory;
  cuda::DeviceScratch scratch{card()};
  CudaTensor q_weight, k_weight;
  static constexpr float eps = 1e-6f;

  Layer(AttentionShape s, KvType t, int p) : shape(s), type(t), pairs(p) {
    q_norm = normals(static_cast<std::size_t>(s.head_dim), 1),
    k_norm = normals(static_cast<std::size_t>(s.head_dim), 2);
    for (float& x : q_norm) x = 1 + 0.3f * x;
    for (float& x : k_norm) x = 1 + 0.3f * x;
    q_weight = memory.tensor(q_norm, s.head_dim), k_weight = memory.tensor(k_norm, s.head_dim);
  }
  int q_cols() const { return shape.heads * shape.head_dim; }
  int kv_cols() const { return shape.kv_heads * shape.head_dim; }
  CudaKvCache cache() const { return CudaKvCache(card(), shape, type); }

  struct Inputs {
    Values q, gate, k, v;
    int rows;
  };
  Inputs inputs(int rows, unsigned seed) const {
    const auto n = static_cast<std::size_t>(rows);
    const auto Q = static_cast<std::size_t>(q_cols()), K = static_cast<std::size_t>(kv_cols());
    return {normals(n * Q, seed, 2), normals(n * Q, seed + 1), normals(n * K, seed + 2, 2), normals(n * K, seed + 3),
            rows};
  }
  static Inputs slice(const Inputs& in, int begin, int count) {
    const auto cut = [&](const Values& v) {
      const std::size_t cols = v.size() / static_cast<std::size_t>(in.rows);
      return Values(v.begin() + static_cast<std::ptrdiff_t>(cols) * begin,
                    v.begin() + static_cast<std::ptrdiff_t>(cols) * (begin + count));
    };
    return {cut(in.q), cut(in.gate), cut(in.k), cut(in.v), count};
  }

  Values run(const Inputs& in, std::span<const Segment<CudaKvCache>> segments, Values* half = nullptr) {
    Memory m;
    const CudaTensor q = m.tensor(in.q, q_cols()), gate = m.tensor(in.gate, q_cols());
    const CudaTensor k = m.tensor(in.k, kv_cols()), v = m.tensor(in.v, kv_cols()), out = m.tensor(in.rows, q_cols());
    const CudaTensor angles = m.tensor(in.rows, 2 * pairs);
    cuda::rope_angles(*card(), angles, frequencies(pairs), 1, segments);
    cuda::gated_attention(*card(), scratch, out, q, gate, k, v, q_weight.data, k_weight.data, eps, angles, shape,
                          segments);
    if (half) *half = read_half(out);
    return read(out);
  }
  Values run(const Inputs& in, CudaKvCache& cache) {
    const Segment<CudaKvCache> s{0, in.rows, cache.length(), &cache};
    return run(in, {&s, 1});
  }
  Values expected(Inputs in, std::span<const Segment<HostKvCache>> segments) const {
    ReferenceBackend be;
    const auto host = [&](Values& v, int cols) {
      return HostTensor{v.data(), static_cast<int>(v.size()) / cols, cols, cols};
    };
    Values out(in.q.size());
    HostTensor q = host(in.q, q_cols()), k = host(in.k, kv_cols()), o = host(out, q_cols());
    HostTensor angles = be.tensor(in.rows, 2 * pairs);
    be.rope_angles(angles, frequencies(pairs), 1, segments);
    be.rms_norm(q, q, VectorView{q_norm.data(), shape.head_dim, shape.head_dim}, eps);
    be.rms_norm(k, k, VectorView{k_norm.data(), shape.head_dim, shape.head_dim}, eps);
    be.rope(q, angles, shape.head_dim);
    be.rope(k, angles, shape.head_dim);
    be.attention(o, q, k, host(in.v, kv_cols()), shape, segments);
    be.sigmoid_gate(o, host(in.gate, q_cols()));
    return out;
  }
};

constexpr KvType types[] = {KvType::f32, KvType::f16, KvType::q8_0};
const char* name(KvType t) { return t == KvType::f32 ? "f32" : t == KvType::f16 ? "f16" : "q8_0"; }
constexpr double bound(KvType t) { return t == KvType::f32 ? 1e-10 : t == KvType::f16 ? 1e-6 : 3e-4; }

// Fills a cache with `depth` random rows: the keys and values of inputs(), as long as they are 4096.
void fill(Layer& layer, CudaKvCache& cache, int depth, unsigned seed) {
  Memory m;
  const int most = std::min(4096, depth);
  if (depth == 0) return;
  const std::size_t count = static_cast<std::size_t>(most) * static_cast<std::size_t>(layer.kv_cols());
  const CudaTensor k = m.tensor(normals(count, seed + 2, 2), layer.kv_cols());
  const CudaTensor v = m.tensor(normals(count, seed + 3), layer.kv_cols());
  for (int done = 0; done < depth; done += most) {
    const int n = std::min(most, depth - done);
    const Segment<CudaKvCache> s{0, n, cache.length(), &cache};
    cuda::append_kv(*card(), k.rows(0, n), v.rows(0, n), layer.shape, {&s, 1});
  }
}

// Passes of so many rows each of two sequences, against the reference.
void check_passes(AttentionShape shape, KvType type, int pairs, std::initializer_list<std::pair<int, int>> passes) {
  Layer layer(shape, type, pairs);
  CudaKvCache a = layer.cache(), b = layer.cache();
  HostKvCache host_a(shape, KvType::f32), host_b(shape, KvType::f32);
  unsigned seed = 10;
  for (const auto& [of_a, of_b] : passes) {
    const auto in = layer.inputs(of_a + of_b, seed += 10);
    const Segment<CudaKvCache> segments[] = {{0, of_a, a.length(), &a}, {of_a, of_b, b.length(), &b}};
    const Segment<HostKvCache> host[] = {{0, of_a, host_a.length(), &host_a}, {of_a, of_b, host_b.length(), &host_b}};
    Values half;
    const Values found = layer.run(in, segments, &half), expected = layer.expected(in, host);
    const double error = nmse(found, expected);
    std::printf("heads %d/%d of %d, %s: rows %d + %d at %d, %d: NMSE %.2e, of halves %.2e\n", shape.heads,
                shape.kv_heads, shape.head_dim, name(type), of_a, of_b, static_cast<int>(a.length()) - of_a,
                static_cast<int>(b.length()) - of_b, error, nmse(half, found));
    if (!(error <= bound(type))) {
      const auto cols = static_cast<std::size_t>(layer.q_cols());
      double worst = 0;
      std::size_t at = 0;
      for (std::size_t i = 0; i < found.size(); ++i) {
        const double d = std::fabs(found[i] - expected[i]);
        if (!(d <= worst)) worst = d, at = i;
      }
      std::printf("  worst: row %zu column %zu: %g, expected %g\n", at / cols, at % cols, found[at], expected[at]);
    }
    CHECK(error <= bound(type));
    CHECK(nmse(half, found) <= 1e-7);
  }
}

}  // namespace

TEST_SUITE("sanitizer") {
  TEST_CASE("attention: prefill, then a few rows, of two sequences") {
    for (const KvType type : types) check_passes({16, 2, 256}, type, 32, {{40, 3}, {1, 1}, {0, 5}, {9, 2}});
    check_passes({6, 3, 20}, KvType::f16, 5, {{3, 20}, {1, 1}});
  }
}

TEST_CASE("attention: all shapes and cache types, across blocks of the caches") {
  struct {
    AttentionShape shape;
    int pairs;
  } const shapes[] = {{{16, 2, 256}, 32}, {{4, 2, 64}, 8},  {{4, 2, 32}, 16},
                      {{6, 3, 20}, 5},    {{2, 1, 80}, 10}, {{8, 1, 256}, 0}};
  for (const auto& s : shapes) {
    for (const KvType type : types) {
      if (type == KvType::q8_0 && s.shape.head_dim % 32 != 0) continue;
      check_passes(s.shape, type, s.pairs, {{250, 20}, {1, 1}, {5, 0}, {8, 300}, {3, 9}, {1, 1}, {2, 130}});
    }
  }
}

TEST_CASE("attention: long prefill") {
  check_passes({16, 2, 256}, KvType::f16, 32, {{700, 0}, {300, 300}, {1, 1}});
  check_passes({16, 2, 256}, KvType::q8_0, 32, {{300, 0}, {130, 30}, {1, 1}});
}

TEST_CASE("attention: up to five rows at once are bit for bit single steps") {
  const auto check = [](AttentionShape shape, KvType type, int pairs, int depth, int rows) {
    CAPTURE(shape.head_dim);
    CAPTURE(depth);
    CAPTURE(rows);
    Layer layer(shape, type, pairs);
    CudaKvCache together = layer.cache();
    fill(layer, together, depth, 1000);
    CudaKvCache single = together, half = together;
    const auto in = layer.inputs(rows, 77);
    const Values found = layer.run(in, together);
    Values expected;
    for (int r = 0; r < rows; ++r) {
      const Values row = layer.run(Layer::slice(in, r, 1), single);
      expected.insert(expected.end(), row.begin(), row.end());
    }
    const std::string d = difference(found, expected, static_cast<std::size_t>(layer.q_cols()));
    if (!d.empty())
      std::printf("head dim %d, %s, depth %d, %d rows: %s\n", shape.head_dim, name(type), depth, rows, d.c_str());
    CHECK(d == "");
    CHECK(bytes_of(together) == bytes_of(single));
    CHECK(half.length() == depth);

    // Beside other sequences.
    CudaKvCache others[3] = {layer.cache(), layer.cache(), half};
    fill(layer, others[0], 300, 5);
    const auto wide = layer.inputs(rows + 13, 78);
    auto mixed = wide;
    const auto put = [&](Values& to, const Values& from) {
      const std::size_t cols = from.size() / static_cast<std::size_t>(rows);
      std::copy(from.begin(), from.end(), to.begin() + static_cast<std::ptrdiff_t>(11 * cols));
    };
    put(mixed.q, in.q), put(mixed.gate, in.gate), put(mixed.k, in.k), put(mixed.v, in.v);
    const Segment<CudaKvCache> segments[] = {
        {0, 2, 300, &others[0]}, {2, 9, 0, &others[1]}, {11, rows, depth, &others[2]}};
    const Values all = layer.run(mixed, segments);
    const auto cols = static_cast<std::ptrdiff_t>(layer.q_cols());
    CHECK(difference(Values(all.begin() + 11 * cols, all.begin() + (11 + rows) * cols), expected,
                     static_cast<std::size_t>(cols)) == "");
  };
  for (int depth = 0; depth <= 3; ++depth) {
    for (int rows = 2; rows <= 5; ++rows) check({16, 2, 256}, KvType::f16, 32, depth, rows);
  }
  for (int depth = 250; depth <= 260; ++depth) check({16, 2, 256}, KvType::f16, 32, depth, 5);
  // 4224: where an H200 goes over from leaves to groups.
  for (const int depth : {60, 1000, 4160, 4220, 4222, 5000, 20000}) check({16, 2, 256}, KvType::f16, 32, depth, 5);
  for (const int depth : {0, 62, 254, 1000, 4222}) {
    check({16, 2, 256}, KvType::q8_0, 32, depth, 5);
    check({16, 2, 256}, KvType::f32, 32, depth, 5);
    check({4, 2, 64}, KvType::f16, 8, depth, 5);
  }
}

TEST_CASE("attention: the plain operation is the gated one without norms, rotation and gate") {
  const AttentionShape shape{16, 2, 256};
  Layer layer(shape, KvType::f16, 0);
  for (const int rows : {3, 40}) {
    const auto in = layer.inputs(rows, 5);
    Memory m;
    const CudaTensor out = m.tensor(rows, layer.q_cols());
    CudaKvCache cache = layer.cache();
    fill(layer, cache, 30, 9);
    const Segment<CudaKvCache> s{0, rows, 30, &cache};
    cuda::attention(*card(), layer.scratch, out, m.tensor(in.q, layer.q_cols()), m.tensor(in.k, layer.kv_cols()),
                    m.tensor(in.v, layer.kv_cols()), shape, {&s, 1});
    ReferenceBackend be;
    HostKvCache host(shape, KvType::f32);
    auto past = layer.inputs(30, 9), now = in;
    const auto view = [](Values& v, int cols) {
      return HostTensor{v.data(), static_cast<int>(v.size()) / cols, cols, cols};
    };
    Segment<HostKvCache> h{0, 30, 0, &host};
    be.append_kv(view(past.k, layer.kv_cols()), view(past.v, layer.kv_cols()), shape, {&h, 1});
    h.count = rows;
    Values expected(in.q.size());
    be.attention(view(expected, layer.q_cols()), view(now.q, layer.q_cols()), view(now.k, layer.kv_cols()),
                 view(now.v, layer.kv_cols()), shape, {&h, 1});
    const double error = nmse(read(out), expected);
    std::printf("plain operation, %d rows: NMSE %.2e\n", rows, error);
    CHECK(error <= 3e-6);  // scores of such keys are large
  }
}

TEST_CASE("rope: angles are those of double precision, also far away") {
  Memory m;
  const auto f = frequencies(32);
  const Segment<CudaKvCache> segments[] = {{0, 3, 0, nullptr}, {3, 2, 1000000, nullptr}, {5, 4, 262143, nullptr}};
  const Segment<HostKvCache> host[] = {{0, 3, 0, nullptr}, {3, 2, 1000000, nullptr}, {5, 4, 262143, nullptr}};
  const CudaTensor angles = m.tensor(9, 64);
  cuda::rope_angles(*card(), angles, f, 1.25f, segments);
  ReferenceBackend be;
  const HostTensor expected = be.tensor(9, 64);
  be.rope_angles(expected, f, 1.25f, host);
  const Values a = read(angles), e(expected.data, expected.data + 9 * 64);
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, static_cast<double>(std::fabs(a[i] - e[i])));
  std::printf("rope angles: worst difference %.2e\n", worst);
  CHECK(worst <= 1.3e-7);

  Values x = normals(9 * 3 * 80, 3);
  const CudaTensor t = m.tensor(x, 240);
  cuda::rope(*card(), t, angles, 80);
  be.rope(HostTensor{x.data(), 9, 240, 240}, expected, 80);
  CHECK(nmse(read(t), x) <= 1e-12);
}

TEST_CASE("KV cache: its bytes are those of the host's cache, and come back") {
  for (const KvType type : types) {
    const AttentionShape shape{4, 2, 64};
    Layer layer(shape, type, 0);
    CudaKvCache cache = layer.cache();
    fill(layer, cache, 600, 4);
    HostKvCache host(shape, type);
    host.extend(600);
    const auto in = layer.inputs(600, 4);
    for (int p = 0; p < 600; ++p) {
      for (int h = 0; h < 2; ++h) {
        const std::ptrdiff_t at = (p * 2 + h) * 64;
        const DType stored = stored_type(type);
        if (type == KvType::f32) {
          std::memcpy(host.key_row(p, h), in.k.data() + at, 256);
          std::memcpy(host.value_row(p, h), in.v.data() + at, 256);
        } else {
          quantize_row(stored, in.k.data() + at, host.key_row(p, h), 64);
          quantize_row(stored, in.v.data() + at, host.value_row(p, h), 64);
        }
      }
    }
    const auto mine = bytes_of(cache), theirs = bytes_of(host);
    REQUIRE(mine.size() == theirs.size());
    std::size_t differing = 0;
    for (std::size_t i = 0; i < mine.size(); ++i) differing += mine[i] != theirs[i];
    std::printf("bytes of a cache, %s: %zu of %zu differ\n", name(type), differing, mine.size());
    CHECK(differing == 0);

    CudaKvCache again = layer.cache();
    again.from_host(host);
    CHECK(bytes_of(again) == theirs);
    CHECK(bytes_of(cache.to_host()) == theirs);
    CHECK(again.begins(cache));
    again.truncate(300);
    CHECK(again.begins(cache));
    CHECK_FALSE(cache.begins(again));
    fill(layer, again, 1, 123);
    CHECK_FALSE(again.begins(cache));
  }
}

TEST_CASE("KV cache: copies share blocks until one of them writes") {
  const AttentionShape shape{4, 2, 64};
  Layer layer(shape, KvType::f16, 0);
  CudaKvCache a = layer.cache();
  fill(layer, a, 300, 4);
  const auto before = bytes_of(a);
  CudaKvCache b = a;
  std::vector<SharedMemory> blocks;
  a.blocks(blocks);
  REQUIRE(blocks.size() == 2);
  CHECK(blocks[0].holders == 2);
  CHECK(blocks[0].bytes == a.block_bytes());

  fill(layer, b, 10, 5);
  CHECK(bytes_of(a) == before);
  blocks.clear();
  a.blocks(blocks);
  CHECK(blocks[0].holders == 2);
  CHECK(blocks[1].holders == 1);
  b.truncate(300);
  CHECK(bytes_of(b) == before);

  // Both go on, differently; what was taken back is used again, and tables follow.
  CudaKvCache c = a;
  c.truncate(256);
  for (int i = 0; i < 3; ++i) {
    fill(layer, a, 400, 6), fill(layer, b, 400, 7);
    const auto in = layer.inputs(1, 8);
    CHECK(layer.run(in, a) != layer.run(in, b));
    CudaKvCache same = layer.cache();
    fill(layer, same, 300, 4), fill(layer, same, 400, 7);
    layer.run(in, same);
    CHECK(bytes_of(same) == bytes_of(b));
    a.truncate(300), b.truncate(300);
    CHECK(bytes_of(a) == before);
    CHECK(bytes_of(b) == before);
  }
  CHECK(c.begins(a));
  a = c;
  fill(layer, a, 1, 9);
  CHECK(c.begins(a));
  CHECK(c.length() == 256);
}

TEST_CASE("attention: speed" * doctest::skip()) {
  const AttentionShape shape{16, 2, 256};
  Layer layer(shape, KvType::f16, 32);
  cuda::DeviceTimer timer(card());
  const auto measure = [&](std::vector<CudaKvCache>& caches, int depth, int rows, int steps) {
    Memory m;
    const auto in = layer.inputs(rows, 3);
    const CudaTensor q = m.tensor(in.q, layer.q_cols()), gate = m.tensor(in.gate, layer.q_cols());
    const CudaTensor k = m.tensor(in.k, layer.kv_cols()), v = m.tensor(in.v, layer.kv_cols());
    const CudaTensor out = m.tensor(rows, layer.q_cols()), angles = m.tensor(rows, 64);
    const Segment<CudaKvCache> at{0, rows, depth, nullptr};
    cuda::rope_angles(*card(), angles, frequencies(32), 1, {&at, 1});
    cuda::LaunchRecord record(card());  // or the processor is what takes the time
    const auto device = card()->with_record(&record);
    const auto run = [&](int count) {
      for (int i = 0; i < count; ++i) {
        CudaKvCache& cache = caches[static_cast<std::size_t>(i) % caches.size()];
        const Segment<CudaKvCache> s{0, rows, depth, &cache};
        cuda::gated_attention(*device, layer.scratch, out, q, gate, k, v, layer.q_weight.data, layer.k_weight.data,
                              Layer::eps, angles, shape, {&s, 1});
        cache.truncate(depth);
      }
    };
    run(1);
    for (int i = 0; i < 3; ++i) {  // the first time makes the graph, the second keeps the card busy meanwhile
      record.begin();
      run(steps);
      if (i == 2) timer.start();
      record.end();
    }
    return timer.seconds() / steps;
  };
  for (const KvType type : {KvType::f16, KvType::q8_0}) {
    layer.type = type;
    for (const int depth : {512, 2048, 4096, 8192, 16384, 32768, 131072}) {
      if (type == KvType::q8_0 && depth != 512 && depth != 32768) continue;
      const double bytes = depth * 4.0 * static_cast<double>(layer.cache().row_bytes());
      std::vector<CudaKvCache> caches(static_cast<std::size_t>(std::clamp(2.5e8 / bytes, 2.0, 64.0)));
      for (std::size_t i = 0; i < caches.size(); ++i) caches[i] = layer.cache(), fill(layer, caches[i], depth, 4);
      for (const int rows : {1, 2, 3, 5, 8}) {
        const double seconds = measure(caches, depth, rows, depth > 20000 ? 40 : 100);
        std::fflush(stdout);
        std::printf("decode, %s, depth %6d, %d rows: %7.2f us, %5.0f GB/s\n", name(type), depth, rows, seconds * 1e6,
                    bytes / seconds / 1e9);
      }
    }
  }
  layer.type = KvType::f16;
  for (const int depth : {0, 32768}) {
    std::vector<CudaKvCache> caches(1);
    caches[0] = layer.cache();
    fill(layer, caches[0], depth, 4);
    for (const int rows : {512, 2048, 8192}) {
      const double seconds = measure(caches, depth, rows, 5);
      const double operations = 4.0 * 256 * 16 * rows * (depth + (rows + 1) / 2.0);
      std::printf("prefill, depth %6d, %d rows: %8.1f us, %4.0f TFLOP/s\n", depth, rows, seconds * 1e6,
                  operations / seconds / 1e12);
    }
  }
}
