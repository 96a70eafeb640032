#pragma once
// What the commands share: the options for opening a model, and reading and writing.

#include <CLI/CLI.hpp>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>

#include "cli/format.hpp"
#include "cli/interrupt.hpp"
#include "cli/progress.hpp"
#include "cli/terminal.hpp"
#include "qwen3next.hpp"

namespace qwen3next::cli {

inline constexpr std::string_view model_help = "GGUF file (the first, if split) or Hugging Face folder";

// A name of a file as users give it: in UTF-8, which a path made of chars would not be on Windows.
inline std::filesystem::path file_path(const std::string& name) { return std::u8string(name.begin(), name.end()); }

// The line under a command's options that shows how to use it.
inline void add_example(CLI::App& command, const std::string& text) { command.footer("Example:\n  " + text + "\n"); }

// --- opening --------------------------------------------------------------------------------------------------------

struct ModelOptions {
  std::string path, mtp_path;
  std::string backend = "cpu";
  std::string isa;
  int threads = 0;
  double yarn = 0;
  std::string memory = "auto", gpu_memory, mtp = "auto", expert_profile;
  int experts_used = 0;
  std::int64_t context = 0;
  int batch = SessionOptions{}.batch;
  std::string kv;
  std::string cache_dir, cache_size = "16GiB";
  bool verbose = false;
};

inline void add_mtp_file_option(CLI::App& command, std::string& path) {
  command.add_option("--mtp-file", path, "The model's MTP block, where it is a file (or folder) of its own")
      ->option_text("FILE");
}

inline CLI::Option* add_yarn_option(CLI::App& command, double& factor) {
  return command.add_option("--yarn", factor, "Extend the model's length by this factor (YaRN), 1M from 262144: 4")
      ->option_text("FACTOR")
      ->check(CLI::Range(1., 1024.));
}

// Bytes of "20GiB", "20GB", "500M" or a plain number, as an option's value; `else_expected` is what else it may be.
inline std::uint64_t size_in_bytes(const std::string& option, const std::string& text,
                                   const std::string& else_expected = "") {
  std::string number = text;
  std::uint64_t bytes = 0;
  bool good = true;
  try {
    good = CLI::AsSizeValue(true)(number).empty();
  } catch (const CLI::ValidationError&) {  // a unit that it does not know
    good = false;
  }
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), bytes);
  if (!good || error != std::errc() || end != number.data() + number.size() || bytes == 0)
    throw CLI::ValidationError(option + " " + text, "expected " + else_expected + "a size as 20GiB, 20GB or 500MiB");
  return bytes;
}
// Of --memory; nothing of "auto".
inline std::optional<std::uint64_t> memory_size(const std::string& text) {
  if (text == "auto") return {};
  return size_in_bytes("--memory", text, "auto, or ");
}

inline std::optional<std::uint64_t> gpu_memory_size(const std::string& text) {
  if (text.empty()) return {};
  return size_in_bytes("--gpu-memory", text);
}

inline void add_memory_options(CLI::App& command, std::string& memory, std::string& profile) {
  command
      .add_option("--memory", memory,
                  "For weights and sessions; experts that do not fit are read as needed.  auto: what can be spared")
      ->option_text("SIZE [auto]")
      ->group("Computing");
  command.add_option("--expert-profile", profile, "With a budget: the experts to begin with (`experts --save`)")
      ->option_text("FILE")
      ->group("Computing");
}

// MODEL and how to compute with it.
inline void add_model_options(CLI::App& command, ModelOptions& o) {
  command.add_option("MODEL", o.path, std::string(model_help))->required()->option_text(" ");
  add_mtp_file_option(command, o.mtp_path);
  command
      .add_option(
          "--backend", o.backend,
          "What computes: cpu, cuda (an NVIDIA GPU, in programs built for it), or reference (float32, slow, exact)")
      ->option_text("NAME [cpu]")
      ->check(CLI::IsMember({"cpu", "reference", "cuda"}))
      ->group("Computing");
  command.add_option("--isa", o.isa, "CPU kernels by name [the best that this machine has]; a wrong one lists them")
      ->option_text("NAME")
      ->group("Computing");
  command.add_option("--threads", o.threads, "CPU threads; 0: as many as this process may run on")
      ->option_text("N [0]")
      ->check(CLI::NonNegativeNumber)
      ->group("Computing");
  add_yarn_option(command, o.yarn)->group("Computing");
  add_memory_options(command, o.memory, o.expert_profile);
  command
      .add_option("--experts-used", o.experts_used, "Fewer routed experts a token: faster, and another model [its own]")
      ->option_text("N")
      ->check(CLI::PositiveNumber)
      ->group("Computing");
  command
      .add_option(
          "--gpu-memory", o.gpu_memory,
          "With --backend cuda: the most of the GPU's memory to take; experts that do not fit stay in this machine's")
      ->option_text("SIZE [what is free]")
      ->group("Computing");
  command.add_flag("-v,--verbose", o.verbose, "Say on stderr what is opened and how");
}

