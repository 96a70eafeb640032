#pragma once
// Writes a checkpoint, Hugging Face folder or GGUF, as a GGUF of given types that llama.cpp loads.
//
//   Checkpoint in = Checkpoint::open("Qwen3-Next-80B-A3B-Instruct");
//   quantize(in, "model.gguf", {.type = "Q4_K_M"});
//
// A stream: rows are read from the mapped source, encoded by all cores into one of two buffers while the other is
// written.  Memory does not depend on the model's size.  The output has its name only when it is complete; until then
// it is OUT.quantize.part, which goes away if something fails or is cancelled.  A process that is killed leaves it, and
// the next run of the same job goes on there.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backends/activation_statistics.hpp"
#include "blocks/dtype.hpp"
#include "core/linkage.hpp"
#include "weights/checkpoint.hpp"

namespace qwen3next {

// What calibrate() found out about the checkpoint object that is quantised, and what it read.
struct Calibration {
  const ActivationStatistics* statistics = nullptr;
  std::string text{};  // its name, for the metadata
  std::int64_t tokens = 0;
};

inline constexpr std::string_view quantize_suffix = ".quantize.part";  // of an output that is not complete

// What quantize() writes.
struct QuantizeOptions {
  std::string type = "Q4_K_M";                                // F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q3_K_M
  std::vector<std::pair<std::string, DType>> tensor_types{};  // regular expression and type, see plan_quantization
  std::string name{};                                         // general.name; empty: the source's
  Calibration calibration{};                                  // none: all columns matter alike
  int threads = 0;                                            // 0: all
  bool overwrite = false;
  std::uint64_t sync_bytes = std::uint64_t{256} << 20;  // written between two syncs: what a killed process may lose
  bool measure = false;                                 // the error of each type, for the summary
};

// How far quantize() is.
struct QuantizeProgress {
  std::string_view tensor;  // being worked on
  std::size_t tensors_done = 0, tensors = 0;
  std::uint64_t bytes_read = 0, bytes_to_read = 0;
  std::uint64_t bytes_written = 0, bytes_to_write = 0;
  double seconds = 0;
};

// A tensor whose rows are not whole blocks of the type that it should have.
struct Fallback {
  std::string name;
  DType wanted, used;
};

// What quantize() wrote.
struct QuantizeSummary {
  struct PerType {
    DType type;
    std::size_t tensors = 0;
    std::uint64_t elements = 0, bytes = 0;
    std::optional<double> relative_rmse{};  // if measured: sqrt(sum (w' - w)^2 / sum w^2)
  };
  std::vector<PerType> types;       // those that occur
  std::vector<Fallback> fallbacks;  // tensors that could not have the type they should
  std::size_t requantized = 0;      // tensors that were quantised before, to another type: quality suffers twice
  bool has_tokenizer = false;
  std::uint64_t bytes_read = 0;  // of weights
  std::uint64_t file_bytes = 0;
  std::uint64_t resumed_bytes = 0;  // of the file: left by an earlier run
  std::uint64_t bytes_skipped = 0;  // of weights: not read again for that
  double seconds = 0;
};

// `progress` is called now and then from the calling thread; if it returns false, nothing is left behind and Cancelled
// is thrown.  Throws Error if the source, the options or the disk do not allow it.  Deterministic: neither threads nor
// batches show in the output.
QuantizeSummary quantize(const Checkpoint& in, const std::filesystem::path& out, const QuantizeOptions& options,
                         const std::function<bool(const QuantizeProgress&)>& progress = {});

}  // namespace qwen3next

#if QWEN3NEXT_DEFINITIONS

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "blocks/codec.hpp"
#include "core/available_processors.hpp"
#include "core/message.hpp"
#include "text/load.hpp"
#include "weights/checkpoint.hpp"
#include "weights/gguf_config.hpp"
#include "weights/gguf_writer.hpp"
#include "weights/quantize_plan.hpp"

