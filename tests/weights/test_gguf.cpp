#include <doctest/doctest.h>

#ifdef __unix__
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#endif

#include "tests/weights/fixtures.hpp"
#include "weights/gguf.hpp"
#include "weights/gguf_writer.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
std::string str(const std::string& text) { return raw<std::uint64_t>(text.size()) + text; }

// A GGUF by hand, for what the writer would not write.
struct RawGguf {
  std::uint32_t version = 3;
  std::vector<std::string> kvs, tensors;
  std::string data;

  void kv(const std::string& key, std::uint32_t type, const std::string& value) {
    kvs.push_back(str(key) + raw(type) + value);
  }
  void tensor(const std::string& name, const std::vector<std::int64_t>& ne, std::uint32_t type, std::uint64_t offset) {
    std::string t = str(name) + raw(static_cast<std::uint32_t>(ne.size()));
    for (const std::int64_t n : ne) t += raw(n);
    tensors.push_back(t + raw(type) + raw(offset));
  }
  std::string text(std::size_t alignment = 32) const {
    std::string out = "GGUF" + raw(version) + raw<std::uint64_t>(tensors.size()) + raw<std::uint64_t>(kvs.size());
    for (const auto& kv : kvs) out += kv;
    for (const auto& tensor : tensors) out += tensor;
    out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data;
  }
};

Gguf open_text(const TempFolder& folder, const std::string& text, const std::string& name = "f.gguf") {
  write_text(folder / name, text);
  return Gguf::open(folder / name);
}

}  // namespace

TEST_CASE("gguf: what is written is read") {
  TempFolder folder;
  const std::vector<std::string> words{"a", "", std::string("b\0c", 3)};
  const std::vector<std::int32_t> ints{-1, 0, 7};
  {
    GgufWriter out(folder / "f.gguf");
    out.set_string("s", "text"), out.set_u16("u16", 65535), out.set_i32("i32", -5), out.set_u32("u32", 4000000000u);
    out.set_u64("u64", 1ull << 40), out.set_f32("f", 1e-6f), out.set_bool("yes", true), out.set_strings("words", words);
    out.set_i32s("ints", ints), out.set_bools("bools", {true, false}), out.set_u32("u32", 4000000001u);
    out.add_tensor("m", {3, 2}, DType::f32);
    out.add_tensor("q", {2, 1, 256}, DType::q6_k);
    out.add_tensor("v", {5}, DType::bf16);
    out.begin();
    const std::string bytes(24 + 2 * 210 + 10, 'x');
    for (std::size_t at = 0; at < bytes.size(); at += 7) {  // pieces that know no borders
      out.write(std::as_bytes(std::span(bytes).subspan(at, std::min<std::size_t>(7, bytes.size() - at))));
    }
    CHECK(!fs::exists(folder / "f.gguf"));
    CHECK(out.written() == out.size());
    out.finish();
  }
  CHECK(std::distance(fs::directory_iterator(folder.path()), {}) == 1);
  const Gguf gguf = Gguf::open(folder / "f.gguf");
  const GgufMetadata& m = gguf.metadata;
  CHECK(m.get<std::string_view>("s") == "text");
  CHECK(m.get<std::int64_t>("u16") == 65535);
  CHECK(m.get<std::int64_t>("i32") == -5);
  CHECK(m.get<std::int64_t>("u32") == 4000000001);
  CHECK(m.get<std::int64_t>("u64") == std::int64_t{1} << 40);
  CHECK(m.get<double>("f") == 1e-6);  // the decimal that was meant
  CHECK(m.get<double>("i32") == -5.0);
  CHECK(m.get<bool>("yes"));
  CHECK(m.get<std::vector<std::string>>("words") == words);
  CHECK(m.get<std::vector<std::int64_t>>("ints") == std::vector<std::int64_t>{-1, 0, 7});
  CHECK(m.get<std::vector<std::int64_t>>("bools") == std::vector<std::int64_t>{1, 0});
  CHECK(!m.has("general.alignment"));
  CHECK(!m.find<bool>("no"));

  REQUIRE(gguf.records.size() == 3);
  CHECK(gguf.records[0].shape.text() == "[3, 2]");
  CHECK(gguf.records[1].shape.text() == "[2, 1, 256]");
  CHECK(gguf.records[1].dtype == "Q6_K");
  CHECK(gguf.records[1].bytes == 420);
  CHECK(gguf.records[0].offset % 4096 == 0);
  CHECK(gguf.records[1].offset == gguf.records[0].offset + 32);   // 24 bytes
  CHECK(gguf.records[2].offset == gguf.records[1].offset + 448);  // 420 bytes
  for (const TensorRecord& r : gguf.records) {
    CHECK(static_cast<char>(r.data[0]) == 'x');
    CHECK(static_cast<char>(r.data[r.bytes - 1]) == 'x');
  }

  GgufWriter copy(folder / "copy.gguf");  // metadata of another file, as it is
  for (const GgufKv& kv : m.all()) copy.copy(kv);
  copy.finish();
  const Gguf again = Gguf::open(folder / "copy.gguf");
  REQUIRE(again.metadata.all().size() == m.all().size());
  for (const GgufKv& kv : m.all()) {
    if (kv.key == "general.padding") continue;  // each file's own
    const GgufKv* other = again.metadata.find_kv(kv.key);
    REQUIRE(other);
    CHECK(other->type_name() == kv.type_name());
    CHECK(std::equal(kv.value.begin(), kv.value.end(), other->value.begin(), other->value.end()));
  }
}

