#include "backends/cuda/launch_record.hpp"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "backends/cuda/launch.cuh"

namespace qwen3next::cuda {

namespace {

// Kernels that need more shared memory than any does by itself must have been told so: the most that was asked for.
void prepare(const void* kernel, const LaunchShape& shape) {
  if (shape.shared_bytes <= 32 * 1024) return;  // 48 KiB in all need no word; some is not dynamic
  static std::mutex mutex;
  static std::unordered_map<const void*, std::size_t> known;
  const std::lock_guard lock(mutex);
  std::size_t& most = known[kernel];
  if (shape.shared_bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)),
        "asking for shared memory");
  most = shape.shared_bytes;
}

}  // namespace

void start(const Device& device, const void* kernel, const LaunchShape& shape, void** parameters) {
  prepare(kernel, shape);
  cudaLaunchConfig_t config{};
  config.gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
  config.blockDim = {shape.block[0], shape.block[1], shape.block[2]};
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = device.stream();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const std::lock_guard lock(device.order().mutex);
  const bool behind_graph = std::exchange(device.order().behind_graph, false);
  config.attrs = &attribute, config.numAttrs = device.dependent_launch() && !behind_graph ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, parameters), "starting a kernel");
}

LaunchRecord::~LaunchRecord() {
  if (!graphs_.empty()) cudaStreamSynchronize(device_->stream());
  for (Graph& graph : graphs_) destroy(graph);
}

void LaunchRecord::begin() {
  launches_.clear();
  piece_ = first_piece;
  gathering_ = true;
}

void LaunchRecord::add(const void* kernel, const LaunchShape& shape) {
  if (launches_.launches.size() == piece_) {
    start_gathered();
    piece_ *= 2;
  }
  launches_.launches.push_back({kernel, shape, launches_.parameters.size(), 0});
}

void LaunchRecord::add_parameter(const void* value, std::size_t size, std::size_t alignment) {
  const std::size_t at = (launches_.bytes.size() + alignment - 1) / alignment * alignment;
  launches_.parameters.push_back(at);
  launches_.bytes.resize(at + size);
  std::memcpy(launches_.bytes.data() + at, value, size);
  ++launches_.launches.back().parameters;
}

void LaunchRecord::end() {
  gathering_ = false;
  start_gathered();
}

void LaunchRecord::start_gathered() {
  if (launches_.launches.empty()) return;
  CUgraphExec_st* const exec = graph().exec;
  launches_.clear();
  const std::lock_guard lock(device_->order().mutex);
  check(cudaGraphLaunch(exec, device_->stream()), "starting a pass");
  device_->order().behind_graph = true;
}

void LaunchRecord::give_up() noexcept {
  gathering_ = false;
  launches_.clear();
}

bool LaunchRecord::Launches::same_kernels(const Launches& other) const noexcept {
  return std::equal(launches.begin(), launches.end(), other.launches.begin(), other.launches.end(),
                    [](const Launch& a, const Launch& b) {
                      return a.kernel == b.kernel && a.first_parameter == b.first_parameter &&
                             a.parameters == b.parameters;
                    }) &&
         parameters == other.parameters && bytes.size() == other.bytes.size();
}

bool LaunchRecord::Launches::same(std::size_t i, const Launches& other) const noexcept {
  const Launch& l = launches[i];
  if (l.shape != other.launches[i].shape) return false;
  const std::size_t last = l.first_parameter + l.parameters;
  const std::size_t begin = l.parameters == 0 ? 0 : parameters[l.first_parameter];
  const std::size_t end = l.parameters == 0 ? 0 : last < parameters.size() ? parameters[last] : bytes.size();
  return std::memcmp(bytes.data() + begin, other.bytes.data() + begin, end - begin) == 0;
}

void** LaunchRecord::parameters_of(std::size_t i) {
  const Launch& l = launches_.launches[i];
  pointers_.clear();
  for (std::size_t p = 0; p < l.parameters; ++p)
    pointers_.push_back(launches_.bytes.data() + launches_.parameters[l.first_parameter + p]);
  return pointers_.data();
}

