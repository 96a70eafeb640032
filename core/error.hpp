#pragma once
// The one exception type of the library.

#include <stdexcept>
#include <string>
#include <utility>

namespace qwen3next {

// Thrown for everything that can go wrong outside the program's own control: a file that is not what it says, an
// option that does not exist, memory that is not there.  The message names what, where, expected, found, and what
// to do about it, in one line, ready to be shown to a person.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The reader asked for it (a callback returned false, or Ctrl-C): not a failure, so a type of its own.
class Cancelled : public Error {
 public:
  Cancelled() : Error("cancelled") {}
};

}  // namespace qwen3next
