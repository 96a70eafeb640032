// Answers a message through the model's chat template.   answer MODEL
#include <iostream>

#include "qwen3next.hpp"

int main(int argc, char** argv) try {
  if (argc != 2) throw qwen3next::Error("usage: answer MODEL");
  auto session = qwen3next::Model::open(argv[1]).session({.context = 2048});
  auto options = session.default_options();
  options.max_tokens = 60;
  const auto answer = session.chat(
      {{{"role", "user"}, {"content", "Tell me a story about a dragon."}}},
      [](const qwen3next::AnswerEvent& event) { return bool(std::cout << event.text << std::flush); }, options);
  std::cout << "\n(" << name(answer.generated.reason) << ")\n";
} catch (const qwen3next::Error& e) {
  std::cerr << e.what() << "\n";
  return 1;
}
