// Weights on the card, and their products with few rows.

#include <doctest/doctest.h>

#include "backends/cuda/experts_few.hpp"
#include "backends/cuda/linear_few.hpp"
#include "backends/cuda/weights.hpp"
#include "tests/cuda/cuda_ops.hpp"

using namespace qwen3next;
using namespace qwen3next::test;
using cuda::FewInput;

namespace {

const std::shared_ptr<cuda::Device>& card() {
  static const std::shared_ptr<cuda::Device> device = cuda::Device::open();
  return device;
}

Rows dequantized(const WeightView& w) {
  Rows rows;
  for (int r = 0; r < w.rows; ++r) dequantize(w, r, rows.emplace_back(static_cast<std::size_t>(w.cols)).data());
  return rows;
}

cuda::CudaWeight upload(const WeightView& view) {
  cuda::Uploader uploader(card());
  cuda::CudaWeight w = uploader.weight(view);
  uploader.finish();
  return w;
}

Rows expanded(CudaTensors& tensors, const cuda::Matrix& m, const std::vector<std::int32_t>& ids) {
  const cuda::DeviceBytes memory(card(), ids.size() * sizeof(ids[0]), "a test");
  card()->copy_to_device(memory.data(), ids.data(), ids.size() * sizeof(ids[0]));
  const cuda::CudaTensor out = tensors.make(static_cast<int>(ids.size()), m.cols, true);
  cuda::expand_rows(*card(), out, memory.data<std::int32_t>(), m);
  return tensors.read(out);
}
Rows expanded(CudaTensors& tensors, const cuda::Matrix& m) {
  std::vector<std::int32_t> ids;
  for (int i = 0; i < m.rows; ++i) ids.push_back(i);
  return expanded(tensors, m, ids);
}

std::vector<int> widths(DType type) {
  std::vector<int> widths = column_counts(type);
  widths.push_back(info(type).elements == 256 ? 2048 : 512);
  return widths;
}

// The products of f32 weights are f32; others round the activations to f16 before, and most the weights.
double bound(DType type) { return type == DType::f32 ? 1e-12 : 3e-7; }
Rows product(const WeightView& w, const Rows& x) {
  return exact_product(w, w.type == DType::f32 ? x : rounded_to_half(x), false);
}

Rows linear(CudaTensors& tensors, const cuda::Matrix& m, const Rows& x) {
  const cuda::CudaTensor y = tensors.make(static_cast<int>(x.size()), m.rows, true);
  const cuda::Product product{m, y};
  cuda::linear_few(*card(), tensors.make(x), {&product, 1});
  return tensors.read(y);
}

}  // namespace

TEST_CASE("cuda: rows of every type come back from the card bit for bit") {
  Random random;
  for (const DTypeInfo& type : dtype_table) {
    for (const int cols : widths(type.type)) {
      CAPTURE(type.name);
      CAPTURE(cols);
      const Matrix w(random, type.type, 37, cols);
      CudaTensors tensors(card());
      CHECK(first_difference(expanded(tensors, upload(w.view).matrix()), dequantized(w.view)) == "");
    }
  }
}

TEST_CASE("cuda: rows of strided views, of grids of factors, with a factor") {
  Random random;
  for (const DType type : {DType::f8_e4m3, DType::bf16, DType::q4_k}) {
    const int cols = type == DType::q4_k ? 512 : 300;
    const Matrix w(random, type, 60 * 7, cols);
    WeightView view = w.view;
    std::vector<float> factors;
    if (type == DType::f8_e4m3) {
      for (int i = 0; i < 4 * 3; ++i) factors.push_back(0.01f * (1 + std::fabs(random.normal())));
      view.grid = {reinterpret_cast<const std::byte*>(factors.data()), DType::f32, 3, 0};
    }
    view.scale = 0.37f;
    for (const WeightView& part : {view, view.every(60, 13, 24), view.every(60, 1, 1), view.slice(131, 90)}) {
      CAPTURE(info(type).name);
      CAPTURE(part.rows);
      CudaTensors tensors(card());
      const cuda::CudaWeight on_card = upload(part);
      CHECK(first_difference(expanded(tensors, on_card.matrix()), dequantized(part)) == "");
      if (part.rows < 48) continue;
      const Rows all = dequantized(part);
      CHECK(first_difference(expanded(tensors, on_card.slice(16, 25).matrix()), slice(all, 16, 25)) == "");
    }
  }
}

TEST_CASE("cuda: a matrix larger than the buffers of the uploader") {
  Random random;
  const Matrix w(random, DType::f32, 5003, 2048);
  CudaTensors tensors(card());
  const cuda::CudaWeight on_card = upload(w.view);
  const std::vector<std::int32_t> ids{0, 15, 16, 4095, 4096, 4100, 5001, 5002};
  Rows expected;
  for (const int id : ids) dequantize(w.view, id, expected.emplace_back(2048).data());
  CHECK(first_difference(expanded(tensors, on_card.matrix(), ids), expected) == "");
}

