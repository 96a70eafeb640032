#pragma once
// The safetensors container: u64 N, N bytes of JSON, then dense row-major data.  A checkpoint is one file, or shards
// with an index.  https://github.com/huggingface/safetensors

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "blocks/half.hpp"
#include "core/json.hpp"
#include "weights/mapped_file.hpp"
#include "weights/tensor_record.hpp"

namespace qwen3next {

struct SafetensorsType {
  std::string_view name;
  int bits;
  std::optional<DType> type;
};

inline constexpr std::array<SafetensorsType, 18> safetensors_types{{
    {"F32", 32, DType::f32},
    {"F16", 16, DType::f16},
    {"BF16", 16, DType::bf16},
    {"F64", 64, {}},
    {"BOOL", 8, {}},
    {"U8", 8, {}},
    {"I8", 8, {}},
    {"F8_E4M3", 8, DType::f8_e4m3},
    {"F8_E5M2", 8, {}},
    {"F8_E8M0", 8, {}},
    {"U16", 16, {}},
    {"I16", 16, {}},
    {"U32", 32, {}},
    {"I32", 32, {}},
    {"U64", 64, {}},
    {"I64", 64, {}},
    {"C64", 64, {}},
    {"F4", 4, {}},
}};

namespace detail {

// Reads {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} as it is parsed: the 80B's headers
// hold 74 thousand of these.
class SafetensorsHeader : public nlohmann::json_sax<Json> {
 public:
  SafetensorsHeader(const MappedFile& file, int file_index, std::size_t data_begin, std::vector<TensorRecord>& records)
      : file_(file), file_index_(file_index), data_begin_(data_begin), records_(records) {}

  bool null() override { return value("null"); }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_float(number_float_t, const string_t&) override { return value("a fraction"); }
  bool number_integer(number_integer_t) override { return value("a negative number"); }
  bool binary(binary_t&) override { return value("binary data"); }

  bool number_unsigned(number_unsigned_t n) override {
    if (ignored() || depth_ != 3) return value("a number");
    if (field_ == Field::shape) {
      if (shape_.rank == Shape::max_rank) fail("more than 8 dimensions");
      if (n > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) fail("an impossible dimension");
      shape_.push_back(static_cast<std::int64_t>(n));
    } else {
      if (offsets_ == 2) fail("more than two data_offsets");
      offset_[static_cast<std::size_t>(offsets_++)] = n;
    }
    return true;
  }

  bool string(string_t& text) override {
    if (ignored()) return true;
    if (depth_ != 2 || field_ != Field::dtype) return value("a string");
    dtype_ = std::find_if(safetensors_types.begin(), safetensors_types.end(),
                          [&](const SafetensorsType& type) { return type.name == text; });
    if (dtype_ == safetensors_types.end()) fail("an unknown dtype " + printable(text, 20));
    return true;
  }

  bool key(string_t& text) override {
    if (depth_ == 1) {
      name_ = std::move(text);
      metadata_ = name_ == "__metadata__";
    } else if (depth_ == 2 && !metadata_) {
      field_ = text == "dtype"          ? Field::dtype
               : text == "shape"        ? Field::shape
               : text == "data_offsets" ? Field::offsets
                                        : Field::other;
      const auto bit = 1u << static_cast<unsigned>(field_);
      if (field_ != Field::other && (seen_ & bit)) fail("'" + text + "' twice");
      seen_ |= bit;
    }
    return true;
  }

  bool start_object(std::size_t) override {
    enter();
    if (depth_ == 2) {
      seen_ = 0, shape_ = {}, offsets_ = 0, dtype_ = safetensors_types.end();
      field_ = Field::other;
    } else if (depth_ > 2 && !ignored()) {
      fail("an object inside");
    }
    return true;
  }

  bool end_object() override {
    if (depth_-- == 2 && !metadata_) add();
    return true;
  }

  bool start_array(std::size_t) override {
    enter();
    if (depth_ < 3 || (!ignored() && (depth_ > 3 || field_ == Field::dtype))) {
      if (depth_ == 1) throw_error(file_.name(), ": the header is an array, expected an object");
      fail("an array instead of its description");
    }
    return true;
  }

  bool end_array() override {
    --depth_;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const Json::exception& e) override {
    throw_error(file_.name(), ": the header is not valid JSON: ", printable(e.what()));
  }

 private:
  enum class Field : unsigned { dtype, shape, offsets, other };

