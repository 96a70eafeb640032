#pragma once
// The GGUF container, versions 2 and 3, little-endian, in one file or split: metadata, tensor list, data.
// https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "blocks/half.hpp"
#include "weights/mapped_file.hpp"
#include "weights/tensor_record.hpp"

namespace qwen3next {

// ---- types ----------------------------------------------------------------------------------------------------------

// Every tensor type that GGUF knows, so that one that is not supported here can be named.
struct GgmlType {
  std::uint32_t id;
  std::string_view name;
  int elements, bytes;  // per block; 0 for withdrawn types
};

inline constexpr std::array<GgmlType, 42> ggml_types{{
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},      {3, "Q4_1", 32, 20},
    {4, "Q4_2", 0, 0},        {5, "Q4_3", 0, 0},        {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},
    {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 36},      {10, "Q2_K", 256, 84},    {11, "Q3_K", 256, 110},
    {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},   {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},
    {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74},  {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},  {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136},
    {24, "I8", 1, 1},         {25, "I16", 1, 2},        {26, "I32", 1, 4},        {27, "I64", 1, 8},
    {28, "F64", 1, 8},        {29, "IQ1_M", 256, 56},   {30, "BF16", 1, 2},       {31, "Q4_0_4_4", 0, 0},
    {32, "Q4_0_4_8", 0, 0},   {33, "Q4_0_8_8", 0, 0},   {34, "TQ1_0", 256, 54},   {35, "TQ2_0", 256, 66},
    {36, "IQ4_NL_4_4", 0, 0}, {37, "IQ4_NL_4_8", 0, 0}, {38, "IQ4_NL_8_8", 0, 0}, {39, "MXFP4", 32, 17},
    {40, "NVFP4", 64, 36},    {41, "Q1_0", 128, 18},
}};

static_assert([] {
  for (std::size_t i = 0; i < ggml_types.size(); ++i) {
    if (ggml_types[i].id != i) return false;
  }
  for (const DTypeInfo& dtype : dtype_table) {
    if (dtype.ggml_id == no_ggml_id) continue;
    const GgmlType& type = ggml_types[dtype.ggml_id];
    if (type.name != dtype.name || type.elements != dtype.elements || type.bytes != dtype.bytes) return false;
  }
  return true;
}());

constexpr std::optional<DType> dtype_of_ggml(std::uint32_t id) noexcept {
  for (const DTypeInfo& dtype : dtype_table) {
    if (dtype.ggml_id == id) return dtype.type;
  }
  return {};
}

enum class GgufType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

struct GgufTypeInfo {
  std::string_view name;
  int bytes;  // 0: depends on the value
};

inline constexpr std::array<GgufTypeInfo, 13> gguf_types{{{"u8", 1},
                                                          {"i8", 1},
                                                          {"u16", 2},
                                                          {"i16", 2},
                                                          {"u32", 4},
                                                          {"i32", 4},
                                                          {"f32", 4},
                                                          {"bool", 1},
                                                          {"string", 0},
                                                          {"array", 0},
                                                          {"u64", 8},
                                                          {"i64", 8},
                                                          {"f64", 8}}};

constexpr const GgufTypeInfo& info(GgufType type) noexcept { return gguf_types[static_cast<std::size_t>(type)]; }

// ---- reading --------------------------------------------------------------------------------------------------------

namespace detail {

// Reads a header from front to back and never past its end.
class GgufCursor {
 public:
  explicit GgufCursor(const MappedFile& file) : file_(file) {}

  std::size_t position() const noexcept { return at_; }
  std::size_t left() const noexcept { return file_.size() - at_; }

  std::span<const std::byte> take(std::uint64_t bytes, std::string_view what) {
    if (bytes > left()) {
      throw_error(file_.name(), ": ", what, " at byte ", at_, " needs ", bytes, " bytes, but the file ends after ",
                  left(), "; it is truncated or damaged: download it again");
    }
    const std::span<const std::byte> span = file_.bytes().subspan(at_, static_cast<std::size_t>(bytes));
    at_ += span.size();
    return span;
  }

  template <class T>
  T read(std::string_view what) {
    return load<T>(take(sizeof(T), what).data());
  }