namespace qwen3next {

namespace detail {

// ---- metadata -------------------------------------------------------------------------------------------------------

inline void set_sampling_defaults(GgufWriter& out, const GenerationDefaults& d) {
  const auto f32 = [&](std::string_view key, const std::optional<double>& value) {
    if (value) out.set_f32(key, static_cast<float>(*value));
  };
  f32("general.sampling.temp", d.temperature);
  f32("general.sampling.top_p", d.top_p);
  f32("general.sampling.min_p", d.min_p);
  f32("general.sampling.penalty_repeat", d.repetition_penalty);
  if (d.top_k) out.set_i32("general.sampling.top_k", *d.top_k);
}

// The id of a special token that tokenizer_config.json names, or config.json numbers.
inline std::optional<std::int64_t> special_token(const std::filesystem::path& folder, const Tokenizer& tokenizer,
                                                 const std::string& which) {
  if (const std::optional<Json> json = open_json(folder / "tokenizer_config.json")) {
    auto token = json->value(which, Json());
    if (token.is_object()) token = token.value("content", Json());
    if (token.is_string()) return tokenizer.find(token.get<std::string>());
  }
  if (const std::optional<Json> json = open_json(folder / "config.json")) {
    auto id = json->value(which + "_id", Json());
    if (id.is_array() && !id.empty()) id = Json(id.front());
    if (id.is_number_integer()) return id.get<std::int64_t>();
  }
  return {};
}

// tokenizer.*: false if the folder has no tokenizer.
inline bool set_tokenizer(GgufWriter& out, const std::filesystem::path& folder, const Config& config,
                          const std::vector<std::int32_t>& eos) {
  std::error_code ignored;
  if (!std::filesystem::exists(folder / "tokenizer.json", ignored)) {
    out.set_string("tokenizer.ggml.model", "none");
    return false;
  }
  const Tokenizer tokenizer = load_tokenizer(folder);
  if (tokenizer.size() > config.vocab_size) {
    throw_error(display(folder), ": tokenizer.json has ", tokenizer.size(), " tokens, the model only ",
                config.vocab_size, "; the two do not belong together");
  }
  const Vocabulary v = tokenizer.vocabulary(static_cast<std::size_t>(config.vocab_size));
  out.set_string("tokenizer.ggml.model", "gpt2");
  out.set_string("tokenizer.ggml.pre", "qwen2");
  out.set_strings("tokenizer.ggml.tokens", v.tokens);
  out.set_i32s("tokenizer.ggml.token_type", v.types);
  out.set_strings("tokenizer.ggml.merges", v.merges);
  const auto set_id = [&](std::string_view key, std::optional<std::int64_t> id) {
    if (id && *id >= 0 && *id < config.vocab_size) {
      out.set_u32(concat("tokenizer.ggml.", key), static_cast<std::uint32_t>(*id));
    }
  };
  // Generation ends at eos and eot, in the order of generation_config.json.
  std::optional<std::int64_t> first = special_token(folder, tokenizer, "eos_token"), second;
  if (!eos.empty()) first = eos[0];
  if (eos.size() > 1) second = eos[1];
  set_id("eos_token_id", first);
  set_id("eot_token_id", second);
  set_id("padding_token_id", special_token(folder, tokenizer, "pad_token"));
  set_id("bos_token_id", special_token(folder, tokenizer, "bos_token"));
  out.set_bool("tokenizer.ggml.add_bos_token", false);
  if (const std::optional<std::string> text = load_chat_template_text(folder)) {
    out.set_string("tokenizer.chat_template", *text);
  }
  return true;
}

inline std::string folder_name(const std::filesystem::path& path) {
  std::error_code ignored;
  const std::filesystem::path full = std::filesystem::weakly_canonical(path, ignored);
  return display(full.has_filename() ? full.filename() : full.parent_path().filename());
}

// All metadata of the output; whether that includes a tokenizer.
inline bool set_metadata(GgufWriter& out, const Checkpoint& in, const QuantizeOptions& options, const Mix& mix) {
  out.set_string("general.architecture", gguf_architecture);
  out.set_string("general.type", "model");
  bool has_tokenizer = false;
  if (in.format == Format::gguf) {
    const std::string own = GgufFields::full("");  // written anew below, from the config as it was understood
    for (const GgufKv& kv : in.metadata.all()) {
      if (!kv.key.starts_with(own) && !kv.key.starts_with("split.") && !kv.key.starts_with("quantize.")) out.copy(kv);
    }
    has_tokenizer = in.metadata.has("tokenizer.ggml.tokens");
  } else {
    const GenerationDefaults defaults = load_generation_defaults(in.path);
    out.set_string("general.name", folder_name(in.path));
    set_sampling_defaults(out, defaults);
    has_tokenizer = set_tokenizer(out, in.path, in.config, defaults.eos_token_ids);
  }
  if (!options.name.empty()) out.set_string("general.name", options.name);
  out.set_u32("general.file_type", mix.file_type);
  out.set_u32("general.quantization_version", 2);
  if (options.calibration.statistics) {
    out.set_string("quantize.calibration.file", options.calibration.text);
    out.set_u64("quantize.calibration.tokens", static_cast<std::uint64_t>(options.calibration.tokens));
  }
  if (!has_tokenizer) out.set_u32(GgufFields::full("vocab_size"), static_cast<std::uint32_t>(in.config.vocab_size));
  set_gguf_config(out, in.config);
  return has_tokenizer;
}

// ---- weights --------------------------------------------------------------------------------------------------------

// Some rows of a piece, and where they go.
struct EncodeTask {
  std::size_t tensor;
  const Piece* piece;
  int first, rows;         // of the piece's view
  std::size_t offset;      // in the batch's buffer
  std::uint64_t position;  // in the tensor
  double error = 0, square = 0;
};

struct Batch {
  std::vector<EncodeTask> tasks;
  std::vector<std::byte> bytes;
  std::uint64_t bytes_read = 0;
};

// Cuts a plan into batches of limited size, each of tasks for one core.
class Batches {
 public:
  explicit Batches(const QuantizePlan& plan) : plan_(plan) {}

