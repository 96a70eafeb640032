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

  bool on = true;  // else operations run as they do without

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

// A product of T rows with w.
inline OpCost product_cost(const WeightView& w, int T) noexcept {
  const double macs = static_cast<double>(T) * static_cast<double>(w.rows) * static_cast<double>(w.cols);
  return {.memory = static_cast<double>(w.bytes()),
          .integer_macs = info(w.type).quantised ? macs : 0,
          .floating_macs = info(w.type).quantised ? 0 : macs};
}
// The experts that `ids`, of all rows, name; `rows` is scratch.
inline OpCost experts_cost(const ExpertViews& experts, std::span<const std::int32_t> ids, std::vector<int>& rows) {
  rows.assign(experts.size(), 0);
  for (const std::int32_t id : ids) ++rows[static_cast<std::size_t>(id)];
  OpCost cost;
  for (std::size_t e = 0; e < experts.size(); ++e) {
    if (rows[e] == 0) continue;
    for (const WeightView* w : {&experts[e].gate, &experts[e].up, &experts[e].down}) cost += product_cost(*w, rows[e]);
  }
  return cost;
}

// How operations of a backend are timed, and what its weights are in the file: of one that computes in the caller's
// thread, and in place.
class HostMeter {
 public:
  static const WeightView& view(const WeightView& w) noexcept { return w; }

  template <class Work>
  void time(Trace& trace, std::string_view name, const OpCost& cost, Work work) {
    const auto start = Clock::now();
    work();
    if (trace.on) trace.add(name, std::chrono::duration<double>(Clock::now() - start).count(), cost);
  }
  // The same of experts, to whose cost those are added that `routing` names after the work.
  template <class Work>
  void time_experts(Trace& trace, std::string_view name, OpCost cost, const ExpertViews& experts,
                    const HostRouting& routing, int T, Work work) {
    const auto start = Clock::now();
    work();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (!trace.on) return;
    cost += experts_cost(experts, {routing.ids.data(), static_cast<std::size_t>(T * routing.k)}, rows_);
    trace.add(name, seconds, cost);
  }
  // All that was timed is to be in the trace.
  static void finish(Trace&) noexcept {}

 private:
  using Clock = std::chrono::steady_clock;
  std::vector<int> rows_;  // of each expert
};

// All operations are B's, timed by a Meter as above.
template <BackendOps B, class Meter = HostMeter>
class Traced : public B {
 public:
  using Tensor = typename B::Tensor;
  using Weight = typename B::Weight;
  using Vector = typename B::Vector;
  using DeltaSegments = std::span<const Segment<typename B::DeltaState>>;
  using KvSegments = std::span<const Segment<typename B::KvCache>>;
  using Projections = std::initializer_list<Projection<Weight, Tensor>>;

  // `trace` outlives the backend.
  Traced(B backend, Trace& trace, Meter meter = {}) : B(std::move(backend)), trace_(&trace), meter_(std::move(meter)) {}

  // Each operation is timed as it is started: none is gathered to be started later.
  bool begin_pass() noexcept requires(requires(B& be) { be.begin_pass(); }) { return false; }