  std::string_view string(std::string_view what) {
    const std::span<const std::byte> bytes = take(read<std::uint64_t>(what), what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  GgufType type(std::string_view key) {
    const auto id = read<std::uint32_t>("a value type");
    if (id >= gguf_types.size()) {
      throw_error(file_.name(), ": metadata key ", printable(key), " has unknown type ", id, "; the file is damaged");
    }
    return static_cast<GgufType>(id);
  }

  void skip_value(GgufType type, std::string_view key) {
    if (type == GgufType::string) {
      string("a string");
    } else if (type == GgufType::array) {
      const GgufType element = this->type(key);
      const auto count = read<std::uint64_t>("an array");
      if (element == GgufType::array) {
        throw_error(file_.name(), ": metadata key ", printable(key), " is an array of arrays, which is not supported");
      }
      const auto smallest = static_cast<std::uint64_t>(element == GgufType::string ? 8 : info(element).bytes);
      if (count > left() / smallest) {
        throw_error(file_.name(), ": metadata key ", printable(key), " claims ", count, " elements, but the file ends ",
                    left(), " bytes later; it is truncated or damaged: download it again");
      }
      constexpr std::uint64_t most = std::uint64_t{1} << 25;  // twice the largest vocabulary
      if (count > most) {
        throw_error(file_.name(), ": metadata key ", printable(key), " has ", count, " elements, expected at most ",
                    most, "; the file is damaged");
      }
      if (element != GgufType::string) {
        take(count * smallest, "an array");
      } else {
        for (std::uint64_t i = 0; i < count; ++i) string("an array of strings");
      }
    } else {
      take(static_cast<std::uint64_t>(info(type).bytes), "a value");
    }
  }

 private:
  const MappedFile& file_;
  std::size_t at_ = 0;
};

// f32 metadata was decimal once (1e-06): the double that prints the same, not the one of the same bits.
inline double decimal_value(float value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  double result = value;
  std::from_chars(text, end, result);
  return result;
}

}  // namespace detail

// One key and its value, still in the file.
struct GgufKv {
  std::string_view key;
  GgufType type;
  std::span<const std::byte> value;  // encoded; an array begins with its element type and count

  // "u32", "array of string": for messages
  std::string type_name() const {
    if (type != GgufType::array) return std::string(info(type).name);
    return "array of " + std::string(info(static_cast<GgufType>(load<std::uint32_t>(value.data()))).name);
  }
};

// The metadata of a file by key.  Views into the mapped file, so valid as long as that is.
class GgufMetadata {
 public:
  const std::vector<GgufKv>& all() const noexcept { return kvs_; }
  const std::string& source() const noexcept { return source_; }  // the file's name, for messages

  const GgufKv* find_kv(std::string_view key) const {
    const auto found = index_.find(key);
    return found == index_.end() ? nullptr : &kvs_[found->second];
  }
  bool has(std::string_view key) const { return find_kv(key) != nullptr; }

  // The value of `key`, nothing if there is no such key; throws if it is of another kind.  T is one of
  //   std::int64_t (any integer type)   double (floats and integers)   bool   std::string_view
  //   std::vector<std::int64_t> (integers, bools)   std::vector<std::string>
  template <class T>
  std::optional<T> find(std::string_view key) const;

  // The same for a key that has to be there.
  template <class T>
  T get(std::string_view key) const {
    if (std::optional<T> value = find<T>(key)) return *std::move(value);
    throw_error(source_, ": metadata key ", key, " is missing; expected in a Qwen3-Next GGUF");
  }

 private:
  friend struct GgufReader;

  [[noreturn]] void wrong_type(const GgufKv& kv, std::string_view expected) const {
    throw_error(source_, ": metadata key ", printable(kv.key), " is of type ", kv.type_name(), ", expected ", expected);
  }