namespace {

cudaKernelNodeParams node_parameters(const void* kernel, const LaunchShape& shape, void** parameters) {
  cudaKernelNodeParams node{};
  node.func = const_cast<void*>(kernel);
  node.gridDim = {shape.grid[0], shape.grid[1], shape.grid[2]};
  node.blockDim = {shape.block[0], shape.block[1], shape.block[2]};
  node.sharedMemBytes = static_cast<unsigned>(shape.shared_bytes);
  node.kernelParams = parameters;
  return node;
}

}  // namespace

LaunchRecord::Graph& LaunchRecord::graph() {
  auto best = graphs_.end();
  fewest_.clear();
  for (auto g = graphs_.begin(); g != graphs_.end(); ++g) {
    if (!g->launches.same_kernels(launches_)) continue;
    changes_.clear();
    for (std::size_t i = 0; i < launches_.launches.size(); ++i) {
      if (!launches_.same(i, g->launches)) changes_.push_back(i);
    }
    if (best == graphs_.end() || changes_.size() < fewest_.size()) best = g, fewest_.swap(changes_);
    if (fewest_.size() <= few_changes) break;
  }
  const bool another = best == graphs_.end() || fewest_.size() > few_changes;
  if (another && graphs_.size() < most_graphs) {
    make(graphs_.emplace_front());
    return graphs_.front();
  }
  if (best == graphs_.end()) {
    device_->wait();  // the oldest may be under way
    destroy(graphs_.back());
    graphs_.pop_back();
    make(graphs_.emplace_front());
    return graphs_.front();
  }
  best->launches.clear();  // what a failure leaves is no pass
  for (const std::size_t i : fewest_) {
    const Launch& l = launches_.launches[i];
    prepare(l.kernel, l.shape);
    const cudaKernelNodeParams node = node_parameters(l.kernel, l.shape, parameters_of(i));
    check(cudaGraphExecKernelNodeSetParams(best->exec, best->nodes[i], &node), "changing a pass");
  }
  std::swap(best->launches, launches_);
  graphs_.splice(graphs_.begin(), graphs_, best);
  return graphs_.front();
}

void LaunchRecord::make(Graph& made) {
  check(cudaGraphCreate(&made.graph, 0), "making a graph of a pass");
  for (std::size_t i = 0; i < launches_.launches.size(); ++i) {
    const Launch& l = launches_.launches[i];
    prepare(l.kernel, l.shape);
    cudaGraphNodeParams node{};
    node.type = cudaGraphNodeTypeKernel;
    const cudaKernelNodeParams kernel = node_parameters(l.kernel, l.shape, parameters_of(i));
    node.kernel.func = kernel.func, node.kernel.gridDim = kernel.gridDim, node.kernel.blockDim = kernel.blockDim;
    node.kernel.sharedMemBytes = kernel.sharedMemBytes, node.kernel.kernelParams = kernel.kernelParams;
    cudaGraphEdgeData edge{};
    if (device_->dependent_launch()) {
      edge.from_port = cudaGraphKernelNodePortProgrammatic;
      edge.type = cudaGraphDependencyTypeProgrammatic;
    }
    cudaGraphNode_t before = i == 0 ? nullptr : made.nodes.back(), added = nullptr;
    check(cudaGraphAddNode(&added, made.graph, i == 0 ? nullptr : &before, i == 0 ? nullptr : &edge, i == 0 ? 0 : 1,
                           &node),
          "making a graph of a pass");
    made.nodes.push_back(added);
  }
  check(cudaGraphInstantiate(&made.exec, made.graph, 0), "making a graph of a pass");
  made.launches = launches_;
}

void LaunchRecord::destroy(Graph& graph) noexcept {
  if (graph.exec) cudaGraphExecDestroy(graph.exec);
  if (graph.graph) cudaGraphDestroy(graph.graph);
  graph = {};
}

}  // namespace qwen3next::cuda
