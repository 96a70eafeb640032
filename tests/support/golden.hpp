#pragma once
// Golden checkpoints and their expected tensors (tests/golden/model, made by tools/make_goldens.py).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "weights/mapped_file.hpp"
#include "weights/safetensors.hpp"

namespace qwen3next::test {

inline std::filesystem::path golden(const std::string& name) {
  return std::filesystem::path(QWEN3NEXT_SOURCE_DIR) / "tests/golden/model" / name;
}

// Normalised mean squared error of `found` against `expected`.
inline double nmse(std::span<const float> found, std::span<const float> expected) {
  if (found.size() != expected.size()) return std::nan("");
  double error = 0, power = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double d = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
    error += d * d;
    power += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return power > 0 ? error / power : error;
}

// The tensors of expected.safetensors.
class Expected {
 public:
  explicit Expected(const std::string& name) : file_(MappedFile::open(golden(name) / "expected.safetensors")) {
    read_safetensors(file_, 0, records_);
  }
  bool has(const std::string& name) const { return find(name) != nullptr; }
  std::vector<float> floats(const std::string& name) const { return values<float>(name); }
  std::vector<std::int32_t> tokens() const { return values<std::int32_t>("tokens"); }

 private:
  const TensorRecord* find(const std::string& name) const {
    for (const TensorRecord& r : records_) {
      if (r.name == name) return &r;
    }
    return nullptr;
  }
  template <class T>
  std::vector<T> values(const std::string& name) const {
    const TensorRecord* r = find(name);
    if (!r) throw Error("expected.safetensors has no tensor " + name);
    std::vector<T> v(r->bytes / sizeof(T));
    std::memcpy(v.data(), r->data, v.size() * sizeof(T));
    return v;
  }

  MappedFile file_;
  std::vector<TensorRecord> records_;
};

}  // namespace qwen3next::test
