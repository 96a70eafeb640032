// Continues a sentence with the installed library.   story MODEL
#include <iostream>

#include "qwen3next.hpp"

int main(int argc, char** argv) try {
  if (argc != 2) throw qwen3next::Error("usage: story MODEL");
  const auto model = qwen3next::Model::open(argv[1]);
  std::cerr << model.backend_description() << "\n";
  auto session = model.session({.context = 2048});
  auto options = session.default_options();
  options.max_tokens = 60;
  options.sampling.temperature = 0;  // always the most probable token
  const std::string_view beginning = "Once upon a time, a little fox";
  std::cout << beginning;
  session.generate(
      beginning, [](std::string_view piece) { return bool(std::cout << piece << std::flush); }, options);
  std::cout << "\n";
} catch (const qwen3next::Error& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
