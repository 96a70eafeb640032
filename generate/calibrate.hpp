#pragma once
// Runs a model over a text to learn which columns of its matrices matter: quantize() then spends their bits there.
//
//   Checkpoint in = Checkpoint::open("Qwen3-Next-80B-A3B-Instruct");
//   ActivationStatistics statistics = calibrate(in, tokens, {}, progress);
//   quantize(in, "model.gguf", {.type = "Q4_K_M", .calibration = {&statistics, "text.txt", tokens.size()}});

#include <cstdint>
#include <span>
#include <string>

#include "backends/activation_statistics.hpp"
#include "core/linkage.hpp"
#include "generate/engine.hpp"
#include "weights/checkpoint.hpp"

namespace qwen3next {

// How calibrate() reads its text.
struct CalibrationOptions {
  std::string isa{};  // as in EngineOptions
  int threads = 0;
  int window = 512;  // tokens of a sequence; each starts with nothing before it
  int batch = 4096;  // tokens that go through the layers at a time: so often is every weight read from the disk
};

// On the CPU backend, the MTP layer included.  Memory: the activations of a batch (240 KB a token with the 80B's
// shape), the states of its sequences, and a float for every column of every matrix (80B: 48 layers x 512 experts x
// (2048 + 512) columns, 250 MB).  The statistics belong to this checkpoint object.
ActivationStatistics calibrate(const Checkpoint& checkpoint, std::span<const std::int32_t> tokens,
                               const CalibrationOptions& options, const Progress& progress = {});

}  // namespace qwen3next

#if QWEN3NEXT_DEFINITIONS

#include <algorithm>
#include <utility>
#include <vector>

#include "backends/calibrating_backend.hpp"
#include "backends/cpu/cpu_backend.hpp"
#include "core/message.hpp"
#include "model/forward.hpp"
#include "model/mtp.hpp"

namespace qwen3next {

namespace detail {

// Windows of `text` one after the other, several at a time.  The last token is only the one that comes next.
template <BackendOps Base>
ActivationStatistics calibrate_on(Base base, const Config& c, const ModelWeights<Views>& views,
                                  std::span<const std::int32_t> tokens, const CalibrationOptions& options,
                                  const Progress& progress) {
  using B = CalibratingBackend<Base>;
  ActivationStatistics statistics;
  ModelWeights<B> weights;
  zip(views, weights, [](const auto& view, auto& mine) { mine = view; });

  const auto total = static_cast<std::int64_t>(tokens.size()) - 1;
  const int window = static_cast<int>(std::min<std::int64_t>(options.window, total));
  const int windows = std::max(1, static_cast<int>(std::min<std::int64_t>(options.batch, total) / window));
  std::int64_t done = 0, coming = 0;
  B be(std::move(base), statistics, [&](int layer) {
    if (progress && !progress(done + coming * (layer + 1) / (c.num_hidden_layers + 1), total)) throw Cancelled();
  });
  Activations<B> a(be, c, windows * window, 1, windows);

  while (done < total) {
    std::vector<SequenceState<B>> states;
    std::vector<SequenceRows<B>> sequences;
    states.reserve(static_cast<std::size_t>(windows));
    for (coming = 0; coming < total - done && static_cast<int>(states.size()) < windows;) {
      const int count = static_cast<int>(std::min<std::int64_t>(window, total - done - coming));
      states.emplace_back(be, c);
      sequences.push_back({static_cast<int>(coming), count, 0, &states.back()});
      coming += count;
    }
    const auto begin = static_cast<std::size_t>(done), count = static_cast<std::size_t>(coming);
    forward<B>(be, c, weights, tokens.subspan(begin, count), sequences, a);
    // The head's logits are of no use here; its inputs are.
    be.watch(a.h.rows(0, static_cast<int>(count)), weights.lm_head);
    if (weights.mtp) {
      mtp_forward<B>(be, c, *weights.mtp, tokens.subspan(begin + 1, count), a.h.rows(0, static_cast<int>(count)),
                     sequences, a);
      const WeightView& own = weights.mtp->lm_head;
      if (own.data != weights.lm_head.data) be.watch(a.h.rows(0, static_cast<int>(count)), own);
    }
    done += std::exchange(coming, 0);
    if (progress && !progress(done, total)) throw Cancelled();
  }
  statistics.finish();
  return statistics;
}

}  // namespace detail

QWEN3NEXT_INLINE ActivationStatistics calibrate(const Checkpoint& checkpoint, std::span<const std::int32_t> tokens,
                                                const CalibrationOptions& options, const Progress& progress) {
  const Config& c = checkpoint.config;
  if (tokens.size() < 2) throw Error("the text to calibrate with is too short: expected at least two tokens");
  if (options.window < 1 || options.batch < 1) throw Error("window and batch of a calibration must be at least 1");
  for (const std::int32_t token : tokens) {
    if (token < 0 || token >= c.vocab_size) {
      throw_error("token id ", token, " is not in the vocabulary, expected 0..", c.vocab_size - 1);
    }
  }
  CalibrationOptions fitting = options;
  fitting.window = static_cast<int>(std::min<std::int64_t>(options.window, c.max_position_embeddings));
  return detail::calibrate_on(CpuBackend(resolve_cpu_options(options.isa, options.threads)), c, checkpoint.weights,
                              tokens, fitting, progress);
}

}  // namespace qwen3next

#endif  // QWEN3NEXT_DEFINITIONS
