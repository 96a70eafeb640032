#pragma once
// The CUDA backend: all of the model on one NVIDIA GPU.
//
// The operations are those of backend.hpp; their meaning in plain words is backends/reference/.  Beside them are the
// boxes of model/forward.hpp that are one or two launches here: for few rows each launch costs more than its work.
// This header is plain C++; kernels are in the .cu files beside it.  An instance owns its scratch memory: one caller at
// a time.  All instances share the device's one stream, and nothing waits but host().

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "backends/cpu/cpu_backend.hpp"
#include "backends/cuda/attention.hpp"
#include "backends/cuda/delta.hpp"
#include "backends/cuda/delta_state.hpp"
#include "backends/cuda/device.hpp"
#include "backends/cuda/elementwise.hpp"
#include "backends/cuda/experts_few.hpp"
#include "backends/cuda/experts_many.hpp"
#include "backends/cuda/kv_cache.hpp"
#include "backends/cuda/launch_record.hpp"
#include "backends/cuda/linear_few.hpp"
#include "backends/cuda/linear_many.hpp"
#include "backends/cuda/router.hpp"
#include "backends/cuda/tensor.hpp"
#include "backends/cuda/weights.hpp"

namespace qwen3next {

class CudaBackend {
 public:
  using Tensor = cuda::CudaTensor;
  using Weight = cuda::CudaWeight;
  using Vector = cuda::CudaVector;
  using Experts = cuda::CudaExperts;
  using Routing = cuda::CudaRouting;
  using DeltaState = cuda::CudaDeltaState;
  using KvCache = cuda::CudaKvCache;

  // What keeps the same states in this machine's memory.
  using Host = CpuBackend;
  static Host host_backend(KvType kv) { return Host({nullptr, 1, kv, {}}); }

  CudaBackend(std::shared_ptr<cuda::Device> device, KvType kv)
      : shared_device_(std::move(device)),
        record_(std::make_unique<cuda::LaunchRecord>(shared_device_)),
        device_(shared_device_->with_record(record_.get())),
        kv_(kv),
        scratch_(device_),
        ids_(shared_device_) {}

  Tensor tensor(int rows, int cols) {
    const std::ptrdiff_t stride = (cols + 63) / 64 * 64;
    const std::size_t count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride);
    memory_.emplace_back(shared_device_, count * (sizeof(float) + sizeof(std::uint16_t)), "activations of a session");
    device_->clear(memory_.back().data(), memory_.back().size());  // products read what lies beyond the columns
    float* data = memory_.back().data<float>();
    return {data, reinterpret_cast<std::uint16_t*>(data + count), rows, cols, stride};
  }
  Routing routing(int rows, int k) { return Routing(shared_device_, rows, k); }
  DeltaState delta_state(DeltaShape s) { return DeltaState(shared_device_, s); }
  KvCache kv_cache(AttentionShape s) {
    if (kv_ == KvType::q8_0 && s.head_dim % 32 != 0) {
      throw Error("a q8_0 KV cache needs heads of a multiple of 32 dims, this model's have " +
                  std::to_string(s.head_dim) + ": use f16 or f32");
    }
    return KvCache(shared_device_, s, kv_);
  }

  // From begin to end, launches are gathered and then started as one graph.
  bool begin_pass() { return record_->begin(), true; }
  void end_pass() { record_->end(); }
  void give_up_pass() noexcept { record_->give_up(); }

  std::span<const float> host(Tensor row) {
    start_gathered();
    const auto n = static_cast<std::size_t>(row.n_cols);
    if (host_row_.size() < n * sizeof(float)) host_row_ = cuda::PinnedBytes(n * sizeof(float));
    device_->copy_to_host(host_row_.data(), row.data, n * sizeof(float));
    return {host_row_.data<float>(), n};
  }
  void set_host(Tensor row, std::span<const float> values) {
    start_gathered();
    device_->copy_to_device(row.data, values.data(), values.size_bytes());
    cuda::round_to_half(*device_, row);
  }
  void copy(Tensor out, Tensor x) { cuda::copy(*device_, out, x); }

  void embed(Tensor out, std::span<const std::int32_t> tokens, const Weight& w) {
    auto* ids = ids_.get<std::int32_t>(tokens.size());
    device_->copy_to_device(ids, tokens.data(), tokens.size_bytes());  // before what is gathered, which reads it
    cuda::expand_rows(*device_, out, ids, w.matrix());
  }

  void rms_norm(Tensor out, Tensor x, const Vector& weight, float eps) {
    cuda::rms_norm(*device_, out, x, weight.data, weight.size, eps);
  }

  using Projections = std::initializer_list<Projection<Weight, Tensor>>;
  void linear(Tensor x, Projections projections) { multiply(x, projections, {}); }

