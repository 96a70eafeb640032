// Guesses: a few rows at once are bit for bit single steps, and a state knows nothing of rows that were not accepted.
// Without this, decoding with guesses would now and then say something else than decoding without.

#include "tests/ops/cpu_ops.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

// The rows of `run(begin, count)`, all at once and one by one, for every number of rows that may be guesses.
template <class Run>
void check_rows(Run run) {
  for (int T = 2; T <= max_tentative_rows; ++T) {
    CAPTURE(T);
    Rows one_by_one;
    for (int t = 0; t < T; ++t) one_by_one.push_back(run(t, 1)[0]);
    CHECK(run(0, T) == one_by_one);
  }
}

struct Inputs {
  DeltaShape shape;
  Rows x, beta, g, taps;
  std::vector<float> flat_taps;

  Inputs(Random& random, DeltaShape s, int T)
      : shape(s),
        x(random_rows(random, T, s.conv_dim())),
        beta(random_rows(random, T, s.value_heads)),
        g(random_rows(random, T, s.value_heads)),
        taps(random_rows(random, s.conv_dim(), s.conv_kernel)) {
    for (auto& row : beta) {
      for (float& b : row) b = 1 / (1 + std::exp(-b));
    }
    for (auto& row : g) {
      for (float& y : row) y = -std::abs(y);
    }
    for (const auto& row : taps) flat_taps.insert(flat_taps.end(), row.begin(), row.end());
  }

  template <class B>
  Rows run(B& be, HostDeltaState& state, int begin, int count, bool tentative = false) const {
    const Segment<HostDeltaState> segment{0, count, begin, &state, tentative};
    HostTensor conv = be.tensor(count, shape.conv_dim()), out = be.tensor(count, shape.value_heads * shape.value_dim);
    be.causal_conv1d(conv, make(be, slice(x, begin, count)),
                     VectorView{flat_taps.data(), static_cast<int>(flat_taps.size()), shape.conv_kernel},
                     {&segment, 1});
    be.gated_delta_rule(out, conv, make(be, slice(beta, begin, count)), make(be, slice(g, begin, count)), shape,
                        {&segment, 1});
    return read(out);
  }
};

bool same(const HostDeltaState& a, const HostDeltaState& b) {
  return a.S.size() == b.S.size() && std::memcmp(a.S.data(), b.S.data(), a.S.size()) == 0 &&
         std::memcmp(a.conv.data(), b.conv.data(), a.conv.size()) == 0;
}

// Passes of guesses of which some are accepted = the accepted tokens one by one; long passes and settling in between.
template <class B>
void check_guesses(B&& be, DeltaShape shape) {
  Random random;
  const Inputs in(random, shape, 100);
  HostDeltaState guessing = be.delta_state(shape), plain = guessing;
  int at = 0;
  for (const int guesses : {1, 2, 3, 4, 5, 5, 4}) {
    for (int accepted = 0; accepted <= guesses; ++accepted) {
      CAPTURE(guesses);
      CAPTURE(accepted);
      const HostDeltaState before = plain;
      const Rows rows = in.run(be, guessing, at, guesses, true);
      for (int t = 0; t < guesses; ++t) {
        if (t == accepted) continue;
        HostDeltaState alone = before;
        Rows last;
        for (int i = 0; i <= t; ++i) last = in.run(be, alone, at + i, 1);
        CHECK(rows[static_cast<std::size_t>(t)] == last[0]);
      }
      guessing.accept(accepted);
      for (int t = 0; t < accepted; ++t) in.run(be, plain, at + t, 1);
      at += accepted;
      if (accepted == 2) {  // a copy, settled, is the state
        HostDeltaState copy = guessing;
        be.settle(copy, shape);
        CHECK(same(copy, plain));
      }
      if (accepted == 3 && at + 20 < 100) {  // a long pass, in the chunked form, and a short one
        CHECK(in.run(be, guessing, at, 17) == in.run(be, plain, at, 17));
        CHECK(in.run(be, guessing, at + 17, 2) == in.run(be, plain, at + 17, 2));
        at += 19;
      }
      if (at > 85) at = 0;
    }
  }
  be.settle(guessing, shape);
  CHECK(same(guessing, plain));
}

}  // namespace

TEST_CASE("few rows at once are single steps, bit for bit: products of every type") {
  on_every_isa([](std::string_view isa) {
    Random random;
    for (const DTypeInfo& i : dtype_table) {
      if (!i.quantised && i.type != DType::f32 && i.type != DType::f16 && i.type != DType::bf16) continue;
      CAPTURE(i.name);
      const Matrix w(random, i.type, 37, i.elements == 256 ? 512 : 288 / i.elements * i.elements, 1, 1, true);
      const Rows x = random_rows(random, max_tentative_rows, w.view.cols);
      CpuBackend be = cpu_backend(isa);
      check_rows([&](int begin, int count) { return run_linear(be, w.view, slice(x, begin, count)); });
    }
  });
}

