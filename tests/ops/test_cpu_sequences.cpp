// What mixes tokens: convolution, delta rule, attention.
// On every ISA of this machine, against the reference backend; and what holds whatever the batch.

#include "tests/ops/cpu_ops.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

// The sequences of a batch: tokens per call of each.
struct Batch {
  std::vector<int> counts;
  int total() const {
    int n = 0;
    for (int c : counts) n += c;
    return n;
  }
  template <class State>
  std::vector<Segment<State>> segments(std::vector<State>& states, std::int64_t position = 0) const {
    std::vector<Segment<State>> out;
    int begin = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      out.push_back({begin, counts[i], position, &states[i]});
      begin += counts[i];
    }
    return out;
  }
};

struct Delta {
  DeltaShape shape;
  Rows qkv, beta, g, taps;

  Delta(Random& random, DeltaShape s, int T, float g_scale = 1) : shape(s) {
    qkv = random_rows(random, T, s.conv_dim());
    beta = random_rows(random, T, s.value_heads);
    g = random_rows(random, T, s.value_heads, g_scale);
    taps = random_rows(random, s.conv_dim(), s.conv_kernel);
    for (auto& row : beta)
      for (float& x : row) x = 1 / (1 + std::exp(-x));
    for (auto& row : g)
      for (float& x : row) x = -std::abs(x);
  }

  // conv, then delta rule, over rows [begin, begin + batch.total()) on the given states.
  template <class B>
  Rows run(B& b, const Batch& batch, std::vector<HostDeltaState>& states, int begin = 0) const {
    const int T = batch.total();
    std::vector<float> flat;
    for (const auto& row : taps) flat.insert(flat.end(), row.begin(), row.end());
    const auto segments = batch.segments(states);
    HostTensor in = make(b, slice(qkv, begin, T)), conv = b.tensor(T, shape.conv_dim()),
               out = b.tensor(T, shape.value_heads * shape.value_dim);
    b.causal_conv1d(conv, in, VectorView{flat.data(), static_cast<int>(flat.size()), shape.conv_kernel}, segments);
    b.gated_delta_rule(out, conv, make(b, slice(beta, begin, T)), make(b, slice(g, begin, T)), shape, segments);
    Rows result = read(out);
    for (const auto& s : states) {  // the states count as results
      result.emplace_back(s.S.floats(), s.S.floats() + s.S.size() / sizeof(float));
      result.emplace_back(s.conv.floats(), s.conv.floats() + s.conv.size() / sizeof(float));
    }
    return result;
  }
};

std::vector<HostDeltaState> delta_states(DeltaShape s, std::size_t n) {
  return std::vector<HostDeltaState>(n, HostDeltaState(s));
}

}  // namespace

TEST_CASE("convolution and delta rule: against the reference") {
  on_every_isa([](std::string_view isa, Expected& expected) {
    Random random;
    for (DeltaShape shape : {DeltaShape{1, 1, 1, 1, 1}, DeltaShape{1, 3, 5, 7, 2}, DeltaShape{2, 2, 16, 16, 4},
                             DeltaShape{2, 4, 33, 70, 3}, DeltaShape{1, 2, 128, 128, 4}}) {
      for (const Batch& batch :
           {Batch{{1}}, Batch{{2, 1}}, Batch{{15}}, Batch{{16}}, Batch{{64, 3}}, Batch{{65}}, Batch{{150, 20, 1}}}) {
        for (float g_scale : {0.01f, 1.0f, 60.0f}) {
          const int T = batch.total();
          CAPTURE(shape.key_dim);
          CAPTURE(T);
          CAPTURE(g_scale);
          const Delta d(random, shape, T, g_scale);
          CpuBackend be = cpu_backend(isa), three = cpu_backend(isa, 3);
          ReferenceBackend reference;
          auto a = delta_states(shape, batch.counts.size()), b = a, c = a;
          const Rows found = d.run(be, batch, a);
          CHECK(nmse(found, expected([&] { return d.run(reference, batch, b); })) < 1e-10);
          CHECK(found == d.run(three, batch, c));
        }
      }
    }
  });
}

