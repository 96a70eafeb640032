#pragma once
// Finds the tensors of a checkpoint by name and turns them into views; keeps account of what is missing or left over.

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "blocks/codec.hpp"
#include "blocks/weight_view.hpp"
#include "core/message.hpp"
#include "weights/mapped_file.hpp"
#include "weights/tensor_record.hpp"

namespace qwen3next {

enum class Format : std::uint8_t { huggingface, gguf };

// A vector that could not be used in place.
struct VectorCopy {
  std::string name;
  std::string why;
  std::vector<float> values;  // views point here: never resized; moving the object keeps them valid

  std::size_t bytes() const noexcept { return values.size() * sizeof(float); }
};

// What a tensor is called in either container, without the layer's prefix.
struct TensorName {
  std::string_view huggingface, gguf;
};

class Binder {
 public:
  // `records`, `files` and `copies` outlive the binder; `source` names the checkpoint in errors.
  Binder(Format format, const std::vector<TensorRecord>& records, const std::vector<MappedFile>& files,
         std::string source, std::vector<VectorCopy>& copies)
      : format_(format), records_(records), files_(files), source_(std::move(source)), copies_(copies) {
    index_.reserve(records.size());
    for (std::size_t i = 0; i < records.size(); ++i) {
      const auto [other, added] = index_.emplace(records[i].name, i);
      if (!added) {
        throw_error(file(records[i]), ": tensor ", printable(records[i].name), " is also in ",
                    file(records[other->second]), "; the files do not belong together");
      }
    }
    used_.resize(records.size());
  }

  bool gguf() const noexcept { return format_ == Format::gguf; }
  const std::string& source() const noexcept { return source_; }

  // Names are looked up after `prefix` + its name in this container.
  std::string_view pick(TensorName name) const noexcept { return gguf() ? name.gguf : name.huggingface; }
  const TensorRecord* find(std::string_view prefix, TensorName name) const { return lookup(prefix, pick(name)).first; }
  bool has(std::string_view prefix, TensorName name) const { return find(prefix, name) != nullptr; }

  // The record, its shape checked (up to leading ones) and itself marked as used; nullptr if missing, which is noted.
  const TensorRecord* take(std::string_view prefix, TensorName name, const Shape& expected) {
    const auto [record, i] = lookup(prefix, pick(name));
    if (!record) {
      missing_.emplace_back(concat(prefix, pick(name)));
      // A config can claim billions of tensors: no list of them, and no tables for them, beyond what the files hold.
      if (missing_.size() > records_.size() + 1024)
        throw_error(source_, ": ", list(missing_, "or more missing"), advice);
      return nullptr;
    }
    used_[i] = true;
    if (!record->type) fail_type(*record, matrix_types());
    if (!record->shape.same(expected)) {
      throw_error(file(*record), ": tensor ", printable(record->name), " is ", record->shape.text(), ", expected ",
                  expected.text(), " by the config; the two do not belong together");
    }
    return record;
  }

  // A tensor that is there but has nothing to say.
  void ignore(std::string_view prefix, TensorName name) {
    if (const auto [record, i] = lookup(prefix, pick(name)); record) used_[i] = true;
  }

  // A matrix in place; an empty view if it is missing.
  WeightView matrix(std::string_view prefix, TensorName name, int rows, int cols) {
    const TensorRecord* record = take(prefix, name, {rows, cols});
    if (!record) return {};
    const auto view = WeightView::contiguous(record->data, *record->type, rows, cols);
    return Factors(*this, *record, 1, view).applied(view, 0);
  }

  // `count` matrices [rows, cols], one after the other in one tensor; none if it is missing.
  std::vector<WeightView> stack(std::string_view prefix, TensorName name, int count, int rows, int cols) {
    const TensorRecord* record = take(prefix, name, {count, rows, cols});
    if (!record) return {};
    std::vector<WeightView> views(static_cast<std::size_t>(count));
    auto view = WeightView::contiguous(record->data, *record->type, rows, cols);
    const Factors factors(*this, *record, count, view);
    for (int i = 0; i < count; ++i, view.data += view.bytes()) {
      views[static_cast<std::size_t>(i)] = factors.applied(view, i);
    }
    return views;
  }

  // How a vector is to be held, beside being F32.
  enum class Transform { none, add_one, minus_exp };

