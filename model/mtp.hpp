#pragma once
// Multi-token prediction: one more layer that guesses the token after next.

#include <span>

#include "model/forward.hpp"

namespace qwen3next {

// Row t of `hidden` [T, H] is the final hidden state of token t; `next_tokens`[t] is the token at t + 1:
//   x = fc [norm(embed(next)); norm(h)],   in a.x;  enters the MTP layer.
template <BackendOps B>
void mtp_input(B& be, const Config& c, const MtpWeights<B>& mtp, std::span<const std::int32_t> next_tokens,
               typename B::Tensor hidden, std::span<const SequenceRows<B>> sequences, Activations<B>& a) {
  const int T = static_cast<int>(next_tokens.size());
  const int H = c.hidden_size;
  auto x = a.x.rows(0, T), in = a.mtp_in->rows(0, T);
  const float eps = static_cast<float>(c.rms_norm_eps);

  position_angles(be, a, sequences, T);
  be.embed(x, next_tokens, mtp.embed_tokens);
  be.rms_norm(in.columns(0, H), x, mtp.pre_fc_norm_embedding, eps);
  be.rms_norm(in.columns(H, H), hidden, mtp.pre_fc_norm_hidden, eps);
  be.linear(in, {{mtp.fc, x}});
  enter_layer(a, sequences, [](SequenceState<B>& s) -> LayerState<B>& { return s.mtp; });
}

//   x = attention layer(mtp_input);   h' = norm(x)
// Leaves h' in a.h, whose logits (by `head`, mtp.lm_head) are for the token at t + 2, and which is the `hidden` of a
// further draft.  The layer has a KV cache of its own that must be fed every position, the prompt's included.
template <BackendOps B>
void mtp_forward(B& be, const Config& c, const MtpWeights<B>& mtp, std::span<const std::int32_t> next_tokens,
                 typename B::Tensor hidden, std::span<const SequenceRows<B>> sequences, Activations<B>& a) {
  const int T = static_cast<int>(next_tokens.size());
  Pass<B> pass(be, sequences);
  mtp_input(be, c, mtp, next_tokens, hidden, sequences, a);
  decoder_layer<B>(be, c, mtp.layer, nullptr, a, T);
  be.rms_norm(a.h.rows(0, T), a.x.rows(0, T), mtp.norm, static_cast<float>(c.rms_norm_eps));
  pass.end();
  for (const SequenceRows<B>& s : sequences) s.state->mtp_position += s.count;
}

// Rows that nobody asks a guess of: their keys and values are all that later rows need.  Leaves a.h as it is.
template <BackendOps B>
void mtp_feed(B& be, const Config& c, const MtpWeights<B>& mtp, std::span<const std::int32_t> next_tokens,
              typename B::Tensor hidden, std::span<const SequenceRows<B>> sequences, Activations<B>& a) {
  const int T = static_cast<int>(next_tokens.size());
  const AttentionWeights<B>& w = *mtp.layer.self_attn;
  const float eps = static_cast<float>(c.rms_norm_eps);
  Pass<B> pass(be, sequences);
  mtp_input(be, c, mtp, next_tokens, hidden, sequences, a);
  auto h = a.mix.rows(0, T), k = a.k.rows(0, T), v = a.v.rows(0, T);
  be.rms_norm(h, a.x.rows(0, T), mtp.layer.input_layernorm, eps);
  be.linear(h, {{w.k_proj, k}, {w.v_proj, v}});
  be.rms_norm(k, k, w.k_norm, eps);
  be.rope(k, a.angles.rows(0, T), c.head_dim);
  be.append_kv(k, v, attention_shape(c), a.kv_segments);
  pass.end();
  for (const SequenceRows<B>& s : sequences) s.state->mtp_position += s.count;
}

}  // namespace qwen3next