  // False at the end.
  bool next(Batch& batch) {
    batch.tasks.clear();
    batch.bytes_read = 0;
    std::size_t size = 0;
    while (tensor_ < plan_.tensors.size()) {
      const PlannedTensor& t = plan_.tensors[tensor_];
      if (piece_ == t.pieces.size()) {
        ++tensor_, piece_ = 0, position_ = 0;
        continue;
      }
      const Piece& piece = t.pieces[piece_];
      const std::size_t row = row_bytes(t.type, t.cols());
      if (size > 0 && size + row > batch_bytes) break;
      const std::size_t room = std::max<std::size_t>((batch_bytes - std::min(size, batch_bytes)) / row, 1);
      const std::size_t task = std::max<std::size_t>(task_elements / static_cast<std::size_t>(t.cols()), 1);
      const int rows = static_cast<int>(std::min({room, task, static_cast<std::size_t>(piece.rows - row_)}));
      batch.tasks.push_back({tensor_, &piece, piece.first + row_, rows, size, position_});
      size += static_cast<std::size_t>(rows) * row;
      position_ += static_cast<std::uint64_t>(rows) * row;
      batch.bytes_read += static_cast<std::uint64_t>(rows) * piece.view.row_bytes();
      row_ += rows;
      if (row_ == piece.rows) row_ = 0, ++piece_;
    }
    batch.bytes.resize(size);
    return size > 0;
  }

 private:
  static constexpr std::size_t batch_bytes = std::size_t{24} << 20;
  static constexpr std::size_t task_elements = std::size_t{1} << 16;

  const QuantizePlan& plan_;
  std::size_t tensor_ = 0, piece_ = 0;
  int row_ = 0;                 // of the piece
  std::uint64_t position_ = 0;  // in the tensor
};

// What a type can hold: beyond it a scale would be infinite.
inline float largest_value(DType type) noexcept {
  if (type == DType::f32) return std::numeric_limits<float>::max();
  if (type == DType::nvfp4) return 6 * 448;
  return type == DType::bf16 ? 0x1.fep127f : 65504.0f;
}

class Encoder {
 public:
  Encoder(const Checkpoint& in, const QuantizePlan& plan, const QuantizeOptions& options)
      : in_(in), plan_(plan), statistics_(options.calibration.statistics), measure_(options.measure) {
    if (statistics_ && !statistics_->has(in.weights.lm_head)) {
      throw_error("this checkpoint has no part in the calibration; calibrate the object that is quantised");
    }
  }

  // Encodes a batch with `threads` threads while this one runs `meanwhile`.
  template <class F>
  void run(Batch& batch, int threads, F&& meanwhile) const {
    std::atomic<std::size_t> next{0};
    std::exception_ptr failure;
    std::mutex mutex;
    const auto work = [&] {
      try {
        Rows rows;
        for (std::size_t i; (i = next.fetch_add(1)) < batch.tasks.size();) encode(batch, batch.tasks[i], rows);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
        next = batch.tasks.size();
      }
    };
    {
      std::vector<std::jthread> workers;
      try {
        for (int i = 0; i < threads; ++i) workers.emplace_back(work);
      } catch (const std::system_error&) {  // no more threads to be had: those there are will do
      }
      try {
        meanwhile();
      } catch (...) {
        next = batch.tasks.size();
        throw;
      }
      work();
    }
    if (failure) std::rethrow_exception(failure);
  }