  std::string source_;
  std::vector<GgufKv> kvs_;
  std::unordered_map<std::string_view, std::size_t> index_;
};

namespace detail {

// An integer or boolean as int64; nothing if it is neither or does not fit.
inline std::optional<std::int64_t> gguf_integer(GgufType type, const std::byte* data) noexcept {
  switch (type) {
    case GgufType::u8:
      return load<std::uint8_t>(data);
    case GgufType::i8:
      return load<std::int8_t>(data);
    case GgufType::u16:
      return load<std::uint16_t>(data);
    case GgufType::i16:
      return load<std::int16_t>(data);
    case GgufType::u32:
      return load<std::uint32_t>(data);
    case GgufType::i32:
      return load<std::int32_t>(data);
    case GgufType::i64:
      return load<std::int64_t>(data);
    case GgufType::boolean:
      return load<std::uint8_t>(data) != 0;
    case GgufType::u64: {
      const auto value = load<std::uint64_t>(data);
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return {};
      return static_cast<std::int64_t>(value);
    }
    default:
      return {};
  }
}

}  // namespace detail

template <class T>
std::optional<T> GgufMetadata::find(std::string_view key) const {
  const GgufKv* kv = find_kv(key);
  if (!kv) return {};
  const std::byte* data = kv->value.data();
  if constexpr (std::is_same_v<T, bool>) {
    if (kv->type != GgufType::boolean) wrong_type(*kv, "bool");
    return load<std::uint8_t>(data) != 0;
  } else if constexpr (std::is_same_v<T, std::int64_t>) {
    const auto value = kv->type == GgufType::boolean ? std::nullopt : detail::gguf_integer(kv->type, data);
    if (!value) wrong_type(*kv, "an integer");
    return value;
  } else if constexpr (std::is_same_v<T, double>) {
    if (kv->type == GgufType::f32) return detail::decimal_value(load<float>(data));
    if (kv->type == GgufType::f64) return load<double>(data);
    const auto value = kv->type == GgufType::boolean ? std::nullopt : detail::gguf_integer(kv->type, data);
    if (!value) wrong_type(*kv, "a number");
    return static_cast<double>(*value);
  } else if constexpr (std::is_same_v<T, std::string_view>) {
    if (kv->type != GgufType::string) wrong_type(*kv, "string");
    return std::string_view(reinterpret_cast<const char*>(data) + 8, kv->value.size() - 8);
  } else if constexpr (std::is_same_v<T, std::vector<std::int64_t>> || std::is_same_v<T, std::vector<std::string>>) {
    constexpr bool strings = std::is_same_v<T, std::vector<std::string>>;
    constexpr std::string_view expected = strings ? "array of string" : "array of integers";
    if (kv->type != GgufType::array) wrong_type(*kv, expected);
    const auto element = static_cast<GgufType>(load<std::uint32_t>(data));
    const auto count = static_cast<std::size_t>(load<std::uint64_t>(data + 4));
    data += 12;
    T values;
    values.reserve(count);  // no more than the file's bytes: checked when it was read
    for (std::size_t i = 0; i < count; ++i) {
      if constexpr (strings) {
        if (element != GgufType::string) wrong_type(*kv, expected);
        const auto size = static_cast<std::size_t>(load<std::uint64_t>(data));
        values.emplace_back(reinterpret_cast<const char*>(data) + 8, size);
        data += 8 + size;
      } else {
        const auto value = detail::gguf_integer(element, data);
        if (!value) wrong_type(*kv, expected);
        values.push_back(*value);
        data += info(element).bytes;
      }
    }
    return values;
  } else {
    static_assert(!sizeof(T), "no such kind of metadata value");
  }
}

struct Gguf {
  std::vector<MappedFile> files;  // one, or all the splits in order
  GgufMetadata metadata;          // of the first
  std::vector<TensorRecord> records;

