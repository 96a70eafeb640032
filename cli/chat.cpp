// chat: a conversation in the terminal.

#include "cli/commands.hpp"
#include "cli/conversation.hpp"
#include "cli/generating.hpp"
#include "cli/line_input.hpp"

namespace qwen3next::cli {

namespace {

constexpr std::string_view commands_help =
    "  /help        this list\n"
    "  /reset       forget the conversation (the system message stays)\n"
    "  /save FILE   write the conversation as JSON, and what the model keeps of it to FILE.state\n"
    "  /load FILE   go on with a saved one; without its state it is read again\n"
    "  /stats       tokens and speed\n"
    "  /quit        leave, as Ctrl-D does\n"
    "Ctrl-C stops an answer.  A line that begins with // is a message that begins with /.\n";

struct ChatOptions {
  ModelOptions model;
  SamplingOptions sampling;
  std::string system;
};

class Chat {
 public:
  Chat(const Model& model, const ChatOptions& o)
      : session_(model.session(session_options(o.model))),
        options_(generate_options(session_, o.sampling)),
        conversation_(o.system),
        verbose_(o.model.verbose) {
    options_.drafts = drafts(o.model);
    (void)model.chat_template();  // says what is wrong before anything is typed
  }

  void run() {
    if (input_.terminal()) std::cerr << "/help lists the commands, Ctrl-D quits\n";
    while (const std::optional<std::string> line = input_.next("> ")) {
      if (line->find_first_not_of(" \t\r") == std::string::npos) continue;
      try {
        if (line->starts_with("/") && !line->starts_with("//")) {
          if (!command(*line)) return;
        } else {
          answer(line->starts_with("//") ? line->substr(1) : *line);
        }
      } catch (const Cancelled&) {
        if (!input_.terminal()) throw;
        std::cerr << "(stopped)\n";
      } catch (const Error& e) {
        // A person can try again; a script must be told.
        if (!input_.terminal()) throw;
        std::cerr << "error: " << e.what() << "\n";
      }
    }
  }

 private:
  // False to leave.
  bool command(const std::string& line) {
    const std::size_t space = std::min(line.find_first_of(" \t\r"), line.size());
    const std::string name = line.substr(0, space);
    const std::size_t begin = std::min(line.find_first_not_of(" \t\r", space), line.size());
    const std::string argument = line.substr(begin, line.find_last_not_of(" \t\r") + 1 - begin);
    const auto file = [&] {
      if (argument.empty()) throw Error(name + " needs the name of a file");
      return argument;
    };
    if (name == "/quit" || name == "/exit") return false;
    if (name == "/help") {
      std::cerr << commands_help;
    } else if (name == "/reset") {
      conversation_.reset();
      session_.reset();
    } else if (name == "/save") {
      conversation_.save(file_path(file()));
      std::cerr << "saved " << conversation_.messages().size() << " messages" << save_state(argument) << "\n";
    } else if (name == "/load") {
      conversation_.load(read_conversation(file()), argument);
      std::cerr << "loaded " << conversation_.messages().size() << " messages" << load_state(argument) << "\n";
    } else if (name == "/stats") {
      stats();
    } else {
      throw Error(name + " is no command; /help lists them, and // at the start of a message stands for /");
    }
    return true;
  }

  // The state lies beside the conversation.  What became of it, for the message.
  std::string save_state(const std::string& conversation) {
    const std::filesystem::path path = file_path(conversation + ".state");
    if (session_.tokens().empty()) {
      std::error_code ignored;
      std::filesystem::remove(path, ignored);  // an older one would be another conversation's
      return "";
    }
    const auto start = std::chrono::steady_clock::now();
    session_.save(path);
    return " and the state of " + count_text(static_cast<std::int64_t>(session_.tokens().size())) + " tokens, " +
           bytes_text(static_cast<double>(std::filesystem::file_size(path))) +
           format(" in %.2f s", seconds_since(start));
  }
  std::string load_state(const std::string& conversation) {
    const std::filesystem::path path = file_path(conversation + ".state");
    const auto start = std::chrono::steady_clock::now();
    try {
      session_.load(path);
    } catch (const Error& e) {
      return std::string("; they will be read again, since their state cannot be used: ") + e.what();
    }
    return " and the state of " + count_text(static_cast<std::int64_t>(session_.tokens().size())) +
           format(" tokens in %.2f s", seconds_since(start));
  }