// The timeline's options.
inline void add_session_options(CLI::App& command, ModelOptions& o) {
  command
      .add_option("--ctx", o.context, "Most tokens of prompt and answer; memory grows as needed [the model's length]")
      ->option_text("N")
      ->check(CLI::PositiveNumber)
      ->group("Computing");
  command.add_option("--batch", o.batch, "Most prompt tokens read at a time: more is faster and takes more memory")
      ->option_text("N [" + std::to_string(o.batch) + "]")
      ->check(CLI::Range(1, 1 << 20))
      ->group("Computing");
  command.add_option("--kv", o.kv, "Type of the KV cache: f16, f32 or q8_0 [f16; reference: f32]")
      ->option_text("TYPE")
      ->check(CLI::IsMember({"f16", "f32", "q8_0"}))
      ->group("Computing");
}

inline void add_cache_options(CLI::App& command, ModelOptions& o) {
  command
      .add_option("--cache-dir", o.cache_dir, "Keep states of long prompts in this folder, and go on from those there")
      ->option_text("DIR")
      ->group("Computing");
  command.add_option("--cache-size", o.cache_size, "Most that the folder may hold; what was not used for longest goes")
      ->option_text("SIZE [16GiB]")
      ->group("Computing");
}

// The same for a command that reads a text in windows, each as if nothing were before it.
inline void add_window_options(CLI::App& command, ModelOptions& o, bool& quiet) {
  add_session_options(command, o);
  command.get_option("--ctx")->description("Tokens of a window [2048, or the model's length if that is less]");
  command.add_flag("-q,--quiet", quiet, "No progress on stderr");
}
inline std::int64_t window_length(const ModelOptions& o, const Config& c) {
  return o.context ? o.context : std::min<std::int64_t>(2048, c.max_position_embeddings);
}

inline void add_mtp_option(CLI::App& command, ModelOptions& o) {
  command
      .add_option("--mtp", o.mtp,
                  "Tokens to guess ahead with the MTP head, 0..4: changes the speed, never the text.  auto: what pays")
      ->option_text("N [auto]")
      ->check(CLI::IsMember({"auto", "0", "1", "2", "3", "4"}))
      ->group("Computing");
}
inline int drafts(const ModelOptions& o) { return o.mtp == "auto" ? auto_drafts : std::stoi(o.mtp); }

inline std::optional<KvType> kv_type(const std::string& name) {
  if (name == "f16") return KvType::f16;
  if (name == "f32") return KvType::f32;
  if (name == "q8_0") return KvType::q8_0;
  return {};
}

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline SessionOptions session_options(const ModelOptions& o) {
  return {.context = o.context, .kv = kv_type(o.kv), .batch = o.batch, .mtp = o.mtp != "0"};
}

// memory: 20.0 GiB for dense weights 1.3 GiB, session up to 6.7 GiB, 6,300 of 24,576 experts 12.0 GiB, ...
inline std::string memory_line(const MemoryPlan& p) {
  const std::string session = "KV cache up to " + bytes_text(p.kv_cache) + ", states " + bytes_text(p.delta_state) +
                              ", scratch " + bytes_text(p.scratch);
  if (!p.streamed()) {
    return "memory: weights " + bytes_text(p.weights_mapped) + " mapped, " + bytes_text(p.weights_copied) +
           " copied; " + session;
  }
  return "memory: " + bytes_text(p.budget) + "; dense weights " + bytes_text(p.weights_resident + p.weights_copied) +
         ", " + session + ", at that length " + count_text(p.experts_held) + " of " + count_text(p.experts) +
         " experts, " + bytes_text(p.experts_resident) + format("; expected hits %.0f %%, ", 100 * p.hit_rate) +
         bytes_text(p.missed_bytes_per_token) + " to read for a token";
}

// GPU memory: 24.0 GiB; dense weights 1.3 GiB, 11,000 of 25,088 experts 20.7 GiB
inline std::string card_line(const MemoryPlan& p) {
  return "GPU memory: " + bytes_text(p.card_budget) + "; dense weights " + bytes_text(p.card_dense) + ", " +
         count_text(p.card_experts_held) + " of " + count_text(p.experts) + " experts " + bytes_text(p.card_experts) +
         "; the others " + (p.host_experts > 0 ? bytes_text(p.host_experts) + " in memory" : "where they are");
}

