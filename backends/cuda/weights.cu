#include "backends/cuda/weights.hpp"

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstring>
#include <thread>

#include "backends/cuda/repack.hpp"
#include "blocks/floats.hpp"

namespace qwen3next::cuda {

// Raw rows gather in pinned memory, buffer by buffer; each is copied to its twin on the card and repacked from there,
// while the next one fills.
struct Uploader::Staging {
  static constexpr std::size_t buffers = 3, capacity = std::size_t{32} << 20, alignment = 256;

  struct Buffer {
    std::byte* host = nullptr;
    DeviceBytes card;
    cudaEvent_t free = nullptr;     // when what was sent from here has been repacked
    cudaEvent_t arrived = nullptr;  // when it is on the card
  };
  struct Piece {
    const std::byte* from;
    std::size_t bytes, at;
    bool shared;  // copied by the card itself
  };
  struct Job {
    DType type;
    RawRows raw;  // data and factors: null; where they lie in the buffer is beside it
    std::size_t at, factors_at;
    std::byte* to;
  };

  std::shared_ptr<Device> device, link;  // link: of the copies
  std::size_t size = 0;                  // of each buffer
  std::array<Buffer, buffers> ring;
  std::size_t current = 0, used = 0;
  std::vector<Piece> pieces;
  std::vector<Job> jobs;
  std::vector<std::vector<float>> factors;  // that pieces point to

  Staging(std::shared_ptr<Device> d, std::shared_ptr<Device> l) : device(std::move(d)), link(std::move(l)) {
    if (!link) link = device;
  }
  ~Staging() { release(); }

  void release() noexcept {
    for (Buffer& b : ring) {
      if (b.free) cudaEventSynchronize(b.free), cudaEventDestroy(b.free), cudaEventDestroy(b.arrived);
      if (b.host) cudaFreeHost(b.host);
      b = Buffer();
    }
    size = 0;
  }
  void allocate(std::size_t bytes) {
    release();
    for (Buffer& b : ring) {
      void* host = nullptr;
      check(cudaHostAlloc(&host, bytes, cudaHostAllocDefault), "allocating pinned memory");
      b.host = static_cast<std::byte*>(host);
      b.card = DeviceBytes(device, bytes, "buffers for loading weights");
      check(cudaEventCreateWithFlags(&b.free, cudaEventDisableTiming), "making an event");
      check(cudaEventCreateWithFlags(&b.arrived, cudaEventDisableTiming), "making an event");
    }
    if (link != device) device->wait();  // until then the memory is the device's stream's alone
    size = bytes;
  }
  // Room for `bytes` in the current buffer, which is sent off if they do not fit.
  std::size_t room(std::size_t bytes) {
    if (used + bytes > size) send();
    if (bytes > size) allocate(std::max(bytes, capacity));
    return size - used;
  }

  void gather() const {
    constexpr std::size_t share = std::size_t{1} << 20;
    struct Part {
      const std::byte* from;
      std::byte* to;
      std::size_t bytes;
    };
    std::vector<Part> parts;
    for (const Piece& p : pieces) {
      if (p.shared) continue;
      for (std::size_t done = 0; done < p.bytes; done += share) {
        parts.push_back({p.from + done, ring[current].host + p.at + done, std::min(share, p.bytes - done)});
      }
    }
    std::atomic<std::size_t> next = 0;
    const auto work = [&] {
      for (std::size_t i = next++; i < parts.size(); i = next++) {
        std::memcpy(parts[i].to, parts[i].from, parts[i].bytes);
      }
    };
    const std::size_t threads = std::min<std::size_t>({16, std::thread::hardware_concurrency(), parts.size()});
    std::vector<std::jthread> helpers;
    for (std::size_t i = 1; i < threads; ++i) helpers.emplace_back(work);
    work();
  }

