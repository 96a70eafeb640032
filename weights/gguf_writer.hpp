#pragma once
// Writes a GGUF file as a stream: metadata and tensor list first, then the data in the same order, a piece at a time.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "blocks/dtype.hpp"
#include "weights/atomic_file.hpp"
#include "weights/gguf.hpp"
#include "weights/tensor_record.hpp"

namespace qwen3next {

//   GgufWriter out("model.gguf");
//   out.set_string("general.architecture", "qwen3next");
//   out.add_tensor("output_norm.weight", {2048}, DType::f32);   ... all of them
//   out.begin();
//   out.write(bytes);                                           ... of all tensors, in order, in pieces of any size
//   out.finish();                                               // now the file exists
//
// The layout is GGUF's default: each tensor begins where the one before ends, rounded up to 32 bytes, and there is no
// general.alignment (llama-quantize copies it but pads with 32, and llama.cpp then refuses the file).  Yet the data as
// a whole begins at a multiple of 4096 bytes of the file, to be read around the page cache: general.padding, a string
// of spaces, fills the header up.  So tensors whose sizes are multiples of 4096 are aligned to it too, if added first.
class GgufWriter {
 public:
  static constexpr std::uint64_t alignment = 32;         // of each tensor
  static constexpr std::uint64_t data_alignment = 4096;  // of the first

  explicit GgufWriter(std::filesystem::path path) : file_(std::move(path)) {}
  explicit GgufWriter(AtomicFile file) : file_(std::move(file)) {}

  // Metadata.  Setting a key again replaces its value.
  void set_u16(std::string_view key, std::uint16_t value) { set(key, GgufType::u16, bytes_of(value)); }
  void set_i32(std::string_view key, std::int32_t value) { set(key, GgufType::i32, bytes_of(value)); }
  void set_u32(std::string_view key, std::uint32_t value) { set(key, GgufType::u32, bytes_of(value)); }
  void set_u64(std::string_view key, std::uint64_t value) { set(key, GgufType::u64, bytes_of(value)); }
  void set_f32(std::string_view key, float value) { set(key, GgufType::f32, bytes_of(value)); }
  void set_bool(std::string_view key, bool value) { set(key, GgufType::boolean, bytes_of(std::uint8_t{value})); }
  void set_string(std::string_view key, std::string_view value) { set(key, GgufType::string, encoded(value)); }
  void set_strings(std::string_view key, std::span<const std::string> values) {
    std::string out = array_head(GgufType::string, values.size());
    for (const std::string& value : values) out += encoded(value);
    set(key, GgufType::array, std::move(out));
  }
  void set_i32s(std::string_view key, std::span<const std::int32_t> values) {
    std::string out = array_head(GgufType::i32, values.size());
    for (const std::int32_t value : values) out += bytes_of(value);
    set(key, GgufType::array, std::move(out));
  }
  void set_bools(std::string_view key, const std::vector<bool>& values) {
    std::string out = array_head(GgufType::boolean, values.size());
    for (const bool value : values) out += value ? '\1' : '\0';
    set(key, GgufType::array, std::move(out));
  }
  // As another file has it; what describes that file's layout is left out.
  void copy(const GgufKv& kv) {
    if (kv.key == "general.alignment" || kv.key == padding_key) return;
    set(kv.key, kv.type, {reinterpret_cast<const char*>(kv.value.data()), kv.value.size()});
  }

  // `shape` slowest dimension first, as everywhere here; the file has the reverse.
  void add_tensor(std::string name, const Shape& shape, DType type);

  // Ends the lists and writes them; throws if the disk has no room for what will follow.
  void begin();
  void write(std::span<const std::byte> bytes);
  void finish();

  // Of a resumable file, once begun: how much of it is there already, under this very header; 0 if nothing.  If there
  // is, go_on() must say where writing begins: at `position` bytes of a tensor.
  std::uint64_t kept() const noexcept { return file_.kept(); }
  std::uint64_t offset(std::size_t tensor, std::uint64_t position) const;  // in the file
  bool holds(std::size_t tensor, std::uint64_t position, std::span<const std::byte> bytes);
  void go_on(std::size_t tensor, std::uint64_t position);

  std::uint64_t size() const noexcept { return size_; }  // of the finished file, once begun
  std::uint64_t written() const noexcept { return file_.written(); }
  const std::filesystem::path& path() const noexcept { return file_.path(); }

 private:
  static constexpr std::string_view padding_key = "general.padding";

  struct Tensor {
    std::string name;
    Shape shape;
    DType type;
    std::uint64_t bytes;
    std::uint64_t offset = 0;  // in the file, once begun
  };

  template <class T>
  static std::string bytes_of(const T& value) {
    return {reinterpret_cast<const char*>(&value), sizeof value};
  }
  static std::string encoded(std::string_view text) { return bytes_of(std::uint64_t{text.size()}) + std::string(text); }
  static std::string array_head(GgufType element, std::size_t count) {
    return bytes_of(static_cast<std::uint32_t>(element)) + bytes_of(std::uint64_t{count});
  }
  static std::uint64_t padding(std::uint64_t position, std::uint64_t to = alignment) {
    return (to - position % to) % to;
  }

