// The program `qwen3next`: a command line around qwen3next.hpp.
//
// Results on stdout, everything else on stderr.  Exit status: 0 good, 1 error, 2 wrong usage, 130 Ctrl-C.

#include <algorithm>
#include <exception>
#include <iostream>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cli/commands.hpp"
#include "cli/common.hpp"
#include "cli/windows.hpp"

namespace {

using namespace qwen3next;
using namespace qwen3next::cli;

int report(std::string message, int status) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::cout.flush();  // what was done until now comes first
  std::cerr << "qwen3next: error: " << message << std::endl;
  return status;
}

// Levenshtein's distance: letters to insert, delete or change.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t change = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = std::exchange(row[j + 1], std::min({change, row[j] + 1, row[j + 1] + 1}));
    }
  }
  return row.back();
}

// CLI11 would only say that the word was not expected.
int unknown_command(const CLI::App& app, const std::string& word) {
  std::string best;
  std::size_t least = 3;  // farther ones are other words
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    const std::size_t d = distance(word, command->get_name());
    if (d < least) least = d, best = command->get_name();
  }
  return report("unknown command '" + word + "'" + (best.empty() ? "" : "; did you mean '" + best + "'?") +
                    " (qwen3next --help lists them)",
                2);
}

// CLI11's help, with a usage line in our words.
class HelpFormatter : public CLI::Formatter {
 public:
  HelpFormatter() {
    column_width(34);
    label("Positionals", "Arguments");
  }
  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode mode) const override {
    std::string help = Formatter::make_help(app, std::move(name), mode);
    for (std::size_t at; (at = help.find("\n\n\n")) != help.npos;) help.erase(at, 1);
    return help;
  }
  std::string make_usage(const CLI::App* app, std::string) const override {
    if (!app->get_parent()) return "\nUsage: qwen3next COMMAND MODEL [options]\n";
    std::string usage = "\nUsage: qwen3next " + app->get_name();
    for (const CLI::Option* option : app->get_options([](const CLI::Option* o) { return o->get_positional(); })) {
      usage += " " + option->get_name(true);
    }
    return usage + " [options]\n";
  }
};

int run_program(int argc, char** argv) {
  CLI::App app("Qwen3-Next on this machine: read, write, chat, measure, convert.", "qwen3next");
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_version_flag("--version", "qwen3next " QWEN3NEXT_VERSION, "Print the version");
  app.set_help_flag("-h,--help", "Print this help; qwen3next COMMAND --help explains a command");
  app.require_subcommand(1);
  app.allow_windows_style_options(false);  // a path may begin with '/' on Windows, too
  app.footer(
      "MODEL is a GGUF file (the first, if split) or a Hugging Face folder.\n"
      "\nExamples:\n"
      "  qwen3next run model.gguf -p 'Once upon a time'\n"
      "  qwen3next chat model.gguf\n"
      "  qwen3next quantize Qwen3-Next-80B-A3B-Instruct model.gguf --type Q4_K_M\n"
      "\nResults go to stdout, progress and messages to stderr.  Exit status: 0 good, 1 error, 2 wrong usage,\n"
      "130 Ctrl-C.\n");
  for (auto add : {add_run, add_chat, add_inspect, add_quantize, add_bench, add_perplexity, add_experts, add_logits,
                   add_tokenize, add_detokenize, add_template}) {
    add(app);
  }
  for (CLI::App* command : app.get_subcommands([](CLI::App*) { return true; })) command->group("Commands");

  if (argc < 2) {
    std::cerr << app.help();
    return 2;
  }
  const std::string word = argv[1];
  const auto has_name = [&](const CLI::App* command) { return command->get_name() == word; };
  if (!word.starts_with("-") && app.get_subcommands(has_name).empty()) return unknown_command(app, word);
  try {
    app.parse(argc, argv);
    finish_output();
    return 0;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help and --version
    const auto parsed = app.get_subcommands();
    return report(
        std::string(e.what()) + " (see qwen3next " + (parsed.empty() ? "" : parsed[0]->get_name() + " ") + "--help)",
        2);
  } catch (const Cancelled&) {
    std::cout.flush();
    return exit_interrupted;
  } catch (const Error& e) {
    return report(e.what(), 1);
  } catch (const std::bad_alloc&) {
    return report("out of memory: use a shorter --ctx, --kv q8_0, or a smaller model", 1);
  } catch (const std::exception& e) {
    return report(std::string("unexpected: ") + e.what(), 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  catch_signals();
  prepare_streams();
  Arguments arguments(argc, argv);
  return run_program(arguments.count(), arguments.values());
}