TEST_CASE("delta rule: all at once, in pieces and one by one are the same; neighbours don't matter") {
  on_every_isa([](std::string_view isa) {
    Random random;
    const DeltaShape shape{2, 4, 24, 40, 4};
    const int T = 100;
    const Delta d(random, shape, T, 0.1f);
    CpuBackend be = cpu_backend(isa);
    auto whole = delta_states(shape, 1), steps = whole, pieces = whole;
    const Rows at_once = d.run(be, {{T}}, whole);
    Rows one_by_one, in_pieces;
    for (int t = 0; t < T; ++t) one_by_one.push_back(d.run(be, {{1}}, steps, t)[0]);
    for (int t = 0; t < T; t += 25) {
      const Rows r = d.run(be, {{25}}, pieces, t);
      in_pieces.insert(in_pieces.end(), r.begin(), r.begin() + 25);
    }
    CHECK(nmse(one_by_one, slice(at_once, 0, T)) < 1e-11);
    CHECK(nmse(in_pieces, slice(at_once, 0, T)) < 1e-11);

    auto two = delta_states(shape, 2), first = delta_states(shape, 1), second = first;
    const Rows together = d.run(be, {{30, 70}}, two);
    CHECK(slice(together, 0, 30) == slice(d.run(be, {{30}}, first), 0, 30));
    CHECK(slice(together, 30, 70) == slice(d.run(be, {{70}}, second, 30), 0, 70));
  });
}

namespace {

struct Attend {
  AttentionShape shape;
  Rows q, k, v;
  Attend(Random& random, AttentionShape s, int T)
      : shape(s),
        q(random_rows(random, T, s.heads * s.head_dim)),
        k(random_rows(random, T, s.kv_heads * s.head_dim)),
        v(random_rows(random, T, s.kv_heads * s.head_dim)) {}

  template <class B>
  Rows run(B& b, const Batch& batch, std::vector<HostKvCache>& caches, int begin = 0) const {
    const int T = batch.total();
    HostTensor out = b.tensor(T, shape.heads * shape.head_dim);
    b.attention(out, make(b, slice(q, begin, T)), make(b, slice(k, begin, T)), make(b, slice(v, begin, T)), shape,
                batch.segments(caches));
    return read(out);
  }
  template <class B>
  std::vector<HostKvCache> caches(B& b, std::size_t n) const {
    return std::vector<HostKvCache>(n, b.kv_cache(shape));
  }
};

double kv_bound(KvType kv) { return kv == KvType::f32 ? 1e-11 : kv == KvType::f16 ? 1e-6 : 1e-3; }

}  // namespace

TEST_CASE("attention: against the reference, every kind of cache") {
  on_every_isa([](std::string_view isa, Expected& expected) {
    Random random;
    for (KvType kv : {KvType::f32, KvType::f16, KvType::q8_0}) {
      for (AttentionShape shape : {AttentionShape{1, 1, 32}, AttentionShape{6, 2, 64}, AttentionShape{3, 3, 7},
                                   AttentionShape{16, 1, 33}, AttentionShape{16, 2, 64}, AttentionShape{70, 1, 32}}) {
        if (kv == KvType::q8_0 && shape.head_dim % 32 != 0) continue;
        for (const Batch& batch : {Batch{{1}}, Batch{{1, 5}}, Batch{{70}}, Batch{{300, 9, 1}}}) {
          const int T = batch.total();
          CAPTURE(static_cast<int>(kv));
          CAPTURE(shape.head_dim);
          CAPTURE(T);
          const Attend a(random, shape, 2 * T);
          CpuBackend be = cpu_backend(isa, 2, kv), three = cpu_backend(isa, 3, kv);
          ReferenceBackend reference;
          auto mine = a.caches(be, batch.counts.size()), theirs = a.caches(reference, batch.counts.size()),
               other = mine;
          for (int call = 0; call < 2; ++call) {  // the second call meets a past
            const Rows found = a.run(be, batch, mine, call * T);
            CHECK(nmse(found, expected([&] { return a.run(reference, batch, theirs, call * T); })) < kv_bound(kv));
            CHECK(found == a.run(three, batch, other, call * T));
          }
        }
      }
    }
  });
}