  [[noreturn]] void fail(std::string_view what) const {
    throw_error(file_.name(), ": tensor ", printable(name_), ": the header gives ", what,
                "; the file is damaged or not safetensors");
  }

  bool ignored() const { return depth_ >= 2 && (metadata_ || field_ == Field::other); }

  bool value(std::string_view kind) const {
    if (ignored()) return true;
    if (depth_ == 0) throw_error(file_.name(), ": the header is ", kind, ", expected an object");
    fail(concat(kind, depth_ == 1 ? " instead of its description" : " where another value belongs"));
  }

  void enter() {
    if (++depth_ > 16) throw_error(file_.name(), ": the header is nested too deeply");
  }

  void add() {
    if ((seen_ & 7u) != 7u || dtype_ == safetensors_types.end() || offsets_ != 2) {
      fail("no dtype, shape or data_offsets");
    }
    const std::uint64_t begin = offset_[0], end = offset_[1], size = file_.size() - data_begin_;
    if (begin > end || end > size) {
      throw_error(file_.name(), ": tensor ", printable(name_), " lies at bytes ", begin, "..", end,
                  " of the data, which has ", size, "; the file is truncated or damaged: download it again");
    }
    const std::optional<std::int64_t> n = shape_.elements();
    // n * bits fits: it is compared in bytes, and no file has more than 2^63.
    if (!n || static_cast<std::uint64_t>(*n) > (std::uint64_t{1} << 57) ||
        static_cast<std::uint64_t>(*n) * static_cast<std::uint64_t>(dtype_->bits) != (end - begin) * 8) {
      throw_error(file_.name(), ": tensor ", printable(name_), " of ", dtype_->name, " ", shape_.text(), " has ",
                  end - begin, " bytes, which does not fit; the file is damaged");
    }
    TensorRecord& record = records_.emplace_back();
    record.name = std::move(name_);
    record.dtype = dtype_->name;
    record.type = dtype_->type;
    record.shape = shape_;
    record.offset = data_begin_ + begin;
    record.data = file_.data() + record.offset;
    record.bytes = end - begin;
    record.file = file_index_;
  }

  const MappedFile& file_;
  const int file_index_;
  const std::size_t data_begin_;
  std::vector<TensorRecord>& records_;