  void causal_conv1d(Tensor out, Tensor x, const Vector& taps, std::span<const Segment<DeltaState>> segments) {
    cuda::causal_conv1d(*device_, out, x, taps.data, taps.cols, segments);
  }
  void delta_gates(Tensor beta, Tensor g, Tensor b, Tensor a, const Vector& A, const Vector& dt_bias) {
    cuda::delta_gates(*device_, beta, g, b, a, A.data, dt_bias.data);
  }
  void gated_delta_rule(Tensor out, Tensor qkv, Tensor beta, Tensor g, DeltaShape shape,
                        std::span<const Segment<DeltaState>> segments) {
    cuda::gated_delta_rule(*device_, scratch_, out, qkv, beta, g, shape, segments);
  }
  void settle(DeltaState& state, DeltaShape shape) { cuda::settle(*device_, state, shape); }

  void gated_rms_norm(Tensor out, Tensor o, Tensor z, const Vector& weight, float eps) {
    cuda::gated_rms_norm(*device_, out, o, z, weight.data, weight.size, eps);
  }

  void rope_angles(Tensor angles, std::span<const double> frequency, float scale,
                   std::span<const Segment<KvCache>> segments) {
    cuda::rope_angles(*device_, angles, frequency, scale, segments);
  }
  void rope(Tensor x, Tensor angles, int head_dim) { cuda::rope(*device_, x, angles, head_dim); }

  void attention(Tensor out, Tensor q, Tensor k, Tensor v, AttentionShape shape,
                 std::span<const Segment<KvCache>> segments) {
    cuda::attention(*device_, scratch_, out, q, k, v, shape, segments);
  }
  void append_kv(Tensor k, Tensor v, AttentionShape shape, std::span<const Segment<KvCache>> segments) {
    cuda::append_kv(*device_, k, v, shape, segments);
  }

  void sigmoid_gate(Tensor x, Tensor gate) { cuda::sigmoid_gate(*device_, x, gate); }

  void router(Routing& routing, Tensor logits, int k, bool normalise) {
    cuda::router(*device_, routing, logits, k, normalise);
  }

  void experts(Tensor out, Tensor x, const Experts& experts, const Routing& routing) {
    if (many(x, experts, routing.k)) {
      cuda::experts_many(*device_, scratch_, {.out = out, .x = x, .experts = &experts, .routing = &routing});
      return;
    }
    few_at_a_time(x, [&](int begin, int n) {
      cuda::experts_few(
          *device_, scratch_,
          {.out = out.rows(begin, n), .x = x.rows(begin, n), .experts = &experts, .routing = routing.slice(begin, n)});
    });
  }

  void swiglu(Tensor out, Tensor gate, Tensor up) { cuda::swiglu(*device_, out, gate, up, 1); }
  void add(Tensor x, Tensor y) { cuda::add(*device_, x, y); }
  void add_gated(Tensor x, Tensor y, Tensor gate) { cuda::add_gated(*device_, x, y, gate); }

  // --- boxes of model/forward.hpp ---

  void norm_linear(Tensor h, Tensor x, const Vector& norm, float eps, Projections projections) {
    if (x.n_rows <= cuda::max_few_rows) {
      multiply(x, projections,
               {.kind = cuda::FewInput::Kind::rms_norm,
                .norm = norm.data,
                .norm_size = norm.size,
                .eps = eps,
                .written = h});
    } else {
      rms_norm(h, x, norm, eps);
      linear(h, projections);
    }
  }

  void linear_add(Tensor x, Tensor in, const Weight& w, Tensor y) {
    if (in.n_rows <= cuda::max_few_rows)
      cuda::linear_few(*device_, in, one({w.matrix(), y}), {}, x);
    else
      cuda::linear_many(*device_, in, one_of_many({w.matrix(), x}), 1, true);
  }

  void gated_norm_linear_add(Tensor x, Tensor o, Tensor z, const Vector& norm, float eps, const Weight& w, Tensor y) {
    if (o.n_rows <= cuda::max_few_rows) {
      cuda::linear_few(*device_, o, one({w.matrix(), y}),
                       {.kind = cuda::FewInput::Kind::gated_rms_norm,
                        .norm = norm.data,
                        .norm_size = norm.size,
                        .eps = eps,
                        .gate = z},
                       x);
    } else {
      gated_rms_norm(o, o, z, norm, eps);
      linear_add(x, o, w, y);
    }
  }

  void delta_net(Tensor o, Tensor conv, Tensor qkv, Tensor b, Tensor a, Tensor beta, Tensor g, const Vector& taps,
                 const Vector& A, const Vector& dt_bias, DeltaShape shape,
                 std::span<const Segment<DeltaState>> segments) {
    cuda::delta_net(*device_, scratch_, o, {qkv, b, a, taps.data, A.data, dt_bias.data, conv, beta, g}, shape,
                    segments);
  }

  void gated_attention(Tensor heads, Tensor q, Tensor gate, Tensor k, Tensor v, const Vector& q_norm,
                       const Vector& k_norm, float eps, Tensor angles, AttentionShape shape,
                       std::span<const Segment<KvCache>> segments) {
    cuda::gated_attention(*device_, scratch_, heads, q, gate, k, v, q_norm.data, k_norm.data, eps, angles, shape,
                          segments);
  }

