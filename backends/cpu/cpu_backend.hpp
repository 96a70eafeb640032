#pragma once
// The CPU backend: vector kernels for the ISA at hand, rows, heads and experts shared out over threads.
//
// The operations are those of backend.hpp; their meaning in plain words is backends/reference/.  An instance owns its
// scratch memory: one caller at a time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "backends/cpu/attention.hpp"
#include "backends/cpu/dispatch.hpp"
#include "backends/cpu/experts.hpp"
#include "backends/cpu/linear.hpp"
#include "backends/cpu/parallel.hpp"
#include "backends/host_state.hpp"
#include "backends/host_tensor.hpp"
#include "blocks/weight_view.hpp"
#include "core/available_processors.hpp"
#include "core/error.hpp"

namespace qwen3next {

struct CpuOptions {
  const cpu::Kernels* kernels = nullptr;  // null: the best for this machine
  int threads = 1;
  KvType kv = KvType::f16;
  std::optional<cpu::Team> team{};  // whose threads compute; nothing: a team of `threads` of this backend's own
};

// From names and numbers as users give them: "" the best ISA, 0 threads as many as the process may use.
inline CpuOptions resolve_cpu_options(const std::string& isa, int threads) {
  return {&cpu::choose_kernels(isa), resolve_threads(threads), KvType::f16, {}};
}

class CpuBackend {
 public:
  using Tensor = HostTensor;
  using Weight = WeightView;
  using Vector = VectorView;
  using Experts = ExpertViews;
  using Routing = HostRouting;
  using DeltaState = HostDeltaState;
  using KvCache = HostKvCache;

  explicit CpuBackend(const CpuOptions& options)
      : k_(options.kernels ? options.kernels : &cpu::choose_kernels("")),
        team_(options.team ? *options.team : cpu::Team(options.threads)),
        kv_(options.kv) {}

  Tensor tensor(int rows, int cols) {
    const int stride = (cols + 15) / 16 * 16;  // rows on cache lines
    memory_.emplace_back(sizeof(float) * static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride),
                         AlignedBytes::Uncleared());
    return {memory_.back().floats(), rows, cols, stride};
  }
  Routing routing(int rows, int k) { return {rows, k}; }
  DeltaState delta_state(DeltaShape s) { return DeltaState(s); }
  KvCache kv_cache(AttentionShape s) {
    if (kv_ == KvType::q8_0 && s.head_dim % 32 != 0) {
      throw Error("a q8_0 KV cache needs heads of a multiple of 32 dims, this model's have " +
                  std::to_string(s.head_dim) + ": use f16 or f32");
    }
    return KvCache(s, kv_);
  }
  std::span<const float> host(Tensor row) { return row[0]; }
  void set_host(Tensor row, std::span<const float> values) { std::copy(values.begin(), values.end(), row.row(0)); }
  void copy(Tensor out, Tensor x) {
    for (int t = 0; t < x.n_rows; ++t) std::copy_n(x.row(t), x.n_cols, out.row(t));
  }

  void embed(Tensor out, std::span<const std::int32_t> tokens, const Weight& w) {
    team_.split(out.n_rows, out.n_cols, [&](int begin, int end) {
      for (int t = begin; t < end; ++t) cpu::expand_row(*k_, w, tokens[static_cast<std::size_t>(t)], out.row(t));
    });
  }

  void rms_norm(Tensor out, Tensor x, const Vector& weight, float eps) {
    for_groups(x, weight.size,
               [&](int t, int c) { k_->rms_norm(out.row(t) + c, x.row(t) + c, weight.data, weight.size, eps); });
  }

  void linear(Tensor x, std::initializer_list<Projection<Weight, Tensor>> projections) {
    linear_(*k_, team_, x, std::span(projections.begin(), projections.size()));
  }

  void causal_conv1d(Tensor out, Tensor x, const Vector& taps, std::span<const Segment<DeltaState>> segments) {
    const int C = x.n_cols, K = taps.cols;
    const int units = (C + conv_channels - 1) / conv_channels;
    for (const auto& s : segments) {
      float* past = s.state->conv.floats();
      const int pieces = (s.count + conv_tokens - 1) / conv_tokens * units;
      team_.split(pieces, std::int64_t{conv_channels} * K * std::min(s.count, conv_tokens), [&](int begin, int end) {
        for (int i = begin; i < end; ++i) {
          const int c = i % units * conv_channels, t = i / units * conv_tokens;
          k_->causal_conv1d({x.row(s.begin) + c, past + c, taps.data + static_cast<std::ptrdiff_t>(c) * K,
                             out.row(s.begin) + c, x.stride, C, out.stride, t, std::min(conv_tokens, s.count - t),
                             std::min(conv_channels, C - c), K});
        }
      });
      if (s.tentative) {
        for (int t = 0; t < s.count; ++t) s.state->keep_inputs(t, x.row(s.begin + t));
        continue;
      }
      for (int j = 0; j < K - 1; ++j) {  // the last K - 1 inputs, oldest first
        const int t = s.count - K + 1 + j;
        std::copy_n(t >= 0 ? x.row(s.begin + t) : past + (K - 1 + t) * C, C, past + j * C);
      }
    }
  }