  std::span<const float> host(Tensor row) {
    const std::span<const float> values = B::host(row);
    meter_.finish(*trace_);
    return values;
  }
  void embed(Tensor out, std::span<const std::int32_t> tokens, const Weight& w) {
    const OpCost cost{.memory = number(tokens.size()) * number(meter_.view(w).row_bytes()), .activations = bytes(out)};
    time("embed", cost, [&] { B::embed(out, tokens, w); });
  }
  void rms_norm(Tensor out, Tensor x, const Vector& weight, float eps) {
    time("rms_norm", norm(out, x, weight), [&] { B::rms_norm(out, x, weight, eps); });
  }
  void linear(Tensor x, Projections projections) {
    time(name(projections), products(x, projections), [&] { B::linear(x, projections); });
  }
  void causal_conv1d(Tensor out, Tensor x, const Vector& taps, DeltaSegments segments) {
    time("causal_conv1d", convolution(out, x, taps, segments), [&] { B::causal_conv1d(out, x, taps, segments); });
  }
  void delta_gates(Tensor beta, Tensor g, Tensor b, Tensor a, const Vector& A, const Vector& dt_bias) {
    time("delta_gates", gates(b, A, dt_bias), [&] { B::delta_gates(beta, g, b, a, A, dt_bias); });
  }
  void gated_delta_rule(Tensor out, Tensor qkv, Tensor beta, Tensor g, DeltaShape shape, DeltaSegments segments) {
    time("gated_delta_rule", delta_rule(out, qkv, beta, shape, segments),
         [&] { B::gated_delta_rule(out, qkv, beta, g, shape, segments); });
  }
  void gated_rms_norm(Tensor out, Tensor o, Tensor z, const Vector& weight, float eps) {
    time("gated_rms_norm", gated_norm(out, weight), [&] { B::gated_rms_norm(out, o, z, weight, eps); });
  }
  void rope_angles(Tensor angles, std::span<const double> frequency, float scale, KvSegments segments) {
    time("rope_angles", {.activations = bytes(angles)}, [&] { B::rope_angles(angles, frequency, scale, segments); });
  }
  void rope(Tensor x, Tensor angles, int head_dim) {
    time("rope", rotation(x, angles, head_dim), [&] { B::rope(x, angles, head_dim); });
  }
  void attention(Tensor out, Tensor q, Tensor k, Tensor v, AttentionShape shape, KvSegments segments) {
    time("attention", attending(out, q, k, v, shape, segments), [&] { B::attention(out, q, k, v, shape, segments); });
  }
  void sigmoid_gate(Tensor x, Tensor gate) {
    time("sigmoid_gate", {.activations = 3 * bytes(x)}, [&] { B::sigmoid_gate(x, gate); });
  }
  void router(typename B::Routing& routing, Tensor logits, int k, bool normalise) {
    time("router", {.activations = bytes(logits)}, [&] { B::router(routing, logits, k, normalise); });
  }
  void experts(Tensor out, Tensor x, const typename B::Experts& experts, const typename B::Routing& routing) {
    meter_.time_experts(*trace_, "experts", {.activations = bytes(out) + bytes(x)}, experts, routing, x.n_rows,
                        [&] { B::experts(out, x, experts, routing); });
  }
  void swiglu(Tensor out, Tensor gate, Tensor up) {
    time("swiglu", {.activations = 3 * bytes(out)}, [&] { B::swiglu(out, gate, up); });
  }
  void add(Tensor x, Tensor y) {
    time("add", {.activations = 3 * bytes(x)}, [&] { B::add(x, y); });
  }
  void add_gated(Tensor x, Tensor y, Tensor gate) {
    time("add_gated", {.activations = 3 * bytes(x) + bytes(gate)}, [&] { B::add_gated(x, y, gate); });
  }

  // The boxes of model/forward.hpp that B has whole.  What passes from one of their operations to the next is not
  // counted.
  void norm_linear(Tensor h, Tensor x, const Vector& weight, float eps,
                   Projections projections) requires(requires(B& be) {
    be.norm_linear(h, x, weight, eps, projections);
  }) {
    OpCost cost = products(h, projections);
    cost += {.memory = bytes(weight), .activations = bytes(x)};
    time(name(projections), cost, [&] { B::norm_linear(h, x, weight, eps, projections); });
  }
  void linear_add(Tensor x, Tensor in, const Weight& w,
                  Tensor y) requires(requires(B& be) { be.linear_add(x, in, w, y); }) {
    OpCost cost = product_cost(meter_.view(w), x.n_rows);
    cost += {.activations = bytes(in) + 2 * bytes(x)};
    time(trace_->product(meter_.view(w)), cost, [&] { B::linear_add(x, in, w, y); });
  }
  void gated_norm_linear_add(Tensor x, Tensor o, Tensor z, const Vector& weight, float eps, const Weight& w,
                             Tensor y) requires(requires(B& be) {
    be.gated_norm_linear_add(x, o, z, weight, eps, w, y);
  }) {
    OpCost cost = product_cost(meter_.view(w), x.n_rows);
    cost += {.memory = bytes(weight), .activations = bytes(o) + bytes(z) + 2 * bytes(x)};
    time(trace_->product(meter_.view(w)), cost, [&] { B::gated_norm_linear_add(x, o, z, weight, eps, w, y); });
  }
  void gated_attention(Tensor out, Tensor q, Tensor gate, Tensor k, Tensor v, const Vector& q_norm,
                       const Vector& k_norm, float eps, Tensor angles, AttentionShape shape,
                       KvSegments segments) requires(requires(B& be) {
    be.gated_attention(out, q, gate, k, v, q_norm, k_norm, eps, angles, shape, segments);
  }) {
    OpCost cost = attending(out, q, k, v, shape, segments);
    cost += {.memory = bytes(q_norm) + bytes(k_norm), .activations = bytes(gate) + bytes(angles)};
    time("attention", cost,
         [&] { B::gated_attention(out, q, gate, k, v, q_norm, k_norm, eps, angles, shape, segments); });
  }
  void delta_net(Tensor out, Tensor mixed, Tensor in, Tensor b, Tensor a, Tensor beta, Tensor g, const Vector& taps,
                 const Vector& A, const Vector& dt_bias, DeltaShape shape,
                 DeltaSegments segments) requires(requires(B& be) {
    be.delta_net(out, mixed, in, b, a, beta, g, taps, A, dt_bias, shape, segments);
  }) {
    OpCost cost = convolution(mixed, in, taps, segments);
    cost += delta_rule(out, mixed, b, shape, segments);
    cost += {.memory = bytes(A) + bytes(dt_bias), .activations = -2 * bytes(mixed)};
    time("delta_net", cost, [&] { B::delta_net(out, mixed, in, b, a, beta, g, taps, A, dt_bias, shape, segments); });
  }
  void experts_add(Tensor x, Tensor h, Tensor logits, typename B::Routing& routing, const typename B::Experts& experts,
                   const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) requires(requires(B& be) {
    be.experts_add(x, h, logits, routing, experts, shared, k, normalise);
  }) {
    OpCost cost{.activations = 2 * bytes(x) + bytes(h) + bytes(logits) + bytes(shared.gate)};
    for (const Weight* w : {&shared.gate_proj, &shared.up_proj, &shared.down_proj})
      cost += product_cost(meter_.view(*w), x.n_rows);
    meter_.time_experts(*trace_, "experts, shared", cost, experts, routing, x.n_rows,
                        [&] { B::experts_add(x, h, logits, routing, experts, shared, k, normalise); });
  }