TEST_CASE("gguf writer: the data begins at a multiple of 4096, whatever the header's size") {
  TempFolder folder;
  const std::string four = "1234";
  for (std::size_t extra = 3900; extra < 4200; ++extra) {
    CAPTURE(extra);
    GgufWriter out(folder / "f.gguf");
    out.set_string("s", std::string(extra, 's'));
    out.add_tensor("t", {1}, DType::f32);
    out.begin();
    out.write(std::as_bytes(std::span(four)));
    out.finish();
    const Gguf gguf = Gguf::open(folder / "f.gguf");
    CHECK(gguf.records[0].offset % 4096 == 0);
    CHECK(gguf.metadata.get<std::string_view>("general.padding").size() < 4096);
  }
}

TEST_CASE("gguf writer: another file's layout is not copied") {
  TempFolder folder;
  RawGguf f;
  f.kv("general.alignment", 4, raw(64u)), f.kv("general.padding", 8, str("xyz")), f.kv("k", 4, raw(5u));
  const Gguf in = open_text(folder, f.text(64), "in.gguf");
  GgufWriter copy(folder / "out.gguf");
  for (const GgufKv& kv : in.metadata.all()) copy.copy(kv);
  copy.finish();
  const Gguf out = Gguf::open(folder / "out.gguf");
  CHECK(!out.metadata.has("general.alignment"));
  CHECK(out.metadata.get<std::string_view>("general.padding").find_first_not_of(' ') == std::string_view::npos);
  CHECK(out.metadata.get<std::int64_t>("k") == 5);
}

TEST_CASE("gguf: the wrong kind of value is an error that names both") {
  TempFolder folder;
  RawGguf f;
  f.kv("s", 8, str("x")), f.kv("i", 4, raw(5u)), f.kv("b", 7, std::string(1, '\1')), f.kv("f", 6, raw(1.5f));
  f.kv("big", 10, raw(~0ull)), f.kv("a", 9, raw(6u) + raw<std::uint64_t>(1) + raw(1.f)), f.kv("d", 12, raw(0.1));
  f.kv("i8", 1, std::string(1, '\xff')), f.kv("i16", 3, raw<std::int16_t>(-2)), f.kv("i64", 11, raw<std::int64_t>(-3));
  f.kv("u8", 0, std::string(1, '\xff')), f.kv("empty", 9, raw(8u) + raw<std::uint64_t>(0));
  const Gguf gguf = open_text(folder, f.text());
  const GgufMetadata& m = gguf.metadata;
  CHECK(m.get<std::int64_t>("i8") == -1);
  CHECK(m.get<std::int64_t>("u8") == 255);
  CHECK(m.get<std::int64_t>("i16") == -2);
  CHECK(m.get<std::int64_t>("i64") == -3);
  CHECK(m.get<double>("d") == 0.1);
  CHECK(m.get<std::vector<std::string>>("empty").empty());
  CHECK(contains(error_of([&] { m.get<std::int64_t>("s"); }), "f.gguf: metadata key s is of type string, expected an"));
  CHECK(contains(error_of([&] { m.get<std::int64_t>("f"); }), "key f is of type f32, expected an integer"));
  CHECK(contains(error_of([&] { m.get<std::int64_t>("b"); }), "key b is of type bool, expected an integer"));
  CHECK(contains(error_of([&] { m.get<std::int64_t>("big"); }), "key big is of type u64"));
  CHECK(contains(error_of([&] { m.get<double>("a"); }), "is of type array of f32, expected a number"));
  CHECK(contains(error_of([&] { m.get<bool>("i"); }), "is of type u32, expected bool"));
  CHECK(contains(error_of([&] { m.get<std::string_view>("i"); }), "is of type u32, expected string"));
  CHECK(contains(error_of([&] { m.get<std::vector<std::int64_t>>("a"); }), "array of f32, expected array of integers"));
  CHECK(contains(error_of([&] { m.get<std::vector<std::string>>("a"); }), "array of f32, expected array of string"));
  CHECK(contains(error_of([&] { m.get<std::vector<std::string>>("i"); }), "is of type u32, expected array"));
  CHECK(contains(error_of([&] { m.get<bool>("no"); }), "metadata key no is missing"));
}

