#include <iostream>

#include "qwen3next.hpp"

// The most probable continuation: the same words on every machine, but for rounding.
void tell_story(qwen3next::Session& session, std::string_view beginning, int tokens) {
  auto options = session.default_options();
  options.max_tokens = tokens;
  options.sampling.temperature = 0;
  std::cout << beginning;
  session.generate(
      beginning, [](std::string_view piece) { return bool(std::cout << piece << std::flush); }, options);
  std::cout << "\n";
}