TEST_CASE("cuda: products of few rows, every type") {
  Random random;
  for (const DTypeInfo& type : dtype_table) {
    for (const int cols : widths(type.type)) {
      CAPTURE(type.name);
      CAPTURE(cols);
      const Matrix w(random, type.type, 83, cols);
      const cuda::CudaWeight on_card = upload(w.view);
      CudaTensors tensors(card());
      const Rows x = random_rows(random, 8, cols);
      const Rows expected = product(w.view, x), found = linear(tensors, on_card.matrix(), x);
      INFO(worst_difference(found, expected));
      CHECK(nmse(found, expected) < bound(type.type));
      for (int rows = 1; rows < 8; ++rows) {
        CHECK(first_difference(linear(tensors, on_card.matrix(), slice(x, 8 - rows, rows)),
                               slice(found, 8 - rows, rows)) == "");
      }
    }
  }
}

TEST_CASE("cuda: products of grids of factors, several at once, added to what was") {
  Random random;
  Matrix f8(random, DType::f8_e4m3, 300, 512);
  std::vector<float> factors;
  for (int i = 0; i < 3 * 4; ++i) factors.push_back(0.01f * (1 + std::fabs(random.normal())));
  f8.view.grid = {reinterpret_cast<const std::byte*>(factors.data()), DType::f32, 4, 0};
  f8.view.scale = 3;
  const Matrix q4(random, DType::q4_k, 1000, 512), q6(random, DType::q6_k, 16, 512), f32(random, DType::f32, 33, 512),
      bf16(random, DType::bf16, 1, 512);
  const std::vector<const WeightView*> views{&q4.view, &f8.view, &q6.view, &f32.view, &bf16.view};
  std::vector<cuda::CudaWeight> weights;
  for (const WeightView* v : views) weights.push_back(upload(*v));
  const Rows x = random_rows(random, 3, 512), before = random_rows(random, 3, 1000);
  CudaTensors tensors(card());
  std::vector<cuda::Product> products;
  for (const auto& w : weights) products.push_back({w.matrix(), tensors.make(3, w.rows(), true)});
  const cuda::CudaTensor residual = tensors.make(before);
  cuda::linear_few(*card(), tensors.make(x), products, {}, residual);
  for (std::size_t i = 0; i < views.size(); ++i) {
    const Rows found = tensors.read(products[i].y), expected = product(*views[i], x);
    INFO(info(views[i]->type).name, " ", worst_difference(found, expected));
    CHECK(nmse(found, expected) < bound(views[i]->type));
    if (i > 0) continue;
    Rows sum = before;
    for (std::size_t r = 0; r < 3; ++r) {
      for (std::size_t c = 0; c < 1000; ++c) sum[r][c] += found[r][c];
    }
    CHECK(nmse(tensors.read(residual), sum) < 1e-13);
  }
}

TEST_CASE("cuda: what comes before a product of few rows") {
  struct Case {
    FewInput::Kind kind;
    int cols, size;
    DType type;
  };
  using Kind = FewInput::Kind;
  Random random;
  for (const Case c :
       {Case{Kind::rms_norm, 2048, 2048, DType::q4_k}, Case{Kind::rms_norm, 2048, 2048, DType::f32},
        Case{Kind::rms_norm, 44, 44, DType::f32}, Case{Kind::rms_norm, 130, 130, DType::f16},
        Case{Kind::gated_rms_norm, 4096, 128, DType::q4_k}, Case{Kind::gated_rms_norm, 60, 12, DType::f32},
        Case{Kind::sigmoid_gate, 4096, 0, DType::q6_k}, Case{Kind::sigmoid_gate, 100, 0, DType::f32}}) {
    CAPTURE(c.cols);
    CAPTURE(info(c.type).name);
    const Matrix w(random, c.type, 70, c.cols);
    const cuda::CudaWeight on_card = upload(w.view);
    const int size = c.size > 0 ? c.size : c.cols;
    const Rows x = random_rows(random, 5, c.cols, 3), gate = random_rows(random, 5, c.cols);
    const std::vector<float> norm = random.normals(static_cast<std::size_t>(size));
    Rows expected = x;
    for (std::size_t t = 0; t < x.size(); ++t) {
      for (std::size_t i = 0; i < x[t].size(); ++i) {
        double value = static_cast<double>(x[t][i]);
        const auto at = static_cast<std::size_t>(size);
        if (c.size > 0) {
          double squares = 0;
          for (std::size_t j = i / at * at; j < i / at * at + at; ++j)
            squares += std::pow(static_cast<double>(x[t][j]), 2);
          value *= static_cast<double>(norm[i % at]) / std::sqrt(squares / size + 1e-6);
        }
        const double g = static_cast<double>(gate[t][i]);
        if (c.kind == Kind::gated_rms_norm) value *= g / (1 + std::exp(-g));
        if (c.kind == Kind::sigmoid_gate) value /= 1 + std::exp(-g);
        expected[t][i] = static_cast<float>(value);
      }
    }
    CudaTensors tensors(card());
    cuda::Uploader uploader(card());
    const cuda::CudaVector weights = uploader.vector({norm.data(), size});
    const auto run = [&](int begin, int rows, cuda::CudaTensor written) {
      const cuda::Product product{on_card.matrix(), tensors.make(rows, 70, true)};
      cuda::linear_few(*card(), tensors.make(slice(x, begin, rows)), {&product, 1},
                       {c.kind, weights.data, size, 1e-6f, tensors.make(slice(gate, begin, rows)), written});
      return tensors.read(product.y);
    };
    const cuda::CudaTensor written = tensors.make(5, c.cols, true);
    const Rows found = run(0, 5, written), input = tensors.read(written);
    INFO(worst_difference(input, expected));
    CHECK(nmse(input, expected) < 1e-12);
    CHECK(nmse(tensors.read_half(written), expected) < 1e-7);
    CHECK(nmse(found, product(w.view, input)) < bound(c.type));
    for (int t = 0; t < 5; ++t) CHECK(first_difference(run(t, 1, {}), slice(found, t, 1)) == "");
  }
}

