// experts: which experts a text needs, how evenly, and what a cache of some of them would be worth.

#include "cli/experts.hpp"

#include <utility>

#include "cli/commands.hpp"
#include "model/traffic.hpp"

namespace qwen3next::cli {

namespace {

std::string_view layer_kind(const Config& c, int layer) {
  if (layer == c.num_hidden_layers) return "mtp";
  return c.full_attention(layer) ? "attention" : "deltanet";
}

// Bytes of an expert, on average over the layers.
double expert_bytes(const ModelWeights<Views>& w) {
  double sum = 0, layers = 0;
  for (const LayerWeights<Views>& layer : w.layers) sum += qwen3next::detail::layer_bytes(layer).expert, ++layers;
  if (w.mtp) sum += qwen3next::detail::layer_bytes(w.mtp->layer).expert, ++layers;
  return sum / layers;
}

// All layers' counts, one after the other: the experts that share a cache.
std::vector<std::int64_t> pooled(const ExpertProfile& profile) {
  std::vector<std::int64_t> all;
  for (int layer = 0; layer < profile.layers(); ++layer) {
    const std::span<const std::int64_t> counts = profile.counts(layer);
    all.insert(all.end(), counts.begin(), counts.end());
  }
  return all;
}

std::vector<std::int64_t> layer_counts(const ExpertProfile& profile, int layer) {
  const std::span<const std::int64_t> counts = profile.counts(layer);
  return {counts.begin(), counts.end()};
}

void print_table(const RoutingResults& r, const Model& model) {
  const Config& c = model.config();
  const Style style(stdout);
  const ExpertProfile whole = r.whole();
  std::cout << count_text(r.tokens) << " tokens in " << count_text(r.windows) << " windows of " << count_text(r.window)
            << "; " << whole.layers() << " layers" << (c.has_mtp ? " with the MTP head's" : "") << ", "
            << whole.experts() << " experts each, " << r.per_token << " of them per token\n\n"
            << style.bold()
            << format("%-14s %6s %7s %6s  %8s  %6s %6s %6s  %6s %8s", "layer", "least", "median", "most", "entropy",
                      "top 10", "25", "50 %", "drift", "(chance)")
            << style.reset() << "\n";
  const auto loads = [](const std::string& name, const LoadStatistics& s) {
    return format("%-14s %6.2f %7.2f %6.2f  %8.3f  %6.1f %6.1f %6.1f", name.c_str(), s.least, s.median, s.most,
                  s.entropy, 100 * s.top10, 100 * s.top25, 100 * s.top50);
  };
  for (int layer = 0; layer < whole.layers(); ++layer) {
    const Drift d = drift(r.first, r.second, layer);
    std::cout << loads(format("%3d ", layer) + std::string(layer_kind(c, layer)),
                       load_statistics(layer_counts(whole, layer)))
              << format("  %6.3f %8.3f\n", d.found, d.chance);
  }
  std::cout << loads("all", load_statistics(pooled(whole)))
            << format("\n\nentropy in bits: %.3f in a layer if all experts are picked alike\n\n",
                      std::log2(whole.experts()));

  std::cout << style.bold()
            << format("%-10s %9s %10s  %9s  %11s  %16s", "cache", "experts", "size", "hits %", "fixed: best",
                      "by 1st half")
            << style.reset() << "\n";
  const double bytes = expert_bytes(model.checkpoint().weights);
  for (const CacheResult& cache : r.caches) {
    std::cout << format("%3.0f %%      %9s %10s  %9.1f  %11.1f  %16.1f\n", 100 * cache.share,
                        count_text(cache.slots).c_str(), bytes_text(cache.slots * bytes).c_str(), 100 * cache.hit_rate,
                        100 * cache.best_fixed, 100 * cache.fixed_by_first_half);
  }
}

ordered_json loads_json(const LoadStatistics& s) {
  return {{"least", s.least},
          {"median", s.median},
          {"most", s.most},
          {"entropy_bits", s.entropy},
          {"coverage", {{"10", s.top10}, {"25", s.top25}, {"50", s.top50}}}};
}

void print_experts_json(const RoutingResults& r, const Model& model) {
  const ExpertProfile whole = r.whole();
  ordered_json json{{"tokens", r.tokens},
                    {"windows", r.windows},
                    {"ctx", r.window},
                    {"experts", whole.experts()},
                    {"experts_per_token", r.per_token},
                    {"layers", ordered_json::array()}};
  for (int layer = 0; layer < whole.layers(); ++layer) {
    const Drift d = drift(r.first, r.second, layer);
    ordered_json entry{{"layer", layer}, {"kind", layer_kind(model.config(), layer)}};
    entry.update(loads_json(load_statistics(layer_counts(whole, layer))));
    entry["drift"] = d.found;
    entry["drift_by_chance"] = d.chance;
    json["layers"].push_back(std::move(entry));
  }
  json["all"] = loads_json(load_statistics(pooled(whole)));
  const double bytes = expert_bytes(model.checkpoint().weights);
  for (const CacheResult& cache : r.caches) {
    json["caches"].push_back({{"share", cache.share},
                              {"experts", cache.slots},
                              {"bytes", std::llround(cache.slots * bytes)},
                              {"hit_rate", cache.hit_rate},
                              {"best_fixed", cache.best_fixed},
                              {"fixed_by_first_half", cache.fixed_by_first_half}});
  }
  json["seconds"] = r.seconds;
  json["tokens_per_second"] = static_cast<double>(r.tokens) / r.seconds;
  std::cout << json.dump() << "\n";
}

void experts(ExpertsOptions o) {
  if (o.model.backend == "cuda")
    throw Error("--backend cuda: the router's picks are watched on the CPU alone; use cpu or reference");
  const Model model = open_model(o.model);
  const Config& c = model.config();
  if (o.model.backend == "reference" && !o.model.kv.empty() && o.model.kv != "f32") {
    throw Error("--kv " + o.model.kv + ": the reference backend keeps its KV cache in f32; leave it out, or use cpu");
  }
  o.model.context = window_length(o.model, c);
  if (o.model.context > c.max_position_embeddings) {
    throw Error("--ctx " + std::to_string(o.model.context) + ": the model's length is " +
                std::to_string(c.max_position_embeddings) + " tokens; --yarn extends it");
  }
  const std::vector<std::int32_t> tokens = model.tokenizer().encode(read_text(o.file, "a text"), Special::parse);
  if (tokens.size() < 3) throw Error(o.file + ": too short, expected a text of at least three tokens");

  const RoutingResults results = observe_routing(model, tokens, o);
  if (!o.save.empty()) {
    ExpertProfile profile = results.whole();
    profile.model = display(file_path(o.model.path).filename());
    profile.save(file_path(o.save));
  }
  o.json ? print_experts_json(results, model) : print_table(results, model);
  if (!o.save.empty() && !o.quiet) std::cerr << "saved " << o.save << "\n";
}

}  // namespace

void add_experts(CLI::App& app) {
  auto o = std::make_shared<ExpertsOptions>();
  CLI::App& command =
      *app.add_subcommand("experts", "Show which experts a text needs, and what a cache of them would be worth");
  add_model_options(command, o->model);
  command
      .add_option("FILE", o->file, "The text; '-' is standard input.  Control tokens in it are those of a conversation")
      ->required()
      ->option_text(" ");
  command.add_option("--save", o->save, "Write how often each expert was picked: a profile that a cache is filled by")
      ->option_text("PROFILE");
  command.add_option("--trace", o->trace, "Write every pick, token by token, to simulate caches with")
      ->option_text("TRACE");
  command.add_flag("--json", o->json, "JSON instead of tables");
  add_window_options(command, o->model, o->quiet);
  add_example(
      command,
      "qwen3next experts model.gguf chats.txt --save chats.profile\n\n"
      "Take a text like those that the model will read and write: some ten thousand tokens tell, fewer than a "
      "thousand\n"
      "do not.  It is cut into windows of --ctx tokens, in each of which the model starts anew, and read in passes of\n"
      "--batch tokens; no logits are computed.\n\n"
      "Of each layer, over the whole text:\n"
      "  least, median, most  loads of its experts; 1 is an even share, 0 an expert that was never picked\n"
      "  entropy              of the load, in bits; log2 of the number of experts if it is even\n"
      "  top 10, 25, 50 %     of the layer's experts take this share of its picks, in %: 10, 25 and 50 if even\n"
      "  drift                the share of the load that moved to other experts from the first half of the text to\n"
      "                       the second.  (chance): what so many picks give if nothing changed; a drift much above\n"
      "                       it says that a profile of one text tells less about another\n\n"
      "Then, for caches of some of all layers' experts, the share of the second half's picks that they hold:\n"
      "  hits                 a cache that learns as it goes, the text being decoded token by token\n"
      "  fixed: best          one that holds what the second half picks most, which nobody knows beforehand\n"
      "  by 1st half          one that holds what the first half picked most: what a profile is worth alone\n"
      "With even, independent picks all three are the cache's size.  A token that misses m experts waits for m times\n"
      "their bytes from the disk.\n\n"
      "--trace: a line of JSON, then the experts of each token in order, u16 [layers, experts per token], ascending.");
  command.callback([o] { experts(*o); });
}

}  // namespace qwen3next::cli
