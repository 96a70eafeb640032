// Files larger than 4 GiB, and rows of a matrix that far apart: nothing on the way from a file's header to a product
// may count bytes in 32 bits.  The file is sparse: it takes a few kilobytes of the disk.

#include <doctest/doctest.h>

#include <cstring>
#include <fstream>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "tests/weights/fixtures.hpp"
#include "weights/safetensors.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

TEST_CASE("offsets beyond 4 GiB: header, mapping, embedding, product") {
  constexpr std::uint64_t far = (std::uint64_t{5} << 30) + 64;
  const std::vector<float> values{1, -2, 3, 0.5f};
  const std::string header = json{{"big", {{"dtype", "U8"}, {"shape", {far}}, {"data_offsets", {0, far}}}},
                                  {"w", {{"dtype", "F32"}, {"shape", {1, 4}}, {"data_offsets", {far, far + 16}}}}}
                                 .dump();
  TempFolder folder;
  const fs::path path = folder / "large.safetensors";
  write_text(path, safetensors_text(header, ""));
  fs::resize_file(path, 8 + header.size() + far + 16);
  {
    std::fstream out(path, std::ios::binary | std::ios::in | std::ios::out);
    out.seekp(static_cast<std::streamoff>(8 + header.size() + far));
    out.write(reinterpret_cast<const char*>(values.data()), 16);
    REQUIRE(out.flush());
  }

  const MappedFile file = MappedFile::open(path);
  CHECK(file.size() == 8 + header.size() + far + 16);
  std::vector<TensorRecord> records;
  read_safetensors(file, 0, records);
  REQUIRE(records.size() == 2);
  CHECK(records[0].bytes == far);
  CHECK(records[1].offset == 8 + header.size() + far);
  CHECK(std::memcmp(records[1].data, values.data(), 16) == 0);

  // Two rows, one at either end of the file.
  WeightView w = WeightView::contiguous(records[0].data, DType::f32, 2, 4);
  w.group_rows = 1;
  w.group_stride = far;
  CpuBackend be({nullptr, 1, KvType::f16});
  HostTensor row = be.tensor(1, 4), y = be.tensor(1, 2);
  const std::int32_t last = 1;
  be.embed(row, {&last, 1}, w);
  CHECK(std::vector<float>(row.row(0), row.row(0) + 4) == values);
  be.linear(row, {{w, y}});
  CHECK(y.row(0)[0] == 0);
  CHECK(y.row(0)[1] == 1 + 4 + 9 + 0.25f);
}
