// Products with weights of every type: linear layers, embeddings, experts.
// On every ISA of this machine, against the reference backend; and what holds whatever the batch.

#include "tests/ops/cpu_ops.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

TEST_CASE("linear: every type, odd shapes, any address") {
  on_every_isa([](std::string_view isa, Expected& expected) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      const bool quantised = info(type).quantised;
      for (int cols : column_counts(type)) {
        for (int rows : {1, 3, 4, 16, 37}) {
          for (int T : {1, 2, 3, 4, 5, 13, 50}) {
            CAPTURE(cols);
            CAPTURE(rows);
            CAPTURE(T);
            Matrix w(random, type, rows, cols, 1 + random.below(7));
            const Rows x = random_rows(random, T, cols);
            const Rows y = run_linear(be, w.view, x);
            CHECK(nmse(y, expected([&] { return exact_product(w.view, x, quantised); })) < 1e-10);
          }
        }
      }
      {  // more rows than a kernel is given at once, and as many tokens as any takes row by row
        Matrix w(random, type, 600, column_counts(type)[0]);
        const Rows x = random_rows(random, 16, w.view.cols);
        CHECK(nmse(run_linear(be, w.view, x), expected([&] { return exact_product(w.view, x, quantised); })) < 1e-10);
      }
      if (quantised) {  // the price of int8 activations
        Matrix w(random, type, 64, 1024);
        const Rows x = random_rows(random, 6, 1024);
        ReferenceBackend reference;
        CHECK(nmse(run_linear(be, w.view, x), expected([&] { return run_linear(reference, w.view, x); })) < 1e-4);
      }
    }
  });
}

TEST_CASE("linear: several matrices of one input, interleaved in memory, into slices of one output") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa, 3);
    ReferenceBackend reference;
    for (int T : {1, 9}) {
      Matrix all(random, DType::f32, 4 * 5, 64), other(random, DType::q4_k, 33, 256), tiny(random, DType::q8_0, 2, 256),
          wide(random, DType::bf16, 20, 256);
      const Rows x64 = random_rows(random, T, 64), x256 = random_rows(random, T, 256);
      auto interleaved = [&](auto& b) {
        HostTensor y = b.tensor(T, 20);
        b.linear(make(b, x64),
                 {{all.view.every(5, 0, 2), y.columns(0, 8)}, {all.view.every(5, 2, 3), y.columns(8, 12)}});
        return read(y);
      };
      CHECK(nmse(interleaved(be), interleaved(reference)) < 1e-12);
      HostTensor a = be.tensor(T, 33), b = be.tensor(T, 2), c = be.tensor(T, 20);
      be.linear(make(be, x256), {{other.view, a}, {tiny.view, b}, {wide.view, c}});
      CHECK(read(a) == run_linear(be, other.view, x256));
      CHECK(read(b) == run_linear(be, tiny.view, x256));
      CHECK(read(c) == run_linear(be, wide.view, x256));
    }
  });
}

TEST_CASE("F8_E4M3 with a factor for every 128 x 128 values: linear, strided views, embeddings, experts") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa, 3);
    ReferenceBackend reference;
    for (const DType factor_type : {DType::f32, DType::bf16}) {
      for (const int cols : {1, 100, 128, 129, 333, 520}) {
        CAPTURE(info(factor_type).name);
        CAPTURE(cols);
        const int rows = 2 * 7 * 19;  // 266: three rows of blocks
        Matrix w(random, DType::f8_e4m3, rows, cols);
        const int grid_cols = (cols + 127) / 128;
        Matrix grid(random, factor_type, (rows + 127) / 128, grid_cols, 3);
        w.view.grid = {grid.view.data, factor_type, grid_cols, 0};
        std::vector<float> row(static_cast<std::size_t>(cols));
        for (int r : {0, 127, 128, 265}) {  // the definition itself
          dequantize(w.view, r, row.data());
          float factor;
          dequantize_row(factor_type, grid.view.row(r / 128) + row_bytes(factor_type, (cols - 1) / 128), &factor, 1);
          REQUIRE(row.back() == f8_e4m3_to_f32(static_cast<std::uint8_t>(w.view.row(r)[cols - 1])) * factor);
        }
        std::vector<WeightView> views{w.view, w.view.slice(100, 57)};
        for (int first : {0, 7, 12}) views.push_back(w.view.every(19, first, 7));
        for (const WeightView& view : views) {
          for (int T : {1, 2, 3, 60}) {
            const Rows x = random_rows(random, T, cols), y = run_linear(be, view, x);
            REQUIRE(nmse(y, exact_product(view, x, false)) < 1e-11);
            if (T > 3) REQUIRE(run_linear(be, view, {x[5]})[0] == y[5]);
          }
          const std::vector<std::int32_t> tokens{view.rows - 1, 0, 33};
          auto embed = [&](auto& b) {
            HostTensor out = b.tensor(3, cols);
            b.embed(out, tokens, view);
            return read(out);
          };
          CHECK(embed(be) == embed(reference));
        }
      }
    }
    Matrix in(random, DType::f8_e4m3, 3 * 2 * 150, 140), out(random, DType::f8_e4m3, 3 * 140, 150);
    Matrix in_grid(random, DType::bf16, 3 * 3, 2), out_grid(random, DType::f32, 3 * 2, 2);
    ExpertViews experts;
    for (int e = 0; e < 3; ++e) {  // a grid for each
      WeightView gate_up = WeightView::contiguous(in.view.row(300 * e), DType::f8_e4m3, 300, 140);
      gate_up.grid = {in_grid.view.row(3 * e), DType::bf16, 2, 0};
      WeightView down = WeightView::contiguous(out.view.row(140 * e), DType::f8_e4m3, 140, 150);
      down.grid = {out_grid.view.row(2 * e), DType::f32, 2, 0};
      experts.push_back({gate_up.slice(0, 150), gate_up.slice(150, 150), down});
    }
    for (int T : {1, 2, 30, 120}) {
      const Rows x = random_rows(random, T, 140, 0.05f), logits = random_rows(random, T, 3);
      auto run = [&](auto& b) {
        HostRouting routing = b.routing(T, 2);
        b.router(routing, make(b, logits), 2, true);
        HostTensor y = b.tensor(T, 140);
        b.experts(y, make(b, x), experts, routing);
        return read(y);
      };
      CHECK(nmse(run(be), run(reference)) < 1e-11);
    }
  });
}

