#pragma once
// A queue of reads that Linux carries out by itself (io_uring, by liburing): a call hands over many at once, and one
// thread sleeps until some are done.
//
// The submission ring is used under mutex_, by whoever submits; the completion ring by reap() alone.  The kernel wakes
// reap() through an eventfd, and so do submit() and the destructor where there is something to do for it.

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/message.hpp"
#include "weights/read_request.hpp"

namespace qwen3next {

class UringReadQueue final : public ReadQueue {
 public:
  using Enter = int (*)(::io_uring*);  // hands the submission ring to the kernel: io_uring_submit, but in tests

  // Throws Error, with the reason, where the kernel has no io_uring or forbids it, as containers do.
  UringReadQueue(int depth, OnDone on_done, Enter enter = ::io_uring_submit)
      : on_done_(std::move(on_done)), enter_(enter), system_(static_cast<unsigned>(depth)) {
    slots_.resize(static_cast<std::size_t>(depth));
    for (Slot& slot : slots_) free_.push_back(&slot);
    results_.reserve(2 * slots_.size());
    try {
      reaper_ = std::thread([this] { reap(); });
    } catch (const std::system_error&) {
      throw_error("the system gives no thread to read files with: end other programs");
    }
  }
  ~UringReadQueue() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake();
    reaper_.join();
  }

  void submit(std::span<const ReadRequest> requests) override {
    const std::lock_guard lock(mutex_);
    waiting_.append(requests);
    begin_waiting();
    if (!send() || error_ != 0) wake();
  }

  std::string_view kind() const noexcept override { return "io_uring"; }

 private:
  using Slot = detail::ReadUnderWay;

  struct System {
    ::io_uring ring{};
    int event = -1;

    explicit System(unsigned depth) {
      ::io_uring_params parameters{};
      parameters.flags = IORING_SETUP_CLAMP;
      if (const int code = ::io_uring_queue_init_params(depth, &ring, &parameters); code < 0)
        refuse(code == -ENOSYS ? "the kernel does not have it" : "the kernel or a container forbids it", -code);
      const std::unique_ptr<::io_uring_probe, void (*)(::io_uring_probe*)> probe(::io_uring_get_probe_ring(&ring),
                                                                                 ::io_uring_free_probe);
      if (!probe || !::io_uring_opcode_supported(probe.get(), IORING_OP_READ)) {
        ::io_uring_queue_exit(&ring);
        refuse("the kernel's is too old, it has no reads", ENOSYS);
      }
      event = ::eventfd(0, EFD_CLOEXEC);
      const int code = event < 0 ? errno : -::io_uring_register_eventfd(&ring, event);
      if (code != 0) {
        close();
        refuse("the kernel gives no eventfd for it", code);
      }
    }
    System(const System&) = delete;
    System& operator=(const System&) = delete;
    ~System() { close(); }

   private:
    void close() noexcept {
      ::io_uring_queue_exit(&ring);
      if (event >= 0) ::close(event);
    }
    [[noreturn]] static void refuse(std::string_view why, int code) {
      throw_error("io_uring cannot be used: ", why, " (", std::generic_category().message(code),
                  "); reading by threads works everywhere");
    }
  };

  void wake() noexcept { ::eventfd_write(system_.event, 1); }

  // Requests that wait get free slots and places in the submission ring, which has one for each slot.
  void begin_waiting() noexcept {
    while (!waiting_.empty() && !free_.empty() && !stopping_ && error_ == 0) {
      Slot* const slot = free_.back();
      free_.pop_back();
      *slot = Slot(waiting_.take());
      prepare(slot);
    }
  }

  void prepare(Slot* slot) noexcept {
    ::io_uring_sqe* const entry = ::io_uring_get_sqe(&system_.ring);
    ::io_uring_prep_read(entry, slot->file().descriptor(), slot->into(), static_cast<unsigned>(slot->size()),
                         slot->offset());
    ::io_uring_sqe_set_data(entry, slot);
  }

  // Whether the kernel has taken all that is in the submission ring.
  bool send() noexcept {
    while (error_ == 0 && ::io_uring_sq_ready(&system_.ring) > 0) {
      const int sent = enter_(&system_.ring);
      if (sent > 0 || sent == -EINTR) {
        refusals_ = 0;
        continue;
      }
      // A second of refusals, and no read under way whose end might help.  What lies in the submission ring stays
      // there, so the ring is not used again.
      if (++refusals_ >= most_refusals && in_kernel() == 0) error_ = sent < 0 ? -sent : EBUSY;
      return false;
    }
    return true;
  }

  std::size_t busy() const noexcept { return slots_.size() - free_.size(); }
  std::size_t in_kernel() const noexcept { return busy() - ::io_uring_sq_ready(&system_.ring); }

  void reap() {
    for (;;) {
      bool all_sent = false, over = false;
      {
        const std::lock_guard lock(mutex_);
        collect();
        begin_waiting();
        all_sent = send();
        fail_the_rest();
        over = stopping_ && waiting_.empty() && busy() == 0;
      }
      if (!results_.empty()) {
        on_done_(results_);
        results_.clear();
      } else if (over) {
        return;
      } else if (!all_sent) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      } else {
        ::eventfd_t woken = 0;
        ::eventfd_read(system_.event, &woken);  // or a signal: then there is nothing to collect
      }
    }
  }

  void collect() noexcept {
    unsigned head = 0, seen = 0;
    ::io_uring_cqe* entry = nullptr;
    io_uring_for_each_cqe(&system_.ring, head, entry) {
      ++seen;
      auto* const slot = static_cast<Slot*>(::io_uring_cqe_get_data(entry));
      if (slot->take(entry->res)) {
        results_.push_back(slot->result());
        free_.push_back(slot);
      } else {
        prepare(slot);
      }
    }
    ::io_uring_cq_advance(&system_.ring, seen);
  }

  // Results for what will never be read: after a give-up also for those in the submission ring.
  void fail_the_rest() noexcept {
    if (!stopping_ && error_ == 0) return;
    if (error_ != 0 && busy() > 0) {
      for (Slot& slot : slots_) {
        if (std::find(free_.begin(), free_.end(), &slot) == free_.end()) results_.push_back(slot.failed(error_));
      }
      free_.clear();
      for (Slot& slot : slots_) free_.push_back(&slot);
    }
    while (!waiting_.empty() && results_.size() < results_.capacity())
      results_.push_back(Slot(waiting_.take()).failed(error_ != 0 ? error_ : ECANCELED));
  }

  static constexpr int most_refusals = 1000;

  const OnDone on_done_;
  const Enter enter_;
  System system_;
  std::mutex mutex_;  // for the submission ring and all below, but results_
  detail::WaitingReads waiting_;
  std::vector<Slot> slots_;
  std::vector<Slot*> free_;
  int refusals_ = 0, error_ = 0;
  bool stopping_ = false;
  std::vector<ReadResult> results_;  // reap()'s
  std::thread reaper_;
};

}  // namespace qwen3next
