// One header, a compiler, no build system; two files to show that both may include it.   story MODEL
//   g++ -std=c++20 -O3 -march=native -pthread -I PREFIX/include main.cpp story.cpp -lutf8proc -o story
#include <iostream>

#include "qwen3next.hpp"

void tell_story(qwen3next::Session& session, std::string_view beginning, int tokens);  // story.cpp

int main(int argc, char** argv) try {
  if (argc != 2) throw qwen3next::Error("usage: story MODEL");
  const auto model = qwen3next::Model::open(argv[1]);
  std::cerr << model.backend_description() << "\n";
  auto session = model.session({.context = 2048});
  tell_story(session, "Once upon a time, a little fox", 60);
} catch (const qwen3next::Error& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