TEST_CASE("F8_E4M3: every code in every lane, NaN included") {
  on_every_isa([](std::string_view isa) {
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    std::vector<std::byte> codes(256 * 37);
    for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::byte>(i / 37 + i % 37);
    const WeightView w = WeightView::contiguous(codes.data(), DType::f8_e4m3, 256, 37);
    std::vector<std::int32_t> tokens;
    for (int r = 0; r < 256; ++r) tokens.push_back(r);
    auto rows = [&](auto& b) {
      HostTensor out = b.tensor(256, 37);
      b.embed(out, tokens, w);
      return read(out);
    };
    const Rows found = rows(be), expected = rows(reference);
    for (int T : {1, 3}) {
      const Rows y = run_linear(be, w, Rows(static_cast<std::size_t>(T), std::vector<float>(37, 0.0f)));
      for (std::size_t r = 0; r < found.size(); ++r) {
        bool nan = false;
        for (std::size_t c = 0; c < found[r].size(); ++c) {
          REQUIRE((std::isnan(expected[r][c]) ? std::isnan(found[r][c]) : found[r][c] == expected[r][c]));
          nan |= std::isnan(expected[r][c]);
        }
        REQUIRE(std::isnan(y.back()[r]) == nan);  // 0 * NaN
      }
    }
  });
}

TEST_CASE("a matrix with a scale: every type, with few and many tokens") {
  for (const DTypeInfo& i : dtype_table) {
    const DType type = i.type;
    CAPTURE(i.name);
    Random weights;
    Matrix w(weights, type, 70, 512, 1, 0.1f, true), other(weights, type, 512, 256, 1, 0.1f, true);
    Matrix gate(weights, type, 256, 512, 1, 0.1f, true), up(weights, type, 256, 512, 1, 0.1f, true);
    on_every_isa([&](std::string_view isa) {
      Random random;
      CpuBackend be = cpu_backend(isa);
      WeightView scaled = w.view, down = other.view;
      scaled.scale = 0.375f;  // few bits: y is scaled exactly
      auto times = [](Rows rows, float factor) {
        for (auto& row : rows)
          for (float& x : row) x *= factor;
        return rows;
      };
      for (int T : {1, 2, 3, 50}) {
        const Rows x = random_rows(random, T, 512);
        CHECK(run_linear(be, scaled.slice(1, 69), x) == times(run_linear(be, w.view.slice(1, 69), x), 0.375f));
        ReferenceBackend reference;
        CHECK(nmse(run_linear(reference, scaled, x), times(run_linear(reference, w.view, x), 0.375f)) < 1e-12);
      }
      const std::vector<std::int32_t> tokens{69, 0};
      auto embed = [&](auto& b, const WeightView& view) {
        HostTensor out = b.tensor(2, 512);
        b.embed(out, tokens, view);
        return read(out);
      };
      CHECK(embed(be, scaled) == times(embed(be, w.view), 0.375f));
      ExpertView plain{gate.view, up.view, down}, with{gate.view, up.view, down};
      with.up.scale = 0.5f, with.down.scale = 3;
      for (int T : {1, 9}) {
        const Rows x = random_rows(random, T, 512);
        auto run = [&](const ExpertView& expert) {
          HostRouting routing = be.routing(T, 1);
          be.router(routing, make(be, Rows(static_cast<std::size_t>(T), {1.0f})), 1, true);
          HostTensor out = be.tensor(T, 512);
          be.experts(out, make(be, x), {expert}, routing);
          return read(out);
        };
        CHECK(nmse(run(with), times(run(plain), 1.5f)) < 1e-12);
        with.gate.scale = 0.25f;  // before silu
        ExpertViews both{with};
        ReferenceBackend reference;
        HostRouting routing = reference.routing(T, 1);
        reference.router(routing, make(reference, Rows(static_cast<std::size_t>(T), {1.0f})), 1, true);
        HostTensor out = reference.tensor(T, 512);
        reference.experts(out, make(reference, x), both, routing);
        CHECK(nmse(run(with), read(out)) < 5e-4);
        with.gate.scale = 1;
      }
    });
  }
}