namespace {

// A layer of experts of random weights.
struct Layer {
  Layer(Random& random, int count, int hidden, int width, int shared_width, DType up_type, DType down_type,
        DType shared_type, bool scaled) {
    const auto matrix = [&](DType type, int rows, int cols) {
      memory.emplace_back(random, type, rows, cols, 1, 1 / std::sqrt(static_cast<float>(cols)), true);
      WeightView view = memory.back().view;
      if (scaled) view.scale = 0.5f + std::fabs(random.normal());
      return view;
    };
    for (int e = 0; e < count; ++e) {
      const WeightView gate = matrix(up_type, width, hidden), up = matrix(up_type, width, hidden);
      views.push_back({gate, up, matrix(down_type, hidden, width)});
    }
    shared = {matrix(shared_type, shared_width, hidden), matrix(DType::f16, shared_width, hidden),
              matrix(shared_type, hidden, shared_width)};
  }
  std::deque<Matrix> memory;
  ExpertViews views;
  ExpertView shared;
};

std::vector<double> swiglu_expert(const ExpertView& e, const std::vector<float>& x) {
  const Rows one{x};
  const std::vector<float> gate = product(e.gate, one)[0], up = product(e.up, one)[0];
  std::vector<double> hidden, out;
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double g = static_cast<double>(gate[i]);
    hidden.push_back(g / (1 + std::exp(-g)) * static_cast<double>(up[i]));
  }
  for (const std::vector<float>& row : dequantized(e.down)) {
    double sum = 0;
    for (std::size_t i = 0; i < row.size(); ++i) sum += static_cast<double>(row[i]) * hidden[i];
    out.push_back(sum);
  }
  return out;
}

}  // namespace

