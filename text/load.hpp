#pragma once
// The text side of a checkpoint: tokenizer, chat template, recommended sampling.
//
// `path` is a GGUF file or a Hugging Face folder; a folder needs no weights for this.

#include <filesystem>
#include <optional>
#include <string>

#include "core/linkage.hpp"
#include "text/chat_template.hpp"
#include "text/generation_defaults.hpp"
#include "text/tokenizer.hpp"
#include "weights/gguf.hpp"
#include "weights/mapped_file.hpp"

namespace qwen3next {

Tokenizer load_tokenizer(const std::filesystem::path& path);

// The Jinja text; nothing if the checkpoint has none.
std::optional<std::string> load_chat_template_text(const std::filesystem::path& path);

// The template, recognised.  Throws if there is none or it is an unknown one.
ChatTemplate load_chat_template(const std::filesystem::path& path);

GenerationDefaults load_generation_defaults(const std::filesystem::path& path);

}  // namespace qwen3next

#if QWEN3NEXT_DEFINITIONS

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "core/json.hpp"

namespace qwen3next {

namespace detail {

// Whether `path` is a folder; throws if it is nothing at all.
inline bool is_model_folder(const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) throw_error(display(path), ": no such file or folder");
  return std::filesystem::is_directory(status);
}

// A text file of a folder, if it is there.
inline std::optional<MappedFile> open_text(const std::filesystem::path& path, std::size_t limit) {
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return {};
  MappedFile file = MappedFile::open(path);
  if (file.size() > limit) throw_error(file.name(), ": ", file.size(), " bytes, expected at most ", limit);
  return file;
}

inline constexpr std::size_t largest_json = 1u << 26;

// A JSON object of a folder, if it is there.
inline std::optional<Json> open_json(const std::filesystem::path& path) {
  const std::optional<MappedFile> file = open_text(path, largest_json);
  if (!file) return {};
  Json json = read_json(file->text(), file->name());
  if (!json.is_object()) throw_error(file->name(), ": is ", json_kind(json), ", expected an object");
  return json;
}

inline Tokenizer load_gguf_tokenizer(const std::filesystem::path& path) {
  const Gguf gguf = Gguf::open(path);
  const GgufMetadata& metadata = gguf.metadata;
  const std::string& source = metadata.source();
  if (!metadata.has("tokenizer.ggml.tokens")) throw_error(source, ": has no tokenizer (no tokenizer.ggml.tokens)");
  const auto expect = [&](std::string_view key, std::string_view expected) {
    if (const auto found = metadata.find<std::string_view>(key).value_or(expected); found != expected) {
      throw_error(source, ": ", key, " is '", printable(found), "', expected '", expected, "', Qwen3-Next's");
    }
  };
  expect("tokenizer.ggml.model", "gpt2");
  expect("tokenizer.ggml.pre", "qwen2");
  auto tokens = metadata.get<std::vector<std::string>>("tokenizer.ggml.tokens");
  auto merges = metadata.get<std::vector<std::string>>("tokenizer.ggml.merges");
  std::vector<std::int32_t> types(tokens.size(), 1);  // normal
  if (const auto given = metadata.find<std::vector<std::int64_t>>("tokenizer.ggml.token_type")) {
    if (given->size() != tokens.size()) {
      throw_error(source, ": tokenizer.ggml.token_type has ", given->size(), " elements, expected ", tokens.size());
    }
    std::transform(given->begin(), given->end(), types.begin(), [&](std::int64_t type) {
      if (type < 0 || type > 6) throw_error(source, ": tokenizer.ggml.token_type has ", type, ", expected 1..6");
      return static_cast<std::int32_t>(type);
    });
  }
  return Tokenizer::from_parts(std::move(tokens), std::move(types), std::move(merges), source);
}

inline std::optional<double> sampling_number(const Json& json, std::string_view key, std::string_view source) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return {};
  if (!found->is_number()) throw_error(source, ": ", key, " is ", json_kind(*found), ", expected a number");
  return found->get<double>();
}

inline std::optional<int> whole(std::optional<double> value, std::string_view key, std::string_view source) {
  if (!value) return {};
  if (!(*value >= -1 && *value <= std::numeric_limits<int>::max()) || *value != static_cast<int>(*value)) {
    throw_error(source, ": ", key, " is ", *value, ", expected a count");
  }
  return static_cast<int>(*value);
}

inline void add_token_id(std::vector<std::int32_t>& ids, std::int64_t id, std::string_view key,
                         std::string_view source) {
  if (id < 0 || id > std::numeric_limits<std::int32_t>::max()) {
    throw_error(source, ": ", key, " has ", id, ", which is no token id");
  }
  if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(static_cast<std::int32_t>(id));
}