  // Maps the file; of a split set, give the first.
  static Gguf open(const std::filesystem::path& path);
};

struct GgufReader {
  // Reads one file: fills `metadata`, appends to `records`.
  static void read(const MappedFile& file, int file_index, GgufMetadata& metadata, std::vector<TensorRecord>& records) {
    detail::GgufCursor cursor(file);
    metadata.source_ = file.name();
    if (file.size() < 4 || file.text().substr(0, 4) != "GGUF") {
      throw_error(file.name(), ": does not begin with \"GGUF\"; not a GGUF file");
    }
    cursor.take(4, "the magic");
    const auto version = cursor.read<std::uint32_t>("the version");
    if (version == 0x02000000 || version == 0x03000000) {
      throw_error(file.name(), ": a big-endian GGUF; expected little-endian: convert it again on this kind of machine");
    }
    if (version != 2 && version != 3) {
      throw_error(file.name(), ": GGUF version ", version, ", expected 2 or 3; convert it with a current llama.cpp");
    }
    const auto tensors = cursor.read<std::uint64_t>("the tensor count");
    const auto kvs = cursor.read<std::uint64_t>("the metadata count");
    constexpr std::uint64_t smallest_kv = 8 + 4 + 1, smallest_tensor = 8 + 4 + 8 + 4 + 8;
    if (kvs > cursor.left() / smallest_kv || tensors > cursor.left() / smallest_tensor) {
      throw_error(file.name(), ": claims ", tensors, " tensors and ", kvs, " metadata keys in ", file.size(),
                  " bytes; it is truncated or damaged: download it again");
    }
    read_metadata(cursor, file, static_cast<std::size_t>(kvs), metadata);
    read_tensors(cursor, file, file_index, static_cast<std::size_t>(tensors), metadata, records);
  }

 private:
  static void read_metadata(detail::GgufCursor& cursor, const MappedFile& file, std::size_t count,
                            GgufMetadata& metadata) {
    for (std::size_t i = 0; i < count; ++i) {
      GgufKv kv;
      kv.key = cursor.string("a metadata key");
      kv.type = cursor.type(kv.key);
      const std::size_t begin = cursor.position();
      cursor.skip_value(kv.type, kv.key);
      kv.value = file.bytes().subspan(begin, cursor.position() - begin);
      if (!metadata.index_.emplace(kv.key, i).second) {
        throw_error(file.name(), ": metadata key ", printable(kv.key), " twice; the file is damaged");
      }
      metadata.kvs_.push_back(kv);
    }
  }

  static void read_tensors(detail::GgufCursor& cursor, const MappedFile& file, int file_index, std::size_t count,
                           const GgufMetadata& metadata, std::vector<TensorRecord>& records) {
    const std::size_t first = records.size();
    records.reserve(first + std::min<std::size_t>(count, 4096));  // `count` is only a claim yet
    for (std::size_t i = 0; i < count; ++i) records.push_back(read_tensor(cursor, file, file_index));

    const std::int64_t alignment = metadata.find<std::int64_t>("general.alignment").value_or(32);
    if (alignment < 1 || alignment > (1 << 30) || (alignment & (alignment - 1)) != 0) {
      throw_error(file.name(), ": general.alignment is ", alignment, ", expected a power of two");
    }
    const auto step = static_cast<std::size_t>(alignment);
    const std::size_t data_begin = (cursor.position() + step - 1) / step * step;
    const std::uint64_t size = file.size() > data_begin ? file.size() - data_begin : 0;
    std::vector<const TensorRecord*> order;
    order.reserve(count);
    for (std::size_t i = first; i < records.size(); ++i) {
      TensorRecord& record = records[i];
      if (record.offset % step != 0 || record.offset > size || record.bytes > size - record.offset) {
        throw_error(file.name(), ": tensor ", printable(record.name), " of ", record.bytes, " bytes lies at offset ",
                    record.offset, " of the data, which has ", size, " bytes (alignment ", alignment,
                    "); the file is truncated or damaged: download it again");
      }
      record.offset += data_begin;
      record.data = file.data() + record.offset;
      if (record.bytes != 0) order.push_back(&record);
    }
    std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->offset < b->offset; });
    for (std::size_t i = 1; i < order.size(); ++i) {
      if (order[i - 1]->offset + order[i - 1]->bytes > order[i]->offset) {
        throw_error(file.name(), ": tensors ", printable(order[i - 1]->name), " and ", printable(order[i]->name),
                    " overlap; the file is damaged");
      }
    }
  }

