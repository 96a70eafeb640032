// Replays inputs without a fuzzer: test_fuzz FOLDER.., each with a folder of files per target.  Protects: what fuzzing
// found stays fixed, under every compiler and sanitizer.

#include <cstdio>
#include <exception>
#include <iterator>

#include "target.hpp"

using namespace qwen3next::fuzz;

int main(int argc, char** argv) {
  int inputs = 0, failures = 0;
  for (const Target& target : targets()) {
    const int before = inputs;
    for (int i = 1; i < argc; ++i) {
      const std::filesystem::path folder = std::filesystem::path(argv[i]) / target.name;
      if (!std::filesystem::is_directory(folder)) continue;
      for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        std::ifstream file(entry.path(), std::ios::binary);
        const std::string input{std::istreambuf_iterator<char>(file), {}};
        ++inputs;
        try {
          may_refuse([&] { target.run(input); });
        } catch (const std::exception& e) {
          ++failures;
          std::printf("FAILED %s: %s\n", entry.path().c_str(), e.what());
        }
      }
    }
    if (inputs == before) {
      ++failures;
      std::printf("FAILED: no input for %.*s\n", static_cast<int>(target.name.size()), target.name.data());
    }
  }
  std::printf("%zu targets, %d inputs, %d failures\n", targets().size(), inputs, failures);
  return failures != 0;
}