 private:
  template <class Work>
  void time(std::string_view name, const OpCost& cost, Work work) {
    meter_.time(*trace_, name, cost, work);
  }
  std::string_view name(Projections projections) const {
    return trace_->product(meter_.view(projections.begin()->weight));
  }

  static double number(auto x) noexcept { return static_cast<double>(x); }
  static double bytes(const Tensor& t) noexcept { return sizeof(float) * number(t.n_rows) * number(t.n_cols); }
  static double bytes(const Vector& v) noexcept { return sizeof(float) * number(v.size); }

  static OpCost norm(const Tensor& out, const Tensor& x, const Vector& weight) noexcept {
    return {.memory = bytes(weight), .activations = bytes(out) + bytes(x)};
  }
  static OpCost gated_norm(const Tensor& out, const Vector& weight) noexcept {
    return {.memory = bytes(weight), .activations = 3 * bytes(out)};
  }
  OpCost products(const Tensor& x, Projections projections) const {
    OpCost cost{.activations = bytes(x)};
    for (const auto& p : projections) {
      cost += product_cost(meter_.view(p.weight), x.n_rows);
      cost.activations += bytes(p.y);
    }
    return cost;
  }
  static OpCost convolution(const Tensor& out, const Tensor& x, const Vector& taps, DeltaSegments segments) noexcept {
    const double window = sizeof(float) * number(taps.cols - 1) * number(x.n_cols);
    return {.memory = bytes(taps) + 2 * window * number(segments.size()),
            .activations = bytes(out) + bytes(x),
            .floating_macs = number(x.n_rows) * number(x.n_cols) * number(taps.cols)};
  }
  static OpCost gates(const Tensor& b, const Vector& A, const Vector& dt_bias) noexcept {
    return {.memory = bytes(A) + bytes(dt_bias), .activations = 4 * bytes(b)};
  }
  static OpCost delta_rule(const Tensor& out, const Tensor& qkv, const Tensor& beta, DeltaShape shape,
                           DeltaSegments segments) noexcept {
    const double S = number(shape.value_heads) * number(shape.key_dim) * number(shape.value_dim);
    OpCost cost{.activations = bytes(out) + bytes(qkv) + 2 * bytes(beta)};
    for (const auto& s : segments) {
      cost.memory += 2 * sizeof(float) * S;
      cost.floating_macs += 3 * number(s.count) * S;  // S^T k, S += k delta^T and S^T q
    }
    return cost;
  }
  static OpCost rotation(const Tensor& x, const Tensor& angles, int head_dim) noexcept {
    const double turned = number(angles.n_cols) / number(head_dim);
    return {.activations = 2 * turned * bytes(x) + bytes(angles)};
  }
  static OpCost attending(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, AttentionShape shape,
                          KvSegments segments) noexcept {
    OpCost cost{.activations = bytes(out) + bytes(q) + bytes(k) + bytes(v)};
    for (const auto& s : segments) {
      const double past = number(s.position), T = number(s.count);
      cost.memory += (past + T) * 2 * number(shape.kv_heads) * number(s.state->row_bytes());
      // q k and p v over what each of the T tokens sees: past + 1 .. past + T.
      cost.floating_macs += (past * T + T * (T + 1) / 2) * 2 * number(shape.heads) * number(shape.head_dim);
    }
    return cost;
  }

  Trace* trace_;
  Meter meter_;
};

}  // namespace qwen3next
