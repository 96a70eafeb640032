// The bytes of a pass, against sums that are easy to follow.

#include <doctest/doctest.h>

#include "model/traffic.hpp"

using namespace qwen3next;

namespace {

// One DeltaNet layer and one attention layer in F16, so that bytes are twice the elements.
struct Toy {
  Config c;
  ModelWeights<Views> w;

  Toy() {
    c.vocab_size = 100, c.hidden_size = 8, c.num_hidden_layers = 2;
    c.layer_types = {LayerType::linear_attention, LayerType::full_attention};
    c.num_attention_heads = 4, c.num_key_value_heads = 2, c.head_dim = 16;
    c.linear_num_key_heads = 1, c.linear_num_value_heads = 2, c.linear_key_head_dim = 3, c.linear_value_head_dim = 5;
    c.linear_conv_kernel_dim = 4;
    c.num_experts = 4, c.num_experts_per_tok = 2, c.moe_intermediate_size = 6;
    c.has_mtp = true;
    w.embed_tokens = w.lm_head = matrix(100, 8);
    w.norm.size = 8;
    w.layers.resize(2);
    w.layers[0].linear_attn.emplace().out_proj = matrix(8, 10);
    w.layers[1].self_attn.emplace().o_proj = matrix(8, 64);
    for (LayerWeights<Views>& layer : w.layers) {
      layer.input_layernorm.size = 8;
      layer.mlp.experts.assign(4, {matrix(6, 8), matrix(6, 8), matrix(8, 6)});
    }
  }
  static WeightView matrix(int rows, int cols) { return WeightView::contiguous(nullptr, DType::f16, rows, cols); }
};

}  // namespace

TEST_CASE("bytes of a decoded token") {
  const Toy toy;
  const Traffic t = pass_traffic(toy.c, toy.w, KvType::f16, 1, 1000);
  CHECK(t.dense == 2 * (8 + 100 * 8 + 8 * 10 + 8 * 64) + 4 * (8 + 8 + 8));  // one row of the embedding; norms are F32
  CHECK(t.experts == doctest::Approx(2 * 2 * (2 * 3 * 6 * 8)));             // top 2 in 2 layers
  CHECK(t.kv_cache == 1001 * 2 * (2 * 2 * 16));                             // one attention layer; not the MTP layer's
  CHECK(t.states == 2 * 4 * (2 * 3 * 5 + 3 * (2 * 3 + 10)));                // read and written; S and three columns
  CHECK(t.total() == doctest::Approx(t.dense + t.experts + t.kv_cache + t.states));
}

TEST_CASE("experts that a batch touches") {
  CHECK(expected_distinct_experts(512, 10, 1) == doctest::Approx(10));
  CHECK(expected_distinct_experts(512, 10, 2) == doctest::Approx(20 - 100. / 512));
  CHECK(expected_distinct_experts(512, 10, 512) > 511.9);
  CHECK(expected_distinct_experts(4, 4, 3) == 4);
}
