// The smallest program: continues a sentence.   hello MODEL
#include <iostream>

#include "qwen3next.hpp"

int main(int argc, char** argv) try {
  if (argc != 2) throw qwen3next::Error("usage: hello MODEL");
  auto model = qwen3next::Model::open(argv[1]);
  auto session = model.session();
  auto options = session.default_options();
  options.max_tokens = 100;
  session.generate(
      "Once upon a time", [](std::string_view s) { return bool(std::cout << s << std::flush); }, options);
} catch (const qwen3next::Error& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