TEST_CASE("linear: activations of zeros, and of very different sizes") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    for (DType type : {DType::q8_0, DType::q2_k, DType::q4_k, DType::q6_k, DType::iq4_nl, DType::nvfp4}) {
      Matrix w(random, type, 5, 512);
      Rows x = random_rows(random, 6, 512);
      std::fill(x[0].begin(), x[0].end(), 0.0f);
      for (float& v : x[1]) v *= 1e20f;
      for (float& v : x[2]) v *= 1e-20f;
      const Rows y = run_linear(be, w.view, x), expected = exact_product(w.view, x, true);
      for (std::size_t t = 0; t < x.size(); ++t) CHECK(nmse({y[t]}, {expected[t]}) < 1e-11);
    }
  });
}

TEST_CASE("embed: rows of every type") {
  on_every_isa([](std::string_view isa) {
    Random random;
    CpuBackend be = cpu_backend(isa);
    ReferenceBackend reference;
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      Matrix w(random, type, 9, info(type).quantised ? 512 : 77);
      const std::vector<std::int32_t> tokens{8, 0, 3, 3};
      auto run = [&](auto& b) {
        HostTensor out = b.tensor(4, w.view.cols);
        b.embed(out, tokens, w.view);
        return read(out);
      };
      CHECK(nmse(run(be), run(reference)) < 1e-13);
    }
  });
}

TEST_CASE("experts: all, few or one expert per token, every type") {
  for (const DTypeInfo& i : dtype_table) {
    const DType type = i.type;
    CAPTURE(i.name);
    Random weights;
    const bool quantised = info(type).quantised;
    const int D = quantised ? 256 : 70, width = quantised ? 512 : 37, E = 6;
    std::vector<Matrix> memory;
    ExpertViews experts;
    for (int e = 0; e < E; ++e) {
      memory.emplace_back(weights, type, width, D, 1, 0.1f, true);
      memory.emplace_back(weights, type, width, D, 2, 0.1f, true);
      memory.emplace_back(weights, e % 2 ? type : DType::f32, D, width, 3, 0.1f, true);
    }
    for (std::size_t e = 0; e < E; ++e)
      experts.push_back({memory[3 * e].view, memory[3 * e + 1].view, memory[3 * e + 2].view});
    on_every_isa([&](std::string_view isa, Expected& expected) {
      Random random;
      for (int T : {1, 3, 20}) {
        for (int k : {1, 3, 6}) {
          CAPTURE(T);
          CAPTURE(k);
          const Rows x = random_rows(random, T, D), logits = random_rows(random, T, E, 2);
          auto run = [&](auto& b) {
            HostRouting routing = b.routing(T, k);
            b.router(routing, make(b, logits), k, true);
            HostTensor out = b.tensor(T, D);
            b.experts(out, make(b, x), experts, routing);
            return read(out);
          };
          CpuBackend be = cpu_backend(isa), single = cpu_backend(isa, 1), three = cpu_backend(isa, 3);
          ReferenceBackend reference;
          const Rows found = run(be);
          CHECK(nmse(found, expected([&] { return run(reference); })) < (quantised ? 5e-4 : 1e-11));
          CHECK(found == run(single));
          CHECK(found == run(three));
        }
      }
    });
  }
}

TEST_CASE("linear: the thread count changes nothing; a row's result hardly depends on its batch") {
  on_every_isa([](std::string_view isa) {
    Random random;
    for (const DTypeInfo& i : dtype_table) {
      const DType type = i.type;
      CAPTURE(i.name);
      Matrix w(random, type, 203, 512);
      const Rows x = random_rows(random, 14, 512);
      CpuBackend one = cpu_backend(isa, 1), two = cpu_backend(isa, 2), three = cpu_backend(isa, 3);
      const Rows y = run_linear(one, w.view, x);
      CHECK(y == run_linear(two, w.view, x));
      CHECK(y == run_linear(three, w.view, x));
      Rows steps;
      for (const auto& row : x) steps.push_back(run_linear(one, w.view, {row})[0]);
      CHECK(steps == [&] {
        Rows again;
        for (const auto& row : x) again.push_back(run_linear(three, w.view, {row})[0]);
        return again;
      }());
      if (info(type).quantised)
        CHECK(nmse(steps, y) < 1e-12);
      else
        CHECK(steps == y);
    }
  });
}
