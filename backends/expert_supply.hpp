#pragma once
// Where a backend gets the routed experts of a layer from: all in memory, or read as they are needed.

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "blocks/weight_view.hpp"

namespace qwen3next {

// The experts that one pass picks in one layer, as they come into memory.  Belongs to one backend instance, as the
// calls of a pass go in order: begin; then for each wave next_wave, arrived until nothing is left.
class ExpertSupply {
 public:
  struct Pick {
    std::int32_t expert;
    std::int32_t tokens;  // how many picked it
  };
  struct Range {
    int begin, end;
  };
  virtual ~ExpertSupply() = default;

  // How many experts the layer has.
  virtual int count() const noexcept = 0;
  // `picks`, ascending by expert, of a pass of `tokens` tokens; they stay in place until the next begin().
  virtual void begin(std::span<const Pick> picks, int tokens) = 0;
  // Types and shapes of pick i from begin() on; its data once it has arrived, until its wave is over.
  virtual const ExpertView& view(int i) const noexcept = 0;
  // The next picks that memory holds together; those of the wave before may go.  Empty: all are done.
  virtual Range next_wave() = 0;
  // Of this wave, those that are there now and were not given before: waits for one.  Empty: all were given.  May throw
  // Error if a file cannot be read; the pass is lost then, the supply is not.
  virtual std::span<const std::int32_t> arrived() = 0;
};

// Experts that are all in memory: one wave.
class ResidentExperts final : public ExpertSupply {
 public:
  void choose(const ExpertViews& experts) noexcept { experts_ = &experts; }

  int count() const noexcept override { return static_cast<int>(experts_->size()); }
  void begin(std::span<const Pick> picks, int) override {
    picks_ = picks;
    for (std::size_t i = all_.size(); i < picks.size(); ++i) all_.push_back(static_cast<std::int32_t>(i));
    wave_given_ = picks_given_ = false;
  }
  const ExpertView& view(int i) const noexcept override {
    return (*experts_)[static_cast<std::size_t>(picks_[static_cast<std::size_t>(i)].expert)];
  }
  Range next_wave() override {
    const int end = static_cast<int>(picks_.size());
    return std::exchange(wave_given_, true) ? Range{end, end} : Range{0, end};
  }
  std::span<const std::int32_t> arrived() override {
    return std::exchange(picks_given_, true) ? std::span<const std::int32_t>() : std::span(all_).first(picks_.size());
  }

 private:
  const ExpertViews* experts_ = nullptr;
  std::span<const Pick> picks_;
  std::vector<std::int32_t> all_;
  bool wave_given_ = false, picks_given_ = false;
};

// Experts that are read as they are needed.  Layers count from 0; the MTP layer comes after the trunk's.
class StreamedExperts : public ExpertSupply {
 public:
  // Which layer's experts the next pass is for.
  virtual void choose(int layer) noexcept = 0;
  // Whether experts are missing at all.
  virtual bool complete() const noexcept = 0;
  // A guess, most probable first: the experts of `layer` that a later pass will pick.  Read behind what is needed now.
  virtual void expect(int layer, std::span<const std::int32_t> experts) = 0;
  // The layer is done, or failed: lets its experts go.
  virtual void end() noexcept = 0;
  // No more layers will come of this pass: lets go what was read ahead for them.
  virtual void give_up() noexcept = 0;
};

}  // namespace qwen3next
