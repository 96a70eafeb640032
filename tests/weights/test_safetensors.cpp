#include <doctest/doctest.h>

#include <cstring>
#include <optional>

#include "tests/weights/fixtures.hpp"
#include "weights/safetensors.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

std::vector<TensorRecord> read(const fs::path& path, const std::string& text) {
  static std::optional<MappedFile> kept;  // the records point into it
  kept.reset();                           // Windows would not let a mapped file be written
  write_text(path, text);
  kept.emplace(MappedFile::open(path));
  std::vector<TensorRecord> records;
  read_safetensors(*kept, 0, records);
  return records;
}

const std::string good_header =
    R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},)"
    R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"empty":{"dtype":"I64","shape":[0,4],"data_offsets":[8,8]}})";
const std::string good = safetensors_text(good_header, std::string(20, 'x'));

}  // namespace

TEST_CASE("safetensors: records in the order of the data") {
  TempFolder folder;
  const auto records = read(folder / "f.safetensors", good);
  REQUIRE(records.size() == 3);
  CHECK(records[0].name == "a");
  CHECK(records[0].type == DType::f32);
  CHECK(records[0].offset == 8 + good_header.size());
  CHECK(records[1].name == "empty");
  CHECK(!records[1].type);
  CHECK(records[1].dtype == "I64");
  CHECK(records[2].shape.text() == "[2, 3]");
  CHECK(records[2].bytes == 12);
  CHECK(*reinterpret_cast<const char*>(records[2].data) == 'x');
}

TEST_CASE("safetensors: unknown fields and metadata of any form are skipped") {
  TempFolder folder;
  const std::string header =
      R"({"__metadata__":{"a":[1,{"b":[-1.5,null,true,"s"]}]},"t":{"x":{"dtype":[1]},"dtype":"U8","y":[[1],{}],"shape":)"
      R"([1],"data_offsets":[0,1]}}   )";
  const auto records = read(folder / "f", safetensors_text(header, "d"));
  REQUIRE(records.size() == 1);
  CHECK(records[0].dtype == "U8");
}