  void experts_add(Tensor x, Tensor h, Tensor logits, Routing& routing, const Experts& experts,
                   const SharedExpert<Weight, Tensor>& shared, int k, bool normalise) {
    if (!many(h, experts, k)) {
      routing.rows = h.n_rows, routing.k = k;
      few_at_a_time(h, [&](int begin, int n) {
        cuda::experts_few(*device_, scratch_,
                          {.residual = x.rows(begin, n),
                           .x = h.rows(begin, n),
                           .experts = &experts,
                           .logits = logits.rows(begin, n),
                           .routing = routing.slice(begin, n),
                           .normalise = normalise,
                           .shared_gate = shared.gate_proj.matrix(),
                           .shared_up = shared.up_proj.matrix(),
                           .shared_down = shared.down_proj.matrix(),
                           .shared_logit = shared.gate.rows(begin, n)});
      });
      return;
    }
    router(routing, logits, k, normalise);
    add_routed(x, h, routing, experts, shared);
  }

  cuda::Device& device() const noexcept { return *device_; }

 protected:
  // Many rows: x += the experts picked, of those on the card or that come in `waves`, and the shared one.
  void add_routed(Tensor x, Tensor h, const Routing& routing, const cuda::CudaExperts& experts,
                  const SharedExpert<Weight, Tensor>& shared, cuda::ExpertWaves* waves = nullptr) {
    linear(h, {{shared.gate_proj, shared.hidden}, {shared.up_proj, shared.up}});
    cuda::swiglu(*device_, shared.hidden, shared.hidden, shared.up, cuda::hidden_scale);
    cuda::linear_many(*device_, shared.hidden, one_of_many({shared.down_proj.matrix(), shared.y}),
                      1 / cuda::hidden_scale);
    cuda::experts_many(*device_, scratch_,
                       {.out = x,
                        .x = h,
                        .experts = &experts,
                        .routing = &routing,
                        .shared = shared.y,
                        .shared_gate = shared.gate,
                        .add = true,
                        .waves = waves});
  }

 private:
  // What the stream is to do next must come after what was gathered.
  void start_gathered() { record_->start_gathered(); }

  static std::span<const cuda::Product> one(const cuda::Product& p) noexcept { return {&p, 1}; }

  static std::span<const cuda::ManyOutput> one_of_many(const cuda::ManyOutput& p) noexcept { return {&p, 1}; }

  // Whether experts go by experts_many: it has no products with f32, which only small models keep them in.
  static bool many(const Tensor& x, const Experts& experts, int k) {
    const cuda::ExpertMatrices& m = experts.matrices;
    const bool f32 = m.gate.type == DType::f32 || m.up.type == DType::f32 || m.down.type == DType::f32;
    const bool fit_few = k <= cuda::max_few_slots && m.count <= cuda::max_few_experts;
    if (f32 && !fit_few) {
      throw Error("the cuda backend takes F32 experts of layers of up to " + std::to_string(cuda::max_few_experts) +
                  ", " + std::to_string(cuda::max_few_slots) + " a token: use cpu, or quantise them");
    }
    return !f32 && !(fit_few && x.n_rows <= cuda::max_few_rows);
  }
  template <class F>
  static void few_at_a_time(const Tensor& x, F f) {
    for (int begin = 0; begin < x.n_rows; begin += cuda::max_few_rows)
      f(begin, std::min(cuda::max_few_rows, x.n_rows - begin));
  }

  // y = W input(x);  of more than a few rows, W x.
  void multiply(Tensor x, Projections projections, const cuda::FewInput& input) {
    if (x.n_rows <= cuda::max_few_rows) {
      few_.clear();
      for (const auto& p : projections) few_.push_back({p.weight.matrix(), p.y});
      const auto most = static_cast<std::size_t>(cuda::max_few_products);
      for (std::size_t i = 0; i < few_.size(); i += most)
        cuda::linear_few(*device_, x, std::span(few_).subspan(i, std::min(most, few_.size() - i)), input);
    } else {
      many_.clear();
      for (const auto& p : projections) many_.push_back({p.weight.matrix(), p.y});
      cuda::linear_many(*device_, x, many_);
    }
  }

  std::shared_ptr<cuda::Device> shared_device_;  // of states, which may outlive this
  std::unique_ptr<cuda::LaunchRecord> record_;
  std::shared_ptr<cuda::Device> device_;  // the same with the record
  KvType kv_;
  std::vector<cuda::DeviceBytes> memory_;
  cuda::DeviceScratch scratch_, ids_;
  cuda::PinnedBytes host_row_;
  std::vector<cuda::Product> few_;
  std::vector<cuda::ManyOutput> many_;
};

static_assert(BackendOps<CudaBackend>);

}  // namespace qwen3next
