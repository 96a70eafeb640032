#include "backends/cuda/expert_slots.hpp"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cassert>

#include "backends/cuda/host_experts.hpp"
#include "backends/cuda/launch.cuh"

namespace qwen3next::cuda {

// --- events ---------------------------------------------------------------------------------------------------------

StreamEvent::StreamEvent() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event"); }
StreamEvent::~StreamEvent() {
  if (event_) cudaEventDestroy(event_);
}
void StreamEvent::record(const Device& device) {
  check(cudaEventRecord(event_, device.stream()), "recording an event");
}
bool StreamEvent::passed() const {
  const cudaError_t state = cudaEventQuery(event_);
  if (state == cudaErrorNotReady) return false;
  check(state, "work on the GPU");
  return true;
}

void check_running(const Device& device) {
  const cudaError_t state = cudaStreamQuery(device.stream());
  if (state != cudaErrorNotReady) check(state, "work on the GPU");
}

void download(const Device& device, void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, device.stream()), "copying from the GPU");
}

bool share_with_card(std::byte* data, std::size_t size) noexcept {
  void* same = nullptr;  // where kernels find it
  if (cudaHostRegister(data, size, cudaHostRegisterPortable) == cudaSuccess) {
    if (cudaHostGetDevicePointer(&same, data, 0) == cudaSuccess && same == data) return true;
    cudaHostUnregister(data);
  }
  cudaGetLastError();
  return false;
}
void take_from_card(std::byte* data) noexcept { cudaHostUnregister(data); }

namespace {

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }

// --- tables ---------------------------------------------------------------------------------------------------------

struct SlotEntries {
  std::int32_t experts[most_slot_entries];
  const std::byte* slots[most_slot_entries];
  int count;
};

__global__ void write_slots_kernel(const std::byte** table, const std::byte* const* base, int experts,
                                   SlotEntries entries, const std::byte* absent) {
  let_successor_start();
  wait_for_predecessor();
  for (int e = thread(); e < experts; e += static_cast<int>(blockDim.x)) table[e] = base ? base[e] : absent;
  __syncthreads();
  for (int i = thread(); i < entries.count; i += static_cast<int>(blockDim.x))
    table[entries.experts[i]] = entries.slots[i] ? entries.slots[i] : absent;
}

__global__ void count_picks_kernel(const std::int32_t* ids, int picks, std::int32_t* counts) {
  let_successor_start();
  wait_for_predecessor();
  const int i = static_cast<int>(blockIdx.x * blockDim.x) + thread();
  if (i < picks) atomicAdd(counts + ids[i], 1);
}

// --- rows to the processor and back ----------------------------------------------------------------------------------

enum Answer : std::uint32_t { none_yet, nothing_to_add, sums_to_add };