TEST_CASE("safetensors: what is wrong is named") {
  TempFolder folder;
  const auto refused = [&](const std::string& header, const std::string& data, const std::string& part) {
    const std::string message = error_of([&] { read(folder / "bad.safetensors", safetensors_text(header, data)); });
    CHECK(contains(message, "bad.safetensors: "));
    CHECK(contains(message, part));
  };
  const auto tensor = [](const std::string& fields) { return R"({"t":{)" + fields + "}}"; };
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), "1234567", "lies at bytes 0..8");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), "123456789", "1 bytes after the last tensor");
  refused(tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), "12345678", "F32 [3] has 8 bytes");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "12345678", "lies at bytes 8..0");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[1,9])"), "123456789", "begins at byte 1");
  refused(tensor(R"("dtype":"Q4","shape":[2],"data_offsets":[0,8])"), "12345678", "unknown dtype Q4");
  refused(tensor(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), "12345678", "a negative number");
  refused(tensor(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), "12345678", "a fraction");
  refused(tensor(R"("dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8])"), "12345678", "'shape' twice");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,9])"), "12345678", "more than two data_offsets");
  refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "12345678", "no dtype, shape or data_offsets");
  refused(tensor(R"("dtype":"F32","data_offsets":[0,8])"), "12345678", "no dtype, shape or data_offsets");
  refused(tensor(R"("dtype":["F32"],"shape":[2],"data_offsets":[0,8])"), "12345678", "an array instead");
  refused(tensor(R"("dtype":"F32","shape":{"a":2},"data_offsets":[0,8])"), "12345678", "an object inside");
  refused(tensor(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), "12345678", "an array instead");
  refused(tensor(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8])"), "12345678", "8 dimensions");
  refused(tensor(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8])"), "12345678", "impossible");
  refused(tensor(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"), "", "does not fit");
  refused(tensor(R"("dtype":"F32","shape":[2305843009213693954],"data_offsets":[0,8])"), "12345678", "does not fit");
  refused(R"({"t":5})", "", "a number instead of its description");
  refused(R"({"t":[1]})", "", "an array instead");
  refused("{\"\\n\\u001b[31m\":1}", "", "tensor ??[31m");
  refused("{\"t\":", "", "not valid JSON");
  refused(" {}", "", "does not start with '{'");
  refused("{" + std::string(100, '['), "", "not valid JSON");
  refused("{\"__metadata__\":{\"a\":" + std::string(100, '['), "", "nested too deeply");
  refused(
      R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
      "123", "tensor b begins at byte 1 of the data, expected 2");
  write_text(folder / "short", "1234567");
  CHECK(contains(error_of([&] { read(folder / "short", "1234567"); }), "7 bytes are no safetensors file"));
  CHECK(contains(error_of([&] { read(folder / "huge", raw_u64(~0ull) + "{}"); }), "a header of 18446744073709551615"));
}

TEST_CASE("safetensors: shards") {
  TempFolder folder;
  const auto one = [&](const std::string& file, const std::string& name) {
    write_text(folder / file,
               safetensors_text(R"({")" + name + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "d"));
  };
  one("x-1.safetensors", "a"), one("x-2.safetensors", "b");
  const auto index = [&](const std::string& text) { write_text(folder / "model.safetensors.index.json", text); };
  const auto open = [&] { return open_safetensors(folder.path()); };

  CHECK(contains(error_of(open), "neither model.safetensors nor model.safetensors.index.json"));
  index(R"({"metadata":{"total_size":2},"weight_map":{"a":"x-1.safetensors","b":"x-2.safetensors"}})");
  const SafetensorsFolder both = open();
  CHECK(both.files.size() == 2);
  CHECK(both.records[1].name == "b");
  CHECK(both.records[1].file == 1);

  index(R"({"weight_map":{"a":"x-1.safetensors","b":"x-2.safetensors","c":"x-2.safetensors"}})");
  CHECK(contains(error_of(open), "x-2.safetensors: has 1 tensors, but model.safetensors.index.json expects 2"));
  index(R"({"weight_map":{"a":"x-1.safetensors","b":"x-3.safetensors"}})");
  CHECK(contains(error_of(open), "x-3.safetensors: missing"));
  for (const char* bad : {"../x-1.safetensors", "/etc/passwd", "..", "", "a\\\\b"}) {
    index(std::string(R"({"weight_map":{"a":")") + bad + "\"}}");
    CHECK(contains(error_of(open), "is not the name of a file"));
  }
  for (const char* bad : {"{}", "[]", "5", R"({"weight_map":{}})"}) {
    index(bad);
    CHECK(contains(error_of(open), "no \"weight_map\""));
  }
  for (const char* bad :
       {R"({"weight_map":{"a":5}})", R"({"weight_map":["a"]})", R"({"weight_map":{"a":{"b":"c"}}})"}) {
    index(bad);
    CHECK(contains(error_of(open), "something else than file names"));
  }
  index("{\"weight_map\":");
  CHECK(contains(error_of(open), "not valid JSON"));
  index("{\"x\":" + std::string(50, '['));
  CHECK(contains(error_of(open), "nested deeper"));

  one("model.safetensors", "single");  // wins, as in transformers
  CHECK(open().records[0].name == "single");
}

TEST_CASE("safetensors: truncated anywhere, any bit flipped: an error or a file, never a crash") {
  TempFolder folder;
  for (std::size_t n = 0; n < good.size(); ++n) {
    CHECK_THROWS_AS(read(folder / "t", good.substr(0, n)), Error);
  }
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string damaged = good;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    try {
      for (const TensorRecord& r : read(folder / "t", damaged)) {
        CHECK(r.offset + r.bytes <= damaged.size());
      }
    } catch (const Error&) {
    }
  }
}

TEST_CASE("a mapped file is a regular file, and its bytes stay when it is moved") {
  TempFolder folder;
  write_text(folder / "f", "hello");
  MappedFile a = MappedFile::open(folder / "f");
  const std::byte* data = a.data();
  MappedFile b = std::move(a);
  CHECK(b.data() == data);
  CHECK(b.text() == "hello");
  CHECK(b.contains(data + 4));
  CHECK(!b.contains(data + 5));
  CHECK(a.size() == 0);
  a = std::move(b);
  CHECK(a.text() == "hello");
  a.advise(MappedFile::Advice::will_need, 1, 100);
  a.advise(MappedFile::Advice::random, 100, 1);
  write_text(folder / "empty", "");
  CHECK(MappedFile::open(folder / "empty").size() == 0);
  CHECK(contains(error_of([&] { MappedFile::open(folder / "none"); }), "none: no such file"));
  CHECK(contains(error_of([&] { MappedFile::open(folder.path()); }), "is a folder"));
}

TEST_CASE("a mapped file says when it was changed under us, and stays as it was when it is replaced") {
  TempFolder folder;
  const fs::path path = folder / "weights";
  write_text(path, "0123456789");
  const MappedFile file = MappedFile::open(path);
  CHECK_NOTHROW(file.check_unchanged());
#if QWEN3NEXT_MMAP
  std::ofstream(path, std::ios::binary | std::ios::app) << "x";  // a download that goes on
  const std::string error = error_of([&] { file.check_unchanged(); });
  CHECK(contains(error, path.string() + ": was changed while it was in use (10 bytes when it was opened, 11 now)"));
  fs::resize_file(path, 4);
  CHECK(contains(error_of([&] { file.check_unchanged(); }), "4 now"));

  write_text(folder / "new", "another");
  const MappedFile old = MappedFile::open(path);
  fs::rename(folder / "new", path);
  CHECK_NOTHROW(old.check_unchanged());
  CHECK(old.text() == "0123");
  fs::remove(path);
  CHECK_NOTHROW(old.check_unchanged());
#endif
}
