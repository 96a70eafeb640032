#include <doctest/doctest.h>

#include "tests/weights/fixtures.hpp"
#include "text/load.hpp"

using namespace qwen3next;
using namespace qwen3next::test;

namespace {

// The 256 byte tokens, a merge, a control token: in the spelling of both containers.
std::vector<std::string> byte_tokens() {
  std::vector<std::string> tokens;
  int shifted = 256;
  for (int b = 0; b < 256; ++b) {
    const bool kept = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const int code = kept ? b : shifted++;
    std::string utf8;
    if (code < 128) {
      utf8 = static_cast<char>(code);
    } else {
      utf8 = {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    }
    tokens.push_back(utf8);
  }
  return tokens;
}

fs::path write_tokenizer_gguf(const TempFolder& folder, auto change) {
  const fs::path path = folder / "t.gguf";
  GgufWriter out(path);
  out.set_string("general.architecture", "qwen3next");
  std::vector<std::string> tokens = byte_tokens();
  tokens.push_back("ab"), tokens.push_back("<|im_end|>");
  std::vector<std::int32_t> types(258, 1);
  types[257] = 3;
  out.set_string("tokenizer.ggml.model", "gpt2"), out.set_string("tokenizer.ggml.pre", "qwen2");
  out.set_strings("tokenizer.ggml.tokens", tokens), out.set_i32s("tokenizer.ggml.token_type", types);
  out.set_strings("tokenizer.ggml.merges", std::vector<std::string>{"a b"});
  out.set_u32("tokenizer.ggml.eos_token_id", 257);
  change(out);
  out.finish();
  return path;
}
fs::path write_tokenizer_gguf(const TempFolder& folder) {
  return write_tokenizer_gguf(folder, [](GgufWriter&) {});
}

}  // namespace

TEST_CASE("load: tokenizer from GGUF") {
  TempFolder folder;
  const Tokenizer tokenizer = load_tokenizer(write_tokenizer_gguf(folder));
  CHECK(tokenizer.encode("cab") == std::vector<std::int32_t>{'c', 256});
  const auto refused = [&](auto change, const std::string& part) {
    CHECK(contains(error_of([&] { load_tokenizer(write_tokenizer_gguf(folder, change)); }), part));
  };
  refused([](GgufWriter& out) { out.set_string("tokenizer.ggml.model", "llama"); },
          "model is 'llama', expected 'gpt2'");
  refused([](GgufWriter& out) { out.set_string("tokenizer.ggml.pre", "qwen35"); }, "pre is 'qwen35', expected 'qwen2'");
  refused([](GgufWriter& out) { out.set_i32s("tokenizer.ggml.token_type", std::vector<std::int32_t>{1}); },
          "token_type has 1 elements, expected 258");
  refused([](GgufWriter& out) { out.set_i32s("tokenizer.ggml.token_type", std::vector<std::int32_t>(258, 9)); },
          "token_type has 9, expected 1..6");
  refused([](GgufWriter& out) { out.set_u32("tokenizer.ggml.merges", 1); }, "expected array of string");
  GgufWriter(folder / "none.gguf").finish();
  CHECK(contains(error_of([&] { load_tokenizer(folder / "none.gguf"); }), "has no tokenizer"));
}

TEST_CASE("load: tokenizer from a folder without weights") {
  TempFolder folder;
  CHECK(contains(error_of([&] { load_tokenizer(folder.path()); }), "no tokenizer.json in this folder"));
  CHECK(contains(error_of([&] { load_tokenizer(folder / "none"); }), "none: no such file or folder"));
  write_text(folder / "tokenizer.json", "{");
  CHECK(contains(error_of([&] { load_tokenizer(folder.path()); }), "tokenizer.json"));
}

TEST_CASE("load: chat template") {
  TempFolder folder;
  const auto config = [&](const std::string& text) { write_text(folder / "tokenizer_config.json", text); };
  const auto load = [&] { return load_chat_template_text(folder.path()); };
  CHECK(!load());
  config("{}");
  CHECK(!load());
  config(R"({"chat_template": null})");
  CHECK(!load());
  config(R"({"chat_template": "T"})");
  CHECK(load() == "T");
  config(R"({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]})");
  CHECK(load() == "D");
  config(R"({"chat_template": [5, {"name": "default"}]})");
  CHECK(contains(error_of(load), "without one named 'default'"));
  config(R"({"chat_template": 5})");
  CHECK(contains(error_of(load), "chat_template is a number, expected a string or a list"));
  config("[]");
  CHECK(contains(error_of(load), "is an array, expected an object"));
  write_text(folder / "chat_template.jinja", "J\n");
  CHECK(load() == "J\n");

  CHECK(!load_chat_template_text(write_tokenizer_gguf(folder)));
  CHECK(load_chat_template_text(write_tokenizer_gguf(
            folder, [](GgufWriter& out) { out.set_string("tokenizer.chat_template", "G"); })) == "G");
}

TEST_CASE("load: generation defaults") {
  TempFolder folder;
  const auto load = [&] { return load_generation_defaults(folder.path()); };
  CHECK(load().eos_token_ids.empty());
  CHECK(!load().temperature);
  write_text(folder / "config.json", R"({"eos_token_id": 7})");
  CHECK(load().eos_token_ids == std::vector<std::int32_t>{7});
  const auto config = [&](const std::string& text) { write_text(folder / "generation_config.json", text); };
  config(R"({"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
             "presence_penalty": 1, "eos_token_id": [151645, 151643, 151645]})");
  GenerationDefaults d = load();
  CHECK(d.temperature == 0.7);
  CHECK(d.top_p == 0.8);
  CHECK(d.top_k == 20);
  CHECK(d.min_p == 0.05);
  CHECK(d.repetition_penalty == 1.1);
  CHECK(d.presence_penalty == 1.0);
  CHECK(!d.frequency_penalty);
  CHECK(d.eos_token_ids == std::vector<std::int32_t>{151645, 151643});
  config(R"({"do_sample": false, "temperature": 0.7, "eos_token_id": 3})");
  CHECK(load().temperature == 0.0);
  CHECK(load().eos_token_ids == std::vector<std::int32_t>{3});
  for (const auto& [text, part] : {std::pair(R"({"temperature": "x"})", "temperature is a string, expected a number"),
                                   std::pair(R"({"top_k": 1.5})", "top_k is 1.5, expected a count"),
                                   std::pair(R"({"top_k": 1e30})", "expected a count"),
                                   std::pair(R"({"eos_token_id": "x"})", "eos_token_id has a string"),
                                   std::pair(R"({"eos_token_id": [-1]})", "eos_token_id has -1, which is no token id"),
                                   std::pair(R"({"eos_token_id": 18446744073709551615})", "which is no token id"),
                                   std::pair("{", "not valid JSON")}) {
    config(text);
    CHECK(contains(error_of(load), part));
  }

  d = load_generation_defaults(write_tokenizer_gguf(folder, [](GgufWriter& out) {
    out.set_f32("general.sampling.temp", 0.6f), out.set_i32("general.sampling.top_k", 20);
    out.set_f32("general.sampling.top_p", 0.95f), out.set_f32("general.sampling.penalty_repeat", 1.05f);
    out.set_u32("tokenizer.ggml.eot_token_id", 5);
  }));
  CHECK(d.temperature == 0.6);
  CHECK(d.top_k == 20);
  CHECK(d.top_p == 0.95);
  CHECK(d.repetition_penalty == 1.05);
  CHECK(!d.min_p);
  CHECK(d.eos_token_ids == std::vector<std::int32_t>{257, 5});
}
