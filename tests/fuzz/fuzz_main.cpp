// libFuzzer's entry points: `fuzz --target=NAME [libFuzzer's options] CORPUS..`, without a name it lists them.

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "target.hpp"

using namespace qwen3next::fuzz;

static const Target* chosen = nullptr;

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  constexpr std::string_view option = "--target=";  // libFuzzer leaves what begins with -- to us
  for (int i = 1; i < *argc; ++i) {
    const std::string_view argument = (*argv)[i];
    if (!argument.starts_with(option)) continue;
    for (const Target& target : targets()) {
      if (target.name == argument.substr(option.size())) chosen = &target;
    }
  }
  if (chosen) return 0;
  for (const Target& target : targets())
    std::printf("%.*s\n", static_cast<int>(target.name.size()), target.name.data());
  std::exit(2);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  may_refuse([&] { chosen->run({reinterpret_cast<const char*>(data), size}); });
  return 0;
}

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

// Weights are most of a container and teach a fuzzer nothing: there, only the beginning is changed.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  constexpr std::size_t header = 6000;
  const bool container = chosen->name == "gguf" || chosen->name == "safetensors" || chosen->name == "hf_folder";
  if (!container || size <= header || seed % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
  const std::vector<std::uint8_t> rest(data + header, data + size);
  const std::size_t begin = LLVMFuzzerMutate(data, header, max_size - rest.size());
  std::memcpy(data + begin, rest.data(), rest.size());
  return begin + rest.size();
}
