#pragma once
// A float32 matrix as NumPy's .npy, written row by row: header first, so a file larger than memory is no problem.
// https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html

#include <bit>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "weights/atomic_file.hpp"

namespace qwen3next::cli {

class NpyWriter {
 public:
  NpyWriter(const std::filesystem::path& path, std::int64_t rows, std::int64_t cols) : file_(path) {
    static_assert(std::endian::native == std::endian::little);
    std::string dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " +
                       std::to_string(cols) + "), }";
    constexpr std::size_t before = 10, alignment = 64;  // magic, version, length; where the data may start
    dict.resize((before + dict.size() + 1 + alignment - 1) / alignment * alignment - before - 1, ' ');
    dict += '\n';
    std::string head("\x93NUMPY\x01\x00", 8);
    head += static_cast<char>(dict.size() & 255);
    head += static_cast<char>(dict.size() >> 8);
    head += dict;
    file_.expect_room(head.size() +
                      static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(cols) * sizeof(float));
    file_.write(std::as_bytes(std::span(head)));
  }
  void write(std::span<const float> row) { file_.write(std::as_bytes(row)); }
  void finish() { file_.commit(); }  // until now there is no file of that name

 private:
  AtomicFile file_;
};

}  // namespace qwen3next::cli