  // A vector, in place where it is F32, aligned and needs no change, else as a copy; an empty view if it is missing.
  VectorView vector(std::string_view prefix, TensorName name, const Shape& shape, Transform transform) {
    const TensorRecord* record = take(prefix, name, shape);
    if (!record) return {};
    if (record->type == DType::f8_e4m3) fail_type(*record, "F32, F16 or BF16");  // no factors are defined for it
    const int cols = shape.rank > 1 ? static_cast<int>(shape[shape.rank - 1]) : 1;
    const std::int64_t elements = *record->shape.elements();
    if (elements > std::numeric_limits<int>::max()) {
      throw_error(file(*record), ": tensor ", printable(record->name), " has ", elements, " values, too many for one");
    }
    const int size = static_cast<int>(elements);
    const bool aligned = reinterpret_cast<std::uintptr_t>(record->data) % alignof(float) == 0;
    if (record->type == DType::f32 && aligned && transform == Transform::none) {
      return {reinterpret_cast<const float*>(record->data), size, cols};
    }
    VectorCopy& copy = copies_.emplace_back();
    copy.name = record->name;
    copy.why = transform == Transform::add_one     ? "held as 1 + w"
               : transform == Transform::minus_exp ? "held as -exp(A_log)"
               : record->type != DType::f32        ? concat("converted from ", record->dtype, " to F32")
                                                   : "not aligned in the file";
    copy.values.resize(static_cast<std::size_t>(size));
    dequantize_row(*record->type, record->data, copy.values.data(), size);
    for (float& value : copy.values) {
      if (transform == Transform::add_one) value += 1;
      if (transform == Transform::minus_exp) value = -std::exp(value);
    }
    return {copy.values.data(), size, cols};
  }

  // Throws unless every tensor was found and used.
  void finish() const {
    std::vector<std::string> unexpected;
    for (std::size_t i = 0; i < records_.size(); ++i) {
      if (used_[i]) continue;
      unexpected.push_back(records_[i].name);
      expect_no_idle_scales(records_[i]);
    }
    if (missing_.empty() && unexpected.empty()) return;
    std::string what = missing_.empty() ? "" : list(missing_, "missing");
    if (!unexpected.empty()) what += (what.empty() ? "" : "; ") + list(unexpected, "unexpected");
    throw_error(source_, ": ", what, missing_.empty() ? "; this is not a Qwen3-Next of the given config" : advice);
  }

  std::string file(const TensorRecord& record) const { return files_[static_cast<std::size_t>(record.file)].name(); }

 private:
  static constexpr std::string_view advice = "; the files are incomplete or of another model";

  // What multiplies a stack of matrices, one after the other in one tensor: a grid beside F8_E4M3, a number in GGUF.
  class Factors {
   public:
    // `view` is the first of the `count` matrices.
    Factors(Binder& b, const TensorRecord& record, int count, const WeightView& view) {
      if (view.type == DType::f8_e4m3) find_grid(b, record, count, view);
      if (b.gguf() && record.name.ends_with(".weight")) {
        const std::string_view stem = std::string_view(record.name).substr(0, record.name.size() - 6);
        find_scales(b, stem, count);
      }
    }
    // Matrix i of the stack.
    WeightView applied(WeightView view, int i) const noexcept {
      view.grid = grid_;
      view.grid.data += static_cast<std::size_t>(i) * grid_bytes_;
      if (scales_) view.scale = load<float>(scales_ + static_cast<std::size_t>(i) * sizeof(float));
      return view;
    }

   private:
    // Hugging Face's X_scale_inv, which multiplies in spite of its name.
    void find_grid(Binder& b, const TensorRecord& record, int count, const WeightView& view) {
      constexpr int block = ScaleGrid::block;
      const int rows = (view.rows + block - 1) / block, cols = (view.cols + block - 1) / block;
      const auto [scales, i] = b.lookup(record.name, "_scale_inv");
      if (!scales) {
        throw_error(b.file(record), ": tensor ", printable(record.name), " is F8_E4M3, but its scales, ",
                    printable(record.name), "_scale_inv, are missing; download all files, or use the BF16 release");
      }
      b.used_[i] = true;
      const Shape expected{count, rows, cols};
      if (!scales->shape.same(expected)) {
        throw_error(b.file(*scales), ": tensor ", printable(scales->name), " is ", scales->shape.text(), ", expected ",
                    count == 1 ? Shape{rows, cols}.text() : expected.text(), ": a scale for every 128 x 128 values of ",
                    printable(record.name));
      }
      if (scales->type != DType::f32 && scales->type != DType::bf16) b.fail_type(*scales, "F32 or BF16");
      grid_ = {scales->data, *scales->type, cols, 0};
      grid_bytes_ = static_cast<std::size_t>(rows) * row_bytes(*scales->type, cols);
    }