TEST_CASE("gguf: version 2, other alignments, holes between tensors") {
  TempFolder folder;
  RawGguf f;
  f.version = 2;
  f.kv("general.alignment", 4, raw(8u));
  f.tensor("a", {2, 3}, 1, 16), f.tensor("b", {4}, 0, 0);
  f.data = std::string(28, 'd');
  const Gguf gguf = open_text(folder, f.text(8));
  CHECK(gguf.records[0].shape.text() == "[3, 2]");
  CHECK(gguf.records[0].type == DType::f16);
  CHECK(gguf.records[1].data + 16 == gguf.records[0].data);
}

TEST_CASE("gguf: what is wrong is named") {
  TempFolder folder;
  const auto refused = [&](const std::string& text, const std::string& part) {
    CHECK(contains(error_of([&] { open_text(folder, text); }), part));
  };
  const auto with = [](auto change, std::size_t alignment = 32) {
    RawGguf f;
    change(f);
    return f.text(alignment);
  };
  refused("", "not a GGUF file");
  refused("GGML----", "not a GGUF file");
  refused(with([](RawGguf& f) { f.version = 1; }), "GGUF version 1, expected 2 or 3");
  refused(with([](RawGguf& f) { f.version = 0x03000000; }), "big-endian");
  refused("GGUF" + raw(3u) + raw(~0ull) + raw(0ull), "claims 18446744073709551615 tensors");
  refused("GGUF" + raw(3u) + raw(0ull) + raw(1ull << 40), "claims 0 tensors and 1099511627776 metadata keys");
  refused(with([](RawGguf& f) { f.kv("k", 13, ""); }), "metadata key k has unknown type 13");
  refused(with([](RawGguf& f) { f.kv("k", 9, raw(9u) + raw(1ull) + raw(0ull)); }), "array of arrays");
  refused(with([](RawGguf& f) { f.kv("k", 9, raw(4u) + raw(1ull << 62)); }), "claims 4611686018427387904 elements");
  refused(with([](RawGguf& f) { f.kv("k", 9, raw(8u) + raw(1ull << 61)); }), "claims 2305843009213693952 elements");
  refused(with([](RawGguf& f) { f.kv("k", 8, raw(~0ull)); }), "needs 18446744073709551615 bytes");
  refused(with([](RawGguf& f) { f.kv("k", 7, "x"), f.kv("k", 7, "x"); }), "metadata key k twice");
  refused(with([](RawGguf& f) { f.kv("general.alignment", 4, raw(48u)); }), "alignment is 48, expected a power of two");
  refused(with([](RawGguf& f) { f.kv("general.alignment", 4, raw(0u)); }), "alignment is 0");
  refused(with([](RawGguf& f) { f.tensor("t", {1}, 0, 0), f.data = "123"; }), "tensor t of 4 bytes lies at offset 0");
  refused(with([](RawGguf& f) { f.tensor("t", {1}, 0, 1), f.data = "12345"; }), "lies at offset 1");
  refused(with([](RawGguf& f) { f.tensor("t", {1}, 0, 1ull << 62); }), "lies at offset 4611686018427387904");
  refused(with([](RawGguf& f) { f.tensor("t", {}, 0, 0); }), "has 0 dimensions");
  refused(with([](RawGguf& f) { f.tensor("t", {1, 1, 1, 1, 1}, 0, 0); }), "has 5 dimensions");
  refused(with([](RawGguf& f) { f.tensor("t", {-1}, 0, 0); }), "has an impossible shape [-1]");
  refused(with([](RawGguf& f) { f.tensor("t", {1ll << 32, 1ll << 32}, 0, 0); }), "has an impossible shape");
  refused(with([](RawGguf& f) { f.tensor("t", {100}, 12, 0); }),
          "of Q4_K has rows of 100 elements, expected a multiple");
  refused(with([](RawGguf& f) { f.tensor("t", {32}, 4, 0); }), "has type Q4_2, which GGUF has withdrawn");
  refused(with([](RawGguf& f) { f.tensor("t", {32}, 99, 0); }), "has unknown type 99");
  refused(with([](RawGguf& f) {
            f.tensor("t", {16}, 0, 0), f.tensor("u", {1}, 0, 32);
            f.data = std::string(64, 'd');
          }),
          "tensors t and u overlap");
}

