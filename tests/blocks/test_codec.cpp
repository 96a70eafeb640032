#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "blocks/codec.hpp"

using namespace qwen3next;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

// The definition, in double.
double f16_value(unsigned h) {
  const double sign = h >> 15 ? -1 : 1;
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 31) return fraction ? std::nan("") : sign * inf;
  return exponent == 0 ? sign * std::ldexp(fraction, -24) : sign * std::ldexp(1024 + fraction, exponent - 25);
}

std::vector<std::byte> read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::vector<std::byte> bytes(text.size());
  std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

std::vector<float> gaussian(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

std::vector<float> laplace(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::exponential_distribution<float> exponential(50);
  std::vector<float> x(n);
  for (float& v : x) v = exponential(random) * (random() & 1 ? 1.0f : -1.0f);
  return x;
}

std::vector<float> round_trip(DType type, const std::vector<float>& x, const float* importance = nullptr) {
  const auto n = static_cast<std::int64_t>(x.size());
  std::vector<std::byte> bytes(row_bytes(type, n));
  std::vector<float> y(x.size());
  quantize_row(type, x.data(), bytes.data(), n, importance);
  dequantize_row(type, bytes.data(), y.data(), n);
  return y;
}

double relative_rmse(const std::vector<float>& x, const std::vector<float>& y, const float* weight = nullptr) {
  double error = 0, square = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double w = weight ? weight[i] : 1, e = y[i] - x[i];
    error += w * e * e;
    square += w * static_cast<double>(x[i]) * x[i];
  }
  return std::sqrt(error / square);
}

}  // namespace

TEST_CASE("every f16 is read as defined and written back") {
  for (unsigned h = 0; h < 65536; ++h) {
    const float f = f16_to_f32(static_cast<std::uint16_t>(h));
    const double expected = f16_value(h);
    if (std::isnan(expected)) {
      REQUIRE(std::isnan(f));
      REQUIRE(std::isnan(f16_to_f32(f32_to_f16(f))));
    } else {
      REQUIRE(f == expected);
      REQUIRE(std::signbit(f) == (h >> 15 != 0));
      REQUIRE(f32_to_f16(f) == h);
    }
  }
}

TEST_CASE("f16 rounds to nearest, ties to even") {
  for (unsigned h = 0; h < 0x7c00; ++h) {  // between h and the next one; after the largest, as if 65536 came
    const double low = f16_value(h), high = h == 0x7bff ? 65536 : f16_value(h + 1);
    const auto tie = static_cast<float>((low + high) / 2);
    const unsigned even = h % 2 == 0 ? h : h + 1;
    for (const float sign : {1.0f, -1.0f}) {
      const unsigned bit = sign < 0 ? 0x8000u : 0;
      REQUIRE(f32_to_f16(sign * tie) == (even | bit));
      REQUIRE(f32_to_f16(sign * std::nextafter(tie, 0.0f)) == (h | bit));
      REQUIRE(f32_to_f16(sign * std::nextafter(tie, inf)) == ((h + 1) | bit));
    }
  }
  CHECK(f32_to_f16(inf) == 0x7c00);
  CHECK(f32_to_f16(-inf) == 0xfc00);
  CHECK(f32_to_f16(1e30f) == 0x7c00);
  CHECK(f32_to_f16(1e-30f) == 0);
  CHECK(f32_to_f16(-1e-45f) == 0x8000);
  CHECK(std::isnan(f16_to_f32(f32_to_f16(not_a_number))));
  static_assert(f32_to_f16(1.0f) == 0x3c00 && f16_to_f32(0x0001) == 0x1p-24f);
}

