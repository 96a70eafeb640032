#pragma once
// A backend that also measures: time, bytes and multiply-adds of every operation.  The forward pass stays as it is, and
// costs nothing more on the backend itself.

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "backends/host_state.hpp"
#include "backends/host_tensor.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next {

// What an operation has to do, however it does it.  Multiply-adds are those of matrices, convolutions, the delta rule
// in its recurrent form and attention; operations on single elements count their bytes alone.
struct OpCost {
  double memory = 0;         // bytes of weights (each that is used, once), of caches read and written, of states twice
  double activations = 0;    // bytes of inputs and outputs, each once
  double integer_macs = 0;   // multiply-adds with quantised weights
  double floating_macs = 0;  // all others

  double bytes() const noexcept { return memory + activations; }
  OpCost& operator+=(const OpCost& o) noexcept {
    memory += o.memory, activations += o.activations;
    integer_macs += o.integer_macs, floating_macs += o.floating_macs;
    return *this;
  }
};

// What was measured, by operation, in the order in which they first ran.
class Trace {
 public:
  struct Op {
    std::string name;
    std::int64_t calls = 0;
    double seconds = 0;
    OpCost cost;
  };

  // Products are called by their first matrix; `name` outlives the trace.
  void name_product(const WeightView& first, std::string_view name) { names_[first.data] = name; }

  std::string_view product(const WeightView& first) const {
    const auto found = names_.find(first.data);
    return found == names_.end() ? "linear" : found->second;
  }
  void add(std::string_view name, double seconds, const OpCost& cost) {
    Op& op = find(name);
    ++op.calls;
    op.seconds += seconds;
    op.cost += cost;
  }
  const std::vector<Op>& ops() const noexcept { return ops_; }
  OpCost total() const {
    OpCost sum;
    for (const Op& op : ops_) sum += op.cost;
    return sum;
  }
  void clear() noexcept { ops_.clear(); }

 private:
  Op& find(std::string_view name) {
    for (Op& op : ops_) {
      if (op.name == name) return op;
    }
    return ops_.emplace_back(Op{std::string(name), 0, 0, {}});
  }
  std::unordered_map<const std::byte*, std::string_view> names_;
  std::vector<Op> ops_;
};

// All operations are B's, timed on the caller's thread.
template <BackendOps B>
requires std::same_as<typename B::Tensor, HostTensor> && std::same_as<typename B::Weight, WeightView> &&
    std::same_as<typename B::Vector, VectorView> && std::same_as<typename B::Experts, ExpertViews> &&
    std::same_as<typename B::Routing, HostRouting> && std::same_as<typename B::DeltaState, HostDeltaState> &&
    std::same_as<typename B::KvCache, HostKvCache>
class Traced : public B {
 public:
  // `trace` outlives the backend.
  Traced(B backend, Trace& trace) : B(std::move(backend)), trace_(&trace) {}