  void delta_gates(Tensor beta, Tensor g, Tensor b, Tensor a, const Vector& A, const Vector& dt_bias) {
    for_rows(
        b, [&](int t) { k_->delta_gates(beta.row(t), g.row(t), b.row(t), a.row(t), A.data, dt_bias.data, b.n_cols); });
  }

  // Few tokens: token by token.  More: in chunks of 64; see delta_rule.hpp.
  void gated_delta_rule(Tensor out, Tensor qkv, Tensor beta, Tensor g, DeltaShape shape,
                        std::span<const Segment<DeltaState>> segments) {
    for (const auto& s : segments) {
      if (s.count >= chunked_tokens) settle(*s.state, shape);
    }
    delta_heads(out, qkv, beta, g, shape, segments);
    for (const auto& s : segments) {
      s.state->accepted = 0;
      if (!s.tentative) continue;
      for (int t = 0; t < s.count; ++t) {
        const int row = s.begin + t;
        s.state->keep_rows(t, qkv.row(row), beta.row(row), g.row(row));
      }
    }
  }

  void settle(DeltaState& state, DeltaShape shape) {
    const Segment<DeltaState> nothing_new{0, 0, 0, &state};
    if (state.accepted > 0) delta_heads({}, {}, {}, {}, shape, {&nothing_new, 1});
    state.settled();
  }

  void gated_rms_norm(Tensor out, Tensor o, Tensor z, const Vector& weight, float eps) {
    for_groups(o, weight.size, [&](int t, int c) {
      k_->gated_rms_norm(out.row(t) + c, o.row(t) + c, z.row(t) + c, weight.data, weight.size, eps);
    });
  }

  // Angles in double: exact to float precision at any position.
  void rope_angles(Tensor angles, std::span<const double> frequency, float scale,
                   std::span<const Segment<KvCache>> segments) {
    const std::size_t n = frequency.size();
    for (const auto& s : segments) {
      team_.split(s.count, static_cast<std::int64_t>(n) * 64, [&](int begin, int end) {
        for (int t = begin; t < end; ++t) {
          float* row = angles.row(s.begin + t);
          for (std::size_t i = 0; i < n; ++i) {
            const double angle = static_cast<double>(s.position + t) * frequency[i];
            row[i] = scale * static_cast<float>(std::cos(angle));
            row[n + i] = scale * static_cast<float>(std::sin(angle));
          }
        }
      });
    }
  }

  void rope(Tensor x, Tensor angles, int head_dim) {
    const int n = angles.n_cols / 2;
    for_rows(x, [&](int t) {
      for (int c = 0; c < x.n_cols; c += head_dim) k_->rope(x.row(t) + c, angles.row(t), angles.row(t) + n, n);
    });
  }

  void attention(Tensor out, Tensor q, Tensor k, Tensor v, AttentionShape shape,
                 std::span<const Segment<KvCache>> segments) {
    attention_(*k_, team_, out, q, k, v, shape, segments);
  }
  void append_kv(Tensor k, Tensor v, AttentionShape shape, std::span<const Segment<KvCache>> segments) {
    cpu::Attention::append(*k_, team_, k, v, shape, segments);
  }

  void sigmoid_gate(Tensor x, Tensor gate) {
    for_rows(x, [&](int t) { k_->sigmoid_gate(x.row(t), gate.row(t), x.n_cols); });
  }

  // Of equal probabilities the lower index comes first.
  void router(Routing& routing, Tensor logits, int k, bool normalise) {
    routing.rows = logits.n_rows;
    routing.k = k;
    const auto E = static_cast<std::size_t>(logits.n_cols);
    auto* probabilities =
        reinterpret_cast<float*>(router_scratch_.get(sizeof(float) * E * static_cast<std::size_t>(logits.n_rows)));
    team_.split(logits.n_rows, logits.n_cols * 8, [&](int begin, int end) {
      for (int t = begin; t < end; ++t) {
        float* p = probabilities + static_cast<std::size_t>(t) * E;
        std::copy_n(logits.row(t), E, p);
        k_->softmax(p, logits.n_cols);
        const auto slot = static_cast<std::size_t>(t) * static_cast<std::size_t>(k);
        k_->top_k(p, logits.n_cols, k, routing.ids.data() + slot, routing.weights.data() + slot);
        if (!normalise) continue;
        float sum = 0;
        for (int i = 0; i < k; ++i) sum += routing.weights[slot + static_cast<std::size_t>(i)];
        for (int i = 0; i < k; ++i) routing.weights[slot + static_cast<std::size_t>(i)] /= sum;
      }
    });
  }