__device__ inline void store_release(std::uint32_t* at, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ inline std::uint32_t load_acquire(const std::uint32_t* at) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

struct RowsThere {
  std::uint32_t* sent;  // [rows]
  std::int32_t* ids;
  float* weights;
  float* x;
  std::ptrdiff_t stride;
};

// A block a row.
__global__ void send_rows(RowsThere to, CudaTensor x, Routing routing, const std::byte* const* table) {
  let_successor_start();
  wait_for_predecessor();
  const auto row = static_cast<std::ptrdiff_t>(blockIdx.x);
  const auto* from = reinterpret_cast<const __half2*>(x.half + row * x.stride);
  auto* there = reinterpret_cast<float4*>(to.x + row * to.stride);
  for (int i = thread(); 4 * i < x.n_cols; i += static_cast<int>(blockDim.x)) {
    const float2 a = __half22float2(from[2 * i]), b = __half22float2(from[2 * i + 1]);
    there[i] = make_float4(a.x, a.y, b.x, b.y);
  }
  for (int i = thread(); i < routing.k; i += static_cast<int>(blockDim.x)) {
    const std::int32_t id = routing.ids[row * routing.k + i];
    to.ids[row * routing.k + i] = table[id] ? ~id : id;
    to.weights[row * routing.k + i] = routing.weights[row * routing.k + i];
  }
  __threadfence_system();
  __syncthreads();
  if (thread() == 0) store_release(to.sent + row, 1);
}

// A block a row.  What comes next may start, and load its weights, while this one waits.
__global__ void add_sums(CudaTensor x, const float* sums, std::ptrdiff_t stride, std::uint32_t* answered) {
  let_successor_start();
  wait_for_predecessor();
  const auto row = static_cast<std::ptrdiff_t>(blockIdx.x);
  __shared__ std::uint32_t answer;
  if (thread() == 0) {
    while ((answer = load_acquire(answered + row)) == none_yet) continue;
    store_release(answered + row, none_yet);
  }
  __syncthreads();
  if (answer == nothing_to_add) return;
  float* const to = x.data + row * x.stride;
  for (int c = 4 * thread(); c < x.n_cols; c += 4 * static_cast<int>(blockDim.x)) {
    const float4 v = __ldcv(reinterpret_cast<const float4*>(sums + row * stride + c));
    const float values[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4 && c + i < x.n_cols; ++i) to[c + i] += values[i];
  }
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

void write_slots(const Device& device, const std::byte** table, const std::byte* const* base, int experts,
                 std::span<const SlotEntry> entries, const std::byte* absent) {
  SlotEntries some{};
  do {
    some.count = static_cast<int>(std::min<std::size_t>(entries.size(), most_slot_entries));
    for (int i = 0; i < some.count; ++i) {
      some.experts[i] = entries[static_cast<std::size_t>(i)].expert;
      some.slots[i] = entries[static_cast<std::size_t>(i)].slot;
    }
    launch(device, write_slots_kernel, 1, 256, 0, table, base, experts, some, absent);
    entries = entries.subspan(static_cast<std::size_t>(some.count));
    base = table;
  } while (!entries.empty());
}

void count_picks(const Device& device, const Routing& routing, std::int32_t* counts) {
  const auto picks = static_cast<int>(routing.picks());
  if (picks == 0) return;
  launch(device, count_picks_kernel, static_cast<unsigned>((picks + 255) / 256), 256, 0, routing.ids, picks, counts);
}

// --- slots ----------------------------------------------------------------------------------------------------------

ExpertSlots::ExpertSlots(std::shared_ptr<Device> device, std::span<const Class> classes, int layers, int experts)
    : device_(std::move(device)),
      layers_(layers),
      experts_(experts),
      tables_(device_, 2 * static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts) * sizeof(std::byte*),
              "tables of experts") {
  device_->clear(tables_.data(), tables_.size());
  std::size_t largest = 0;
  for (const Class& c : classes) largest = std::max(largest, c.bytes);
  zeros_ = DeviceBytes(device_, largest, "an expert of zeros");
  device_->clear(zeros_.data(), largest);
  for (int layer = 0; layer < layers; ++layer)
    write_slots(*device_, row(layers + layer), nullptr, experts, {}, zeros_.data());
  for (std::size_t cls = 0; cls < classes.size(); ++cls) {
    const std::size_t bytes = aligned(classes[cls].bytes);
    for (int left = classes[cls].count; left > 0;) {
      const int n = std::min(left, chunk_slots);
      Part& part = parts_.emplace_back(Part{{static_cast<int>(slots_.size()), n, static_cast<std::size_t>(n) * bytes},
                                            static_cast<int>(cls),
                                            DeviceBytes(device_, static_cast<std::size_t>(n) * bytes, "experts")});
      for (int i = 0; i < n; ++i) slots_.push_back(part.memory.data() + static_cast<std::size_t>(i) * bytes);
      left -= n;
    }
  }
}

ExpertSlots::Chunk ExpertSlots::last_chunk() const noexcept {
  std::vector<int> left;
  for (const Part& part : parts_) {
    left.resize(std::max(left.size(), static_cast<std::size_t>(part.cls) + 1));
    ++left[static_cast<std::size_t>(part.cls)];
  }
  const Part* last = nullptr;
  for (const Part& part : parts_) {
    const auto most = std::max_element(left.begin(), left.end()) - left.begin();
    if (part.cls == most) last = &part;
  }
  return last ? last->chunk : Chunk{0, 0, 0};
}

void ExpertSlots::give_back(const Chunk& chunk) {
  std::erase_if(parts_, [&](const Part& part) { return part.chunk.first == chunk.first; });
}

// --- transit ---------------------------------------------------------------------------------------------------------

Transit::Transit(std::shared_ptr<Device> device, int slots, std::size_t slot_bytes, int experts)
    : device_(std::move(device)),
      slots_(slots),
      slot_bytes_(aligned(slot_bytes)),
      experts_(experts),
      memory_(device_, static_cast<std::size_t>(slots_) * slot_bytes_, "experts that pass through"),
      table_(device_, static_cast<std::size_t>(experts) * sizeof(std::byte*), "tables of experts"),
      uploader_(device_, Device::open()) {}

std::size_t Transit::bytes(int slots, std::size_t slot_bytes, int experts) {
  return static_cast<std::size_t>(slots) * aligned(slot_bytes) + static_cast<std::size_t>(experts) * sizeof(std::byte*);
}

const std::byte* const* Transit::bring(const std::byte* const* base, const ExpertMatrices& layer,
                                       std::span<const Expert> experts, int first) {
  assert(first + static_cast<int>(experts.size()) <= slots_);
  std::vector<SlotEntry> entries;
  std::byte* slot = memory_.data() + static_cast<std::size_t>(first) * slot_bytes_;
  for (const Expert& e : experts) {
    uploader_.expert(e.view, layer, slot, e.shared);
    entries.push_back({e.id, slot});
    slot += slot_bytes_;
  }
  uploader_.finish();
  auto* const table = table_.data<const std::byte*>();
  write_slots(*device_, table, base, experts_, entries);
  return table;
}

void Transit::bring(std::byte* slot, const ExpertMatrices& layer, const Expert& expert) {
  uploader_.expert(expert.view, layer, slot, expert.shared);
  uploader_.finish();
}

// --- rows ------------------------------------------------------------------------------------------------------------

void RowExchange::reserve(int rows, int k, int width) {
  rows_ = std::max(rows, rows_), k_ = std::max(k, k_), width_ = std::max(width, width_);
  const auto n = static_cast<std::size_t>(rows_);
  stride_ = (static_cast<std::size_t>(width_) + 15) / 16 * 16;
  answered_ = aligned(n * sizeof(std::uint32_t));
  ids_ = 2 * answered_;
  weights_ = ids_ + aligned(n * static_cast<std::size_t>(k_) * sizeof(std::int32_t));
  x_ = weights_ + aligned(n * static_cast<std::size_t>(k_) * sizeof(float));
  sums_ = x_ + aligned(n * stride_ * sizeof(float));
  memory_ = PinnedBytes();
  memory_ = PinnedBytes(sums_ + n * stride_ * sizeof(float));
  std::fill_n(memory_.data<std::uint32_t>(), ids_ / sizeof(std::uint32_t), std::uint32_t{0});
}

RowExchange::Rows RowExchange::rows(int rows, int k, int width) const noexcept {
  std::byte* const at = memory_.data();
  return {rows,
          k,
          width,
          static_cast<std::ptrdiff_t>(stride_),
          reinterpret_cast<const std::int32_t*>(at + ids_),
          reinterpret_cast<const float*>(at + weights_),
          reinterpret_cast<float*>(at + x_),
          reinterpret_cast<float*>(at + sums_)};
}

void RowExchange::send(const Device& device, CudaTensor x, const Routing& routing,
                       const std::byte* const* table) const {
  std::byte* const at = memory_.data();
  const RowsThere to{sent(), reinterpret_cast<std::int32_t*>(at + ids_), reinterpret_cast<float*>(at + weights_),
                     reinterpret_cast<float*>(at + x_), static_cast<std::ptrdiff_t>(stride_)};
  launch(device, send_rows, static_cast<unsigned>(x.n_rows), 256, 0, to, x, routing, table);
}

void RowExchange::add_answer(const Device& device, CudaTensor x) const {
  launch(device, add_sums, static_cast<unsigned>(x.n_rows), 256, 0, x,
         reinterpret_cast<const float*>(memory_.data() + sums_), static_cast<std::ptrdiff_t>(stride_), answered());
}

bool RowExchange::arrived(int rows) const noexcept {
  for (int i = 0; i < rows; ++i)
    if (std::atomic_ref(sent()[i]).load(std::memory_order_acquire) == 0) return false;
  return true;
}

void RowExchange::take(int rows) noexcept { std::fill_n(sent(), rows, std::uint32_t{0}); }

void RowExchange::answer(int rows, bool with_sums) noexcept {
  take(rows);
  for (int i = 0; i < rows; ++i)
    std::atomic_ref(answered()[i]).store(with_sums ? sums_to_add : nothing_to_add, std::memory_order_release);
}

}  // namespace qwen3next::cuda