// The backend by its name; refuses options that would do nothing with it, rather than ignoring them.
inline Backend backend_kind(const ModelOptions& o) {
  if (o.backend != "cuda") {
    if (!o.gpu_memory.empty())
      throw Error("--gpu-memory: the " + o.backend + " backend uses no GPU; add --backend cuda, or leave it out");
    return o.backend == "reference" ? Backend::reference : Backend::cpu;
  }
#ifndef QWEN3NEXT_CUDA
  throw Error("--backend cuda: this program was built without CUDA; build preset cuda (README says how), or use cpu");
#endif
  if (!o.isa.empty()) throw Error("--isa " + o.isa + ": names kernels of the cpu backend; leave it out, or use cpu");
  return Backend::cuda;
}

inline Model open_model(const ModelOptions& o) {
  const Backend backend = backend_kind(o);
  const auto start = std::chrono::steady_clock::now();
  Progress loading("copying weights to the GPU", Progress::Unit::bytes);
  Model model = Model::open(file_path(o.path), {.backend = backend,
                                                .isa = o.isa,
                                                .threads = o.threads,
                                                .mtp_path = file_path(o.mtp_path),
                                                .yarn_factor = o.yarn,
                                                .on_load =
                                                    [&](std::int64_t done, std::int64_t total) {
                                                      loading.update(done, total);
                                                      return true;
                                                    },
                                                .experts_used = o.experts_used,
                                                .memory = memory_size(o.memory),
                                                .expert_profile = file_path(o.expert_profile),
                                                .gpu_memory = gpu_memory_size(o.gpu_memory),
                                                .cache_dir = file_path(o.cache_dir),
                                                .cache_dir_bytes = size_in_bytes("--cache-size", o.cache_size)});
  loading.clear();
  if (drafts(o) > 0 && !model.config().has_mtp) {
    throw Error("--mtp " + o.mtp + ": " + o.path +
                " holds no MTP head; leave it out, or name a file that does: --mtp-file");
  }
  if (o.verbose) {
    const Config& c = model.config();
    const MemoryPlan plan = model.plan(session_options(o));
    std::cerr << o.path << ": " << c.num_hidden_layers << " layers, width " << c.hidden_size << ", " << c.num_experts
              << " experts, top " << c.num_experts_per_tok << ", length " << c.max_position_embeddings
              << (c.has_mtp ? ", MTP head" : "") << format("; opened in %.3f s\n", seconds_since(start))
              << "backend: " << model.backend_description() << "\n"
              << memory_line(plan) << "\n";
    if (plan.card_budget > 0) std::cerr << card_line(plan) << "\n";
  }
  return model;
}

// --- reading and writing --------------------------------------------------------------------------------------------

// To the end, which /dev/zero and its kind do not have.
inline std::string read_all(std::istream& in, const std::string& name) {
  constexpr std::size_t most = std::size_t{1} << 30, piece = std::size_t{1} << 16;
  std::string text;
  while (in) {
    const std::size_t size = text.size();
    if (size > most) throw Error(name + ": more than 1 GiB, expected a text");
    text.resize(size + piece);
    in.read(text.data() + size, static_cast<std::streamsize>(piece));
    text.resize(size + static_cast<std::size_t>(in.gcount()));
  }
  if (in.bad()) throw Error(name + ": cannot be read");
  return text;
}

inline std::string read_stdin(std::string_view what) {
  if (is_terminal(stdin)) std::cerr << "reading " << what << " from the terminal; Ctrl-D on an empty line ends it\n";
  return read_all(std::cin, "standard input");
}

// A whole file; "-" is standard input.
inline std::string read_text(const std::string& path, std::string_view what) {
  if (path == "-") return read_stdin(what);
  std::error_code error;
  if (std::filesystem::is_directory(file_path(path), error))
    throw Error(path + ": is a folder, expected a file with " + std::string(what));
  std::ifstream in(file_path(path), std::ios::binary);
  if (!in)
    throw Error(path + ": cannot be opened (" + std::generic_category().message(errno) + "); expected " +
                std::string(what));
  return read_all(in, path);
}

// Ends with an error if the results did not reach their reader: a full disk must not look like success.
inline void finish_output() {
  errno = 0;
  if (!std::cout.flush()) {
    throw Error(std::string("standard output: cannot be written") +
                (errno ? ": " + std::generic_category().message(errno) : ""));
  }
}

}  // namespace qwen3next::cli