TEST_CASE("attention: a long context, split in decode") {
  on_every_isa([](std::string_view isa, Expected& expected) {
    Random random;
    const AttentionShape shape{4, 2, 32};
    const int past = 5000;
    const Attend a(random, shape, past + 6);
    CpuBackend be = cpu_backend(isa, 2, KvType::f32);
    ReferenceBackend reference;
    auto mine = a.caches(be, 1), theirs = a.caches(reference, 1);
    CHECK(nmse(a.run(be, {{past}}, mine), expected([&] { return a.run(reference, {{past}}, theirs); })) < 1e-11);
    auto one_by_one = mine, copy = mine;
    const Rows together = a.run(be, {{6}}, mine, past);
    CHECK(nmse(together, expected([&] { return a.run(reference, {{6}}, theirs, past); })) < 1e-11);
    Rows single;
    for (int t = 0; t < 6; ++t) single.push_back(a.run(be, {{1}}, one_by_one, past + t)[0]);
    CHECK(nmse(single, together) < 1e-12);
    CHECK(copy[0].length() == past);                  // copies are snapshots:
    CHECK(a.run(be, {{6}}, copy, past) == together);  // what others appended is not in them
  });
}

// Tokens that came before, without attending; the rows repeat.
void remember(HostKvCache& cache, AttentionShape shape, const Rows& k, const Rows& v, int count,
              void (*store)(DType, const float*, int, std::byte*) noexcept) {
  cache.extend(count);
  const DType type = stored_type(cache.type());
  for (std::size_t t = 0; t < static_cast<std::size_t>(count); ++t) {
    for (int h = 0; h < shape.kv_heads; ++h) {
      const std::size_t at = static_cast<std::size_t>(h) * static_cast<std::size_t>(shape.head_dim);
      store(type, &k[t % k.size()][at], shape.head_dim, cache.key_row(static_cast<std::int64_t>(t), h));
      store(type, &v[t % v.size()][at], shape.head_dim, cache.value_row(static_cast<std::int64_t>(t), h));
    }
  }
}

TEST_CASE("attention: few tokens and many after a long context, several sequences, every kind of cache") {
  on_every_isa([](std::string_view isa, Expected& expected) {
    Random random;
    const int past = 4500;
    for (AttentionShape shape : {AttentionShape{16, 2, 64}, AttentionShape{2, 1, 256}}) {
      const Attend a(random, shape, past);
      for (KvType kv : {KvType::f32, KvType::f16, KvType::q8_0}) {
        for (const Batch& batch : {Batch{{1, 1, 2}}, Batch{{8, 1}}, Batch{{9}}}) {
          CAPTURE(static_cast<int>(kv));
          CAPTURE(batch.total());
          CpuBackend be = cpu_backend(isa, 2, kv), three = cpu_backend(isa, 3, kv);
          ReferenceBackend reference;
          const std::size_t n = batch.counts.size();
          auto mine = a.caches(be, n), theirs = a.caches(reference, n);
          for (std::size_t i = 0; i < n; ++i) {  // contexts of several lengths
            const int length = past - 700 * static_cast<int>(i);
            remember(mine[i], shape, a.k, a.v, length, be.kernels().store_kv);
            remember(theirs[i], shape, a.k, a.v, length, be.kernels().store_kv);
          }
          auto other = mine;
          const Rows found = a.run(be, batch, mine);
          CHECK(nmse(found, expected([&] { return a.run(reference, batch, theirs); })) < kv_bound(kv));
          CHECK(found == a.run(three, batch, other));
        }
      }
    }
  });
}

// In fp64, of a f32 cache with one KV head: what the newest token's heads see.
std::vector<float> attention_in_double(AttentionShape shape, const std::vector<float>& q, const HostKvCache& cache) {
  const auto D = static_cast<std::size_t>(shape.head_dim);
  std::vector<float> out(q.size());
  for (std::size_t h = 0; h < q.size(); h += D) {
    std::vector<double> sum(D);
    double total = 0;
    for (std::int64_t p = 0; p < cache.length(); ++p) {
      const std::size_t row = static_cast<std::size_t>(p % HostKvCache::block_positions) * cache.row_bytes();
      const std::byte *key = cache.keys(p / HostKvCache::block_positions, 0) + row,
                      *value = cache.values(p / HostKvCache::block_positions, 0) + row;
      double score = 0;
      for (std::size_t d = 0; d < D; ++d) score += double{q[h + d]} * double{load<float>(key + 4 * d)};
      const double weight = std::exp(score / std::sqrt(static_cast<double>(D)));
      for (std::size_t d = 0; d < D; ++d) sum[d] += weight * double{load<float>(value + 4 * d)};
      total += weight;
    }
    for (std::size_t d = 0; d < D; ++d) out[h + d] = static_cast<float>(sum[d] / total);
  }
  return out;
}

