#pragma once
// The graphics card as the other files of this folder see it: memory, one stream, timing.  Plain C++: what includes
// this needs no CUDA header.
//
// All work of an engine goes through one stream, in order, whichever thread and session it comes from.  So memory may
// be given back while work that uses it is still under way, and nothing here waits unless it says so.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

struct CUstream_st;
struct CUevent_st;

namespace qwen3next::cuda {

using Stream = CUstream_st*;

// Throws Error if `code` (a cudaError_t) is one; `doing` says what failed.
void check(int code, const char* doing);

struct DeviceProperties {
  std::string name;  // "NVIDIA H200"
  int major = 0, minor = 0;
  int multiprocessors = 0;
  std::size_t shared_memory_per_block = 0;  // most that a kernel can ask for
  std::uint64_t memory = 0;                 // bytes
};

class LaunchRecord;

// What was started last on a stream.  A kernel that was allowed to start before the one before it ends (launch.cuh)
// does not wait for all of a graph: it must not be allowed that behind one.
struct StreamOrder {
  std::mutex mutex;
  bool behind_graph = false;
};

class Device {
 public:
  // The first card.  Throws Error, saying what is missing, if there is no driver, no card or none that these kernels
  // were compiled for.
  static std::shared_ptr<Device> open();
  Device& operator=(const Device&) = delete;

  const DeviceProperties& properties() const noexcept { return properties_; }
  Stream stream() const noexcept { return stream_; }
  bool dependent_launch() const noexcept { return properties_.major >= 9; }  // programmatic dependent launch
  std::uint64_t free_memory() const;                                         // bytes

  void copy_to_device(void* to, const void* from, std::size_t bytes);  // `from` may change as soon as this returns
  void copy_to_host(void* to, const void* from, std::size_t bytes);    // waits
  void copy_on_device(void* to, const void* from, std::size_t bytes);
  void clear(void* at, std::size_t bytes);
  void wait();  // until all work is done; throws Error if some of it failed

  // The same card and stream for one session, which gathers its launches; `record` outlives what is started here.
  std::shared_ptr<Device> with_record(LaunchRecord* record) const;
  LaunchRecord* record() const noexcept { return record_; }
  StreamOrder& order() const noexcept { return *order_; }

  // Called when memory that is asked for does not fit, again and again: gives some back, or returns false.  Null: none.
  void on_full(std::function<bool()> give_back) { give_back_ = std::move(give_back); }

 private:
  Device() = default;
  Device(const Device&) = default;
  void activate() const;  // for the calling thread
  friend class DeviceBytes;

  DeviceProperties properties_;
  std::shared_ptr<CUstream_st> owned_stream_;
  Stream stream_ = nullptr;
  std::shared_ptr<StreamOrder> order_ = std::make_shared<StreamOrder>();
  LaunchRecord* record_ = nullptr;
  std::function<bool()> give_back_;
};

// Owned memory of the card, aligned to 256 bytes.  Given back in the order of the stream.
class DeviceBytes {
 public:
  DeviceBytes() = default;
  // Uncleared.  Throws Error if it does not fit: `what` for whom it was, in words.
  DeviceBytes(std::shared_ptr<Device> device, std::size_t bytes, const char* what);
  ~DeviceBytes() { release(); }
  DeviceBytes(DeviceBytes&& other) noexcept { *this = std::move(other); }
  DeviceBytes& operator=(DeviceBytes&& other) noexcept {
    std::swap(device_, other.device_), std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }

  template <class T = std::byte>
  T* data() const noexcept {
    return static_cast<T*>(data_);
  }
  std::size_t size() const noexcept { return size_; }
  const std::shared_ptr<Device>& device() const noexcept { return device_; }
  DeviceBytes copy() const;

 private:
  void release() noexcept;

  std::shared_ptr<Device> device_;
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// Owned memory of the host that the card copies from and to at the full speed of the link.
class PinnedBytes {
 public:
  PinnedBytes() = default;
  explicit PinnedBytes(std::size_t bytes);  // throws Error if the system does not give as much
  ~PinnedBytes();
  PinnedBytes(PinnedBytes&& other) noexcept { *this = std::move(other); }
  PinnedBytes& operator=(PinnedBytes&& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  template <class T = std::byte>
  T* data() const noexcept {
    return static_cast<T*>(data_);
  }
  std::size_t size() const noexcept { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// Scratch memory that grows to the most that was ever asked for; contents are lost with each call.
class DeviceScratch {
 public:
  explicit DeviceScratch(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  template <class T = std::byte>
  T* get(std::size_t count) {
    if (count * sizeof(T) > bytes_.size()) grow(count * sizeof(T));
    return bytes_.template data<T>();
  }

 private:
  void grow(std::size_t bytes);

  std::shared_ptr<Device> device_;
  DeviceBytes bytes_;
};

// Time between two moments of the stream.
class DeviceTimer {
 public:
  explicit DeviceTimer(std::shared_ptr<Device> device);
  ~DeviceTimer();
  DeviceTimer(const DeviceTimer&) = delete;
  void start();
  double seconds();  // since start(), on the card; waits

 private:
  std::shared_ptr<Device> device_;
  CUevent_st* begin_ = nullptr;
  CUevent_st* end_ = nullptr;
};

}  // namespace qwen3next::cuda