  int depth_ = 0;
  std::string name_;
  bool metadata_ = false;
  Field field_ = Field::other;
  unsigned seen_ = 0;
  const SafetensorsType* dtype_ = safetensors_types.end();
  Shape shape_;
  std::array<std::uint64_t, 2> offset_{};
  int offsets_ = 0;
};

}  // namespace detail

// Appends the tensors of one file, in the order of its data.  `file_index` goes into the records.
inline void read_safetensors(const MappedFile& file, int file_index, std::vector<TensorRecord>& records) {
  constexpr std::size_t prefix = 8, largest_header = 100'000'000;  // the format's own limit
  if (file.size() < prefix) {
    throw_error(file.name(), ": ", file.size(), " bytes are no safetensors file; download it again");
  }
  const auto header = load<std::uint64_t>(file.data());
  if (header < 2 || header > largest_header || header > file.size() - prefix) {
    throw_error(file.name(), ": a header of ", header, " bytes in a file of ", file.size(),
                "; the file is truncated or not safetensors");
  }
  const std::string_view json = file.text().substr(prefix, static_cast<std::size_t>(header));
  if (json.front() != '{') throw_error(file.name(), ": the header does not start with '{'; not a safetensors file");
  const std::size_t first = records.size(), data_begin = prefix + static_cast<std::size_t>(header);
  detail::SafetensorsHeader reader(file, file_index, data_begin, records);
  read_json_events(json, reader);

  // The format allows neither overlaps nor holes; either means that the file is not what was written.
  const auto added = records.begin() + static_cast<std::ptrdiff_t>(first);
  std::sort(added, records.end(), [](const TensorRecord& a, const TensorRecord& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  std::uint64_t end = data_begin;
  for (auto record = added; record != records.end(); ++record) {
    if (record->offset != end) {
      throw_error(file.name(), ": tensor ", printable(record->name), " begins at byte ", record->offset - data_begin,
                  " of the data, expected ", end - data_begin, "; the file is damaged");
    }
    end += record->bytes;
  }
  if (end != file.size()) {
    throw_error(file.name(), ": ", file.size() - end, " bytes after the last tensor; the file is damaged");
  }
}

namespace detail {

using ShardCounts = std::map<std::string, std::size_t>;  // file name -> tensors in it

// Reads {"metadata": {...}, "weight_map": {"tensor": "file", ...}} as it is parsed.  Only the files matter: which
// tensors they hold, they say themselves, and whether all are there is checked when they are bound.
class ShardIndex : public nlohmann::json_sax<Json> {
 public:
  explicit ShardIndex(const MappedFile& file) : file_(file) {}
  ShardCounts counts;

  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(number_integer_t) override { return value(); }
  bool number_unsigned(number_unsigned_t) override { return value(); }
  bool number_float(number_float_t, const string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool string(string_t& shard) override {
    if (depth_ != 2 || !in_map_) return value();
    if (!last_ || last_->first != shard) last_ = &*counts.try_emplace(shard).first;
    ++last_->second;
    return true;
  }
  bool key(string_t& name) override {
    if (depth_ == 1) in_map_ = name == "weight_map";
    return true;
  }
  bool start_object(std::size_t) override {
    enter();
    return depth_ > 2 ? value() : true;
  }
  bool end_object() override { return --depth_, true; }
  bool start_array(std::size_t) override {
    enter();
    return value();
  }
  bool end_array() override { return --depth_, true; }
  bool parse_error(std::size_t, const std::string&, const Json::exception& e) override {
    throw_error(file_.name(), ": not valid JSON: ", printable(e.what()));
  }

 private:
  bool value() const {
    if (in_map_) throw_error(file_.name(), ": \"weight_map\" has something else than file names; download it again");
    return true;
  }
  void enter() {
    if (++depth_ > 16) throw_error(file_.name(), ": JSON nested deeper than 16 levels");
  }

  const MappedFile& file_;
  int depth_ = 0;
  bool in_map_ = false;
  ShardCounts::value_type* last_ = nullptr;  // neighbours mostly share a file
};

inline ShardCounts read_shard_index(const MappedFile& file) {
  const std::string_view json = file.text();
  if (json.size() > 100'000'000)
    throw_error(file.name(), ": ", json.size(), " bytes are too many for an index of shards");
  ShardIndex index(file);
  read_json_events(json, index);
  if (index.counts.empty()) {
    throw_error(file.name(), ": no \"weight_map\" from tensors to files; download it again");
  }
  return std::move(index.counts);
}

}  // namespace detail

struct SafetensorsFolder {
  std::vector<MappedFile> files;
  std::vector<TensorRecord> records;
};

// Maps model.safetensors, or the shards that model.safetensors.index.json names.
inline SafetensorsFolder open_safetensors(const std::filesystem::path& folder) {
  namespace fs = std::filesystem;
  SafetensorsFolder result;
  std::error_code ignored;
  if (fs::exists(folder / "model.safetensors", ignored)) {
    result.files.push_back(MappedFile::open(folder / "model.safetensors"));
    read_safetensors(result.files.back(), 0, result.records);
    return result;
  }
  const fs::path index_path = folder / "model.safetensors.index.json";
  if (!fs::exists(index_path, ignored)) {
    throw_error(display(folder), ": neither model.safetensors nor model.safetensors.index.json here; expected a ",
                "Hugging Face folder with safetensors weights, or the path of a .gguf file");
  }
  const detail::ShardCounts shards = detail::read_shard_index(MappedFile::open(index_path));
  for (const auto& [shard, expected] : shards) {
    if (shard.empty() || shard == "." || shard == ".." || shard.find_first_of("/\\:\0", 0, 4) != std::string::npos) {
      throw_error(display(index_path), ": '", printable(shard), "' is not the name of a file in the same folder");
    }
    const fs::path path = folder / fs::path(std::u8string(shard.begin(), shard.end()));
    if (!fs::exists(path, ignored)) {
      throw_error(display(path), ": missing, but ", index_path.filename().string(), " expects ", expected,
                  " tensors in it; download it");
    }
    const std::size_t first = result.records.size();
    result.files.push_back(MappedFile::open(path));
    read_safetensors(result.files.back(), static_cast<int>(result.files.size()) - 1, result.records);
    if (const std::size_t found = result.records.size() - first; found != expected) {
      throw_error(display(path), ": has ", found, " tensors, but ", index_path.filename().string(), " expects ",
                  expected, " in it; download both again");
    }
  }
  return result;
}

}  // namespace qwen3next
