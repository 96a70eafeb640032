#pragma once
// What a backend must offer: the boxes of the paper, over its own tensors and weights.
//
// The layers in model/ are written once against this concept.  A backend instance belongs to one caller at a time (it
// owns scratch memory and tensors); weights are shared by all instances.  All activations are float32.
// Letters: T rows (tokens of one or several sequences); others as in model/weights.hpp.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <span>
#include <utility>
#include <vector>

#include "blocks/weight_view.hpp"

namespace qwen3next {

// Rows [begin, begin + count) of a batch are consecutive tokens of one sequence, the first at `position`; `state` is
// what that sequence keeps in the layer at hand.  Rows that are `tentative` (guesses to be checked) leave a DeltaNet
// state as it is until accept() says how many of them are to stay; their results are as if all did.
template <class State>
struct Segment {
  int begin;
  int count;
  std::int64_t position;
  State* state;
  bool tentative = false;
};

// Most tentative rows of a sequence in a pass.  So few rows, tentative or not, are bit for bit as many passes of one.
inline constexpr int max_tentative_rows = 5;

// y = W x for one of the matrices that share an input.
template <class Weight, class Tensor>
struct Projection {
  const Weight& weight;  // [N, D]
  Tensor y;              // [T, N]
};

// The expert that serves all tokens: out += sigmoid(gate) * down(silu(gate_proj h) * (up_proj h)).
template <class Weight, class Tensor>
struct SharedExpert {
  const Weight& gate_proj;  // [Is, H]
  const Weight& up_proj;    // [Is, H]
  const Weight& down_proj;  // [H, Is]
  Tensor gate;              // [T, 1]
  Tensor hidden, up, y;     // scratch [T, Is] x2, [T, H]
};

struct DeltaShape {
  int key_heads, value_heads, key_dim, value_dim, conv_kernel;
  int conv_dim() const noexcept { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

struct AttentionShape {
  int heads, kv_heads, head_dim;
};

// How the keys and values of past positions are kept.
enum class KvType : std::uint8_t { f16, f32, q8_0 };

constexpr DType stored_type(KvType type) noexcept {
  return type == KvType::f32 ? DType::f32 : type == KvType::f16 ? DType::f16 : DType::q8_0;
}

// Memory that several values may share: of this identity, so large, held by so many.
struct SharedMemory {
  const void* identity;
  std::uint64_t bytes;
  long holders;
};
// Given bytes of a state, piece by piece.
using BytesSink = std::function<void(std::span<const std::byte>)>;

template <class B>
concept BackendOps = requires(B& be, typename B::Tensor t, const typename B::Weight& w, const typename B::Vector& v,
                              const typename B::Experts& e, typename B::Routing& routing,
                              std::span<const Segment<typename B::DeltaState>> delta,
                              std::span<const Segment<typename B::KvCache>> kv, std::span<const std::int32_t> tokens,
                              std::span<const double> frequency, DeltaShape ds, AttentionShape as, int n, float f) {
  // Memory.  Tensors live as long as the instance; states are values: a copy is a snapshot.
  { be.tensor(n, n) } -> std::same_as<typename B::Tensor>;    // [rows, cols]
  { be.routing(n, n) } -> std::same_as<typename B::Routing>;  // [rows, experts per token]
  { be.delta_state(ds) } -> std::same_as<typename B::DeltaState>;
  { be.kv_cache(as) } -> std::same_as<typename B::KvCache>;
  requires std::copyable<typename B::DeltaState> && std::copyable<typename B::KvCache>;
  requires requires(typename B::KvCache cache, std::int64_t length) { cache.truncate(length); };  // forgets the rest
  // What a state is in a file, piece by piece: f32, and rows of the cache's type; and what copies of a cache share.
  requires requires(typename B::DeltaState state, typename B::KvCache cache, const BytesSink& sink,
                    std::vector<SharedMemory>& blocks) {
    state.bytes(sink);
    { state.size_in_bytes() } -> std::same_as<std::uint64_t>;  // what bytes() gives in all
    cache.bytes(sink);
    { cache.begins(cache) } -> std::same_as<bool>;
    cache.extend(int());
    cache.blocks(blocks);
  };
  // The first n rows of the tentative pass before stay, the others are forgotten.  A backend may put the work off to
  // the next pass; settle() does it now.
  requires requires(typename B::DeltaState state, int rows) { state.accept(rows); };
  be.settle(std::declval<typename B::DeltaState&>(), ds);
  { be.host(t) } -> std::same_as<std::span<const float>>;  // one row, to read on the host until the next call
  be.set_host(t, std::span<const float>());                // one row, from the host
  be.copy(t, t);                                           // out = x
  { w.slice(n, n) } -> std::same_as<typename B::Weight>;   // rows [n, n + n) of a contiguous matrix
  { t.rows(n, n) } -> std::same_as<typename B::Tensor>;
  { t.columns(n, n) } -> std::same_as<typename B::Tensor>;

  // out [T, H] = rows of w [V, H].
  be.embed(t, tokens, w);

  // out = x / sqrt(mean(x^2) + eps) * v over every group of v.size columns of x; in place allowed.
  be.rms_norm(t, t, v, f);

  // y = W x for several W of one x [T, D].
  be.linear(t, std::initializer_list<Projection<typename B::Weight, typename B::Tensor>>{});

  // out = silu(sum_j taps[c, j] x_{t-K+1+j}[c]), zeros before the start; the state keeps the last K-1 inputs.
  be.causal_conv1d(t, t, v, delta);

  // beta = sigmoid(b), g = A softplus(a + dt_bias); all [T, Hv].
  be.delta_gates(t, t, t, t, v, v);  // beta, g, b, a, A, dt_bias

  // The gated delta rule over conv output qkv [T, 2 Hk Dk + Hv Dv], out [T, Hv Dv]; see model/forward.hpp.
  be.gated_delta_rule(t, t, t, t, ds, delta);  // out, qkv, beta, g

  // out = rms_norm(o; v) * silu(z) over every group of v.size columns; in place allowed.
  be.gated_rms_norm(t, t, t, v, f);  // out, o, z

  // angles [T, 2 n] = cos, sin of position * frequency, times f;  then rotation of the pairs (i, i + n), i < n, of
  // every head of n columns of x, in place.
  be.rope_angles(t, frequency, f, kv);
  be.rope(t, t, n);  // x, angles, head_dim

  // Appends k, v [T, Hkv D] to the caches and attends causally: out [T, Hq D] = softmax(q k / sqrt(D)) v.
  be.attention(t, t, t, t, as, kv);  // out, q, k, v
  be.append_kv(t, t, as, kv);        // the first half of it alone

  // x *= sigmoid(gate), elementwise.
  be.sigmoid_gate(t, t);

  // The n most probable experts of softmax(logits [T, E]), weights divided by their sum if asked for.
  be.router(routing, t, n, true);

  // out [T, H] = sum over the chosen experts of weight * down(silu(gate x) * (up x)).
  be.experts(t, t, e, routing);

  // out = silu(gate) * up; out may be gate.
  be.swiglu(t, t, t);

  // x += y;  x += sigmoid(gate [T, 1]) * y.
  be.add(t, t);
  be.add_gated(t, t, t);
};

}  // namespace qwen3next
