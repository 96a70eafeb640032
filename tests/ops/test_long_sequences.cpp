// What a million tokens could wear down: the angles of far positions, and a state that is rounded at every token.

#include <array>
#include <utility>

#include "model/config.hpp"
#include "tests/ops/cpu_ops.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

// Four value heads of one key head, each with gates of its own kind.  Rows of a table in an order that does not repeat
// with it; a gate of token t is the same in every run.
struct LongDelta {
  static constexpr int heads = 4, D = 16, distinct = 1021;
  DeltaShape shape{1, heads, D, D, 4};
  Rows qkv, noise;

  explicit LongDelta(Random& random)
      : qkv(random_rows(random, distinct, shape.conv_dim())), noise(random_rows(random, distinct, 2 * heads)) {}

  const std::vector<float>& row(const Rows& table, std::int64_t t) const {
    return table[static_cast<std::size_t>((t + t / distinct * 7) % distinct)];
  }
  // g <= 0 of a head: 0 forgets nothing, and a million tokens at -1e-7 keep nine tenths.
  float g(std::int64_t t, int head) const {
    const float x = row(noise, t)[static_cast<std::size_t>(head)];
    const std::array<float, heads> scales{1e-7f, 0, 1e-3f, 0.3f};
    return -scales[static_cast<std::size_t>(head)] * std::abs(x);
  }
  // 0 < beta < 1: what a key had is replaced nearly whole, half, or hardly.
  float beta(std::int64_t t, int head) const {
    const float x = row(noise, t)[static_cast<std::size_t>(heads + head)];
    const std::array<float, heads> bias{7, 0, -6, 3};
    return 1 / (1 + std::exp(-x - bias[static_cast<std::size_t>(head)]));
  }
};

// The recurrent form in fp64, of the same inputs.
class DeltaInDouble {
 public:
  static constexpr int heads = LongDelta::heads, D = LongDelta::D;
  using Row = std::array<double, D>;

  // Outputs of all heads for token t.
  std::array<Row, heads> step(const LongDelta& d, std::int64_t t) {
    const std::vector<float>& x = d.row(d.qkv, t);
    auto unit = [&](int begin) {
      Row row;
      double squares = 1e-6;
      for (int i = 0; i < D; ++i) row[i] = x[static_cast<std::size_t>(begin + i)], squares += row[i] * row[i];
      for (double& y : row) y /= std::sqrt(squares);
      return row;
    };
    Row q = unit(0), k = unit(D);
    for (double& y : q) y /= std::sqrt(static_cast<double>(D));
    std::array<Row, heads> out{};
    for (int h = 0; h < heads; ++h) {
      const double decay = std::exp(double{d.g(t, h)}), beta = d.beta(t, h);
      for (int v = 0; v < D; ++v) {
        Row& s = S[h][v];
        double held = 0, o = 0;
        for (int i = 0; i < D; ++i) held += (s[i] *= decay) * k[i];
        const double delta = beta * (x[static_cast<std::size_t>((2 + h) * D + v)] - held);
        for (int i = 0; i < D; ++i) o += (s[i] += delta * k[i]) * q[i];
        out[h][v] = o;
      }
    }
    return out;
  }

  std::array<std::array<Row, D>, heads> S{};  // [head, Dv, Dk]
};

}  // namespace

// Rounding each token's update to fp32 must not add up: what a state holds of its errors fades as what it holds of its
// inputs does.  The norm of the error over that of outputs and state is 1e-7 to 9e-7 after 8192 tokens and no more
// after a million.
TEST_CASE("delta rule: a million tokens stay beside the recurrent form in fp64, token by token and in chunks") {
  constexpr int pass = 1024, D = LongDelta::D, heads = LongDelta::heads;
  constexpr std::array<std::int64_t, 4> looks{1 << 13, 1 << 16, 1 << 18, 1 << 20};  // tokens, after which to compare
  Random random;
  const LongDelta d(random);

  // For each look and head: the outputs of the last pass, then the state.
  std::vector<std::array<Rows, heads>> right;
  DeltaInDouble exact;
  std::array<Rows, heads> window;
  for (std::int64_t t = 0; t < looks.back(); ++t) {
    if (t % pass == 0) window = {};
    const auto out = exact.step(d, t);
    for (int h = 0; h < heads; ++h) window[h].emplace_back(out[h].begin(), out[h].end());
    if (t + 1 != looks[right.size()]) continue;
    for (int h = 0; h < heads; ++h) {
      for (const auto& row : exact.S[h]) window[h].emplace_back(row.begin(), row.end());
    }
    right.push_back(window);
  }

  int lanes = 0;
  on_every_isa([&](std::string_view isa) {
    if (std::exchange(lanes, cpu_backend(isa).kernels().lanes) == lanes) return;  // the neighbour has the same code
    for (const int T : {8, pass}) {                                               // the recurrent and the chunked form
      CAPTURE(T);
      CpuBackend be = cpu_backend(isa, 1);
      HostDeltaState state(d.shape);
      HostTensor qkv = be.tensor(pass, d.shape.conv_dim()), beta = be.tensor(pass, heads), g = be.tensor(pass, heads),
                 out = be.tensor(pass, heads * D);
      std::array<double, heads> first{};
      std::size_t look = 0;
      for (std::int64_t t0 = 0; t0 < looks.back(); t0 += pass) {
        for (int t = 0; t < pass; ++t) {
          const std::vector<float>& x = d.row(d.qkv, t0 + t);
          std::copy(x.begin(), x.end(), qkv.row(t));
          for (int h = 0; h < heads; ++h) g.row(t)[h] = d.g(t0 + t, h), beta.row(t)[h] = d.beta(t0 + t, h);
        }
        for (int t = 0; t < pass; t += T) {
          const Segment<HostDeltaState> segment{0, T, t0 + t, &state};
          be.gated_delta_rule(out.rows(t, T), qkv.rows(t, T), beta.rows(t, T), g.rows(t, T), d.shape, {&segment, 1});
        }
        if (t0 + pass != looks[look]) continue;
        for (int h = 0; h < heads; ++h) {
          CAPTURE(h);
          CAPTURE(looks[look]);
          Rows found;
          for (int t = 0; t < pass; ++t) found.emplace_back(out.row(t) + h * D, out.row(t) + (h + 1) * D);
          for (int v = 0; v < D; ++v) {
            const float* row = state.S.floats() + (h * D + v) * D;
            found.emplace_back(row, row + D);
          }
          const double error = std::sqrt(nmse(found, right[look][h]));
          CHECK(error < 2e-6);
          if (look == 0) first[h] = error;
          CHECK(error < 2 * first[h]);
        }
        ++look;
      }
    }
  });
}
