// A model that is larger than memory.   stream MODEL MEBIBYTES
//
// Says what the budget will hold before it reads any weights, then tells a story within it, and how that went.

#include <cstdlib>
#include <iostream>

#include "qwen3next.hpp"

using namespace qwen3next;

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: stream MODEL MEBIBYTES\n";
    return 2;
  }
  const Model model = Model::open(argv[1], {.memory = std::strtoull(argv[2], nullptr, 10) << 20});
  const MemoryPlan plan = model.plan({.context = 512});
  std::cerr << "dense weights " << (plan.weights_resident >> 20) << " MiB, " << plan.experts_held << " of "
            << plan.experts << " experts in memory, " << 100 * plan.hit_rate << " % of picks expected there\n";

  Session session = model.session({.context = 512});
  GenerateOptions options = session.default_options();
  options.max_tokens = 60;
  session.generate(
      "Once upon a time",
      [](std::string_view piece) {
        std::cout << piece << std::flush;
        return true;
      },
      options);
  const ExpertStatistics experts = *model.expert_statistics();
  std::cout << "\n";
  std::cerr << 100 * experts.hit_rate() << " % of picks were there, " << (experts.bytes_read >> 20)
            << " MiB were read, " << experts.stall_seconds << " s waited for\n";
} catch (const Error& error) {
  std::cerr << "stream: " << error.what() << "\n";
  return 1;
}