  void experts(Tensor out, Tensor x, const Experts& experts, const Routing& routing) {
    resident_.choose(experts);
    experts_from(resident_, out, x, routing);
  }
  void experts_from(ExpertSupply& supply, Tensor out, Tensor x, const Routing& routing) {
    experts_(*k_, team_, out, x, routing, supply);
  }

  void swiglu(Tensor out, Tensor gate, Tensor up) {
    for_rows(out, [&](int t) { k_->swiglu(out.row(t), gate.row(t), up.row(t), out.n_cols); });
  }

  void add(Tensor x, Tensor y) {
    for_rows(x, [&](int t) { k_->add(x.row(t), y.row(t), 1, x.n_cols); });
  }

  void add_gated(Tensor x, Tensor y, Tensor gate) {
    for_rows(x, [&](int t) { k_->add(x.row(t), y.row(t), k_->sigmoid(gate.row(t)[0]), x.n_cols); });
  }

  const cpu::Kernels& kernels() const noexcept { return *k_; }
  int threads() const noexcept { return team_.size(); }

 private:
  static constexpr int conv_channels = 256, conv_tokens = 32;  // a piece of a convolution: its inputs stay in L1
  static constexpr int chunked_tokens = 16;                    // from here on the chunked form is faster

  void delta_heads(Tensor out, Tensor qkv, Tensor beta, Tensor g, DeltaShape shape,
                   std::span<const Segment<DeltaState>> segments) {
    const int Dk = shape.key_dim, Dv = shape.value_dim, Hk = shape.key_heads, Hv = shape.value_heads;
    // Value heads that share a key head go together, unless that leaves threads without work.
    const int group = Hv / Hk, together = static_cast<int>(segments.size()) * Hk >= team_.size() ? group : 1;
    const int pieces = Hv / together;
    const cpu::Scratch::Pieces space = delta_scratch_.pieces(static_cast<std::size_t>(team_.size()),
                                                             sizeof(float) * k_->delta_scratch(together, Dk, Dv));
    const std::int64_t work =
        std::int64_t{4} * together * (qkv.n_rows / std::max(1, static_cast<int>(segments.size())) + 1) * Dk * Dv;
    team_.each(static_cast<int>(segments.size()) * pieces, work, [&](int item, int thread) {
      const auto& s = segments[static_cast<std::size_t>(item / pieces)];
      const int h = item % pieces * together, key_head = h / group;
      cpu::Kernels::DeltaHeads heads{};
      if (s.count > 0) {
        heads.q = qkv.row(s.begin) + key_head * Dk;
        heads.k = qkv.row(s.begin) + (Hk + key_head) * Dk;
        heads.v = qkv.row(s.begin) + 2 * Hk * Dk + h * Dv;
        heads.beta = beta.row(s.begin) + h;
        heads.g = g.row(s.begin) + h;
        heads.out = out.row(s.begin) + h * Dv;
        heads.qk_stride = heads.v_stride = qkv.stride;
        heads.gate_stride = beta.stride;
        heads.out_stride = out.stride;
      }
      heads.S = s.state->S.floats() + static_cast<std::ptrdiff_t>(h) * Dv * Dk;
      heads.heads = together, heads.T = s.count, heads.Dk = Dk, heads.Dv = Dv;
      heads.tentative = s.tentative;
      if (s.state->accepted > 0) {
        const DeltaState& past = *s.state;
        heads.past = {past.qkv.data() + (Hk + key_head) * Dk,
                      past.qkv.data() + 2 * Hk * Dk + h * Dv,
                      past.beta.data() + h,
                      past.g.data() + h,
                      past.channels,
                      Hv,
                      past.accepted};
      }
      (s.count < chunked_tokens ? k_->delta_recurrent : k_->delta_chunked)(heads,
                                                                           reinterpret_cast<float*>(space[thread]));
    });
  }

  template <class F>
  void for_rows(const Tensor& x, F f) {
    team_.split(x.n_rows, x.n_cols, [&](int begin, int end) {
      for (int t = begin; t < end; ++t) f(t);
    });
  }
  template <class F>
  void for_groups(const Tensor& x, int size, F f) {
    for_rows(x, [&](int t) {
      for (int c = 0; c < x.n_cols; c += size) f(t, c);
    });
  }

  const cpu::Kernels* k_;
  cpu::Team team_;
  KvType kv_;
  std::vector<AlignedBytes> memory_;
  cpu::Linear linear_;
  cpu::ExpertLayer experts_;
  ResidentExperts resident_;
  cpu::Attention attention_;
  cpu::Scratch delta_scratch_, router_scratch_;
};

static_assert(BackendOps<CpuBackend>);

}  // namespace qwen3next