// A draft that is verified must meet what a step of its own would have met: where a token begins a block, or the pieces
// of the context become longer (beyond 64 of 8 blocks: at 131072), and where rows of several tokens would share
// vectors.
TEST_CASE("attention: each of up to 8 tokens in a pass is what it is alone, bit for bit, at any depth") {
  on_every_isa([](std::string_view isa, Expected& expected) {
    Random random;
    auto check = [&](AttentionShape shape, KvType kv, int past) {
      CAPTURE(shape.heads);
      CAPTURE(past);
      CAPTURE(static_cast<int>(kv));
      const int T = 8;
      const Attend a(random, shape, T), old(random, shape, 499);
      CpuBackend be = cpu_backend(isa, 2, kv);
      auto single = a.caches(be, 1);
      remember(single[0], shape, old.k, old.v, past, be.kernels().store_kv);
      const auto before = single;
      Rows alone;
      for (int t = 0; t < T; ++t) alone.push_back(a.run(be, {{1}}, single, t)[0]);
      for (int count : {3, 8}) {
        auto together = before;
        CHECK(a.run(be, {{count}}, together) == slice(alone, 0, count));
      }
      if (kv == KvType::f32 && shape.kv_heads == 1) {
        const Rows& right = expected([&] { return Rows{attention_in_double(shape, a.q[T - 1], single[0])}; });
        CHECK(nmse({alone[T - 1]}, right) < 1e-11);
      }
    };
    for (AttentionShape shape : {AttentionShape{8, 1, 32}, AttentionShape{6, 2, 32}, AttentionShape{70, 1, 32}}) {
      for (int past : {3, 252, 2300}) {
        for (KvType kv : {KvType::f32, KvType::f16, KvType::q8_0}) check(shape, kv, past);
      }
    }
    check({3, 1, 32}, KvType::f32, 131068);
  });
}

TEST_CASE("attention: peaked and flat scores") {
  on_every_isa([](std::string_view isa, Expected& expected) {
    Random random;
    const AttentionShape shape{2, 1, 32};
    Attend a(random, shape, 600);
    for (std::size_t t = 0; t < 600; ++t) {
      for (float& x : a.q[t]) x *= t % 2 ? 100.0f : 0.0f;
    }
    CpuBackend be = cpu_backend(isa, 2, KvType::f32);
    ReferenceBackend reference;
    auto mine = a.caches(be, 1), theirs = a.caches(reference, 1);
    CHECK(nmse(a.run(be, {{600}}, mine), expected([&] { return a.run(reference, {{600}}, theirs); })) < 1e-9);
  });
}

TEST_CASE("copies of a cache share the past and nothing else") {
  for (int past : {0, 1, 255, 256, 257, 1500}) {
    CAPTURE(past);
    HostKvCache cache({2, 2, 32}, KvType::f32);
    auto append = [](HostKvCache& c, int count, float value) {
      for (std::int64_t p = c.extend(count); p < c.length(); ++p) {
        for (int h = 0; h < 2; ++h) {
          store(c.key_row(p, h), value);
          store(c.value_row(p, h), -value);
        }
      }
    };
    append(cache, past, 1);
    HostKvCache a = cache, b = cache;
    append(a, 300, 2);
    append(b, 300, 3);
    append(cache, 300, 4);
    HostKvCache c = a;
    append(a, 900, 5);
    append(c, 900, 6);
    auto holds = [](HostKvCache& x, std::int64_t begin, std::int64_t end, float value) {
      for (std::int64_t p = begin; p < end; ++p) {
        for (int h = 0; h < 2; ++h) {
          if (load<float>(x.key_row(p, h)) != value || load<float>(x.value_row(p, h)) != -value) return false;
        }
      }
      return true;
    };
    for (HostKvCache* x : {&cache, &a, &b, &c}) CHECK(holds(*x, 0, past, 1));
    CHECK(holds(cache, past, past + 300, 4));
    CHECK(holds(b, past, past + 300, 3));
    CHECK(holds(a, past, past + 300, 2));
    CHECK(holds(a, past + 300, past + 1200, 5));
    CHECK(holds(c, past + 300, past + 1200, 6));
  }
}

TEST_CASE("a q8_0 cache refuses heads that are not whole blocks") {
  CpuBackend be = cpu_backend("", 1, KvType::q8_0);
  CHECK_THROWS_AS(be.kv_cache({4, 2, 40}), Error);
}
