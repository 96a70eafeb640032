#pragma once
// What `inspect` finds out about a model's files, before it is shown to a person (inspect_text.cpp) or to a program
// (inspect_json.cpp).

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/parameters.hpp"
#include "model/traffic.hpp"
#include "qwen3next.hpp"

namespace qwen3next::cli {

// What a tensor is for, told by its name in either container.
enum class Role : std::uint8_t {
  embedding,
  delta_net,
  attention,
  router,
  experts,
  shared_experts,
  norms,
  head,
  mtp,
  other,
};
inline constexpr std::array<std::pair<std::string_view, std::string_view>, 10> role_names{{
    {"embedding", "Embedding"},
    {"delta_net", "Gated DeltaNet"},
    {"attention", "Gated attention"},
    {"router", "Routers"},
    {"experts", "Routed experts"},
    {"shared_experts", "Shared experts"},
    {"norms", "Norms"},
    {"head", "Output head"},
    {"mtp", "MTP head"},
    {"other", "Other"},
}};  // in JSON, for people

// Sums over tensors.
struct Sum {
  std::int64_t tensors = 0, values = 0;
  std::uint64_t bytes = 0;

  void add(const TensorRecord& record);
  double bits_per_value() const { return values ? 8 * static_cast<double>(bytes) / static_cast<double>(values) : 0; }
};

// Tensors that differ only in their layer or expert.
struct TensorGroup {
  Role role;
  std::string name;  // with * for the numbers
  std::string_view type;
  Shape shape;
  Sum sum;
};

// What the text side of the files is; a reason in words where there is none.
struct TextSide {
  std::string tokenizer, chat_template;
  std::int64_t tokens = 0;
};

struct CopyGroup {
  std::int64_t vectors = 0;
  std::uint64_t bytes = 0;
};

struct Inspection {
  Checkpoint checkpoint;
  KvType kv;
  std::int64_t context;
  TextSide text{};
  ParameterCount parameters{};
  std::vector<TensorGroup> groups{};  // by role, then in the order of the files
  std::map<Role, Sum> roles{};
  std::map<std::string_view, Sum> types{};    // by the container's spelling
  std::map<std::string, CopyGroup> copies{};  // why -> how much
  MemoryPlan memory{};                        // at `context`
  double read_bandwidth = 0;                  // of experts that are streamed, bytes per second
  Traffic first_token{}, last_token{};        // of a decoded token: after nothing, and at the end of `context`
  std::vector<std::string> problems{};        // in words, with what to do

  std::string_view format() const { return checkpoint.format == Format::gguf ? "GGUF" : "Hugging Face"; }
  double share(std::uint64_t bytes) const {
    return static_cast<double>(bytes) / static_cast<double>(std::max<std::uint64_t>(1, checkpoint.weight_bytes()));
  }
};

// Opens and checks the files as running would.  `context` 0: the model's length, extended by `yarn` unless that is 0.
Inspection inspect_model(const std::string& path, const std::string& mtp_path, double yarn, std::int64_t context,
                         KvType kv);

// If a model opened with these options would stream its experts: plans for that, and measures how fast they are read.
void plan_streaming(Inspection& inspection, const Options& options);

// The largest power of two that divides an offset, at most 4096: what the loader and O_DIRECT care about.
std::uint64_t alignment(std::uint64_t offset);

std::string_view name(KvType kv);

void print_json(const Inspection& inspection);
void print_text(const Inspection& inspection);
void print_tensors(const Inspection& inspection);  // a line for every tensor

}  // namespace qwen3next::cli
