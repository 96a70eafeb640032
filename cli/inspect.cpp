// inspect: what is in a model's files, and what it will take to run.

#include "cli/commands.hpp"
#include "cli/common.hpp"
#include "cli/inspection.hpp"

namespace qwen3next::cli {

namespace {

struct InspectOptions {
  std::string path, mtp_path, kv = "f16", memory, profile;
  std::int64_t context = 0;
  double yarn = 0;
  bool json = false, tensors = false;
};

}  // namespace

void add_inspect(CLI::App& app) {
  auto o = std::make_shared<InspectOptions>();
  CLI::App& command = *app.add_subcommand("inspect", "Show a model's config, tensors, memory and problems");
  command.add_option("MODEL", o->path, std::string(model_help))->required()->option_text(" ");
  add_mtp_file_option(command, o->mtp_path);
  command.add_option("--ctx", o->context, "Plan memory for this many tokens [the model's length]")
      ->option_text("N")
      ->check(CLI::PositiveNumber);
  command.add_option("--kv", o->kv, "Type of the KV cache in the plan: f16, f32 or q8_0")
      ->option_text("TYPE [f16]")
      ->check(CLI::IsMember({"f16", "f32", "q8_0"}));
  add_yarn_option(command, o->yarn);
  add_memory_options(command, o->memory, o->profile);
  command.get_option("--memory")
      ->description("Plan for this budget, or what can be spared, and measure how fast experts are read")
      ->option_text("SIZE|auto");
  CLI::Option* json = command.add_flag("--json", o->json, "All of it as JSON, every tensor included");
  command.add_flag("--tensors", o->tensors, "A line for every tensor: file, offset, alignment, bytes, type, shape")
      ->excludes(json);
  add_example(
      command,
      "qwen3next inspect model.gguf --ctx 32768\n\nOpens and checks the files as running would, but computes nothing.");
  command.callback([o] {
    Inspection inspection = inspect_model(o->path, o->mtp_path, o->yarn, o->context, *kv_type(o->kv));
    if (!o->memory.empty()) {
      plan_streaming(inspection, {.mtp_path = file_path(o->mtp_path),
                                  .yarn_factor = o->yarn,
                                  .memory = memory_size(o->memory),
                                  .expert_profile = file_path(o->profile)});
    }
    o->json ? print_json(inspection) : o->tensors ? print_tensors(inspection) : print_text(inspection);
  });
}

}  // namespace qwen3next::cli
