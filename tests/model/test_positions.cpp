// The angles of rotary embedding against fp64, as far as a million tokens reach (tests/golden/rope, made by
// tools/make_rope_goldens.py: YaRN's frequencies are those of transformers' function).

#include <doctest/doctest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "backends/reference/reference_backend.hpp"
#include "model/config.hpp"
#include "tests/support/backends.hpp"

using namespace qwen3next;

namespace {

Config config_of(const nlohmann::json& j) {
  Config c;
  c.rope_theta = j.at("rope_theta");
  c.head_dim = j.at("head_dim");
  c.rotary_dim = j.at("rotary_dim");
  c.max_position_embeddings = j.at("trained");
  if (!j.contains("factor")) return c;
  YarnScaling yarn;
  yarn.factor = j.at("factor");
  yarn.original_max_position_embeddings = c.max_position_embeddings;
  yarn.beta_fast = j.value("beta_fast", yarn.beta_fast);
  yarn.beta_slow = j.value("beta_slow", yarn.beta_slow);
  if (j.contains("attention_factor")) yarn.attention_factor = j.at("attention_factor").get<double>();
  c.yarn = yarn;
  return c;
}

// Cos and sin of a position, one token at a time.
template <class B>
std::vector<float> angles_at(B& be, const Rope& rope, std::int64_t position) {
  const int n = static_cast<int>(rope.frequency.size());
  HostTensor angles = be.tensor(1, 2 * n);
  const Segment<typename B::KvCache> segment{0, 1, position, nullptr};
  be.rope_angles(angles, rope.frequency, rope.scale, {&segment, 1});
  return {angles.row(0), angles.row(0) + 2 * n};
}

}  // namespace

TEST_CASE("rotary angles: to float precision at every position up to a million, with and without YaRN") {
  std::ifstream file(std::string(QWEN3NEXT_SOURCE_DIR) + "/tests/golden/rope/angles.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  const std::vector<std::int64_t> positions = golden.at("positions");
  CpuBackend fast(test::cpu("", 2, KvType::f16));
  ReferenceBackend reference;
  for (const nlohmann::json& j : golden.at("cases")) {
    CAPTURE(j.dump().substr(0, 120));
    const Rope rope = make_rope(config_of(j));
    const std::vector<double> frequency = j.at("frequency");
    const double scale = j.at("scale");
    REQUIRE(rope.frequency.size() == frequency.size());
    // The two forms of the same power and sum differ by a few roundings of fp64: 2e-9 radians at a million.
    for (std::size_t i = 0; i < frequency.size(); ++i)
      CHECK(std::abs(rope.frequency[i] - frequency[i]) <= 2e-15 * frequency[i]);
    CHECK(std::abs(static_cast<double>(rope.scale) - scale) < 1e-7 * scale);
    for (std::size_t p = 0; p < positions.size(); ++p) {
      CAPTURE(positions[p]);
      const std::vector<double> cos = j.at("cos").at(p), sin = j.at("sin").at(p);
      // cos, the scale and their product are each rounded to float: 2^-24 of at most 1 and the scale.
      const double bound = 1.8e-7 * scale;
      for (const std::vector<float>& row :
           {angles_at(fast, rope, positions[p]), angles_at(reference, rope, positions[p])}) {
        for (std::size_t i = 0; i < cos.size(); ++i) {
          CHECK(std::abs(static_cast<double>(row[i]) - scale * cos[i]) < bound);
          CHECK(std::abs(static_cast<double>(row[cos.size() + i]) - scale * sin[i]) < bound);
        }
      }
    }
  }
}

TEST_CASE("YaRN asked for by a factor alone: transformers' defaults, and a context as much longer") {
  Config c;
  c.layer_types = interval_layer_types(c.num_hidden_layers, 4);
  c.extend_context(4);
  CHECK(c.max_position_embeddings == 1048576);
  CHECK(c.yarn->original_max_position_embeddings == 262144);
  CHECK(make_rope(c).scale == doctest::Approx(1.1386294361119891));
  c.extend_context(2);  // again: of the length that the model was trained on
  CHECK(c.max_position_embeddings == 524288);
  CHECK(c.yarn->original_max_position_embeddings == 262144);
}