  static TensorRecord read_tensor(detail::GgufCursor& cursor, const MappedFile& file, int file_index) {
    TensorRecord record;
    record.name = cursor.string("a tensor name");
    const auto fail = [&](const auto&... what) {
      throw_error(file.name(), ": tensor ", printable(record.name), " ", what...);
    };
    const auto rank = cursor.read<std::uint32_t>("a tensor's rank");
    if (rank < 1 || rank > 4) fail("has ", rank, " dimensions, expected 1 to 4; the file is damaged");
    std::array<std::int64_t, 4> ne{};
    for (std::uint32_t i = 0; i < rank; ++i) ne[i] = cursor.read<std::int64_t>("a tensor's shape");
    for (std::uint32_t i = rank; i-- > 0;) record.shape.push_back(ne[i]);
    const auto id = cursor.read<std::uint32_t>("a tensor's type");
    record.offset = cursor.read<std::uint64_t>("a tensor's offset");
    if (id >= ggml_types.size()) fail("has unknown type ", id, "; it needs a newer version of this program");
    const GgmlType& type = ggml_types[id];
    if (type.bytes == 0) fail("has type ", type.name, ", which GGUF has withdrawn; convert the model again");
    record.dtype = type.name;
    record.type = dtype_of_ggml(id);
    record.file = file_index;
    const std::optional<std::int64_t> elements = record.shape.elements();
    if (!elements || *elements > std::int64_t{1} << 57) fail("has an impossible shape ", record.shape.text());
    if (ne[0] % type.elements != 0) {
      fail("of ", type.name, " has rows of ", ne[0], " elements, expected a multiple of ", type.elements);
    }
    record.bytes = static_cast<std::uint64_t>(*elements / type.elements) * static_cast<std::uint64_t>(type.bytes);
    return record;
  }
};

namespace detail {

struct SplitName {
  std::string stem;  // NAME in NAME-00001-of-00003.gguf
  int number, count;
};

inline std::string split_name(const std::string& stem, std::int64_t number, std::int64_t count) {
  const auto five = [](std::int64_t n) {
    const std::string digits = std::to_string(n);
    return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
  };
  return stem + "-" + five(number) + "-of-" + five(count) + ".gguf";
}

}  // namespace detail

inline Gguf Gguf::open(const std::filesystem::path& path) {
  Gguf gguf;
  gguf.files.push_back(MappedFile::open(path));
  GgufReader::read(gguf.files[0], 0, gguf.metadata, gguf.records);
  const std::string& source = gguf.metadata.source();
  const std::int64_t count = gguf.metadata.find<std::int64_t>("split.count").value_or(1);
  if (count == 0 || count == 1) return gguf;
  const std::int64_t number = gguf.metadata.find<std::int64_t>("split.no").value_or(0);
  const std::string name = display(path.filename());
  const std::string ending = detail::split_name("", number + 1, count);
  if (count < 0 || count > 99999 || number < 0 || number >= count || name.size() < ending.size() ||
      name.compare(name.size() - ending.size(), ending.size(), ending) != 0) {
    throw_error(source, ": is part ", number + 1, " of ", count, " of a split model, so its name should end in '",
                ending, "'; rename the parts");
  }
  const std::string stem = name.substr(0, name.size() - ending.size());
  const auto part_path = [&](std::int64_t i) {
    const std::string part = detail::split_name(stem, i + 1, count);
    return path.parent_path() / std::filesystem::path(std::u8string(part.begin(), part.end()));
  };
  if (number != 0) {
    throw_error(source, ": is part ", number + 1, " of ", count, " of a split model; give the first part, ",
                display(part_path(0)));
  }
  for (std::int64_t i = 1; i < count; ++i) {
    std::error_code ignored;
    if (!std::filesystem::exists(part_path(i), ignored)) {
      throw_error(display(part_path(i)), ": missing; ", source, " is split in ", count, " parts: download all");
    }
    gguf.files.push_back(MappedFile::open(part_path(i)));
    GgufMetadata part;
    GgufReader::read(gguf.files.back(), static_cast<int>(i), part, gguf.records);
    if (part.find<std::int64_t>("split.no").value_or(-1) != i ||
        part.find<std::int64_t>("split.count").value_or(-1) != count) {
      throw_error(part.source(), ": is not part ", i + 1, " of ", count, " of the model of ", source);
    }
  }
  const std::optional<std::int64_t> total = gguf.metadata.find<std::int64_t>("split.tensors.count");
  if (total && *total != static_cast<std::int64_t>(gguf.records.size())) {
    throw_error(source, ": its ", count, " parts hold ", gguf.records.size(), " tensors, expected ", *total,
                "; the parts do not belong together");
  }
  return gguf;
}

}  // namespace qwen3next
