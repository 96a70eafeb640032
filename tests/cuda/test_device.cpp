// The card itself: memory, copies, time, and what is said where there is none.

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "backends/cuda/device.hpp"
#include "backends/cuda/elementwise.hpp"
#include "qwen3next.hpp"
#include "tests/cuda/cuda_ops.hpp"

using namespace qwen3next;

namespace {

std::string error_of(auto work) {
  try {
    work();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("host: without a GPU, opening a model for it is an error that says what to do") {
  const std::string model = QWEN3NEXT_SOURCE_DIR "/weights/tiny/qwen3next-tiny.gguf";
  const std::string device = error_of([] { cuda::Device::open(); });
  CHECK_MESSAGE((device.find("driver is missing") != device.npos || device.find("no NVIDIA GPU") != device.npos),
                device);
  CHECK_MESSAGE(device.find("use cpu") != device.npos, device);
  CHECK(error_of([&] { Model::open(model, {.backend = Backend::cuda}); }) == device);
  CHECK(Model::open(model, {.backend = Backend::cpu}).config().num_hidden_layers > 0);  // the rest works
}

TEST_CASE("memory: what is copied to the card, on it and back is the same") {
  const auto device = cuda::Device::open();
  std::vector<std::uint32_t> values(100'003), back(values.size());
  std::iota(values.begin(), values.end(), 7u);
  const std::size_t bytes = values.size() * sizeof(std::uint32_t);
  cuda::DeviceBytes a(device, bytes, "a test");
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 256 == 0);
  device->copy_to_device(a.data(), values.data(), bytes);
  const cuda::DeviceBytes b = a.copy();
  device->clear(a.data(), bytes);
  device->copy_to_host(back.data(), b.data(), bytes);
  CHECK(back == values);
  device->copy_to_host(back.data(), a.data(), bytes);
  CHECK(back == std::vector<std::uint32_t>(values.size()));
}

TEST_CASE("memory: what does not fit is named, and the card goes on") {
  const auto device = cuda::Device::open();
  const std::string message =
      error_of([&] { cuda::DeviceBytes(device, std::size_t{1} << 46, "the weights of a test"); });
  CHECK_MESSAGE(message.find("the weights of a test: 67108864 MiB more") != message.npos, message);
  CHECK_MESSAGE(message.find(" MiB are free") != message.npos, message);
  cuda::DeviceBytes small(device, 1000, "a test");
  device->clear(small.data(), small.size());
  device->wait();
}

TEST_CASE("launches: a kernel that started early sees what the one before wrote, also where an earlier one has read") {
  const auto device = cuda::Device::open();
  constexpr int times = 50, columns = 2048;
  for (const int rows : {1, 3, 20, 66}) {
    CAPTURE(rows);
    test::CudaTensors tensors(device);
    const auto n = static_cast<std::size_t>(rows);
    const cuda::CudaTensor x = tensors.make(test::Rows(n, std::vector<float>(columns, 1)));
    const cuda::CudaTensor one = tensors.make(test::Rows(n, std::vector<float>(columns, 1)));
    std::vector<cuda::CudaTensor> seen;
    for (int i = 0; i < times; ++i) seen.push_back(tensors.make(rows, columns, true));
    for (int i = 0; i < times; ++i) {  // each copy reads what the one before the addition has read
      cuda::copy(*device, seen[static_cast<std::size_t>(i)], x);
      cuda::add(*device, x, one);
    }
    for (int i = 0; i < times; ++i) {
      CAPTURE(i);
      const test::Rows expected(n, std::vector<float>(columns, static_cast<float>(1 + i)));
      CHECK(test::first_difference(tensors.read(seen[static_cast<std::size_t>(i)]), expected) == "");
    }
  }
}

TEST_CASE("time: events measure the card's work, not the caller's") {
  const auto device = cuda::Device::open();
  const std::size_t bytes = std::size_t{256} << 20;
  cuda::DeviceBytes memory(device, bytes, "a test");
  cuda::DeviceTimer timer(device);
  timer.start();
  device->clear(memory.data(), bytes);
  const double once = timer.seconds();
  timer.start();
  for (int i = 0; i < 10; ++i) device->clear(memory.data(), bytes);
  const double ten = timer.seconds();
  CHECK(once > 0);
  CHECK(static_cast<double>(bytes) / once < 100e12);
  CHECK(ten > 3 * once);
}