  // Whether the file has what this batch would be, as far as a few of its rows tell: the first, the last and one
  // between.
  bool same(const Batch& batch, GgufWriter& file) const {
    Rows rows;
    Batch probe;
    for (const std::size_t i : {std::size_t{0}, batch.tasks.size() / 2, batch.tasks.size() - 1}) {
      EncodeTask task = batch.tasks[i];
      const PlannedTensor& t = plan_.tensors[task.tensor];
      const std::size_t row = row_bytes(t.type, t.cols());
      const int skip = i + 1 == batch.tasks.size() ? task.rows - 1 : 0;
      task.position += static_cast<std::uint64_t>(skip) * row;
      task.first += skip, task.rows = 1, task.offset = 0;
      probe.bytes.resize(row);
      encode(probe, task, rows);
      if (!file.holds(task.tensor, task.position, probe.bytes)) return false;
    }
    return true;
  }

  // Tells the system which pages of the source come next, or are not needed again.
  void advise(const Batch& batch, MappedFile::Advice advice) const noexcept {
    for (const EncodeTask& task : batch.tasks) {
      const WeightView& view = task.piece->view;
      const std::byte* begin = view.row(task.first);
      const std::byte* end = view.row(task.first + task.rows - 1) + view.row_bytes();
      if (const auto at = in_.locate(begin)) {
        in_.files[static_cast<std::size_t>(at->file)].advise(advice, static_cast<std::size_t>(at->offset),
                                                             static_cast<std::size_t>(end - begin));
      }
    }
  }

 private:
  struct Rows {
    std::vector<float> row, back, importance, weight;
  };

  void encode(Batch& batch, EncodeTask& task, Rows& rows) const {
    auto& [row, back, importance, weight] = rows;
    const PlannedTensor& t = plan_.tensors[task.tensor];
    const WeightView& view = task.piece->view;
    const std::size_t bytes = row_bytes(t.type, view.cols);
    std::byte* to = batch.bytes.data() + task.offset;
    const bool weigh = statistics_ && statistics_->has(view);  // an embedding is looked up, no input meets it
    if (weigh) statistics_->importance(view, importance);
    for (int r = task.first; r < task.first + task.rows; ++r, to += bytes) {
      if (view.type == t.type && view.scale == 1) {
        std::copy_n(view.row(r), bytes, to);
        continue;
      }
      row.resize(static_cast<std::size_t>(view.cols));
      dequantize(view, r, row.data());
      check(t, row);
      if (weigh) weigh_errors(row, importance, weight);
      quantize_row(t.type, row.data(), to, view.cols, weigh ? weight.data() : nullptr);
      if (!measure_) continue;
      back.resize(row.size());
      dequantize_row(t.type, to, back.data(), view.cols);
      for (std::size_t i = 0; i < row.size(); ++i) {
        const double e = back[i] - row[i];
        task.error += e * e;
        task.square += static_cast<double>(row[i]) * row[i];
      }
    }
  }

  // weight = importance * sqrt(mean square of the row + x^2): without importance, errors of large weights count a
  // little more, and that stays so.  Measured on the bundled model in Q3_K_M and Q4_K_M (bench/RESULTS.md): the same
  // distance from BF16's predictions as with the importance alone, and less perplexity.
  static void weigh_errors(const std::vector<float>& row, const std::vector<float>& importance,
                           std::vector<float>& weight) {
    float square = 0;
    for (const float x : row) square += x * x;
    const float mean = square / static_cast<float>(row.size());
    weight.resize(row.size());
    for (std::size_t i = 0; i < row.size(); ++i) weight[i] = importance[i] * std::sqrt(mean + row[i] * row[i]);
  }

  static void check(const PlannedTensor& t, const std::vector<float>& row) {
    const float limit = largest_value(t.type);
    bool good = true;
    for (const float x : row) good &= std::fabs(x) <= limit;  // false for NaN
    if (good) return;
    for (const float x : row) {
      if (std::isfinite(x) && std::fabs(x) > limit) {
        throw_error("tensor ", t.name, " has the value ", static_cast<double>(x), ", too large for ", info(t.type).name,
                    "; give it another type: BF16");
      }
    }
    throw_error("tensor ", t.name, " has values that are not finite; the source is damaged");
  }

