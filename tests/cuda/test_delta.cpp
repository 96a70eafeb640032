// DeltaNet on the card against the reference backend; and what holds bit for bit: a few rows at once are single rows,
// guesses leave no trace, copies are exact.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "backends/cuda/delta.hpp"
#include "backends/cuda/launch_record.hpp"
#include "backends/reference/reference_backend.hpp"

using namespace qwen3next;
using namespace qwen3next::cuda;

namespace {

using Rows = std::vector<std::vector<float>>;

Rows slice(const Rows& rows, int begin, int count) { return Rows(rows.begin() + begin, rows.begin() + begin + count); }

double nmse(std::span<const float> found, std::span<const float> expected) {
  double error = 0, power = 0;
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double d = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
    error += d * d, power += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return std::isfinite(error) ? error / std::max(power, 1e-30) : 1e30;
}
double nmse(const Rows& found, const Rows& expected) {
  std::vector<float> a, b;
  for (const auto& row : found) a.insert(a.end(), row.begin(), row.end());
  for (const auto& row : expected) b.insert(b.end(), row.begin(), row.end());
  return nmse(a, b);
}
double nmse(const AlignedBytes& found, const AlignedBytes& expected) {
  return nmse(std::span(found.floats(), found.size() / 4), std::span(expected.floats(), expected.size() / 4));
}

struct Card {
  std::shared_ptr<Device> device = Device::open();
  LaunchRecord record{device};
  std::shared_ptr<Device> recording = device->with_record(&record);
  DeviceScratch scratch{device};
  std::deque<DeviceBytes> memory;

  CudaTensor tensor(int rows, int cols) {
    const std::ptrdiff_t stride = (cols + 63) / 64 * 64;
    memory.emplace_back(device, sizeof(float) * static_cast<std::size_t>(rows * stride), "a test");
    device->clear(memory.back().data(), memory.back().size());
    return {memory.back().data<float>(), nullptr, rows, cols, stride};
  }
  CudaTensor upload(const Rows& rows) {
    CudaTensor t = tensor(static_cast<int>(rows.size()), static_cast<int>(rows[0].size()));
    std::vector<float> flat(static_cast<std::size_t>(t.n_rows * t.stride));
    for (std::size_t r = 0; r < rows.size(); ++r)
      std::copy(rows[r].begin(), rows[r].end(), flat.begin() + static_cast<std::ptrdiff_t>(r) * t.stride);
    device->copy_to_device(t.data, flat.data(), flat.size() * sizeof(float));
    return t;
  }
  const float* upload(const std::vector<float>& values) {
    memory.emplace_back(device, sizeof(float) * values.size(), "a test");
    device->copy_to_device(memory.back().data(), values.data(), sizeof(float) * values.size());
    return memory.back().data<float>();
  }
  Rows download(CudaTensor t) {
    std::vector<float> flat(static_cast<std::size_t>(t.n_rows * t.stride));
    device->copy_to_host(flat.data(), t.data, flat.size() * sizeof(float));
    Rows rows;
    for (int r = 0; r < t.n_rows; ++r)
      rows.emplace_back(flat.begin() + r * t.stride, flat.begin() + r * t.stride + t.n_cols);
    return rows;
  }
};

Card& card() {
  static Card one;
  return one;
}

constexpr DeltaShape shapes[] = {{16, 32, 128, 128, 4}, {2, 4, 64, 64, 4}, {2, 2, 64, 32, 4}, {2, 4, 20, 24, 4},
                                 {2, 8, 8, 12, 3},      {3, 3, 16, 10, 5}, {1, 1, 1, 1, 1},   {1, 2, 300, 5, 2}};

// What a layer takes for T tokens.  `bias` makes keys alike, `decay` scales how fast states forget.
struct Layer {
  DeltaShape shape;
  Rows x, b, a;
  std::vector<float> taps, A, dt_bias;
  std::mt19937 engine;
  bool gathered = false;  // passes are

