#pragma once
// How often a text made the routers pick each expert: what `experts MODEL TEXT --save` writes, and a cache of experts
// is filled by at its start.
//
// A JSON file: {"format": "qwen3next expert profile", "version": 1, "model": NAME, "experts": E,
// "tokens": [a number per layer], "counts": [[E numbers] per layer]}.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.hpp"
#include "core/message.hpp"
#include "weights/atomic_file.hpp"
#include "weights/mapped_file.hpp"

namespace qwen3next {

// Picks of each expert of each layer: the model's layers in order, then that of its MTP head, if it has one.
class ExpertProfile {
 public:
  static constexpr std::int64_t most_tokens = std::int64_t{1} << 40;  // a layer's picks fit 64 bits

  ExpertProfile() = default;
  ExpertProfile(int layers, int experts)
      : experts_(experts),
        tokens_(static_cast<std::size_t>(layers)),
        counts_(tokens_.size() * static_cast<std::size_t>(experts)) {}

  std::string model;  // whose routers picked, for people

  int layers() const noexcept { return static_cast<int>(tokens_.size()); }
  int experts() const noexcept { return experts_; }
  std::int64_t tokens(int layer) const noexcept { return tokens_[static_cast<std::size_t>(layer)]; }
  std::span<const std::int64_t> counts(int layer) const noexcept {  // [E]
    return std::span(counts_).subspan(row(layer), static_cast<std::size_t>(experts_));
  }
  std::int64_t picks(int layer) const noexcept {
    const std::span<const std::int64_t> c = counts(layer);
    return std::accumulate(c.begin(), c.end(), std::int64_t{0});
  }

  // `tokens` more went through a layer and picked these experts, each counts[i] times.
  void add(int layer, std::span<const std::int32_t> ids, std::span<const std::int32_t> counts, std::int64_t tokens) {
    tokens_[static_cast<std::size_t>(layer)] += tokens;
    for (std::size_t i = 0; i < ids.size(); ++i) counts_[row(layer) + static_cast<std::size_t>(ids[i])] += counts[i];
  }

  // What another text's tokens picked, as well.  Both have the same shape.
  ExpertProfile& operator+=(const ExpertProfile& o) noexcept {
    for (std::size_t i = 0; i < tokens_.size(); ++i) tokens_[i] += o.tokens_[i];
    for (std::size_t i = 0; i < counts_.size(); ++i) counts_[i] += o.counts_[i];
    return *this;
  }

  // Throws Error, naming `source`, unless it has this shape.
  void expect_shape(int layers, int experts, std::string_view source) const {
    if (layers == this->layers() && experts == experts_) return;
    throw_error(source, ": the profile has ", this->layers(), " layers of ", experts_, " experts, expected ", layers,
                " of ", experts, " as the model has; make one with: qwen3next experts MODEL TEXT --save FILE");
  }

  // Throws Error, naming `source`, if the text is no profile.
  static ExpertProfile parse(std::string_view text, std::string_view source);
  static ExpertProfile load(const std::filesystem::path& path);
  std::string json() const;
  void save(const std::filesystem::path& path) const;  // replaces what is there, all or nothing

 private:
  static constexpr std::string_view format_name = "qwen3next expert profile";
  static constexpr std::int64_t version = 1;
  static constexpr std::size_t largest_file = std::size_t{1} << 26;  // 48 layers of 512 experts take 200 KB

  std::size_t row(int layer) const noexcept {
    return static_cast<std::size_t>(layer) * static_cast<std::size_t>(experts_);
  }

  int experts_ = 0;
  std::vector<std::int64_t> tokens_;  // [layers]
  std::vector<std::int64_t> counts_;  // [layers, E]
};

inline ExpertProfile ExpertProfile::parse(std::string_view text, std::string_view source) {
  if (text.size() > largest_file) throw_error(source, ": larger than any expert profile: ", text.size(), " bytes");
  const Json json = read_json(text, source, 4);
  const auto field = [&](const char* name, Json::value_t type, std::string_view expected) -> const Json& {
    const auto found = json.find(name);
    if (found == json.end()) throw_error(source, ": not an expert profile: it has no \"", name, "\"");
    if (found->type() != type) {
      throw_error(source, ": \"", name, "\" is ", json_kind(*found), ", expected ", expected);
    }
    return *found;
  };
  const auto number = [&](const Json& value, std::string_view what, std::int64_t most) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > static_cast<std::uint64_t>(most)) {
      throw_error(source, ": ", what, " is ", printable(value.dump(-1, ' ', true, Json::error_handler_t::replace), 40),
                  ", expected a whole number from 0 to ", most);
    }
    return value.get<std::int64_t>();
  };
  if (!json.is_object()) throw_error(source, ": not an expert profile: ", json_kind(json), ", expected an object");
  if (field("format", Json::value_t::string, "a string") != format_name) {
    throw_error(source, ": \"format\" is not \"", format_name, "\"");
  }
  if (const std::int64_t found =
          number(field("version", Json::value_t::number_unsigned, "a number"), "\"version\"", most_tokens);
      found != version) {
    throw_error(source, ": version ", found, ", expected ", version, "; make it anew with this program's `experts`");
  }
  const Json& tokens = field("tokens", Json::value_t::array, "an array");
  const Json& counts = field("counts", Json::value_t::array, "an array");
  const std::int64_t experts =
      number(field("experts", Json::value_t::number_unsigned, "a number"), "\"experts\"", 1 << 16);
  if (tokens.empty() || counts.size() != tokens.size()) {
    throw_error(source, ": counts of ", counts.size(), " layers but tokens of ", tokens.size(), ", expected as many");
  }
  for (const Json& layer : counts) {  // before room is made for them
    if (!layer.is_array() || layer.size() != static_cast<std::size_t>(experts) || layer.empty()) {
      throw_error(source, ": counts of a layer are ", json_kind(layer), " of ", layer.size(), ", expected an array of ",
                  experts);
    }
  }

  ExpertProfile profile(static_cast<int>(tokens.size()), static_cast<int>(experts));
  for (std::size_t l = 0; l < tokens.size(); ++l) {
    profile.tokens_[l] = number(tokens[l], "a number of tokens", most_tokens);
    for (std::size_t e = 0; e < counts[l].size(); ++e) {  // a token picks an expert once at most
      profile.counts_[profile.row(static_cast<int>(l)) + e] = number(counts[l][e], "a count", profile.tokens_[l]);
    }
  }
  if (const auto name = json.find("model"); name != json.end() && name->is_string()) profile.model = *name;
  return profile;
}

inline ExpertProfile ExpertProfile::load(const std::filesystem::path& path) {
  const MappedFile file = MappedFile::open(path);
  return parse(file.text(), file.name());
}

inline std::string ExpertProfile::json() const {
  std::string out =
      concat("{\"format\": \"", format_name, "\", \"version\": ", version,
             ", \"model\": ", Json(model).dump(-1, ' ', false, Json::error_handler_t::replace),
             ",\n \"experts\": ", experts_, ",\n \"tokens\": ", Json(tokens_).dump(), ",\n \"counts\": [");
  for (int l = 0; l < layers(); ++l) {
    const std::span<const std::int64_t> row = counts(l);
    out += concat(l == 0 ? "\n  " : ",\n  ", Json(std::vector(row.begin(), row.end())).dump());
  }
  return out += "]}\n";
}

inline void ExpertProfile::save(const std::filesystem::path& path) const {
  const std::string text = json();
  AtomicFile file(path);
  file.write(std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace qwen3next