TEST_CASE("few rows at once are single steps, bit for bit: experts that they share") {
  on_every_isa([](std::string_view isa) {
    Random random;
    constexpr int E = 4, k = 3, H = 256, I = 64;
    for (const DType type : {DType::q4_k, DType::q8_0, DType::bf16}) {
      CAPTURE(info(type).name);
      const DType down = type == DType::q4_k ? DType::q5_0 : type;  // rows of 64 are no block of 256
      std::deque<Matrix> matrices;
      ExpertViews experts;
      for (int e = 0; e < E; ++e) {
        matrices.emplace_back(random, type, I, H, 1, 0.1f, true);
        matrices.emplace_back(random, type, I, H, 1, 0.1f, true);
        matrices.emplace_back(random, down, H, I, 1, 0.1f, true);
        experts.push_back(
            {matrices[matrices.size() - 3].view, matrices[matrices.size() - 2].view, matrices.back().view});
      }
      const Rows x = random_rows(random, max_tentative_rows, H), logits = random_rows(random, max_tentative_rows, E);
      CpuBackend be = cpu_backend(isa);
      check_rows([&](int begin, int count) {
        HostRouting routing = be.routing(count, k);
        be.router(routing, make(be, slice(logits, begin, count)), k, true);
        HostTensor out = be.tensor(count, H);
        be.experts(out, make(be, slice(x, begin, count)), experts, routing);
        return read(out);
      });
    }
  });
}

TEST_CASE("few rows at once are single steps, bit for bit: attention over every kind of cache") {
  on_every_isa([](std::string_view isa) {
    Random random;
    for (const AttentionShape shape : {AttentionShape{16, 2, 64}, AttentionShape{4, 4, 32}}) {
      for (const KvType kv : {KvType::f32, KvType::f16, KvType::q8_0}) {
        for (const int past : {0, 1, 253, 700}) {
          CAPTURE(static_cast<int>(kv));
          CAPTURE(past);
          CpuBackend be = cpu_backend(isa, 2, kv);
          const int T = past + max_tentative_rows;
          const Rows q = random_rows(random, T, shape.heads * shape.head_dim),
                     k = random_rows(random, T, shape.kv_heads * shape.head_dim),
                     v = random_rows(random, T, shape.kv_heads * shape.head_dim);
          HostKvCache before = be.kv_cache(shape);
          const Segment<HostKvCache> first{0, past, 0, &before};
          if (past > 0) be.append_kv(make(be, slice(k, 0, past)), make(be, slice(v, 0, past)), shape, {&first, 1});
          HostKvCache cache = before;
          check_rows([&](int begin, int count) {
            cache.truncate(past + begin);
            const Segment<HostKvCache> segment{0, count, past + begin, &cache};
            HostTensor out = be.tensor(count, shape.heads * shape.head_dim);
            be.attention(out, make(be, slice(q, past + begin, count)), make(be, slice(k, past + begin, count)),
                         make(be, slice(v, past + begin, count)), shape, {&segment, 1});
            return read(out);
          });
        }
      }
    }
  });
}

TEST_CASE("delta rule: what was not accepted leaves no trace") {
  const DeltaShape shapes[] = {{1, 1, 1, 1, 1}, {2, 4, 24, 39, 4}, {1, 2, 128, 128, 4}};
  for (const DeltaShape shape : shapes) {
    CAPTURE(shape.key_dim);
    on_every_isa([&](std::string_view isa) { check_guesses(cpu_backend(isa), shape); });
    check_guesses(ReferenceBackend(), shape);
  }
}

TEST_CASE("a cache that is cut back again and again takes no more memory") {
  HostKvCache cache({1, 1, 32}, KvType::f32);
  cache.extend(250);
  std::vector<const std::byte*> places;
  for (int i = 0; i < 50; ++i) {
    cache.extend(10);  // over the end of a block
    places.push_back(cache.keys(1, 0));
    cache.truncate(250);
  }
  CHECK(std::equal(places.begin() + 1, places.end(), places.begin()));
  const HostKvCache copy = cache;  // what a copy holds is not used again
  cache.extend(10);
  HostKvCache other = cache;
  cache.truncate(250);
  cache.extend(10);
  CHECK(cache.keys(1, 0) != other.keys(1, 0));
}