  Layer(DeltaShape s, int T, float decay = 1, float bias = 0, unsigned seed = 1) : shape(s), engine(seed) {
    x = rows(T, s.conv_dim(), bias), b = rows(T, s.value_heads), a = rows(T, s.value_heads);
    taps = rows(1, s.conv_dim() * s.conv_kernel, 0.3f)[0];
    A = rows(1, s.value_heads)[0], dt_bias = rows(1, s.value_heads)[0];
    for (float& y : A) y = -decay * std::abs(y);
  }
  Rows rows(int T, int n, float mean = 0) {
    std::normal_distribution<float> normal(mean);
    Rows out(static_cast<std::size_t>(T), std::vector<float>(static_cast<std::size_t>(n)));
    for (auto& row : out)
      for (float& y : row) y = normal(engine);
    return out;
  }
  HostDeltaState some_state() {
    HostDeltaState state(shape);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < state.S.size() / 4; ++i) state.S.floats()[i] = 0.3f * normal(engine);
    for (std::size_t i = 0; i < state.conv.size() / 4; ++i) state.conv.floats()[i] = normal(engine);
    return state;
  }

  Rows expected(HostDeltaState& state, int begin, int count, bool tentative = false) const {
    ReferenceBackend be;
    const Segment<HostDeltaState> segment{0, count, begin, &state, tentative};
    const auto make = [&](const Rows& rows) {
      HostTensor t = be.tensor(count, static_cast<int>(rows[0].size()));
      for (int r = 0; r < count; ++r)
        std::copy(rows[static_cast<std::size_t>(begin + r)].begin(), rows[static_cast<std::size_t>(begin + r)].end(),
                  t.row(r));
      return t;
    };
    const auto vector = [](const std::vector<float>& v, int cols) {
      return VectorView{v.data(), static_cast<int>(v.size()), cols};
    };
    HostTensor conv = be.tensor(count, shape.conv_dim()), beta = be.tensor(count, shape.value_heads),
               g = be.tensor(count, shape.value_heads), o = be.tensor(count, shape.value_heads * shape.value_dim);
    be.causal_conv1d(conv, make(x), vector(taps, shape.conv_kernel), {&segment, 1});
    be.delta_gates(beta, g, make(b), make(a), vector(A, 1), vector(dt_bias, 1));
    be.gated_delta_rule(o, conv, beta, g, shape, {&segment, 1});
    Rows out;
    for (int r = 0; r < count; ++r) out.emplace_back(o.row(r), o.row(r) + o.n_cols);
    return out;
  }

  // On the card, over rows [begin, begin + all of the segments').
  struct Device {
    DeltaNetInputs in;
    CudaTensor o;
  };
  Device upload(int begin, int count) const {
    Card& c = card();
    c.memory.clear();
    Device d;
    d.in = {c.upload(slice(x, begin, count)),
            c.upload(slice(b, begin, count)),
            c.upload(slice(a, begin, count)),
            c.upload(taps),
            c.upload(A),
            c.upload(dt_bias),
            c.tensor(count, shape.conv_dim()),
            c.tensor(count, shape.value_heads),
            c.tensor(count, shape.value_heads)};
    d.o = c.tensor(count, shape.value_heads * shape.value_dim);
    return d;
  }
  Rows run(std::span<const Segment<CudaDeltaState>> segments, int begin, int count) const {
    const Device d = upload(begin, count);
    if (gathered) card().record.begin();
    delta_net(gathered ? *card().recording : *card().device, card().scratch, d.o, d.in, shape, segments);
    if (gathered) card().record.end();
    return card().download(d.o);
  }
  Rows run(CudaDeltaState& state, int begin, int count, bool tentative = false) const {
    const Segment<CudaDeltaState> segment{0, count, begin, &state, tentative};
    return run({&segment, 1}, begin, count);
  }
  Rows run_apart(CudaDeltaState& state, int begin, int count, bool tentative = false) const {
    const Device d = upload(begin, count);
    const Segment<CudaDeltaState> segment{0, count, begin, &state, tentative};
    cuda::Device& device = *card().device;
    delta_gates(device, d.in.beta, d.in.g, d.in.b, d.in.a, d.in.A, d.in.dt_bias);
    causal_conv1d(device, d.in.conv, d.in.qkv, d.in.taps, shape.conv_kernel, {&segment, 1});
    gated_delta_rule(device, card().scratch, d.o, d.in.conv, d.in.beta, d.in.g, shape, {&segment, 1});
    return card().download(d.o);
  }
  CudaDeltaState state() const { return CudaDeltaState(card().device, shape); }
};

bool same(const AlignedBytes& a, const AlignedBytes& b) {
  return a.size() == b.size() && (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size()) == 0);
}
bool same(const CudaDeltaState& a, const CudaDeltaState& b) {
  const HostDeltaState x = a.to_host(), y = b.to_host();
  return same(x.S, y.S) && same(x.conv, y.conv);
}

