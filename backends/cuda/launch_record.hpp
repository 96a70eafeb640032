#pragma once
// The launches of a pass, gathered and handed to the card as CUDA graphs: in those, a kernel follows the one before
// sooner than in a stream.  The first is short, and each is twice as long as the one before: the card computes one
// while the next is gathered.
//
// A graph is used again when a pass gathers the same kernels in the same order; nodes whose sizes or parameters differ
// in a byte are changed before.  So there is no second description of a pass that could disagree with the first.

#include <cstddef>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "backends/cuda/device.hpp"

struct CUgraph_st;
struct CUgraphNode_st;
struct CUgraphExec_st;

namespace qwen3next::cuda {

struct LaunchShape {
  unsigned grid[3], block[3];
  std::size_t shared_bytes;
  bool operator==(const LaunchShape&) const = default;
};

class LaunchRecord {
 public:
  explicit LaunchRecord(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  ~LaunchRecord();
  LaunchRecord(const LaunchRecord&) = delete;

  // From begin() to end() launches are gathered, and started later, in their order.  Copies and other work of the
  // stream are not: they come before those that were not started yet.
  void begin();
  void end();
  void start_gathered();    // what there is so far, if there is, and goes on
  void give_up() noexcept;  // instead of end(): forgets them
  bool gathering() const noexcept { return gathering_; }

  void add(const void* kernel, const LaunchShape& shape);
  void add_parameter(const void* value, std::size_t size, std::size_t alignment);  // of the last add()

 private:
  struct Launch {
    const void* kernel;
    LaunchShape shape;
    std::size_t first_parameter, parameters;  // of Launches::parameters, and how many
  };
  struct Launches {
    std::vector<Launch> launches;
    std::vector<std::size_t> parameters;  // where they begin in `bytes`
    std::vector<std::byte> bytes;

    void clear() noexcept { launches.clear(), parameters.clear(), bytes.clear(); }
    bool same_kernels(const Launches& other) const noexcept;
    bool same(std::size_t i, const Launches& other) const noexcept;  // of launch i, given the same kernels
  };
  struct Graph {
    Launches launches;
    CUgraph_st* graph = nullptr;
    std::vector<CUgraphNode_st*> nodes;
    CUgraphExec_st* exec = nullptr;
  };
  // Some passes take turns (DeltaNet's windows do): each has graphs that hardly need to be changed.
  static constexpr std::size_t most_graphs = 128, few_changes = 16, first_piece = 12;

  Graph& graph();
  void make(Graph& graph);
  void** parameters_of(std::size_t i);  // of a launch that was gathered; until the next call
  static void destroy(Graph& graph) noexcept;

  std::shared_ptr<Device> device_;
  bool gathering_ = false;
  std::size_t piece_ = 0;  // launches of the next graph
  Launches launches_;
  std::list<Graph> graphs_;                    // the last used first
  std::vector<std::size_t> changes_, fewest_;  // launches that differ from a graph's
  std::vector<void*> pointers_;
};

}  // namespace qwen3next::cuda
