#include "backends/cuda/device.hpp"

#include <cuda_runtime.h>

#include "backends/cuda/launch_record.hpp"
#include "core/message.hpp"

namespace qwen3next::cuda {

void check(int code, const char* doing) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it was told
  throw_error("cuda: ", doing, " failed: ", cudaGetErrorString(error));
}

std::shared_ptr<Device> Device::open() {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    throw_error("--backend cuda: the NVIDIA driver is missing or older than CUDA ", CUDART_VERSION / 1000,
                "; install a newer one, or use cpu");
  }
  if (found != cudaSuccess || count == 0) {
    cudaGetLastError();
    throw_error("--backend cuda: this machine shows no NVIDIA GPU (", cudaGetErrorString(found),
                "); use cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES");
  }
  std::shared_ptr<Device> device(new Device);
  cudaDeviceProp p{};
  check(cudaGetDeviceProperties(&p, 0), "asking for the GPU's properties");
  device->properties_ = {p.name, p.major, p.minor, p.multiProcessorCount, p.sharedMemPerBlockOptin, p.totalGlobalMem};
  if (p.major < 8) {
    throw_error("--backend cuda: ", p.name, " has compute capability ", p.major, ".", p.minor,
                ", expected 8.0 (Ampere) or later; use cpu");
  }
  device->activate();
  check(cudaStreamCreateWithFlags(&device->stream_, cudaStreamNonBlocking), "opening a stream");
  device->owned_stream_.reset(device->stream_, [](Stream stream) {
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  });
  // What is given back stays with the process: sessions come and go.
  cudaMemPool_t pool = nullptr;
  check(cudaDeviceGetDefaultMemPool(&pool, 0), "asking for the memory pool");
  std::uint64_t keep = std::uint64_t{1} << 30;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "setting up the memory pool");
  return device;
}

std::shared_ptr<Device> Device::with_record(LaunchRecord* record) const {
  std::shared_ptr<Device> device(new Device(*this));
  device->record_ = record;
  return device;
}

void Device::activate() const { check(cudaSetDevice(0), "choosing the GPU"); }

std::uint64_t Device::free_memory() const {
  activate();
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  return free;
}

void Device::copy_to_device(void* to, const void* from, std::size_t bytes) {
  activate();
  // From pageable memory the source is read before this returns.
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copying to the GPU");
}
void Device::copy_to_host(void* to, const void* from, std::size_t bytes) {
  activate();
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copying from the GPU");
  wait();
}
void Device::copy_on_device(void* to, const void* from, std::size_t bytes) {
  activate();
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "copying on the GPU");
}
void Device::clear(void* at, std::size_t bytes) {
  activate();
  check(cudaMemsetAsync(at, 0, bytes, stream_), "clearing memory of the GPU");
}
void Device::wait() { check(cudaStreamSynchronize(stream_), "work on the GPU"); }

DeviceBytes::DeviceBytes(std::shared_ptr<Device> device, std::size_t bytes, const char* what)
    : device_(std::move(device)), size_(bytes) {
  if (bytes == 0) return;
  device_->activate();
  cudaError_t code = cudaMallocAsync(&data_, bytes, device_->stream());
  while (code == cudaErrorMemoryAllocation && device_->give_back_ && device_->give_back_()) {
    cudaGetLastError();
    code = cudaMallocAsync(&data_, bytes, device_->stream());
  }
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    constexpr std::size_t mebi = 1 << 20;
    throw_error("the GPU has no room for ", what, ": ", (bytes + mebi - 1) / mebi, " MiB more, ",
                device_->free_memory() / mebi, " of ", device_->properties().memory / mebi, " MiB are free");
  }
  check(code, "allocating memory on the GPU");
}

void DeviceBytes::release() noexcept {
  if (data_) cudaFreeAsync(data_, device_->stream());
  data_ = nullptr, size_ = 0;
}

DeviceBytes DeviceBytes::copy() const {
  if (size_ == 0) return {};
  DeviceBytes other(device_, size_, "a copy of a session's state");
  device_->copy_on_device(other.data(), data_, size_);
  return other;
}

void DeviceScratch::grow(std::size_t bytes) {
  if (LaunchRecord* record = device_->record()) record->start_gathered();  // what uses the memory that goes
  bytes_ = DeviceBytes();
  bytes_ = DeviceBytes(device_, bytes, "scratch memory of a session");
}

PinnedBytes::PinnedBytes(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  const cudaError_t code = cudaMallocHost(&data_, bytes);
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw_error("this machine has no room for ", bytes >> 20, " MiB of pinned memory");
  }
  check(code, "allocating pinned memory");
}
PinnedBytes::~PinnedBytes() {
  if (data_) cudaFreeHost(data_);
}

DeviceTimer::DeviceTimer(std::shared_ptr<Device> device) : device_(std::move(device)) {
  check(cudaEventCreate(&begin_), "making an event");
  check(cudaEventCreate(&end_), "making an event");
}
DeviceTimer::~DeviceTimer() {
  cudaEventDestroy(begin_);
  cudaEventDestroy(end_);
}
void DeviceTimer::start() { check(cudaEventRecord(begin_, device_->stream()), "recording an event"); }
double DeviceTimer::seconds() {
  check(cudaEventRecord(end_, device_->stream()), "recording an event");
  check(cudaEventSynchronize(end_), "work on the GPU");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin_, end_), "reading an event");
  return static_cast<double>(milliseconds) / 1000;
}

}  // namespace qwen3next::cuda