  void embed(HostTensor out, std::span<const std::int32_t> tokens, const WeightView& w) {
    const Timer timer(
        *trace_, "embed",
        {.memory = static_cast<double>(tokens.size()) * number(w.row_bytes()), .activations = bytes(out)});
    B::embed(out, tokens, w);
  }
  void rms_norm(HostTensor out, HostTensor x, const VectorView& weight, float eps) {
    const Timer timer(*trace_, "rms_norm", {.memory = bytes(weight), .activations = bytes(out) + bytes(x)});
    B::rms_norm(out, x, weight, eps);
  }
  void linear(HostTensor x, std::initializer_list<Projection<WeightView, HostTensor>> projections) {
    OpCost cost{.activations = bytes(x)};
    for (const auto& p : projections) cost += product(p.weight, x.n_rows), cost.activations += bytes(p.y);
    const Timer timer(*trace_, trace_->product(projections.begin()->weight), cost);
    B::linear(x, projections);
  }
  void causal_conv1d(HostTensor out, HostTensor x, const VectorView& taps,
                     std::span<const Segment<HostDeltaState>> segments) {
    OpCost cost{.memory = bytes(taps),
                .activations = bytes(out) + bytes(x),
                .floating_macs = number(x.n_rows) * number(x.n_cols) * number(taps.cols)};
    for (const auto& s : segments) cost.memory += 2 * number(s.state->conv.size());
    const Timer timer(*trace_, "causal_conv1d", cost);
    B::causal_conv1d(out, x, taps, segments);
  }
  void delta_gates(HostTensor beta, HostTensor g, HostTensor b, HostTensor a, const VectorView& A,
                   const VectorView& dt_bias) {
    const Timer timer(*trace_, "delta_gates", {.memory = bytes(A) + bytes(dt_bias), .activations = 4 * bytes(b)});
    B::delta_gates(beta, g, b, a, A, dt_bias);
  }
  void gated_delta_rule(HostTensor out, HostTensor qkv, HostTensor beta, HostTensor g, DeltaShape shape,
                        std::span<const Segment<HostDeltaState>> segments) {
    OpCost cost{.activations = bytes(out) + bytes(qkv) + bytes(beta) + bytes(g)};
    for (const auto& s : segments) {
      cost.memory += 2 * number(s.state->S.size());
      // S^T k, S += k delta^T and S^T q.
      cost.floating_macs += 3 * number(s.count) * number(s.state->S.size() / sizeof(float));
    }
    const Timer timer(*trace_, "gated_delta_rule", cost);
    B::gated_delta_rule(out, qkv, beta, g, shape, segments);
  }
  void gated_rms_norm(HostTensor out, HostTensor o, HostTensor z, const VectorView& weight, float eps) {
    const Timer timer(*trace_, "gated_rms_norm", {.memory = bytes(weight), .activations = 3 * bytes(out)});
    B::gated_rms_norm(out, o, z, weight, eps);
  }
  void rope_angles(HostTensor angles, std::span<const double> frequency, float scale,
                   std::span<const Segment<HostKvCache>> segments) {
    const Timer timer(*trace_, "rope_angles", {.activations = bytes(angles)});
    B::rope_angles(angles, frequency, scale, segments);
  }
  void rope(HostTensor x, HostTensor angles, int head_dim) {
    const double turned = number(angles.n_cols) / number(head_dim);
    const Timer timer(*trace_, "rope", {.activations = 2 * turned * bytes(x) + bytes(angles)});
    B::rope(x, angles, head_dim);
  }
  void attention(HostTensor out, HostTensor q, HostTensor k, HostTensor v, AttentionShape shape,
                 std::span<const Segment<HostKvCache>> segments) {
    OpCost cost{.activations = bytes(out) + bytes(q) + bytes(k) + bytes(v)};
    for (const auto& s : segments) {
      const double past = number(s.position), T = number(s.count);
      cost.memory += (past + T) * 2 * number(shape.kv_heads) * number(s.state->row_bytes());
      // q k and p v over what each of the T tokens sees: past + 1 .. past + T.
      cost.floating_macs += (past * T + T * (T + 1) / 2) * 2 * number(shape.heads) * number(shape.head_dim);
    }
    const Timer timer(*trace_, "attention", cost);
    B::attention(out, q, k, v, shape, segments);
  }
  void sigmoid_gate(HostTensor x, HostTensor gate) {
    const Timer timer(*trace_, "sigmoid_gate", {.activations = 3 * bytes(x)});
    B::sigmoid_gate(x, gate);
  }
  void router(HostRouting& routing, HostTensor logits, int k, bool normalise) {
    const Timer timer(*trace_, "router", {.activations = bytes(logits)});
    B::router(routing, logits, k, normalise);
  }
  void experts(HostTensor out, HostTensor x, const ExpertViews& experts, const HostRouting& routing) {
    OpCost cost{.activations = bytes(out) + bytes(x)};
    rows_.assign(experts.size(), 0);
    for (int i = 0; i < routing.rows * routing.k; ++i)
      ++rows_[static_cast<std::size_t>(routing.ids[static_cast<std::size_t>(i)])];
    for (std::size_t e = 0; e < experts.size(); ++e) {
      if (rows_[e] == 0) continue;
      for (const WeightView* w : {&experts[e].gate, &experts[e].up, &experts[e].down}) cost += product(*w, rows_[e]);
    }
    const Timer timer(*trace_, "experts", cost);
    B::experts(out, x, experts, routing);
  }
  void swiglu(HostTensor out, HostTensor gate, HostTensor up) {
    const Timer timer(*trace_, "swiglu", {.activations = 3 * bytes(out)});
    B::swiglu(out, gate, up);
  }
  void add(HostTensor x, HostTensor y) {
    const Timer timer(*trace_, "add", {.activations = 3 * bytes(x)});
    B::add(x, y);
  }
  void add_gated(HostTensor x, HostTensor y, HostTensor gate) {
    const Timer timer(*trace_, "add_gated", {.activations = 3 * bytes(x) + bytes(gate)});
    B::add_gated(x, y, gate);
  }

 private:
  using Clock = std::chrono::steady_clock;
  class Timer {
   public:
    Timer(Trace& trace, std::string_view name, const OpCost& cost) : trace_(trace), name_(name), cost_(cost) {}
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    ~Timer() { trace_.add(name_, std::chrono::duration<double>(Clock::now() - start_).count(), cost_); }

   private:
    Trace& trace_;
    std::string_view name_;
    OpCost cost_;
    Clock::time_point start_ = Clock::now();
  };

  static double number(auto x) noexcept { return static_cast<double>(x); }
  static double bytes(const HostTensor& t) noexcept { return sizeof(float) * number(t.n_rows) * number(t.n_cols); }
  static double bytes(const VectorView& v) noexcept { return sizeof(float) * number(v.size); }
  static OpCost product(const WeightView& w, int T) noexcept {
    const double macs = number(T) * number(w.rows) * number(w.cols);
    return {.memory = number(w.bytes()),
            .integer_macs = info(w.type).quantised ? macs : 0,
            .floating_macs = info(w.type).quantised ? 0 : macs};
  }

  Trace* trace_;
  std::vector<int> rows_;  // of each expert
};

}  // namespace qwen3next
