#pragma once
// Ctrl-C, and files that are cut off while they are mapped.

#include <atomic>
#include <csignal>
#include <cstdlib>

#include "core/error.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace qwen3next::cli {

inline constexpr int exit_interrupted = 130;

namespace detail {
inline std::atomic<bool> stoppable = false, stop_requested = false;
static_assert(std::atomic<bool>::is_always_lock_free, "used in a signal handler");

extern "C" inline void on_interrupt(int) {
#if defined(_WIN32)
  std::signal(SIGINT, on_interrupt);  // which it forgets with every signal
#endif
  if (!stoppable || stop_requested) std::_Exit(exit_interrupted);
  stop_requested = true;
}

#if defined(__unix__) || defined(__APPLE__)
// Another program truncated a mapped file: nothing can be saved, but the reason can be told.
extern "C" inline void on_bus_error(int signal, siginfo_t* what, void*) {
  if (what->si_code == BUS_ADRERR) {
    constexpr char text[] = "qwen3next: error: a model file became shorter while it was in use, or its disk failed\n";
    if (::write(STDERR_FILENO, text, sizeof text - 1) < 0) std::_Exit(1);
    std::_Exit(1);
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}
#endif
}  // namespace detail

// Ctrl-C ends the program at once, except within this scope, where the first one only makes interrupted() true: the
// work that goes on there asks for it between two steps, and ends cleanly.
class Interruptible {
 public:
  Interruptible() {
    detail::stop_requested = false;
    detail::stoppable = true;
  }
  ~Interruptible() { detail::stoppable = false; }
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;
};

inline bool interrupted() noexcept { return detail::stop_requested; }
inline void stop_if_interrupted() {
  if (interrupted()) throw Cancelled();
}

inline void catch_signals() {
  std::signal(SIGINT, detail::on_interrupt);
#if defined(__unix__) || defined(__APPLE__)
  struct sigaction bus {};
  bus.sa_sigaction = detail::on_bus_error;
  bus.sa_flags = SA_SIGINFO;
  ::sigaction(SIGBUS, &bus, nullptr);
#endif
#ifdef SIGPIPE
  std::signal(SIGPIPE,
              SIG_DFL);  // whoever reads our output has had enough: end quietly, even if started with it ignored
#endif
#ifdef SIGXFSZ
  std::signal(SIGXFSZ, SIG_IGN);  // a limit of file size is an error of the write, like a full disk
#endif
}

}  // namespace qwen3next::cli
