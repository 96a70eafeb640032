// quantize: a checkpoint in, a GGUF out.

#include "weights/quantize.hpp"
#include "generate/calibrate.hpp"
#include "weights/quantize_plan.hpp"

#include "cli/commands.hpp"
#include "cli/common.hpp"
#include "cli/progress.hpp"

namespace qwen3next::cli {

namespace {

struct QuantizeCommand {
  std::string in, mtp_path, out, type = "Q4_K_M", name, calibrate;
  std::int64_t calibrate_tokens = 65536;
  std::vector<std::string> tensor_types;
  int threads = 0;
  bool force = false, quiet = false;
};

std::vector<std::string> mix_names() {
  std::vector<std::string> names;
  for (const Mix& mix : mixes) names.emplace_back(mix.name);
  return names;
}

std::string join(const std::vector<std::string>& parts) {
  std::string out;
  for (const std::string& part : parts) out += (out.empty() ? "" : ", ") + part;
  return out;
}

// REGEX=TYPE
std::pair<std::string, DType> parse_tensor_type(const std::string& text) {
  const std::size_t equals = text.rfind('=');
  const auto type = equals == text.npos ? std::nullopt : find_dtype(text.substr(equals + 1));
  if (!type || equals == 0) {
    std::vector<std::string> types;
    for (const DTypeInfo& known : dtype_table) {
      if (known.ggml_id != no_ggml_id) types.emplace_back(known.name);
    }
    throw CLI::ValidationError("--tensor-type", "'" + text + "': expected REGEX=TYPE, TYPE one of " + join(types));
  }
  return {text.substr(0, equals), *type};
}

void summarise(const Checkpoint& in, const QuantizeCommand& o, const QuantizeSummary& s) {
  const auto rate = static_cast<double>(s.bytes_read - s.bytes_skipped) / s.seconds;
  std::cerr << o.out << ": " << bytes_text(s.file_bytes) << " from " << bytes_text(in.weight_bytes()) << " of weights, "
            << format("%.1f s, ", s.seconds) << bytes_text(rate) << "/s\n";
  if (s.resumed_bytes > 0) {
    std::cerr << "  went on with " << bytes_text(s.resumed_bytes) << " that an earlier run had written\n";
  }
  double bits = 0, elements = 0;
  for (const QuantizeSummary::PerType& t : s.types) {
    const auto n = static_cast<double>(t.elements), b = static_cast<double>(t.bytes);
    std::cerr << format("  %-5s %6zu tensors %10s  %.2f bits each\n", std::string(info(t.type).name).c_str(), t.tensors,
                        bytes_text(b).c_str(), 8 * b / n);
    bits += 8 * b, elements += n;
  }
  std::cerr << format("  all   %.2f bits per weight\n", bits / elements);
  if (!s.fallbacks.empty()) {
    const Fallback& f = s.fallbacks.front();
    std::cerr << "  " << s.fallbacks.size() << " tensors have rows that are not whole blocks of their type: " << f.name
              << " is " << info(f.used).name << ", not " << info(f.wanted).name
              << (s.fallbacks.size() > 1 ? ", ..." : "") << "\n";
  }
  if (s.requantized > 0) {
    std::cerr << "  " << s.requantized << " tensors were quantised before: from BF16 the result would be better\n";
  }
  if (o.calibrate.empty() && bits / elements < 7) {
    std::cerr << "  not calibrated: with --calibrate TEXT it would be nearer to the source\n";
  }
  if (!s.has_tokenizer) std::cerr << "  no tokenizer in the source, so none in the result\n";
}

// The beginning of the text; control tokens in it are those of a conversation.
std::vector<std::int32_t> calibration_tokens(const QuantizeCommand& o) {
  const std::string text = read_text(o.calibrate, "a text to calibrate with");
  std::vector<std::int32_t> tokens = load_tokenizer(file_path(o.in)).encode(text, Special::parse);
  if (tokens.size() < 2) throw Error(o.calibrate + ": too short, expected a text of at least two tokens");
  const auto wanted = static_cast<std::size_t>(o.calibrate_tokens) + 1;  // the last is only what comes next
  if (tokens.size() > wanted) tokens.resize(wanted);
  return tokens;
}

void run_quantize(const QuantizeCommand& o) {
  QuantizeOptions options{.type = o.type, .name = o.name, .threads = o.threads, .overwrite = o.force};
  for (const std::string& text : o.tensor_types) options.tensor_types.push_back(parse_tensor_type(text));
  std::error_code ignored;
  if (!o.force && std::filesystem::exists(file_path(o.out), ignored)) {
    throw Error(o.out + ": exists already; --force overwrites it");
  }
  const Checkpoint in = Checkpoint::open(file_path(o.in), file_path(o.mtp_path));
  const Interruptible scope;
  ActivationStatistics statistics;
  if (!o.calibrate.empty()) {
    const std::vector<std::int32_t> tokens = calibration_tokens(o);
    Progress progress("calibrating", Progress::Unit::tokens, !o.quiet);
    statistics = calibrate(in, tokens, {.threads = o.threads}, [&](std::int64_t done, std::int64_t total) {
      progress.update(done, total);
      return !interrupted();
    });
    options.calibration = {&statistics, display(file_path(o.calibrate).filename()),
                           static_cast<std::int64_t>(tokens.size()) - 1};
  }
  Progress progress("quantizing", Progress::Unit::bytes, !o.quiet);
  const QuantizeSummary summary = quantize(in, file_path(o.out), options, [&](const QuantizeProgress& p) {
    progress.update(static_cast<std::int64_t>(p.bytes_read), static_cast<std::int64_t>(p.bytes_to_read));
    return !interrupted();
  });
  progress.clear();
  if (!o.quiet) summarise(in, o, summary);
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto o = std::make_shared<QuantizeCommand>();
  CLI::App& command = *app.add_subcommand("quantize", "Write a model as a GGUF of smaller types");
  command.add_option("IN", o->in, "Hugging Face folder or GGUF file")->required()->option_text(" ");
  command.add_option("OUT", o->out, "The GGUF file to write")->required()->option_text(" ");
  command.add_option("-t,--type", o->type, join(mix_names()))
      ->option_text("TYPE [Q4_K_M]")
      ->transform(CLI::IsMember(mix_names(), CLI::ignore_case));
  command
      .add_option("--tensor-type", o->tensor_types,
                  "Another type for the tensors whose name (llama.cpp's) matches; repeatable, the first match counts")
      ->option_text("REGEX=TYPE")
      ->take_all()
      ->allow_extra_args(false);
  command
      .add_option("--calibrate", o->calibrate,
                  "A text like those that the model will meet: it is run over it first, to learn which columns of its "
                  "matrices matter most; '-' is standard input")
      ->option_text("TEXT");
  command.add_option("--calibrate-tokens", o->calibrate_tokens, "Most tokens of that text [65536]")
      ->option_text("N")
      ->check(CLI::PositiveNumber);
  add_mtp_file_option(command, o->mtp_path);
  command.add_option("--name", o->name, "The name that the file gives the model [the source's]")->option_text("TEXT");
  command.add_option("--threads", o->threads, "Threads; 0: all processors")
      ->option_text("N [0]")
      ->check(CLI::NonNegativeNumber);
  command.add_flag("--force", o->force, "Overwrite OUT if it exists");
  command.add_flag("-q,--quiet", o->quiet, "No progress and no summary on stderr");
  add_example(
      command,
      "qwen3next quantize Qwen3-Next-80B-A3B-Instruct model.gguf --type Q4_K_M --calibrate text.txt\n"
      "  qwen3next quantize folder model.gguf --type Q4_K_M --tensor-type 'ffn_down_exps=Q5_K'\n\n"
      "Which type?  The largest that leaves some GiB of memory free; the 80B with its MTP block takes:\n"
      "  BF16    151.6 GiB  the release's own type\n"
      "  Q8_0     80.6 GiB  as good as BF16\n"
      "  Q6_K     62.3 GiB  hardly to be told from it\n"
      "  Q5_K_M   54.0 GiB  a little worse\n"
      "  Q4_K_M   46.3 GiB  the usual choice\n"
      "  IQ4_NL   43.6 GiB  like Q4_0, better; for rows that are not multiples of 256\n"
      "  Q4_0     43.3 GiB  the oldest and simplest: for other programs that want it\n"
      "  MXFP4    41.9 GiB  experts in 4-bit floats, all else in Q8_0\n"
      "  Q3_K_M   36.6 GiB  where nothing else fits: calibrate it\n"
      "F16 and F32 are for other programs.  The MTP block keeps at least 5 bits in all of them.\n\n"
      "Time: a core packs about 25 million weights a second as K quants (120 million as Q8_0), so the 80B takes\n"
      "54 minutes divided by the cores, or as long as the disk needs to read 163 GB and to write the result.\n"
      "Before that, calibration reads 65536 tokens of the text, as long as a prompt of that length takes.\n\n"
      "Memory: less than 1 GiB whatever the model's size; calibration, with the 80B, 3 GiB, and reads the weights\n"
      "once for 4096 tokens.  OUT appears when it is complete; until then it is OUT.quantize.part, which Ctrl-C\n"
      "and errors take away.  If the process is killed it stays, and the same command goes on where that ended.\n"
      "llama.cpp loads the result as well.");
  command.callback([o] { run_quantize(*o); });
}

}  // namespace qwen3next::cli