  void send() {
    if (used == 0) return;
    Buffer& b = ring[current];
    check(cudaEventSynchronize(b.free), "work on the GPU");
    gather();
    for (std::size_t i = 0, next = 0; i < pieces.size(); i = next) {  // neighbours at once
      const Piece& first = pieces[i];
      std::size_t bytes = first.bytes;
      for (next = i + 1; next < pieces.size() && pieces[next].shared == first.shared; ++next) {
        const Piece& p = pieces[next];
        if (p.shared && (p.from != first.from + bytes || p.at != first.at + bytes)) break;
        bytes = p.at + p.bytes - first.at;
      }
      check(cudaMemcpyAsync(b.card.data() + first.at, first.shared ? first.from : b.host + first.at, bytes,
                            cudaMemcpyHostToDevice, link->stream()),
            "copying weights to the GPU");
    }
    if (link != device) {
      check(cudaEventRecord(b.arrived, link->stream()), "recording an event");
      check(cudaStreamWaitEvent(device->stream(), b.arrived, 0), "waiting for an event");
    }
    for (Job& job : jobs) {
      job.raw.data = b.card.data() + job.at;
      if (job.factors_at) job.raw.factors = reinterpret_cast<const float*>(b.card.data() + job.factors_at);
      repack(*device, job.type, job.raw, job.to);
    }
    check(cudaEventRecord(b.free, device->stream()), "recording an event");
    pieces.clear(), jobs.clear(), factors.clear();
    used = 0, current = (current + 1) % buffers;
  }
  std::size_t take(std::size_t bytes) {
    const std::size_t at = used;
    used = std::min(size, (used + bytes + alignment - 1) / alignment * alignment);
    return at;
  }
};

namespace {

int grid_columns(const WeightView& v) { return (v.cols + ScaleGrid::block - 1) / ScaleGrid::block; }

// The factors of rows [begin, begin + count) of an f8 matrix: [count, grid_columns].
std::vector<float> grid_factors(const WeightView& v, int begin, int count) {
  const auto columns = static_cast<std::size_t>(grid_columns(v));
  std::vector<float> factors(static_cast<std::size_t>(count) * columns);
  for (int r = 0; r < count; ++r) {
    float* to = factors.data() + static_cast<std::size_t>(r) * columns;
    const std::byte* from = v.grid_row(begin + r);
    if (v.grid.type == DType::f32) {
      unpack_f32(from, to, static_cast<std::int64_t>(columns));
    } else {
      unpack_bf16(from, to, static_cast<std::int64_t>(columns));
    }
  }
  return factors;
}

Matrix shape_of(const WeightView& v) {
  return {.data = nullptr, .rows = v.rows, .cols = v.cols, .scale = v.scale, .type = v.type};
}

}  // namespace

Uploader::Uploader(std::shared_ptr<Device> device, std::shared_ptr<Device> link)
    : device_(std::move(device)), staging_(std::make_unique<Staging>(device_, std::move(link))) {}
Uploader::~Uploader() = default;

void Uploader::finish() { staging_->send(); }

void Uploader::add(const WeightView& v, std::byte* to, bool shared) {
  Staging& s = *staging_;
  const std::size_t row_bytes = v.row_bytes();
  const std::size_t factor_bytes = v.grid.data ? static_cast<std::size_t>(grid_columns(v)) * sizeof(float) : 0;
  const auto bytes_of = [&](int rows) {
    return static_cast<std::size_t>(rows) * (row_bytes + factor_bytes) + 2 * Staging::alignment;
  };
  const std::size_t tile_bytes = Matrix{.rows = strip_rows, .cols = v.cols, .type = v.type}.bytes();
  for (int begin = 0, count = 0; begin < v.rows; begin += count) {
    const std::size_t room = s.room(bytes_of(std::min(strip_rows, v.rows - begin)));
    count = v.rows - begin;
    if (bytes_of(count) > room) {
      count = static_cast<int>((room - 2 * Staging::alignment) / (row_bytes + factor_bytes)) / strip_rows * strip_rows;
      count = std::max(count, strip_rows);
    }
    Staging::Job job{.type = v.type,
                     .raw = {nullptr, row_bytes, count, v.cols, nullptr},
                     .at = s.take(static_cast<std::size_t>(count) * row_bytes),
                     .factors_at = 0,
                     .to = to + static_cast<std::size_t>(begin / strip_rows) * tile_bytes};
    for (int r = begin, rows = 0; r < begin + count; r += rows) {  // neighbours of a group at once
      rows = std::min(v.group_rows - r % v.group_rows, begin + count - r);
      s.pieces.push_back({v.row(r), static_cast<std::size_t>(rows) * row_bytes,
                          job.at + static_cast<std::size_t>(r - begin) * row_bytes, shared});
    }
    if (factor_bytes) {
      const auto& factors = s.factors.emplace_back(grid_factors(v, begin, count));
      job.factors_at = s.take(factors.size() * sizeof(float));
      s.pieces.push_back(
          {reinterpret_cast<const std::byte*>(factors.data()), factors.size() * sizeof(float), job.factors_at, false});
    }
    s.jobs.push_back(job);
  }
}

CudaWeight Uploader::weight(const WeightView& view) {
  Matrix m = shape_of(view);
  auto memory = std::make_shared<const DeviceBytes>(device_, m.bytes(), "weights");
  m.data = memory->data();
  add(view, memory->data());
  return {m, std::move(memory)};
}

CudaVector Uploader::vector(const VectorView& view) {
  const std::size_t bytes = static_cast<std::size_t>(view.size) * sizeof(float);
  auto memory = std::make_shared<const DeviceBytes>(device_, bytes, "weights");
  if (bytes) device_->copy_to_device(memory->data(), view.data, bytes);
  return {memory->data<float>(), view.size, view.cols, memory};
}

ExpertMatrices expert_matrices(const ExpertViews& views) {
  ExpertMatrices m;
  if (views.empty()) return m;
  m.count = static_cast<int>(views.size());
  m.gate = shape_of(views[0].gate), m.up = shape_of(views[0].up), m.down = shape_of(views[0].down);
  m.gate.scale = m.up.scale = m.down.scale = 1;
  m.up_at = m.gate.bytes(), m.down_at = m.up_at + m.up.bytes();
  return m;
}

void Uploader::expert(const ExpertView& e, const ExpertMatrices& m, std::byte* slot, bool shared) {
  assert(e.gate.type == m.gate.type && e.up.type == m.up.type && e.down.type == m.down.type);
  add(e.gate, slot, shared), add(e.up, slot + m.up_at, shared), add(e.down, slot + m.down_at, shared);
}

CudaExperts Uploader::experts(const ExpertViews& views) {
  CudaExperts experts;
  if (views.empty()) return experts;
  ExpertMatrices& m = experts.matrices = expert_matrices(views);

  experts.memory = std::make_shared<const DeviceBytes>(device_, views.size() * m.slot_bytes(), "experts");
  std::vector<const std::byte*> slots;
  std::vector<float> scales;
  bool scaled = false;
  for (const ExpertView& e : views) {
    std::byte* slot = experts.memory->data() + slots.size() * m.slot_bytes();
    expert(e, m, slot);
    slots.push_back(slot);
    for (const WeightView* w : {&e.gate, &e.up, &e.down}) {
      scales.push_back(w->scale);
      scaled |= w->scale != 1;
    }
  }
  const std::size_t slot_bytes = slots.size() * sizeof(slots[0]), scale_bytes = scales.size() * sizeof(float);
  experts.tables = std::make_shared<const DeviceBytes>(device_, slot_bytes + scale_bytes, "experts");
  device_->copy_to_device(experts.tables->data(), slots.data(), slot_bytes);
  device_->copy_to_device(experts.tables->data() + slot_bytes, scales.data(), scale_bytes);
  m.slots = experts.tables->data<const std::byte*>();
  if (scaled) m.scales = reinterpret_cast<const float*>(experts.tables->data() + slot_bytes);
  return experts;
}

}  // namespace qwen3next::cuda
