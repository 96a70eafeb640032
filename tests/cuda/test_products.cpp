// Weights on the card, and their products with few rows.

#include <doctest/doctest.h>

#include <chrono>
#include <cstdio>

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
      const double error = nmse(found, expected);
      MESSAGE(type.name, " ", cols, " NMSE ", error);
      CHECK(error < bound(type.type));
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

// --- times, by --no-skip --test-case="bench: few*" -----------------------------------------------------------------

namespace {

// Copies of a matrix, more than the card's cache holds; contents do not matter.
struct ManyCopies {
  ManyCopies(DType type, int rows, int cols) : matrix{.data = nullptr, .rows = rows, .cols = cols, .type = type} {
    count = std::max<std::size_t>(1, (std::size_t{300} << 20) / matrix.bytes());
    memory = cuda::DeviceBytes(card(), count * matrix.bytes(), "a benchmark");
    card()->clear(memory.data(), memory.size());
  }
  cuda::Matrix operator[](std::size_t i) const {
    cuda::Matrix m = matrix;
    m.data = memory.data() + i % count * matrix.bytes();
    return m;
  }
  cuda::Matrix matrix;
  std::size_t count;
  cuda::DeviceBytes memory;
};

template <class F>
void time(const char* name, double bytes, F f) {
  cuda::DeviceTimer timer(card());
  constexpr int times = 200;
  for (int i = 0; i < 20; ++i) f(static_cast<std::size_t>(i));
  timer.start();
  for (int i = 0; i < times; ++i) f(static_cast<std::size_t>(20 + i));
  const double seconds = timer.seconds() / times;
  std::printf("%-44s %8.2f us %8.0f GB/s\n", name, seconds * 1e6, bytes / seconds * 1e-9);
}

}  // namespace

TEST_CASE("bench: few rows, products" * doctest::skip()) {
  CudaTensors tensors(card());
  const cuda::CudaTensor norm = tensors.make(1, 4096);
  for (const int T : {1, 2, 5, 8}) {
    const auto run = [&](const char* name, DType type, int rows, int cols, FewInput input, bool add) {
      const ManyCopies w(type, rows, cols);
      const cuda::CudaTensor x = tensors.make(T, cols), y = tensors.make(T, rows), residual = tensors.make(T, rows);
      input.norm = norm.data, input.gate = tensors.make(T, cols);
      if (input.kind == FewInput::Kind::rms_norm) input.written = tensors.make(T, cols), input.norm_size = cols;
      time((std::string(name) + " T=" + std::to_string(T)).c_str(), static_cast<double>(w.matrix.bytes()),
           [&](std::size_t i) {
             const cuda::Product product{w[i], y};
             cuda::linear_few(*card(), x, {&product, 1}, input, add ? residual : cuda::CudaTensor{});
           });
    };
    const FewInput normed{.kind = FewInput::Kind::rms_norm, .eps = 1e-6f};
    const FewInput gated_norm{.kind = FewInput::Kind::gated_rms_norm, .norm_size = 128, .eps = 1e-6f};
    const FewInput gated{.kind = FewInput::Kind::sigmoid_gate};
    run("in_proj 12352 x 2048 q4_k, rms_norm", DType::q4_k, 12352, 2048, normed, false);
    run("in_proj 12352 x 2048 q4_k, plain", DType::q4_k, 12352, 2048, {}, false);
    run("qkv 9216 x 2048 q4_k, rms_norm", DType::q4_k, 9216, 2048, normed, false);
    run("out_proj 2048 x 4096 q4_k, gated norm, add", DType::q4_k, 2048, 4096, gated_norm, true);
    run("o_proj 2048 x 4096 q4_k, sigmoid gate, add", DType::q4_k, 2048, 4096, gated, true);
    run("out_proj 2048 x 4096 q4_k, plain", DType::q4_k, 2048, 4096, {}, true);
    run("router 513 x 2048 f32, rms_norm", DType::f32, 513, 2048, normed, false);
    run("lm_head 151936 x 2048 q6_k", DType::q6_k, 151936, 2048, {}, false);
    if (T > 1) continue;
    for (const DType type : {DType::f16, DType::bf16, DType::f8_e4m3, DType::q8_0, DType::q5_k, DType::q4_0,
                             DType::iq4_xs, DType::mxfp4, DType::nvfp4}) {
      run((std::string(info(type).name) + " 12352 x 2048, plain").c_str(), type, 12352, 2048, {}, false);
    }
  }
}

TEST_CASE("bench: few rows, taking weights to the card" * doctest::skip()) {
  const std::vector<std::byte> memory(std::size_t{1} << 30, std::byte{1});
  const int rows = static_cast<int>(memory.size() / 1152 / 512 * 512);
  cuda::Uploader uploader(card());
  for (int i = 0; i < 3; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const cuda::CudaWeight w = uploader.weight(WeightView::contiguous(memory.data(), DType::q4_k, rows, 2048));
    uploader.finish();
    card()->wait();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("upload of 1 GiB of q4_k: %.3f s, %.1f GB/s\n", seconds,
                static_cast<double>(memory.size()) / seconds * 1e-9);
  }
}