TEST_CASE("cuda: experts of few rows") {
  struct Case {
    int count, k, hidden, width, shared_width;
    DType up, down, shared;
    bool normalise, scaled;
  };
  Random random;
  for (const Case c : {Case{32, 4, 256, 256, 512, DType::q4_k, DType::q6_k, DType::q4_k, true, false},
                       Case{70, 10, 512, 256, 256, DType::q4_k, DType::q4_k, DType::q6_k, true, false},
                       Case{40, 16, 44, 12, 20, DType::f32, DType::f32, DType::f32, false, false},
                       Case{7, 1, 64, 96, 32, DType::q8_0, DType::q5_0, DType::bf16, true, true},
                       Case{64, 3, 320, 64, 64, DType::nvfp4, DType::mxfp4, DType::f8_e4m3, true, true}}) {
    CAPTURE(c.count);
    CAPTURE(c.hidden);
    const Layer layer(random, c.count, c.hidden, c.width, c.shared_width, c.up, c.down, c.shared, c.scaled);
    cuda::Uploader uploader(card());
    const cuda::CudaExperts experts = uploader.experts(layer.views);
    uploader.finish();
    const cuda::CudaWeight shared[3]{upload(layer.shared.gate), upload(layer.shared.up), upload(layer.shared.down)};
    const int T = 8;
    const Rows x = random_rows(random, T, c.hidden), before = random_rows(random, T, c.hidden);
    Rows logits = random_rows(random, T, c.count, 2), shared_logit = random_rows(random, T, 1);
    for (float& l : logits[1]) l = std::nearbyint(l);     // many ties
    std::fill(logits[2].begin(), logits[2].end(), 0.5f);  // nothing but ties
    HostRouting expected_routing(T, c.k);
    ReferenceBackend reference;
    reference.router(expected_routing, make(reference, logits), c.k, c.normalise);

    Rows expected;
    for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) {
      std::vector<double> sum(static_cast<std::size_t>(c.hidden));
      const auto add = [&](const ExpertView& e, double weight) {
        const std::vector<double> y = swiglu_expert(e, x[t]);
        for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += weight * y[i];
      };
      for (std::size_t i = 0; i < static_cast<std::size_t>(c.k); ++i) {
        const std::size_t slot = t * static_cast<std::size_t>(c.k) + i;
        add(layer.views[static_cast<std::size_t>(expected_routing.ids[slot])],
            static_cast<double>(expected_routing.weights[slot]));
      }
      add(layer.shared, 1 / (1 + std::exp(-static_cast<double>(shared_logit[t][0]))));
      expected.emplace_back(sum.begin(), sum.end());
    }

    CudaTensors tensors(card());
    cuda::DeviceScratch scratch(card());
    const auto run = [&](int begin, int rows, bool route) {
      cuda::CudaRouting routing(card(), rows, c.k);
      const auto picks = static_cast<std::size_t>(rows * c.k), first = static_cast<std::size_t>(begin * c.k);
      if (!route) {
        card()->copy_to_device(routing.ids, expected_routing.ids.data() + first, picks * 4);
        card()->copy_to_device(routing.weights, expected_routing.weights.data() + first, picks * 4);
      }
      const cuda::CudaTensor out = tensors.make(rows, c.hidden, true), sum = tensors.make(slice(before, begin, rows));
      cuda::experts_few(*card(), scratch,
                        {.out = out,
                         .residual = sum,
                         .x = tensors.make(slice(x, begin, rows)),
                         .experts = &experts,
                         .logits = route ? tensors.make(slice(logits, begin, rows)) : cuda::CudaTensor{},
                         .routing = routing,
                         .normalise = c.normalise,
                         .shared_gate = shared[0].matrix(),
                         .shared_up = shared[1].matrix(),
                         .shared_down = shared[2].matrix(),
                         .shared_logit = tensors.make(slice(shared_logit, begin, rows))});
      std::vector<std::int32_t> ids(picks);
      std::vector<float> weights(picks);
      card()->copy_to_host(ids.data(), routing.ids, picks * 4);
      card()->copy_to_host(weights.data(), routing.weights, picks * 4);
      for (std::size_t i = 0; i < picks; ++i) {
        CAPTURE(i);
        CHECK(ids[i] == expected_routing.ids[first + i]);
        CHECK(weights[i] == doctest::Approx(expected_routing.weights[first + i]).epsilon(1e-5));
      }
      const Rows found = tensors.read(out);
      Rows total = slice(before, begin, rows);
      for (std::size_t t = 0; t < total.size(); ++t) {
        for (std::size_t i = 0; i < total[t].size(); ++i) total[t][i] += found[t][i];
      }
      CHECK(nmse(tensors.read(sum), total) < 1e-13);
      return found;
    };
    const Rows found = run(0, T, true);
    INFO(worst_difference(found, expected));
    CHECK(nmse(found, expected) < 5e-7);
    CHECK(nmse(run(0, T, false), expected) < 5e-7);
    for (int rows = 1; rows < T; ++rows) {
      CHECK(first_difference(run(T - rows, rows, true), slice(found, T - rows, rows)) == "");
    }
  }
}

TEST_CASE("cuda: logits that are not numbers choose the first experts") {
  Random random;
  const Layer layer(random, 8, 64, 32, 32, DType::f16, DType::f16, DType::f16, false);
  cuda::Uploader uploader(card());
  const cuda::CudaExperts experts = uploader.experts(layer.views);
  uploader.finish();
  CudaTensors tensors(card());
  cuda::DeviceScratch scratch(card());
  cuda::CudaRouting routing(card(), 1, 3);
  Rows logits = random_rows(random, 1, 8);
  logits[0][5] = NAN;
  cuda::experts_few(*card(), scratch,
                    {.out = tensors.make(1, 64),
                     .x = tensors.make(random_rows(random, 1, 64)),
                     .experts = &experts,
                     .logits = tensors.make(logits),
                     .routing = routing});
  std::vector<std::int32_t> ids(3);
  card()->copy_to_host(ids.data(), routing.ids, 12);
  CHECK(ids == std::vector<std::int32_t>{0, 1, 2});
}