// Of chunks: factors of 11 bits.
double bound(DeltaShape s, int rows) {
  const bool chunks = rows > 8 && s.value_dim % 64 == 0 && (s.key_dim == 64 || s.key_dim == 128);
  return chunks ? 1e-6 : 1e-11;
}

struct Errors {
  double o, S, conv;
};
Errors check_pass(Layer& layer, int T) {
  HostDeltaState host = layer.some_state();
  CudaDeltaState state = layer.state();
  state.from_host(host);
  const Rows found = layer.run(state, 0, T), expected = layer.expected(host, 0, T);
  const HostDeltaState after = state.to_host();
  const Errors e{nmse(found, expected), nmse(after.S, host.S), nmse(after.conv, host.conv)};
  for (std::size_t r = 0; r < found.size() && !(e.o < bound(layer.shape, T)); ++r) {
    for (std::size_t i = 0; i < found[r].size(); ++i) {
      if (std::abs(found[r][i] - expected[r][i]) <= 0.01f * std::abs(expected[r][i]) + 1e-3f) continue;
      MESSAGE("row ", r, " column ", i, ": expected ", expected[r][i], ", found ", found[r][i]);
      return e;
    }
  }
  return e;
}

}  // namespace

TEST_CASE("delta: against the reference, from a state on") {
  for (const DeltaShape shape : shapes) {
    double worst[2] = {};
    for (const int T : {1, 2, 5, 8, 9, 15, 16, 63, 64, 65, 129, 300}) {
      CAPTURE(shape.key_dim);
      CAPTURE(shape.value_dim);
      CAPTURE(T);
      Layer layer(shape, T);
      const Errors e = check_pass(layer, T);
      CHECK(e.o < bound(shape, T));
      CHECK(e.S < bound(shape, T));
      CHECK(e.conv == 0);
      worst[T > 8] = std::max({worst[T > 8], e.o, e.S});
    }
    MESSAGE("Dk ", shape.key_dim, " Dv ", shape.value_dim, ": worst NMSE ", worst[0], " of few rows, ", worst[1],
            " of many");
  }
}

TEST_CASE("delta: no decay, extreme decays, keys that are alike") {
  for (const DeltaShape shape : {shapes[0], shapes[1], shapes[3]}) {
    for (const float decay : {0.0f, 0.001f, 30.0f, 3000.0f}) {
      for (const float bias : {0.0f, 2.0f}) {
        for (const int T : {5, 200}) {
          CAPTURE(shape.key_dim);
          CAPTURE(decay);
          CAPTURE(bias);
          CAPTURE(T);
          Layer layer(shape, T, decay, bias);
          if (decay > 1) {  // some tokens forget nothing
            for (std::size_t t = 0; t < layer.a.size(); t += 3) layer.a[t].assign(layer.a[t].size(), -30.0f);
          }
          const Errors e = check_pass(layer, T);
          CHECK(e.o < bound(shape, T));
          CHECK(e.S < bound(shape, T));
          if (T > 8 && shape.key_dim == 128) MESSAGE("decay ", decay, " bias ", bias, ": ", e.o, " ", e.S);
        }
      }
    }
  }
}

TEST_CASE("delta: the operations one by one are all at once") {
  for (const DeltaShape shape : shapes) {
    for (const int T : {1, 5, 70}) {
      CAPTURE(shape.key_dim);
      CAPTURE(T);
      Layer layer(shape, T + 3);
      CudaDeltaState one = layer.state(), other = one;
      one.from_host(layer.some_state());
      other = one;
      CHECK(layer.run(one, 0, T) == layer.run_apart(other, 0, T));
      CHECK(same(one, other));
      CHECK(layer.run(one, T, 3, true) == layer.run_apart(other, T, 3, true));
      one.accept(2), other.accept(2);
      CHECK(layer.run(one, T, 3, true) == layer.run_apart(other, T, 3, true));
      one.accept(3), other.accept(3);
      settle(*card().device, one, shape), settle(*card().device, other, shape);
      CHECK(same(one, other));
    }
  }
}