TEST_CASE("every F8_E4M3 code is read as defined; between two, the nearest is written, ties to even") {
  const auto value = [](unsigned code) {  // the definition, in double
    const int exponent = code >> 3 & 15, fraction = code & 7;
    const double magnitude = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    return code & 0x80 ? -magnitude : magnitude;
  };
  for (unsigned code = 0; code < 256; ++code) {
    const float f = f8_e4m3_to_f32(static_cast<std::uint8_t>(code));
    if ((code & 0x7f) == 0x7f) {
      REQUIRE(std::isnan(f));
      REQUIRE((f32_to_f8_e4m3(f) & 0x7f) == 0x7f);
      continue;
    }
    REQUIRE(f == value(code));
    REQUIRE(std::signbit(f) == (code >> 7 != 0));
    REQUIRE(f32_to_f8_e4m3(f) == code);
    const unsigned next = code + 1;  // one magnitude up; above 448, as if 480 were one
    const auto tie = static_cast<float>((value(code) + value(next)) / 2);
    REQUIRE(f32_to_f8_e4m3(tie) == code + code % 2);
    REQUIRE(f32_to_f8_e4m3(std::nextafter(tie, 0.0f)) == code);
    REQUIRE(f32_to_f8_e4m3(std::nextafter(tie, 1e9f * tie)) == next);
  }
  static_assert(f8_e4m3_to_f32(0x7e) == 448 && f8_e4m3_to_f32(0x81) == -0x1p-9f);
  CHECK(f32_to_f8_e4m3(inf) == 0x7f);
  CHECK(f32_to_f8_e4m3(1e-30f) == 0);
}

TEST_CASE("bf16 is the upper half of a float, rounded to even") {
  for (unsigned h = 0; h < 65536; ++h) {
    const float f = bf16_to_f32(static_cast<std::uint16_t>(h));
    if (std::isnan(f)) {
      REQUIRE(std::isnan(bf16_to_f32(f32_to_bf16(f))));
    } else {
      REQUIRE(f32_to_bf16(f) == h);
      if (std::isinf(f)) continue;
      REQUIRE(f32_to_bf16(std::bit_cast<float>(h << 16 | 0x8000u)) == h + h % 2);
      REQUIRE(f32_to_bf16(std::bit_cast<float>(h << 16 | 0x7fffu)) == h);
      REQUIRE(f32_to_bf16(std::bit_cast<float>(h << 16 | 0x8001u)) == h + 1);
    }
  }
  CHECK(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));  // not rounded to infinity
}

TEST_CASE("blocks have the values that the gguf package gives them, at any address") {
  for (const DTypeInfo& type : dtype_table) {
    if (!type.quantised) continue;
    CAPTURE(type.name);
    const std::filesystem::path folder = std::filesystem::path(QWEN3NEXT_SOURCE_DIR) / "tests/golden/blocks";
    std::vector<std::byte> bytes = read_file(folder / (std::string(type.name) + ".bin"));
    const auto values = static_cast<std::size_t>(type.elements) * sizeof(float);
    const std::size_t count = bytes.size() / (static_cast<std::size_t>(type.bytes) + values);
    const auto n = static_cast<std::int64_t>(count) * type.elements;
    REQUIRE(n >= 2048);
    REQUIRE(bytes.size() == row_bytes(type.type, n) + count * values);
    std::vector<float> expected(static_cast<std::size_t>(n)), found(expected.size());
    std::memcpy(expected.data(), bytes.data() + row_bytes(type.type, n), count * values);
    for (int shift = 0; shift < 2; ++shift) {
      dequantize_row(type.type, bytes.data() + shift, found.data(), n);
      for (std::size_t i = 0; i < found.size(); ++i) REQUIRE(same_bits(found[i], expected[i]));
      bytes.insert(bytes.begin(), std::byte{});
    }
  }
}

