// Any bytes as a GGUF, or as a folder of config.json and model.safetensors: what is bound can be read to the last byte.

#include <numeric>

#include "target.hpp"
#include "text/load.hpp"
#include "weights/checkpoint.hpp"
#include "weights/quantize.hpp"

using namespace qwen3next;
using namespace qwen3next::fuzz;

// Reads every weight that the model would use.
static void read_weights(const std::filesystem::path& path) {
  const Checkpoint checkpoint = Checkpoint::open(path);
  for (const PlannedTensor& tensor :
       plan_quantization(checkpoint.config, checkpoint.weights, find_mix("BF16"), {}).tensors) {
    std::vector<float> row;
    for (const Piece& piece : tensor.pieces) {
      row.resize(static_cast<std::size_t>(piece.view.cols));
      for (int r = piece.first; r < piece.first + piece.rows; ++r) {
        dequantize_row(piece.view.type, piece.view.row(r), row.data(), piece.view.cols);
      }
    }
  }
}

FUZZ_TARGET(gguf) {
  const auto path = write_file("model.gguf", input);
  may_refuse([&] { read_weights(path); });
  may_refuse([&] { (void)load_generation_defaults(path); });
  may_refuse([&] { (void)load_chat_template(path); });
  may_refuse([&] {
    const Tokenizer tokenizer = load_tokenizer(path);
    for (const std::int32_t id : tokenizer.encode("Hello, hello <|im_end|>\n", Special::parse)) {
      expect(id >= 0 && id < tokenizer.size(), "ids are in the vocabulary");
    }
  });
}

// u16 n, n bytes of config.json, the rest is model.safetensors.
FUZZ_TARGET(hf_folder) {
  const auto size = std::min<std::size_t>(Numbers(input).take<std::uint16_t>(), input.size());
  write_file("config.json", input.substr(0, size));
  write_file("model.safetensors", input.substr(size));
  read_weights(folder());
}
