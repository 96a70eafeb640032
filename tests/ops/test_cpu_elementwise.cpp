// Norms, gates, rope and the router.
// On every ISA of this machine, against the reference backend; and what holds whatever the batch.

#include <algorithm>
#include <numeric>

#include "tests/ops/cpu_ops.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

TEST_CASE("norms, gates and other elementwise operations") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (int T : {1, 5}) {
      for (int width : {1, 7, 16, 45, 128}) {
        CAPTURE(T);
        CAPTURE(width);
        const Rows x = random_rows(random, T, 3 * width, 4), y = random_rows(random, T, 3 * width, 4);
        const Rows one = random_rows(random, T, 1);
        const auto w = random.normals(static_cast<std::size_t>(width)),
                   b = random.normals(static_cast<std::size_t>(3 * width), 10);
        const VectorView weight{w.data(), width, 1}, bias{b.data(), 3 * width, 1};
        auto both = [&](auto op) {
          auto run = [&](auto& backend) {
            HostTensor a = make(backend, x), c = make(backend, y);
            op(backend, a, c);
            return read(a);
          };
          return nmse(run(be), run(reference));
        };
        CHECK(both([&](auto& k, HostTensor a, HostTensor) { k.rms_norm(a, a, weight, 1e-6f); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.gated_rms_norm(a, a, z, weight, 1e-6f); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.swiglu(a, a, z); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.sigmoid_gate(a, z); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.add(a, z); }) < 1e-13);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) { k.add_gated(a, z, make(k, one)); }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) {
                HostTensor g = k.tensor(T, 3 * width);
                k.delta_gates(a, g, z, a, bias, bias);
              }) < 1e-12);
        CHECK(both([&](auto& k, HostTensor a, HostTensor z) {
                HostTensor beta = k.tensor(T, 3 * width);
                k.delta_gates(beta, a, z, a, bias, bias);
              }) < 1e-12);
      }
    }
  });
}

TEST_CASE("rope: far positions, partial heads") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (int n : {1, 3, 16, 32}) {
      const int head_dim = 2 * n + 5, T = 7;
      std::vector<double> frequency;
      for (int i = 0; i < n; ++i) frequency.push_back(std::pow(1e7, -static_cast<double>(i) / n));
      const Rows x = random_rows(random, T, 3 * head_dim);
      auto run = [&](auto& b) {
        using Cache = typename std::remove_reference_t<decltype(b)>::KvCache;
        const std::vector<Segment<Cache>> segments{{0, 4, 1000000, nullptr}, {4, 3, 17, nullptr}};
        HostTensor angles = b.tensor(T, 2 * n), heads = make(b, x);
        b.rope_angles(angles, frequency, 1.25f, segments);
        b.rope(heads, angles, head_dim);
        return read(heads);
      };
      CHECK(nmse(run(be), run(reference)) < 1e-13);
    }
  });
}

TEST_CASE("router: probabilities, ties, normalisation") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (int E : {1, 5, 16, 33, 512}) {
      for (bool normalise : {false, true}) {
        const int k = std::min(E, 10), T = 6;
        Rows logits = random_rows(random, T, E, 3);
        for (float& x : logits[1]) x = 0.5f;                                 // all equal
        for (float& x : logits[2]) x = static_cast<float>(random.below(3));  // many equal
        auto run = [&](auto& b) {
          HostRouting routing = b.routing(T, k);
          b.router(routing, make(b, logits), k, normalise);
          return routing;
        };
        const HostRouting found = run(be), expected = run(reference);
        CHECK(found.rows == T);
        CHECK(found.ids == expected.ids);
        CHECK(nmse({found.weights}, {expected.weights}) < 1e-12);
      }
    }
  });
}

TEST_CASE("top k: the order of a stable sort, whatever the order of the values and however many are equal") {
  for (const cpu::Level& level : tested_levels()) {
    const std::string_view isa = level.name;
    CAPTURE(isa);
    Random random;
    for (int n : {1, 2, 15, 16, 17, 64, 511, 512, 600}) {
      for (int k : {1, 2, 10, 16, 33, n}) {
        if (k > n) continue;
        for (int kind = 0; kind < 5; ++kind) {
          CAPTURE(n);
          CAPTURE(k);
          CAPTURE(kind);
          std::vector<float> p(static_cast<std::size_t>(n), 0.25f);  // 0: all equal
          for (int i = 0; i < n; ++i) {
            float& x = p[static_cast<std::size_t>(i)];
            if (kind == 1) x = random.normal();
            if (kind == 2) x = static_cast<float>(random.below(3)) - 1;
            if (kind == 3) x = static_cast<float>(i / 2);  // every one gets in, in pairs
            if (kind == 4) x = static_cast<float>((n - i) / 2);
          }
          std::vector<std::int32_t> order(p.size()), ids(static_cast<std::size_t>(k), -1);
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
            return p[static_cast<std::size_t>(a)] > p[static_cast<std::size_t>(b)];
          });
          order.resize(ids.size());
          std::vector<float> values(ids.size());
          level.kernels().top_k(p.data(), n, k, ids.data(), values.data());
          REQUIRE(ids == order);
          for (std::size_t i = 0; i < ids.size(); ++i) REQUIRE(values[i] == p[static_cast<std::size_t>(ids[i])]);
        }
      }
    }
  }
}
