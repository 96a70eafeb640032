#pragma once

#include "weights/checkpoint.hpp"

namespace qwen3next::cli {

// Bytes per second, of experts at random, around the page cache, as many at once as a layer picks for a token; takes a
// third of a second.  Throws Error if a file cannot be read.
double measure_expert_bandwidth(const Checkpoint& checkpoint);

}  // namespace qwen3next::cli