TEST_CASE("scales and levels go into a block and come out") {
  std::mt19937 random(1);
  ScaleMin pairs[8];
  for (auto& [scale, min] : pairs) scale = random() & 63, min = random() & 63;
  std::uint8_t packed[12];
  set_scale_min(packed, pairs);
  for (int k = 0; k < 8; ++k) {
    CHECK(get_scale_min(packed, k).scale == pairs[k].scale);
    CHECK(get_scale_min(packed, k).min == pairs[k].min);
  }
  int scales[16];
  for (int& s : scales) s = static_cast<int>(random() & 63) - 32;
  set_scales_q3(packed, scales);
  for (int k = 0; k < 16; ++k) CHECK(get_scale_q3(packed, k) == scales[k]);

  const auto check_levels = [&](auto block, unsigned levels, int offset) {
    std::memset(static_cast<void*>(&block), 0, sizeof block);
    std::uint8_t q[256];
    for (auto& v : q) v = static_cast<std::uint8_t>(random() % levels);
    set_levels(block, q);
    block.d = f32_to_f16(1);
    if constexpr (requires { block.dmin; }) {
      const ScaleMin ones[8] = {{1, 0}, {1, 0}, {1, 0}, {1, 0}, {1, 0}, {1, 0}, {1, 0}, {1, 0}};
      if constexpr (sizeof block == sizeof(BlockQ2_K)) {
        for (auto& s : block.scales) s = 1;
      } else {
        set_scale_min(block.scales, ones);
      }
    } else if constexpr (sizeof block == sizeof(BlockQ3_K)) {
      const int ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
      set_scales_q3(block.scales, ones);
    } else {
      for (auto& s : block.scales) s = 1;
    }
    float y[256];
    unpack(block, y);
    for (int i = 0; i < 256; ++i) REQUIRE(y[i] == static_cast<float>(q[i] - offset));
  };
  check_levels(BlockQ2_K{}, 4, 0);
  check_levels(BlockQ3_K{}, 8, 4);
  check_levels(BlockQ4_K{}, 16, 0);
  check_levels(BlockQ5_K{}, 32, 0);
  check_levels(BlockQ6_K{}, 64, 32);
}

// Bounds: 0.5 % above what is measured here.  llama.cpp's quantiser, on data of the same kind (compare_quantizers.py):
//   Gaussian  Q4_0 .0861  Q4_1 .0783  Q5_0 .0428  Q5_1 .0379  Q8_0 .00536  Q2_K .297  Q3_K .1511  Q4_K .0715
//             Q5_K .0362  Q6_K .0178  IQ4_NL .0762  IQ4_XS .0768  MXFP4 .1141  NVFP4 .1033
//   Laplace   Q4_0 .1065  Q4_1 .0918  Q5_0 .0533  Q5_1 .0445  Q8_0 .00672  Q2_K .344  Q3_K .1760  Q4_K .0844
//             Q5_K .0427  Q6_K .0216  IQ4_NL .0878  IQ4_XS .0885  MXFP4 .1256  NVFP4 .0970
TEST_CASE("quantisation errors are as small as they were") {
  struct Bound {
    DType type;
    double gaussian, laplace;
  };
  using enum DType;
  constexpr Bound bounds[] = {
      {f32, 0, 0},
      {f16, 0.00022, 0.00022},
      {bf16, 0.00167, 0.00167},
      {f8_e4m3, 0.03314, 0.03013},  // without factors
      {q4_0, 0.0819, 0.1035},
      {q4_1, 0.0704, 0.0829},
      {q5_0, 0.0406, 0.0518},
      {q5_1, 0.0336, 0.0397},
      {q8_0, 0.00537, 0.00676},
      {q2_k, 0.2701, 0.3004},
      {q3_k, 0.1457, 0.1715},
      {q4_k, 0.0711, 0.0841},
      {q5_k, 0.0348, 0.0412},
      {q6_k, 0.01672, 0.0206},
      {iq4_nl, 0.0742, 0.0860},
      {iq4_xs, 0.0748, 0.0868},
      {mxfp4, 0.1118, 0.1230},
      {nvfp4, 0.0901, 0.0878},
  };
  static_assert(std::size(bounds) == dtype_table.size());
  const auto normal = gaussian(1 << 17, 2), heavy = laplace(1 << 17, 3);
  for (const Bound& b : bounds) {
    CAPTURE(info(b.type).name);
    CHECK(relative_rmse(normal, round_trip(b.type, normal)) <= b.gaussian);
    CHECK(relative_rmse(heavy, round_trip(b.type, heavy)) <= b.laplace);
  }
}