TEST_CASE("delta: few rows at once are single rows, bit for bit") {
  for (const DeltaShape shape : shapes) {
    for (int T = 2; T <= max_tentative_rows; ++T) {
      CAPTURE(shape.key_dim);
      CAPTURE(T);
      Layer layer(shape, T);
      CudaDeltaState at_once = layer.state();
      at_once.from_host(layer.some_state());
      CudaDeltaState single = at_once;
      Rows rows;
      for (int t = 0; t < T; ++t) rows.push_back(layer.run(single, t, 1)[0]);
      CHECK(layer.run(at_once, 0, T) == rows);
      CHECK(same(at_once, single));
    }
  }
}

// As tests/ops/test_tentative.cpp.
TEST_CASE("delta: what was not accepted leaves no trace") {
  for (const DeltaShape shape : shapes) {
    CAPTURE(shape.key_dim);
    Layer in(shape, 100);
    CudaDeltaState guessing = in.state();
    guessing.from_host(in.some_state());
    CudaDeltaState plain = guessing;
    HostDeltaState host = plain.to_host();
    int at = 0;
    for (const int guesses : {1, 2, 3, 4, 5, 5, 4}) {
      for (int accepted = 0; accepted <= guesses; ++accepted) {
        CAPTURE(guesses);
        CAPTURE(accepted);
        const CudaDeltaState before = plain;
        in.gathered = accepted % 2 == 1;
        const Rows rows = in.run(guessing, at, guesses, true);
        in.gathered = false;
        {
          const Rows expected = in.expected(host, at, guesses, true);
          host.accept(accepted);
          CHECK(nmse(rows, expected) < 1e-5);  // over long passes in chunks
        }
        CudaDeltaState alone = before;
        for (int t = 0; t < guesses; ++t) CHECK(in.run(alone, at + t, 1)[0] == rows[static_cast<std::size_t>(t)]);
        guessing.accept(accepted);
        for (int t = 0; t < accepted; ++t) in.run(plain, at + t, 1);
        at += accepted;
        if (accepted == 2) {  // a copy, settled, is the state; and a copy in use
          CudaDeltaState copy = guessing, in_use = before;
          settle(*card().device, copy, shape);
          CHECK(same(copy, plain));
          in_use = guessing;
          CudaDeltaState as_plain = plain;
          CHECK(in.run(in_use, at, 1) == in.run(as_plain, at, 1));
          CHECK(same(in_use, as_plain));
        }
        if (accepted == 3 && at + 20 < 100) {
          const Rows found = in.run(guessing, at, 17);
          CHECK(found == in.run(plain, at, 17));
          CHECK(in.run(guessing, at + 17, 2) == in.run(plain, at + 17, 2));
          in.expected(host, at, 17), in.expected(host, at + 17, 2);
          at += 19;
        }
        if (at > 85) at = 0;
      }
    }
    settle(*card().device, guessing, shape);
    CHECK(same(guessing, plain));
    ReferenceBackend().settle(host, shape);
    CHECK(nmse(guessing.to_host().S, host.S) < 1e-5);
    CHECK(same(guessing.to_host().conv, host.conv));
  }
}

TEST_CASE("delta: a batch is its sequences alone, bit for bit") {
  for (const auto& [shape, mixed] :
       {std::pair{shapes[0], false}, {shapes[0], true}, {shapes[1], true}, {shapes[1], false}, {shapes[3], true}}) {
    CAPTURE(shape.key_dim);
    CAPTURE(mixed);
    std::vector<int> counts(67, 1);
    counts[3] = 5, counts[11] = 2;
    if (mixed) counts[10] = 70, counts[66] = 20;
    int T = 0;
    for (const int n : counts) T += n;
    Layer layer(shape, T);
    std::vector<CudaDeltaState> together, alone;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      together.push_back(layer.state());
      together.back().from_host(layer.some_state());
      alone.push_back(together.back());
    }
    std::vector<Segment<CudaDeltaState>> segments;
    Rows rows;
    int begin = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      segments.push_back({begin, counts[i], 0, &together[i], i % 2 == 1 && counts[i] <= max_tentative_rows});
      const Rows r = layer.run(alone[i], begin, counts[i], segments.back().tentative);
      rows.insert(rows.end(), r.begin(), r.end());
      begin += counts[i];
    }
    layer.gathered = true;
    CHECK(layer.run(segments, 0, T) == rows);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      CAPTURE(i);
      if (segments[i].tentative) {
        together[i].accept(1), alone[i].accept(1);
        settle(*card().device, together[i], shape), settle(*card().device, alone[i], shape);
      }
      CHECK(same(together[i], alone[i]));
    }
  }
}