  const Checkpoint& in_;
  const QuantizePlan& plan_;
  const ActivationStatistics* statistics_;
  const bool measure_;
};

// How many batches an earlier run left in the file.  That it was the same job shows in the header, which is equal, and
// in rows of every batch: with another source, type or calibration they would differ.
inline std::size_t batches_kept(const QuantizePlan& plan, const Encoder& encoder, GgufWriter& file) {
  Batches batches(plan);
  Batch batch;
  std::size_t n = 0;
  while (batches.next(batch) && encoder.same(batch, file)) ++n;
  return n;
}

inline void expect_new_file(const Checkpoint& in, const std::filesystem::path& out, bool overwrite) {
  std::error_code ignored;
  if (!std::filesystem::exists(out, ignored)) return;
  for (const MappedFile& file : in.files) {
    if (std::filesystem::equivalent(file.path(), out, ignored)) {
      throw_error(display(out), ": is the source itself; write to another file");
    }
  }
  if (!overwrite) throw_error(display(out), ": exists already; remove it, or ask to overwrite it");
}

}  // namespace detail

QWEN3NEXT_INLINE QuantizeSummary quantize(const Checkpoint& in, const std::filesystem::path& out,
                                          const QuantizeOptions& options,
                                          const std::function<bool(const QuantizeProgress&)>& progress) {
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  const Mix& mix = find_mix(options.type);
  const int threads = resolve_threads(options.threads);
  detail::expect_new_file(in, out, options.overwrite);
  QuantizePlan plan = plan_quantization(in.config, in.weights, mix, options.tensor_types);

  GgufWriter writer(AtomicFile::resumable(out, quantize_suffix, std::max<std::uint64_t>(options.sync_bytes, 1)));
  QuantizeSummary summary;
  summary.has_tokenizer = detail::set_metadata(writer, in, options, mix);
  for (const PlannedTensor& t : plan.tensors) writer.add_tensor(t.name, t.shape, t.type);
  writer.begin();

  QuantizeProgress state;
  state.tensors = plan.tensors.size();
  state.bytes_to_write = writer.size();
  for (const PlannedTensor& t : plan.tensors) {
    for (const Piece& p : t.pieces) state.bytes_to_read += static_cast<std::uint64_t>(p.rows) * p.view.row_bytes();
  }
  const auto report = [&] {
    state.bytes_written = writer.written();
    state.seconds = seconds();
    if (progress && !progress(state)) throw Cancelled();
  };

  const detail::Encoder encoder(in, plan, options);
  detail::Batches batches(plan);
  detail::Batch working, ready, coming;
  std::vector<double> error(plan.tensors.size()), square(plan.tensors.size());
  report();
  bool more = batches.next(working);
  if (writer.kept() > 0) {
    for (auto kept = detail::batches_kept(plan, encoder, writer); more && kept > 0; --kept) {
      state.bytes_read += working.bytes_read;
      more = batches.next(working);
    }
    const detail::EncodeTask* next = more ? &working.tasks.front() : nullptr;
    writer.go_on(next ? next->tensor : plan.tensors.size(), next ? next->position : 0);
    summary.resumed_bytes = state.bytes_read > 0 ? writer.written() : 0;
    summary.bytes_skipped = state.bytes_read;
    report();
  }
  while (more) {
    for (const MappedFile& file : in.files) file.check_unchanged();
    more = batches.next(coming);
    encoder.advise(coming, MappedFile::Advice::will_need);
    // This thread writes first, then helps.
    encoder.run(working, threads - 1, [&] { writer.write(ready.bytes); });
    encoder.advise(working, MappedFile::Advice::dont_need);
    for (const detail::EncodeTask& task : working.tasks) {
      error[task.tensor] += task.error, square[task.tensor] += task.square;
    }
    state.tensors_done = working.tasks.back().tensor;
    state.tensor = plan.tensors[state.tensors_done].name;
    state.bytes_read += working.bytes_read;
    std::swap(ready, working);
    std::swap(working, coming);
    report();
  }
  writer.write(ready.bytes);
  writer.finish();
  state.tensors_done = state.tensors;
  summary.seconds = seconds();
  summary.bytes_read = state.bytes_read;
  summary.file_bytes = writer.written();
  summary.fallbacks = std::move(plan.fallbacks);
  for (const DTypeInfo& type : dtype_table) {
    QuantizeSummary::PerType per{type.type};
    double e = 0, s = 0;
    for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
      const PlannedTensor& t = plan.tensors[i];
      if (t.type != type.type) continue;
      ++per.tensors;
      per.elements += static_cast<std::uint64_t>(*t.shape.elements());
      per.bytes += t.bytes();
      e += error[i], s += square[i];
      const DType from = t.pieces.front().view.type;
      summary.requantized += info(from).quantised && info(t.type).quantised && from != t.type;
    }
    if (options.measure && summary.resumed_bytes == 0) per.relative_rmse = s > 0 ? std::sqrt(e / s) : 0;
    if (per.tensors > 0) summary.types.push_back(per);
  }
  return summary;
}

}  // namespace qwen3next

#endif  // QWEN3NEXT_DEFINITIONS