TEST_CASE("gguf: types that are not supported are records that say so") {
  TempFolder folder;
  RawGguf f;
  std::uint64_t offset = 0;
  for (const GgmlType& type : ggml_types) {
    if (type.bytes == 0) continue;
    f.tensor("t." + std::string(type.name), {type.elements}, type.id, offset);
    offset += static_cast<std::uint64_t>((type.bytes + 31) / 32 * 32);
  }
  f.data = std::string(offset, 'd');
  const Gguf gguf = open_text(folder, f.text());
  for (const TensorRecord& r : gguf.records) {
    CHECK(r.name == "t." + std::string(r.dtype));
    CHECK((!r.type || info(*r.type).name == r.dtype));
  }
}

TEST_CASE("gguf: split files") {
  TempFolder folder;
  const auto part = [](int no, int count, int total, bool tensor) {
    RawGguf f;
    f.kv("split.no", 2, raw(static_cast<std::uint16_t>(no))),
        f.kv("split.count", 2, raw(static_cast<std::uint16_t>(count)));
    f.kv("split.tensors.count", 5, raw(total));
    if (tensor) f.tensor("t" + std::to_string(no), {1}, 0, 0), f.data = std::string(4, static_cast<char>('0' + no));
    return f.text();
  };
  write_text(folder / "m-00001-of-00003.gguf", part(0, 3, 2, false));
  const auto open = [&](const std::string& name = "m-00001-of-00003.gguf") { return Gguf::open(folder / name); };
  CHECK(contains(error_of(open), "m-00002-of-00003.gguf: missing"));
  write_text(folder / "m-00002-of-00003.gguf", part(1, 3, 2, true));
  write_text(folder / "m-00003-of-00003.gguf", part(2, 3, 2, true));
  {
    const Gguf gguf = open();
    REQUIRE(gguf.records.size() == 2);
    CHECK(gguf.files.size() == 3);
    CHECK(gguf.records[1].file == 2);
    CHECK(static_cast<char>(*gguf.records[1].data) == '2');
  }
  CHECK(contains(error_of([&] { open("m-00002-of-00003.gguf"); }), "give the first part, "));
  write_text(folder / "x.gguf", part(0, 3, 2, false));
  CHECK(contains(error_of([&] { open("x.gguf"); }), "its name should end in '-00001-of-00003.gguf'"));
  write_text(folder / "m-00003-of-00003.gguf", part(1, 3, 2, true));
  CHECK(contains(error_of(open), "is not part 3 of 3"));
  write_text(folder / "m-00003-of-00003.gguf", part(2, 3, 2, true));
  write_text(folder / "m-00001-of-00003.gguf", part(0, 3, 5, false));
  CHECK(contains(error_of(open), "hold 2 tensors, expected 5"));
}