TEST_CASE("delta: a copy is a snapshot, and bytes are the host's") {
  for (const DeltaShape shape : shapes) {
    Layer layer(shape, 4);
    const HostDeltaState host = layer.some_state();
    CudaDeltaState state = layer.state();
    state.from_host(host);
    std::vector<std::byte> expected, found;
    host.bytes([&](std::span<const std::byte> piece) { expected.insert(expected.end(), piece.begin(), piece.end()); });
    state.bytes([&](std::span<const std::byte> piece) { found.insert(found.end(), piece.begin(), piece.end()); });
    CHECK(found == expected);
    CHECK(state.size_in_bytes() == expected.size());
    CudaDeltaState copy = state, moved = std::move(copy);
    const Rows rows = layer.run(state, 0, 4);
    CHECK(!same(state, moved));
    CHECK(layer.run(moved, 0, 4) == rows);
    CHECK(same(state, moved));
    copy = state;  // what was moved from can be assigned to
    CHECK(same(copy, state));
  }
}

TEST_CASE("bench: delta" * doctest::skip()) {
  const DeltaShape shape = shapes[0];
  Device& device = *card().device;
  DeviceTimer timer(card().device);
  constexpr double state_bytes = 2.0 * 32 * 128 * 128 * 4;
  {  // decode: a layer after another, as in a model, with and without a kernel before it
    Layer layer(shape, 64);
    std::vector<CudaDeltaState> states(128, layer.state());
    const auto d = layer.upload(0, 64);
    for (const int T : {1, 2, 5, 8}) {
      for (const bool alone : {true, false}) {
        constexpr int rounds = 2000;
        double seconds = 0;
        for (int pass = 0; pass < 2; ++pass) {
          timer.start();
          for (int i = 0; i < rounds; ++i) {
            const Segment<CudaDeltaState> segment{0, T, 0, &states[static_cast<std::size_t>(i) % states.size()]};
            if (!alone)
              delta_gates(device, d.in.beta, d.in.g, d.in.b.rows(0, 1), d.in.a.rows(0, 1), d.in.A, d.in.dt_bias);
            delta_net(device, card().scratch, d.o, d.in, shape, {&segment, 1});
          }
          seconds = timer.seconds() / rounds;
        }
        std::printf("decode T = %d%s: %.2f us, %.0f GB/s\n", T, alone ? "" : " after a small kernel", seconds * 1e6,
                    state_bytes / seconds / 1e9);
      }
    }
    for (const int n : {8, 64}) {
      std::vector<Segment<CudaDeltaState>> segments;
      double seconds = 0;
      for (int pass = 0; pass < 2; ++pass) {
        timer.start();
        for (int i = 0; i < 100; ++i) {
          segments.clear();
          for (int s = 0; s < n; ++s) segments.push_back({s, 1, 0, &states[static_cast<std::size_t>(i * n + s) % 128]});
          delta_net(device, card().scratch, d.o, d.in, shape, segments);
        }
        seconds = timer.seconds() / 100;
      }
      std::printf("batch of %d: %.1f us, %.0f GB/s\n", n, seconds * 1e6, n * state_bytes / seconds / 1e9);
    }
  }
  for (const int T : {16, 64, 512, 2048, 8192}) {
    Layer layer(shape, T, 1, 0.2f);
    CudaDeltaState state = layer.state();
    const auto d = layer.upload(0, T);
    const Segment<CudaDeltaState> segment{0, T, 0, &state};
    const auto measure = [&](const char* what, auto work) {
      const int rounds = T > 1000 ? 10 : 50;
      double seconds = 0;
      for (int pass = 0; pass < 2; ++pass) {
        timer.start();
        for (int i = 0; i < rounds; ++i) work();
        seconds = timer.seconds() / rounds;
      }
      std::printf("T = %d, %s: %.1f us\n", T, what, seconds * 1e6);
    };
    measure("all", [&] { delta_net(device, card().scratch, d.o, d.in, shape, {&segment, 1}); });
    measure("convolution", [&] { causal_conv1d(device, d.in.conv, d.in.qkv, d.in.taps, 4, {&segment, 1}); });
    measure("gates", [&] { delta_gates(device, d.in.beta, d.in.g, d.in.b, d.in.a, d.in.A, d.in.dt_bias); });
    measure("rule", [&] {
      gated_delta_rule(device, card().scratch, d.o, d.in.conv, d.in.beta, d.in.g, shape, {&segment, 1});
    });
  }
}