    // llama.cpp's X.scale, one number for a matrix.  X.input_scale is for activations in 4 bits, which are not used
    // here.
    void find_scales(Binder& b, std::string_view stem, int count) {
      for (const std::string_view suffix : {"scale", "input_scale"}) {
        const auto [scales, i] = b.lookup(stem, suffix);
        if (!scales) continue;
        b.used_[i] = true;
        if (!scales->shape.same({count})) {
          throw_error(b.file(*scales), ": tensor ", printable(scales->name), " is ", scales->shape.text(),
                      ", expected ", Shape{count}.text(), ": a scale for each matrix");
        }
        if (scales->type != DType::f32) b.fail_type(*scales, "F32");
        if (suffix == "scale") scales_ = scales->data;
      }
    }

    ScaleGrid grid_{};
    std::size_t grid_bytes_ = 0;  // of one matrix
    const std::byte* scales_ = nullptr;
  };

  [[noreturn]] void fail_type(const TensorRecord& record, std::string_view expected) const {
    const bool codebook = record.dtype.starts_with("IQ1") || record.dtype.starts_with("IQ2") ||
                          record.dtype.starts_with("IQ3") || record.dtype.starts_with("TQ");
    throw_error(file(record), ": tensor ", printable(record.name), " is ", record.dtype, ", expected ", expected,
                codebook ? "; codebook types of 1 to 3 bits" : "; such tensors",
                " are not supported: use another file of the model");
  }

  // "F32, F16, ... or Q6_K"
  std::string matrix_types() const {
    if (!gguf()) return "F32, F16, BF16 or F8_E4M3";
    std::string types;
    for (const DTypeInfo& type : dtype_table) {
      if (type.ggml_id == no_ggml_id) continue;
      if (!types.empty()) types += type.type == dtype_table.back().type ? " or " : ", ";
      types += type.name;
    }
    return types;
  }

  // Scales that nobody asked for, because their tensor is of a type that has none.
  void expect_no_idle_scales(const TensorRecord& scales) const {
    constexpr std::string_view suffix = "_scale_inv";
    if (!scales.name.ends_with(suffix)) return;
    const std::string_view stem = std::string_view(scales.name).substr(0, scales.name.size() - suffix.size());
    const auto [record, i] = lookup(stem, "");
    if (!record || !used_[i] || record->type == DType::f8_e4m3) return;
    throw_error(file(scales), ": has ", printable(scales.name), ", but ", printable(record->name), " is ",
                record->dtype, ", expected F8_E4M3; the files do not belong together");
  }

  std::pair<const TensorRecord*, std::size_t> lookup(std::string_view prefix, std::string_view name) const {
    key_.assign(prefix).append(name);
    const auto found = index_.find(key_);
    if (found == index_.end()) return {nullptr, 0};
    return {&records_[found->second], found->second};
  }

  static std::string list(const std::vector<std::string>& names, std::string_view what) {
    std::string out = concat(names.size(), " tensor", names.size() == 1 ? "" : "s", " ", what, " (");
    constexpr std::size_t shown = 4;
    for (std::size_t i = 0; i < names.size() && i < shown; ++i) out += (i ? ", " : "") + printable(names[i]);
    return out + (names.size() > shown ? ", ...)" : ")");
  }

  const Format format_;
  const std::vector<TensorRecord>& records_;
  const std::vector<MappedFile>& files_;
  const std::string source_;
  std::vector<VectorCopy>& copies_;
  std::unordered_map<std::string_view, std::size_t> index_;
  std::vector<bool> used_;
  std::vector<std::string> missing_;
  mutable std::string key_;  // of the look-up at hand: spares an allocation for each of 74 thousand
};

}  // namespace qwen3next