TEST_CASE("gguf: truncated anywhere, any bit flipped: an error or a file, never a crash") {
  TempFolder folder;
  RawGguf f;
  f.kv("general.architecture", 8, str("qwen3next")), f.kv("w", 9, raw(8u) + raw(2ull) + str("ab") + str(""));
  f.kv("i", 9, raw(2u) + raw(3ull) + "aabbcc"), f.kv("general.alignment", 4, raw(32u));
  f.tensor("t", {4, 2}, 0, 0), f.tensor("u", {32, 1}, 8, 32);
  f.data = std::string(66, 'd');
  const std::string good = f.text();
  for (std::size_t n = 0; n < good.size(); ++n) CHECK_THROWS_AS(open_text(folder, good.substr(0, n)), Error);
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string damaged = good;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    try {
      const Gguf gguf = open_text(folder, damaged);
      for (const TensorRecord& r : gguf.records) CHECK(r.offset + r.bytes <= damaged.size());
      for (const GgufKv& kv : gguf.metadata.all()) (void)kv.type_name();
      (void)gguf.metadata.find<std::vector<std::string>>("w");
      (void)gguf.metadata.find<std::vector<std::int64_t>>("i");
    } catch (const Error&) {
    }
  }
}

TEST_CASE("gguf writer: nothing is left behind unless it is finished") {
  TempFolder folder;
  const auto files = [&] { return std::distance(fs::directory_iterator(folder.path()), {}); };
  const std::string four = "1234";
  const auto bytes = std::as_bytes(std::span(four));
  {
    GgufWriter out(folder / "f.gguf");
    out.add_tensor("t", {2}, DType::f32);
    CHECK(contains(error_of([&] { out.add_tensor("q", {100}, DType::q4_k); }), "cannot hold tensor q of Q4_K [100]"));
    CHECK(contains(error_of([&] { out.add_tensor("z", {0}, DType::f32); }), "cannot hold tensor z"));
    CHECK(contains(error_of([&] { out.write(bytes); }), "data before the tensor list"));
    out.begin();
    CHECK(contains(error_of([&] { out.add_tensor("u", {2}, DType::f32); }), "the list is written already"));
    out.write(bytes);
    CHECK(contains(error_of([&] { out.finish(); }), "tensor t has 4 of its 8 bytes"));
    CHECK(files() == 1);
  }
  CHECK(files() == 0);
  write_text(folder / "f.gguf", "old");
  GgufWriter out(folder / "f.gguf");
  out.add_tensor("t", {1}, DType::f32);
  out.begin(), out.write(bytes);
  CHECK(contains(error_of([&] { out.write(bytes); }), "more data than the tensors have"));
  CHECK(read_text(folder / "f.gguf") == "old");
  out.finish();
  CHECK(Gguf::open(folder / "f.gguf").records.size() == 1);
  CHECK(files() == 1);

  CHECK(contains(error_of([&] { GgufWriter(folder / "no/f.gguf"); }), "create the folder first"));
  CHECK(contains(error_of([&] { GgufWriter{folder.path()}; }), "is a folder"));
  GgufWriter huge(folder / "huge.gguf");
  huge.add_tensor("t", {std::int64_t{1} << 50}, DType::f32);
  CHECK(contains(error_of([&] { huge.begin(); }), "but the disk has"));
}

#ifdef __unix__
#ifdef __unix__
TEST_CASE("gguf writer: a device or a pipe is not replaced by a file") {
  TempFolder folder;  // never a real device: as root, a failure of this test would replace it for everybody
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(contains(error_of([&] { GgufWriter out(folder / "pipe"); }), "is not a regular file"));
  CHECK(fs::is_fifo(folder / "pipe"));
}
#endif

TEST_CASE("gguf writer: a disk that is full is an error, and the file goes away") {
  TempFolder folder;
  struct Limit {  // of file size, which the system reports like a full disk
    ::rlimit old{};
    Limit() {
      ::signal(SIGXFSZ, SIG_IGN);
      ::getrlimit(RLIMIT_FSIZE, &old);
      ::rlimit small = old;
      small.rlim_cur = 100000;
      ::setrlimit(RLIMIT_FSIZE, &small);
    }
    ~Limit() { ::setrlimit(RLIMIT_FSIZE, &old); }
  };
  {
    GgufWriter out(folder / "f.gguf");
    out.add_tensor("t", {100000}, DType::f32);
    out.begin();
    const std::vector<std::byte> bytes(400000);
    const Limit limit;
    CHECK(contains(error_of([&] { out.write(bytes), out.finish(); }),
                   "f.gguf: cannot write it: File too large; free some"));
  }
  CHECK(fs::is_empty(folder.path()));
}
#endif