  void set(std::string_view key, GgufType type, std::string value) {
    value.insert(0, bytes_of(static_cast<std::uint32_t>(type)));
    for (auto& [old_key, old_value] : kvs_) {
      if (old_key == key) {
        old_value = std::move(value);
        return;
      }
    }
    kvs_.emplace_back(key, std::move(value));
  }

  std::string header() const;

  void pad() {
    static constexpr std::array<std::byte, alignment> zeros{};
    file_.write(std::span(zeros).first(static_cast<std::size_t>(padding(file_.written()))));
  }

  AtomicFile file_;
  std::vector<std::pair<std::string, std::string>> kvs_;  // key, encoded type and value
  std::vector<Tensor> tensors_;
  std::uint64_t size_ = 0;
  bool begun_ = false;
  std::size_t current_ = 0;     // the tensor that is being written
  std::uint64_t position_ = 0;  // bytes of it that are
};

inline void GgufWriter::add_tensor(std::string name, const Shape& shape, DType type) {
  if (info(type).ggml_id == no_ggml_id) {
    throw_error(display(path()), ": cannot hold tensor ", printable(name), " of ", info(type).name,
                ", no type of GGUF");
  }
  const std::optional<std::int64_t> n = shape.elements();
  if (begun_ || shape.rank < 1 || shape.rank > 4 || !n || *n == 0 || !fits_blocks(type, shape[shape.rank - 1])) {
    throw_error(display(path()), ": cannot hold tensor ", printable(name), " of ", info(type).name, " ", shape.text(),
                begun_ ? ": the list is written already" : "; its rows must be whole blocks and its rank 1 to 4");
  }
  const auto bytes =
      static_cast<std::uint64_t>(*n / info(type).elements) * static_cast<std::uint64_t>(info(type).bytes);
  tensors_.push_back({std::move(name), shape, type, bytes, 0});
}

inline std::string GgufWriter::header() const {
  std::string out = "GGUF" + bytes_of(std::uint32_t{3}) + bytes_of(std::uint64_t{tensors_.size()}) +
                    bytes_of(std::uint64_t{kvs_.size()});
  for (const auto& [key, value] : kvs_) out += encoded(key) + value;
  std::uint64_t offset = 0;
  for (const Tensor& tensor : tensors_) {
    out += encoded(tensor.name) + bytes_of(static_cast<std::uint32_t>(tensor.shape.rank));
    for (int i = tensor.shape.rank; i-- > 0;) out += bytes_of(tensor.shape[i]);
    out += bytes_of(info(tensor.type).ggml_id) + bytes_of(offset);
    offset += tensor.bytes + padding(tensor.bytes);
  }
  return out;
}

inline void GgufWriter::begin() {
  set_string(padding_key, "");
  set_string(padding_key, std::string(static_cast<std::size_t>(padding(header().size(), data_alignment)), ' '));
  const std::string head = header();
  size_ = head.size();
  for (Tensor& tensor : tensors_) {
    tensor.offset = size_;
    size_ += tensor.bytes + padding(tensor.bytes);
  }
  begun_ = true;
  file_.expect_room(size_ - std::min(size_, file_.kept()));
  if (file_.kept() > 0) {
    std::string found(file_.kept() < head.size() ? 0 : head.size(), '\0');
    file_.read(0, std::as_writable_bytes(std::span(found)));
    if (found == head) return;
    file_.go_on(0);  // of another model, or of other types
  }
  file_.write(std::as_bytes(std::span(head)));
}

inline std::uint64_t GgufWriter::offset(std::size_t tensor, std::uint64_t position) const {
  return tensor < tensors_.size() ? tensors_[tensor].offset + position : size_;
}

inline bool GgufWriter::holds(std::size_t tensor, std::uint64_t position, std::span<const std::byte> bytes) {
  if (offset(tensor, position) + bytes.size() > file_.kept()) return false;
  std::vector<std::byte> found(bytes.size());
  file_.read(offset(tensor, position), found);
  return std::ranges::equal(found, bytes);
}

inline void GgufWriter::go_on(std::size_t tensor, std::uint64_t position) {
  file_.go_on(offset(tensor, position));
  current_ = tensor;
  position_ = position;
}

inline void GgufWriter::write(std::span<const std::byte> bytes) {
  if (!begun_ || kept() > 0) throw_error(display(path()), ": data before the tensor list, or before go_on()");
  while (!bytes.empty()) {
    if (current_ == tensors_.size()) throw_error(display(path()), ": more data than the tensors have");
    const Tensor& tensor = tensors_[current_];
    const auto left = tensor.bytes - position_;
    const auto piece = bytes.first(left < bytes.size() ? static_cast<std::size_t>(left) : bytes.size());
    file_.write(piece);
    position_ += piece.size();
    bytes = bytes.subspan(piece.size());
    if (position_ == tensor.bytes) {
      pad();
      ++current_;
      position_ = 0;
    }
  }
}

inline void GgufWriter::finish() {
  if (!begun_) begin();
  if (current_ != tensors_.size()) {
    throw_error(display(path()), ": tensor ", printable(tensors_[current_].name), " has ", position_, " of its ",
                tensors_[current_].bytes, " bytes, and the file was to be finished");
  }
  file_.commit();
}

}  // namespace qwen3next
