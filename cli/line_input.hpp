#pragma once
// Lines from a person, with editing and history where there is libedit, or from a pipe.

#if defined(QWEN3NEXT_EDITLINE)
#include <editline/readline.h>
#endif

#include <clocale>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>

#include "cli/interrupt.hpp"
#include "cli/terminal.hpp"

namespace qwen3next::cli {

class LineInput {
 public:
  LineInput() : terminal_(is_terminal(stdin) && is_terminal(stdout)) {
#if defined(QWEN3NEXT_EDITLINE)
    if (!terminal_) return;
    // Letters beyond ASCII: by the user's locale, and where that has none, in UTF-8 as everything here.
    if (!std::setlocale(LC_CTYPE, "") || MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
    using_history();
    stifle_history(1000);
    rl_bind_key('\t', rl_insert);  // no file names: this is prose
#endif
  }

  bool terminal() const { return terminal_; }

  // The next line; nothing at the end (Ctrl-D).  Ctrl-C empties a line that is edited, and else ends the program.
  std::optional<std::string> next(const char* prompt) {
#if defined(QWEN3NEXT_EDITLINE)
    if (terminal_) return edited(prompt);
#endif
    if (terminal_) std::cout << prompt << std::flush;
    std::string line;
    if (!std::getline(std::cin, line)) {
      if (terminal_) std::cout << std::endl;
      return {};
    }
    return line;
  }

 private:
#if defined(QWEN3NEXT_EDITLINE)
  std::optional<std::string> edited(const char* prompt) {
    for (;;) {
      const Interruptible scope;  // so that editline puts the terminal back before the program ends
      char* typed = ::readline(prompt);
      if (interrupted()) {
        std::free(typed);
        std::cout << std::endl;
        continue;
      }
      if (!typed) {
        std::cout << std::endl;
        return {};
      }
      std::string line = typed;
      std::free(typed);
      if (!line.empty()) add_history(line.c_str());
      return line;
    }
  }
#endif

  bool terminal_;
};

}  // namespace qwen3next::cli
