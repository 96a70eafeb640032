// The size that a model is named after, against sums that are easy to follow.

#include <doctest/doctest.h>

#include "model/parameters.hpp"

using namespace qwen3next;

TEST_CASE("parameters, in all and per token") {
  const auto matrix = [](int rows, int cols, const void* at = nullptr) {
    return WeightView::contiguous(static_cast<const std::byte*>(at), DType::bf16, rows, cols);
  };
  Config c;
  c.hidden_size = 8, c.num_experts = 4, c.num_experts_per_tok = 2;
  const char embedding = 0, head = 0;
  ModelWeights<Views> w;
  w.embed_tokens = matrix(100, 8, &embedding);
  w.lm_head = matrix(100, 8, &head);
  w.norm.size = 8;
  w.layers.resize(2);
  w.layers[0].linear_attn.emplace().out_proj = matrix(8, 10);
  w.layers[1].self_attn.emplace().o_proj = matrix(8, 64);
  for (LayerWeights<Views>& layer : w.layers) layer.mlp.experts.assign(4, {matrix(6, 8), matrix(6, 8), matrix(8, 6)});
  const int expert = 3 * 6 * 8, dense = 8 * 10 + 8 * 64 + 8;

  ParameterCount n = count_parameters(c, w);
  CHECK(n.total == 2 * 800 + dense + 2 * 4 * expert);
  CHECK(n.experts == 2 * 4 * expert);
  CHECK(n.mtp == 0);
  CHECK(n.active == 8 + 800 + dense + 2 * 2 * expert);  // one row of the embedding, two experts a layer

  w.lm_head = w.embed_tokens;  // tied: stored once, and still multiplied with
  CHECK(count_parameters(c, w).total == n.total - 800);
  CHECK(count_parameters(c, w).active == n.active);

  const float norms[2] = {};
  w.norm.data = &norms[0];
  w.mtp.emplace().fc = matrix(8, 16);
  w.mtp->norm = {&norms[0], 8, 1};  // all three are the model's
  w.mtp->embed_tokens = w.embed_tokens;
  w.mtp->lm_head = w.lm_head;
  w.mtp->layer.mlp.experts = w.layers[0].mlp.experts;
  CHECK(count_parameters(c, w).mtp == 8 * 16 + 4 * expert);
  CHECK(count_parameters(c, w).total == n.total - 800 + 8 * 16 + 4 * expert);
  CHECK(count_parameters(c, w).active == n.active);  // a plain pass does without it

  const char own = 0;
  w.mtp->lm_head = matrix(100, 8, &own);
  w.mtp->norm.data = &norms[1];
  CHECK(count_parameters(c, w).mtp == 8 * 16 + 4 * expert + 800 + 8);
  CHECK(count_parameters(c, w).total == n.total - 800 + 8 * 16 + 4 * expert + 800 + 8);
}
