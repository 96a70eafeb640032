#pragma once
// Each adds its subcommand to the program; the work is done while the command line is parsed.
//
// They end by returning (exit status 0) or by throwing: Error (1), CLI::ParseError (2), Cancelled (130).

#include <CLI/CLI.hpp>

namespace qwen3next::cli {

void add_run(CLI::App& app);
void add_chat(CLI::App& app);
void add_logits(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_detokenize(CLI::App& app);
void add_template(CLI::App& app);
void add_perplexity(CLI::App& app);
void add_bench(CLI::App& app);
void add_quantize(CLI::App& app);
void add_inspect(CLI::App& app);
void add_experts(CLI::App& app);

}  // namespace qwen3next::cli
