// Packs a file of floats, for tools/compare_quantizers.py; prints the seconds of one thread that it took.
//
//   bench_pack TYPE VALUES.f32 COLUMNS PACKED [IMPORTANCE.f32]       importance: one value for each column

#include <cstring>
#include <ctime>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "blocks/codec.hpp"
#include "core/error.hpp"
#include "core/message.hpp"

namespace {

using namespace qwen3next;

DType parse_type(std::string_view name) {
  for (const DTypeInfo& type : dtype_table) {
    if (type.name == name) return type.type;
  }
  throw_error("unknown type '", name, "'");
}

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw_error("cannot read ", path);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

void run(int argc, char** argv) {
  if (argc != 5 && argc != 6) throw_error("usage: bench_pack TYPE VALUES.f32 COLUMNS PACKED [IMPORTANCE.f32]");
  const DType type = parse_type(argv[1]);
  const std::vector<float> values = read_floats(argv[2]);
  const std::int64_t columns = std::stoll(argv[3]), rows = static_cast<std::int64_t>(values.size()) / columns;
  const std::vector<float> importance = argc == 6 ? read_floats(argv[5]) : std::vector<float>{};
  if (!fits_blocks(type, columns) || (argc == 6 && static_cast<std::int64_t>(importance.size()) != columns))
    throw_error(columns, " columns fit neither the type's blocks nor the importance");
  const std::size_t bytes = row_bytes(type, columns);
  std::vector<std::byte> packed(static_cast<std::size_t>(rows) * bytes);
  const std::clock_t start = std::clock();
  for (std::int64_t r = 0; r < rows; ++r) {
    quantize_row(type, values.data() + r * columns, packed.data() + static_cast<std::size_t>(r) * bytes, columns,
                 argc == 6 ? importance.data() : nullptr);
  }
  std::cout << static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC << '\n';
  std::ofstream(argv[4], std::ios::binary)
      .write(reinterpret_cast<const char*>(packed.data()), static_cast<std::streamsize>(packed.size()));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "error: " << e.what() << '\n';
    return 1;
  }
}
