// Any text as config.json: what is accepted has finite angles and a memory plan.

#include <algorithm>
#include <cmath>

#include "model/memory_plan.hpp"
#include "target.hpp"
#include "weights/hf_config.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

FUZZ_TARGET(hf_config) {
  const Config config = read_hf_config(input, "config.json");
  const Rope rope = make_rope(config);
  expect(std::isfinite(rope.scale), "a finite scale");
  expect(std::ranges::all_of(rope.frequency, [](double f) { return std::isfinite(f); }), "finite angles");
  expect(plan_session(config, KvType::f16, config.max_position_embeddings, 512).session() > 0, "a plan");
}