TEST_CASE("importance moves the error to columns that matter less") {
  const auto x = gaussian(1 << 15, 4);
  std::vector<float> importance(x.size());
  std::mt19937 random(5);
  std::chi_squared_distribution<float> chi(1);
  for (float& w : importance) w = chi(random) + 0.01f;
  for (const DTypeInfo& type : dtype_table) {
    if (!type.quantised || type.type == DType::q8_0) continue;  // 8 bits need no such care
    CAPTURE(type.name);
    const double without = relative_rmse(x, round_trip(type.type, x), importance.data());
    const double with = relative_rmse(x, round_trip(type.type, x, importance.data()), importance.data());
    CHECK(with < (type.type == DType::mxfp4 ? 0.99 : 0.93) * without);  // powers of two leave little choice
  }
}

TEST_CASE("quantisation survives odd blocks") {
  const auto x = gaussian(256, 6);
  const std::vector<float> ignored(256, 0.0f);
  for (const DTypeInfo& type : dtype_table) {
    if (!type.quantised) continue;
    CAPTURE(type.name);
    const bool iq4 = type.type == DType::iq4_nl || type.type == DType::iq4_xs;
    const bool fp4 = type.type == DType::mxfp4 || type.type == DType::nvfp4;
    const auto check_close = [&](const std::vector<float>& values, double bound) {
      const auto y = round_trip(type.type, values);
      for (std::size_t i = 0; i < y.size(); ++i) {
        REQUIRE(std::isfinite(y[i]));
        CHECK(std::fabs(static_cast<double>(y[i]) - static_cast<double>(values[i])) <= bound);
      }
    };
    check_close(std::vector<float>(256, 0.0f), 0);
    check_close(std::vector<float>(256, 1.5f), 0.001);
    check_close(std::vector<float>(256, -1.5f), 0.001);
    std::vector<float> spike(256, 0.0f);
    const double of_three = iq4 ? 0.03 : 0.002;  // IQ4 has no level for 0
    spike[77] = 3;
    check_close(spike, of_three);
    spike[77] = -3;
    check_close(spike, of_three);
    if (!fp4) {  // whose scales are coarser, or end
      spike[200] = 60000;
      check_close(spike, iq4 ? 600 : 30);
    }
    for (const float scale : {1e-3f, 1e-5f, 1e-12f, 1e-30f, 1e-42f}) {  // down to what F16 scales cannot express
      std::vector<float> small = x;
      for (float& v : small) v *= scale;
      check_close(small, 0.1 * static_cast<double>(scale));
    }
    for (const float large : {1e6f, 1e30f, 3e38f}) {  // more than F16 scales can express: the nearest that they can
      std::vector<float> values = x;
      for (float& v : values) v *= large;
      CHECK(std::ranges::all_of(round_trip(type.type, values), [](float v) { return std::isfinite(v); }));
    }
    CHECK(std::ranges::all_of(round_trip(type.type, x, ignored.data()), [](float v) { return std::isfinite(v); }));
  }
}

TEST_CASE("packing is deterministic and knows no neighbours") {
  const auto x = gaussian(512, 7);
  for (const DTypeInfo& type : dtype_table) {
    CAPTURE(type.name);
    std::vector<std::byte> both(row_bytes(type.type, 512)), second(row_bytes(type.type, 256));
    quantize_row(type.type, x.data(), both.data(), 512);
    quantize_row(type.type, x.data() + 256, second.data(), 256);
    CHECK(std::memcmp(both.data() + second.size(), second.data(), second.size()) == 0);
  }
}
