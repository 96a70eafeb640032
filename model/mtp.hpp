#pragma once
// Multi-token prediction: one more layer that guesses the token after next.

#include <span>

#include "model/forward.hpp"

namespace qwen3next {

// Row t takes the final hidden state of token t, rows [0, T) of a.h, and `next_tokens`[t], the token at t + 1:
//   x = fc [norm(embed(next)); norm(h)];   x = attention layer(x);   h' = norm(x)
// and leaves h' in a.h, whose logits (by `head`, mtp.lm_head) are for the token at t + 2, and which is the h of a
// further draft. The layer has a KV cache of its own that must be fed every position, the prompt's included.
template <BackendOps B>
void mtp_forward(B& be, const Config& c, const MtpWeights<B>& mtp, std::span<const std::int32_t> next_tokens,
                 std::span<const SequenceRows<B>> sequences, Activations<B>& a) {
  const int T = static_cast<int>(next_tokens.size());
  const int H = c.hidden_size;
  auto x = a.x.rows(0, T), h = a.h.rows(0, T), in = a.mtp_in->rows(0, T);
  const float eps = static_cast<float>(c.rms_norm_eps);

  position_angles(be, a, sequences, T);
  be.embed(x, next_tokens, mtp.embed_tokens);
  be.rms_norm(in.columns(0, H), x, mtp.pre_fc_norm_embedding, eps);
  be.rms_norm(in.columns(H, H), h, mtp.pre_fc_norm_hidden, eps);
  be.linear(in, {{mtp.fc, x}});
  enter_layer(a, sequences, [](SequenceState<B>& s) -> LayerState<B>& { return s.mtp; });
  decoder_layer<B>(be, c, mtp.layer, nullptr, a, T);
  be.rms_norm(h, x, mtp.norm, eps);
  for (const SequenceRows<B>& s : sequences) s.state->mtp_position += s.count;
}

}  // namespace qwen3next