// eos_token_id: an id or a list of them.
inline void add_eos_tokens(std::vector<std::int32_t>& ids, const Json& json, std::string_view source) {
  constexpr std::string_view key = "eos_token_id";
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return;
  const auto add = [&](const Json& id) {
    if (!id.is_number_integer()) throw_error(source, ": ", key, " has ", json_kind(id), ", expected token ids");
    add_token_id(ids, id.get<std::int64_t>(), key, source);
  };
  if (found->is_array()) {
    for (const Json& id : *found) add(id);
  } else {
    add(*found);
  }
}

inline GenerationDefaults gguf_generation_defaults(const std::filesystem::path& path) {
  const Gguf gguf = Gguf::open(path);
  const GgufMetadata& metadata = gguf.metadata;
  GenerationDefaults d;
  d.temperature = metadata.find<double>("general.sampling.temp");
  d.top_p = metadata.find<double>("general.sampling.top_p");
  d.top_k = whole(metadata.find<double>("general.sampling.top_k"), "general.sampling.top_k", metadata.source());
  d.min_p = metadata.find<double>("general.sampling.min_p");
  d.repetition_penalty = metadata.find<double>("general.sampling.penalty_repeat");
  for (const std::string_view key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    if (const auto id = metadata.find<std::int64_t>(key)) add_token_id(d.eos_token_ids, *id, key, metadata.source());
  }
  return d;
}

}  // namespace detail

QWEN3NEXT_INLINE Tokenizer load_tokenizer(const std::filesystem::path& path) {
  if (!detail::is_model_folder(path)) return detail::load_gguf_tokenizer(path);
  const std::optional<MappedFile> file = detail::open_text(path / "tokenizer.json", detail::largest_json);
  if (!file) throw_error(display(path), ": no tokenizer.json in this folder; copy it from the model's release");
  return Tokenizer::from_json(file->text(), file->name());
}

QWEN3NEXT_INLINE std::optional<std::string> load_chat_template_text(const std::filesystem::path& path) {
  if (!detail::is_model_folder(path)) {
    const Gguf gguf = Gguf::open(path);
    const auto text = gguf.metadata.find<std::string_view>("tokenizer.chat_template");
    return text ? std::optional<std::string>(*text) : std::nullopt;
  }
  if (const std::optional<MappedFile> jinja = detail::open_text(path / "chat_template.jinja", 1u << 24)) {
    return std::string(jinja->text());
  }
  const std::filesystem::path file = path / "tokenizer_config.json";
  const std::optional<Json> json = detail::open_json(file);
  if (!json) return {};
  const auto found = json->find("chat_template");
  if (found == json->end() || found->is_null()) return {};
  if (found->is_string()) return found->get<std::string>();
  if (found->is_array()) {  // [{"name": "default", "template": "..."}, ...]
    for (const Json& entry : *found) {
      if (!entry.is_object()) continue;
      const auto name = entry.find("name"), text = entry.find("template");
      if (name != entry.end() && *name == "default" && text != entry.end() && text->is_string()) {
        return text->get<std::string>();
      }
    }
    throw_error(display(file), ": chat_template is a list without one named 'default'");
  }
  throw_error(display(file), ": chat_template is ", json_kind(*found), ", expected a string or a list");
}

QWEN3NEXT_INLINE ChatTemplate load_chat_template(const std::filesystem::path& path) {
  const std::optional<std::string> text = load_chat_template_text(path);
  if (!text) throw_error(display(path), ": holds no chat template; use --raw to go on without one");
  return ChatTemplate::detect(*text, display(path));
}

QWEN3NEXT_INLINE GenerationDefaults load_generation_defaults(const std::filesystem::path& path) {
  if (!detail::is_model_folder(path)) return detail::gguf_generation_defaults(path);
  GenerationDefaults d;
  const std::filesystem::path file = path / "generation_config.json";
  if (const std::optional<Json> json = detail::open_json(file)) {
    const std::string source = display(file);
    const auto number = [&](std::string_view key) { return detail::sampling_number(*json, key, source); };
    d.temperature = number("temperature");
    d.top_p = number("top_p");
    d.top_k = detail::whole(number("top_k"), "top_k", source);
    d.min_p = number("min_p");
    d.presence_penalty = number("presence_penalty");
    d.frequency_penalty = number("frequency_penalty");
    d.repetition_penalty = number("repetition_penalty");
    if (const auto sample = json->find("do_sample"); sample != json->end() && *sample == false) d.temperature = 0;
    detail::add_eos_tokens(d.eos_token_ids, *json, source);
  }
  if (d.eos_token_ids.empty()) {
    const std::filesystem::path config = path / "config.json";
    if (const std::optional<Json> json = detail::open_json(config)) {
      detail::add_eos_tokens(d.eos_token_ids, *json, display(config));
    }
  }
  return d;
}

}  // namespace qwen3next

#endif  // QWEN3NEXT_DEFINITIONS
