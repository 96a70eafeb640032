#pragma once
// A tensor as a file describes it, before anybody knows what it is for.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "blocks/dtype.hpp"
#include "core/message.hpp"

namespace qwen3next {

// Slowest dimension first, as Hugging Face writes it; GGUF's `ne` is the reverse.
struct Shape {
  static constexpr int max_rank = 8;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> list) {
    for (const std::int64_t dim : list) push_back(dim);
  }

  void push_back(std::int64_t dim) {
    if (rank == max_rank) throw Error("a tensor of more than 8 dimensions");
    dims[static_cast<std::size_t>(rank++)] = dim;
  }
  std::int64_t operator[](int i) const noexcept { return dims[static_cast<std::size_t>(i)]; }
  std::span<const std::int64_t> span() const noexcept { return {dims.data(), static_cast<std::size_t>(rank)}; }

  // The number of elements; nothing if a dimension is negative or the product does not fit.
  std::optional<std::int64_t> elements() const noexcept {
    std::int64_t n = 1;
    for (const std::int64_t dim : span()) {
      if (dim < 0 || (dim > 0 && n > std::numeric_limits<std::int64_t>::max() / dim)) return {};
      n *= dim;
    }
    return n;
  }

  // The same up to leading ones, which files drop and add: [1, 2048] is [2048].
  bool same(const Shape& other) const noexcept {
    std::span<const std::int64_t> a = span(), b = other.span();
    while (!a.empty() && a.front() == 1) a = a.subspan(1);
    while (!b.empty() && b.front() == 1) b = b.subspan(1);
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

  std::string text() const {
    std::string out = "[";
    for (const std::int64_t dim : span()) out += (out.size() > 1 ? ", " : "") + std::to_string(dim);
    return out + "]";
  }

  int rank = 0;
  std::array<std::int64_t, max_rank> dims{};
};

struct TensorRecord {
  std::string name;
  std::string_view dtype;     // as the container spells it; lives forever
  std::optional<DType> type;  // nothing: a type that is not supported, refused when the tensor is bound
  Shape shape;
  const std::byte* data = nullptr;
  std::uint64_t bytes = 0;
  int file = 0;              // index of its file in the checkpoint
  std::uint64_t offset = 0;  // of `data` in that file
};

}  // namespace qwen3next
