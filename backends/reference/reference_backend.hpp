#pragma once
// The specification: every operation in float32 and in plain words (Eigen for the matrix products), one thread.
//
// Other backends are tested against this one, operation by operation.  It reads every weight type by expanding rows to
// float32, keeps its KV cache in float32 and computes the delta rule token by token.

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <span>
#include <vector>

#include "backends/backend.hpp"
#include "backends/host_state.hpp"
#include "backends/host_tensor.hpp"
#include "blocks/codec.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next {

class ReferenceBackend {
 public:
  using Tensor = HostTensor;
  using Weight = WeightView;
  using Vector = VectorView;
  using Experts = ExpertViews;
  using Routing = HostRouting;
  using DeltaState = HostDeltaState;
  using KvCache = HostKvCache;

  Tensor tensor(int rows, int cols) {
    memory_.emplace_back(sizeof(float) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols));
    return {memory_.back().floats(), rows, cols, cols};
  }
  Routing routing(int rows, int k) { return {rows, k}; }
  DeltaState delta_state(DeltaShape s) { return DeltaState(s); }
  KvCache kv_cache(AttentionShape s) { return KvCache(s, KvType::f32); }
  std::span<const float> host(Tensor row) { return row[0]; }
  void set_host(Tensor row, std::span<const float> values) { std::copy(values.begin(), values.end(), row.row(0)); }
  void copy(Tensor out, Tensor x) {
    for (int t = 0; t < x.n_rows; ++t) std::copy_n(x.row(t), x.n_cols, out.row(t));
  }

  void embed(Tensor out, std::span<const std::int32_t> tokens, const Weight& w) {
    for (int t = 0; t < out.n_rows; ++t) dequantize(w, tokens[static_cast<std::size_t>(t)], out.row(t));
  }

  void rms_norm(Tensor out, Tensor x, const Vector& weight, float eps) {
    const int D = weight.size;
    for (int t = 0; t < x.n_rows; ++t) {
      for (int d = 0; d < x.n_cols; d += D) {
        const auto in = vec(x.row(t) + d, D);
        const float scale = 1 / std::sqrt(in.squaredNorm() / static_cast<float>(D) + eps);
        vec(out.row(t) + d, D) = (in * scale).cwiseProduct(vec(weight.data, D));
      }
    }
  }

  void linear(Tensor x, std::initializer_list<Projection<Weight, Tensor>> projections) {
    for (const auto& [w, y] : projections) multiply(w, x, y);
  }

  void causal_conv1d(Tensor out, Tensor x, const Vector& taps, std::span<const Segment<DeltaState>> segments) {
    const int C = x.n_cols, K = taps.cols;
    for (const auto& s : segments) {
      std::vector<float> window(static_cast<std::size_t>(K) * static_cast<std::size_t>(C));  // [K, C], newest last
      const std::size_t past = window.size() - static_cast<std::size_t>(C);
      std::copy_n(s.state->conv.floats(), past, window.begin());
      for (int t = s.begin; t < s.begin + s.count; ++t) {
        std::copy_n(x.row(t), C, window.end() - C);
        for (int c = 0; c < C; ++c) {
          float sum = 0;
          for (int j = 0; j < K; ++j) sum += taps.data[c * K + j] * window[static_cast<std::size_t>(j * C + c)];
          out.row(t)[c] = silu(sum);
        }
        std::copy(window.begin() + C, window.end(), window.begin());
        if (s.tentative) s.state->keep_inputs(t - s.begin, x.row(t));
      }
      if (!s.tentative) std::copy_n(window.begin(), past, s.state->conv.floats());
    }
  }

  void delta_gates(Tensor beta, Tensor g, Tensor b, Tensor a, const Vector& A, const Vector& dt_bias) {
    for (int t = 0; t < b.n_rows; ++t) {
      for (int h = 0; h < b.n_cols; ++h) {
        beta[t][static_cast<std::size_t>(h)] = sigmoid(b.row(t)[h]);
        g[t][static_cast<std::size_t>(h)] = A.data[h] * softplus(a.row(t)[h] + dt_bias.data[h]);
      }
    }
  }

  void gated_delta_rule(Tensor out, Tensor qkv, Tensor beta, Tensor g, DeltaShape shape,
                        std::span<const Segment<DeltaState>> segments) {
    for (const auto& s : segments) {
      settle_rows(*s.state, shape);
      AlignedBytes guessed;
      if (s.tentative) guessed = s.state->S;
      float* S = s.tentative ? guessed.floats() : s.state->S.floats();
      for (int t = s.begin; t < s.begin + s.count; ++t) {
        delta_step(S, shape, qkv.row(t), beta.row(t), g.row(t), out.row(t));
        if (s.tentative) s.state->keep_rows(t - s.begin, qkv.row(t), beta.row(t), g.row(t));
      }
    }
  }

  void settle(DeltaState& state, DeltaShape shape) {
    settle_rows(state, shape);
    state.settled();
  }

  void gated_rms_norm(Tensor out, Tensor o, Tensor z, const Vector& weight, float eps) {
    rms_norm(out, o, weight, eps);
    for (int t = 0; t < o.n_rows; ++t) {
      for (int i = 0; i < o.n_cols; ++i) out.row(t)[i] *= silu(z.row(t)[i]);
    }
  }

  void rope_angles(Tensor angles, std::span<const double> frequency, float scale,
                   std::span<const Segment<KvCache>> segments) {
    const int n = static_cast<int>(frequency.size());
    for (const auto& s : segments) {
      for (int t = 0; t < s.count; ++t) {
        float* row = angles.row(s.begin + t);
        for (int i = 0; i < n; ++i) {
          const double angle = static_cast<double>(s.position + t) * frequency[static_cast<std::size_t>(i)];
          row[i] = scale * static_cast<float>(std::cos(angle));
          row[n + i] = scale * static_cast<float>(std::sin(angle));
        }
      }
    }
  }

  void rope(Tensor x, Tensor angles, int head_dim) {
    const int n = angles.n_cols / 2;
    for (int t = 0; t < x.n_rows; ++t) {
      const float *cos = angles.row(t), *sin = cos + n;
      for (int h = 0; h < x.n_cols; h += head_dim) {
        float *first = x.row(t) + h, *second = first + n;
        for (int i = 0; i < n; ++i) {
          const float a = first[i], b = second[i];
          first[i] = a * cos[i] - b * sin[i];
          second[i] = b * cos[i] + a * sin[i];
        }
      }
    }
  }

  void attention(Tensor out, Tensor q, Tensor k, Tensor v, AttentionShape shape,
                 std::span<const Segment<KvCache>> segments) {
    append_kv(k, v, shape, segments);
    const int D = shape.head_dim;
    const float scale = 1 / std::sqrt(static_cast<float>(D));
    for (const auto& s : segments) {
      KvCache& cache = *s.state;
      const std::int64_t first = cache.length() - s.count;
      for (int t = 0; t < s.count; ++t) {
        for (int h = 0; h < shape.heads; ++h) {
          const int kv_head = h / (shape.heads / shape.kv_heads);
          const auto query = vec(q.row(s.begin + t) + h * D, D);
          const std::int64_t visible = first + t + 1;
          Eigen::VectorXf scores(visible);
          for (std::int64_t p = 0; p < visible; ++p)
            scores[p] = scale * query.dot(vec(row(cache.key_row(p, kv_head)), D));
          scores = (scores.array() - scores.maxCoeff()).exp();
          scores /= scores.sum();
          auto result = vec(out.row(s.begin + t) + h * D, D);
          result.setZero();
          for (std::int64_t p = 0; p < visible; ++p) result += scores[p] * vec(row(cache.value_row(p, kv_head)), D);
        }
      }
    }
  }

  void append_kv(Tensor k, Tensor v, AttentionShape shape, std::span<const Segment<KvCache>> segments) {
    const int D = shape.head_dim;
    for (const auto& s : segments) {
      const std::int64_t first = s.state->extend(s.count);
      for (int t = 0; t < s.count; ++t) {
        for (int h = 0; h < shape.kv_heads; ++h) {
          store_row(s.state->key_row(first + t, h), k.row(s.begin + t) + h * D, D);
          store_row(s.state->value_row(first + t, h), v.row(s.begin + t) + h * D, D);
        }
      }
    }
  }

  void sigmoid_gate(Tensor x, Tensor gate) {
    for (int t = 0; t < x.n_rows; ++t) {
      for (int i = 0; i < x.n_cols; ++i) x.row(t)[i] *= sigmoid(gate.row(t)[i]);
    }
  }

  void router(Routing& routing, Tensor logits, int k, bool normalise) {
    const int E = logits.n_cols;
    routing.rows = logits.n_rows;
    std::vector<std::int32_t> order(static_cast<std::size_t>(E));
    for (int t = 0; t < logits.n_rows; ++t) {
      const auto row = vec(logits.row(t), E);
      Eigen::VectorXf p = (row.array() - row.maxCoeff()).exp();
      p /= p.sum();
      p = p.array().isNaN().select(-1, p);  // damaged weights: no order of NaNs, but an order
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + k, order.end(),
                        [&](int a, int b) { return p[a] != p[b] ? p[a] > p[b] : a < b; });
      float sum = 0;
      for (int i = 0; i < k; ++i) sum += p[order[static_cast<std::size_t>(i)]];
      for (int i = 0; i < k; ++i) {
        const auto slot = static_cast<std::size_t>(t * k + i);
        routing.ids[slot] = order[static_cast<std::size_t>(i)];
        routing.weights[slot] = normalise ? p[routing.ids[slot]] / sum : p[routing.ids[slot]];
      }
    }
  }

  void experts(Tensor out, Tensor x, const Experts& experts, const Routing& routing) {
    for (int t = 0; t < x.n_rows; ++t) {
      auto sum = vec(out.row(t), out.n_cols);
      sum.setZero();
      for (int i = 0; i < routing.k; ++i) {
        const auto slot = static_cast<std::size_t>(t * routing.k + i);
        const ExpertView& e = experts[static_cast<std::size_t>(routing.ids[slot])];
        Eigen::VectorXf gate(e.gate.rows), up(e.gate.rows), down(out.n_cols);
        multiply(e.gate, x.rows(t, 1), as_tensor(gate));
        multiply(e.up, x.rows(t, 1), as_tensor(up));
        swiglu(as_tensor(gate), as_tensor(gate), as_tensor(up));
        multiply(e.down, as_tensor(gate), as_tensor(down));
        sum += routing.weights[slot] * down;
      }
    }
  }

  void swiglu(Tensor out, Tensor gate, Tensor up) {
    for (int t = 0; t < gate.n_rows; ++t) {
      for (int i = 0; i < gate.n_cols; ++i) out.row(t)[i] = silu(gate.row(t)[i]) * up.row(t)[i];
    }
  }

  void add(Tensor x, Tensor y) {
    for (int t = 0; t < x.n_rows; ++t) vec(x.row(t), x.n_cols) += vec(y.row(t), x.n_cols);
  }

  void add_gated(Tensor x, Tensor y, Tensor gate) {
    for (int t = 0; t < x.n_rows; ++t) vec(x.row(t), x.n_cols) += sigmoid(gate.row(t)[0]) * vec(y.row(t), x.n_cols);
  }

 private:
  // One token: q, k and v of all heads side by side, beta and g of each value head.
  static void delta_step(float* state, DeltaShape shape, const float* qkv, const float* beta, const float* g,
                         float* out) {
    const int Dk = shape.key_dim, Dv = shape.value_dim;
    for (int h = 0; h < shape.value_heads; ++h) {
      Matrix S(state + static_cast<std::ptrdiff_t>(h) * Dv * Dk, Dv, Dk);  // transposed state
      const int key_head = h / (shape.value_heads / shape.key_heads);
      const Eigen::VectorXf q = l2_normalised(vec(qkv + key_head * Dk, Dk)) / std::sqrt(static_cast<float>(Dk));
      const Eigen::VectorXf k = l2_normalised(vec(qkv + (shape.key_heads + key_head) * Dk, Dk));
      const auto v = vec(qkv + 2 * shape.key_heads * Dk + h * Dv, Dv);
      S *= std::exp(g[h]);
      const Eigen::VectorXf delta = beta[h] * (v - S * k);
      S += delta * k.transpose();
      vec(out + h * Dv, Dv) = S * q;
    }
  }

  // What was accepted of a tentative pass.
  static void settle_rows(DeltaState& state, DeltaShape shape) {
    std::vector<float> known(static_cast<std::size_t>(shape.value_heads) * static_cast<std::size_t>(shape.value_dim));
    for (int t = 0; t < state.accepted; ++t) {
      delta_step(state.S.floats(), shape, state.qkv.data() + t * state.channels, state.beta.data() + t * state.heads,
                 state.g.data() + t * state.heads, known.data());
    }
    state.accepted = 0;
  }

  using Matrix = Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

  static Eigen::Map<Eigen::VectorXf> vec(float* data, int n) { return {data, n}; }
  static Eigen::Map<const Eigen::VectorXf> vec(const float* data, int n) { return {data, n}; }
  static HostTensor as_tensor(Eigen::VectorXf& v) {
    return {v.data(), 1, static_cast<int>(v.size()), static_cast<std::ptrdiff_t>(v.size())};
  }
  static const float* row(const std::byte* stored) { return reinterpret_cast<const float*>(stored); }
  static void store_row(std::byte* stored, const float* values, int n) {
    std::copy_n(values, n, reinterpret_cast<float*>(stored));
  }

  static float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
  static float silu(float x) { return x * sigmoid(x); }
  static float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }
  static Eigen::VectorXf l2_normalised(Eigen::Map<const Eigen::VectorXf> x) {
    return x / std::sqrt(x.squaredNorm() + 1e-6f);
  }

  // y [T, N] = x [T, D] W^T, a band of expanded rows of W at a time.
  void multiply(const Weight& w, Tensor x, Tensor y) {
    constexpr int band = 64;
    using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    using Strided = Eigen::Map<RowMajor, 0, Eigen::OuterStride<>>;
    RowMajor rows(std::min(band, w.rows), w.cols);
    Strided in(x.data, x.n_rows, x.n_cols, Eigen::OuterStride<>(x.stride));
    Strided out(y.data, y.n_rows, y.n_cols, Eigen::OuterStride<>(y.stride));
    for (int begin = 0; begin < w.rows; begin += band) {
      const int n = std::min(band, w.rows - begin);
      for (int r = 0; r < n; ++r) dequantize(w, begin + r, rows.row(r).data());
      if (x.n_rows <= max_tentative_rows) {
        for (int t = 0; t < x.n_rows; ++t)  // each as it is alone: a product of matrices sums in another order
          out.row(t).segment(begin, n).noalias() = in.row(t) * rows.topRows(n).transpose();
      } else {
        out.middleCols(begin, n).noalias() = in * rows.topRows(n).transpose();
      }
    }
  }

  std::vector<AlignedBytes> memory_;
};

static_assert(BackendOps<ReferenceBackend>);

}  // namespace qwen3next