  static std::string read_conversation(const std::string& path) {
    constexpr std::uintmax_t largest = 64u << 20;
    std::error_code error;
    if (std::filesystem::file_size(file_path(path), error) > largest && !error) {
      throw Error(path + ": larger than 64 MiB, which no saved conversation is");
    }
    return read_text(path, "a saved conversation");
  }

  void answer(std::string message) {
    if (message.ends_with('\r')) message.pop_back();
    conversation_.add({{"role", "user"}, {"content", std::move(message)}});
    const Interruptible scope;
    AnswerPrinter printer;
    Progress progress("reading", Progress::Unit::tokens);
    options_.on_prefill = [&](std::int64_t done, std::int64_t total) {
      done < total ? progress.update(done, total) : progress.clear();
      return !interrupted();
    };
    try {
      const Answer answer = session_.chat(
          conversation_.messages(),
          [&](const AnswerEvent& event) {
            printer.show(event);
            return printer.good() && !interrupted();
          },
          options_);
      printer.finish(true);
      conversation_.add(answer.message());
      note(answer.generated);
      if (!input_.terminal()) stop_if_interrupted();
    } catch (...) {
      printer.finish(true);
      conversation_.drop_last();  // no answer came of it
      throw;
    }
  }

  void note(const Generated& g) {
    last_ = g;
    ++answers_;
    generated_ += static_cast<std::int64_t>(g.tokens.size());
    if (g.reason == StopReason::cancelled) std::cerr << "(stopped)\n";
    if (g.reason == StopReason::max_tokens) std::cerr << "(cut off by -n " << options_.max_tokens << ")\n";
    if (g.reason == StopReason::context_full) {
      std::cerr << "(the context of " << session_.context() << " tokens is full: /reset starts anew)\n";
    }
    if (verbose_)
      std::cerr << timing_line(g, session_.model()) << "\n" << reuse_line(g.reuse, session_.model()) << "\n";
  }

  void stats() const {
    std::cerr << "context: " << count_text(static_cast<std::int64_t>(session_.tokens().size())) << " of "
              << count_text(session_.context()) << " tokens\n"
              << "answers: " << answers_ << ", " << count_text(generated_) << " tokens\n";
    if (answers_ > 0) {
      std::cerr << "last: " << timing_line(last_, session_.model()) << "\n"
                << "last prompt: " << reuse_line(last_.reuse, session_.model()) << "\n";
    }
    const PrefixStatistics known = session_.model().prefix_statistics();
    std::cerr << "states to go back to: " << known.snapshots << " in " << bytes_text(known.bytes) << " of "
              << bytes_text(known.budget) << "\n";
    std::cerr << "backend: " << session_.model().backend_description() << "\n";
    if (const auto experts = session_.model().expert_statistics()) std::cerr << experts_line(*experts) << "\n";
  }

  Session session_;
  GenerateOptions options_;
  Conversation conversation_;
  LineInput input_;
  bool verbose_;
  Generated last_;
  std::int64_t answers_ = 0, generated_ = 0;
};

void chat(const ChatOptions& o) { Chat(open_model(o.model), o).run(); }

}  // namespace

void add_chat(CLI::App& app) {
  auto o = std::make_shared<ChatOptions>();
  CLI::App& command = *app.add_subcommand("chat", "Talk with the model in the terminal");
  add_model_options(command, o->model);
  add_session_options(command, o->model);
  add_cache_options(command, o->model);
  add_mtp_option(command, o->model);
  command.add_option("--system", o->system, "The system message")->option_text("TEXT");
  add_sampling_options(command, o->sampling);
  add_example(command,
              "qwen3next chat model.gguf --system 'You are brief.'\n\nWhile talking:\n" + std::string(commands_help) +
                  "Each line is a message.  Reasoning is shown dim.  With input from a pipe it answers line by line.");
  command.callback([o] { chat(*o); });
}

}  // namespace qwen3next::cli
