// The whole model against Hugging Face transformers in fp32: logits, MTP logits, and where they part, the first layer.

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "backends/cpu/cpu_backend.hpp"
#include "backends/reference/reference_backend.hpp"
#include "model/forward.hpp"
#include "model/mtp.hpp"
#include "tests/support/backends.hpp"
#include "tests/support/golden.hpp"
#include "tests/support/observed.hpp"
#include "tests/support/run_model.hpp"
#include "weights/checkpoint.hpp"

using namespace qwen3next;
using test::nmse;

namespace {

const std::vector<std::string> goldens{"release", "fused", "sharded", "yarn", "fp8"};

template <BackendOps B>
void check_golden(const std::string& name, test::Observed<B> be, double bound) {
  CAPTURE(name);
  const Checkpoint checkpoint = Checkpoint::open(test::golden(name));
  const test::Expected expected(name);
  test::RunModel<test::Observed<B>> run(checkpoint, be, static_cast<int>(expected.tokens().size()));

  const std::vector<float> logits = run.logits(expected.tokens());
  for (std::size_t i = 0; i < run.be.residual.size(); ++i) {  // names the first layer that differs
    CAPTURE(i);
    REQUIRE(nmse(run.be.residual[i], expected.floats("hidden." + std::to_string(i))) < bound);
  }
  const double error = nmse(logits, expected.floats("logits"));
  MESSAGE(name << ": logits NMSE " << error);
  CHECK(error < bound);
}

template <BackendOps B>
void check_mtp(const std::string& name, B be, double bound) {
  CAPTURE(name);
  const Checkpoint checkpoint = Checkpoint::open(test::golden(name));
  const test::Expected expected(name);
  REQUIRE(checkpoint.config.has_mtp == expected.has("mtp_logits"));
  if (!checkpoint.config.has_mtp) return;
  test::RunModel<B> run(checkpoint, std::move(be), static_cast<int>(expected.tokens().size()));
  const double error = nmse(run.mtp_logits(expected.tokens()), expected.floats("mtp_logits"));
  MESSAGE(name << ": MTP logits NMSE " << error);
  CHECK(error < bound);
}

}  // namespace

TEST_CASE("the reference backend gives transformers' logits") {
  for (const std::string& name : goldens) check_golden(name, test::Observed<ReferenceBackend>(), 3e-10);
}

TEST_CASE("the reference backend gives the MTP head's logits") {
  for (const std::string& name : goldens) check_mtp(name, ReferenceBackend(), 3e-10);
}

TEST_CASE("an MTP block's own head and embeddings are used, where it has them") {
  const Checkpoint checkpoint = Checkpoint::open(test::golden("release"));
  const std::vector<std::int32_t> tokens = test::Expected("release").tokens();
  const auto run = [&](auto change) {
    test::RunModel<ReferenceBackend> model(checkpoint, ReferenceBackend(), static_cast<int>(tokens.size()));
    change(*model.weights.mtp);
    return model.mtp_logits(tokens);
  };
  const std::vector<float> shared = run([](auto&) {});
  std::vector<float> doubled = run([](auto& mtp) { mtp.lm_head.scale = 2; });
  for (float& x : doubled) x /= 2;
  CHECK(doubled == shared);
  CHECK(nmse(run([](auto& mtp) { mtp.embed_tokens.scale = 64; }), shared) < 1e-6);  // its norm takes that away
  CHECK(nmse(run([](auto& mtp) { mtp.embed_tokens = mtp.lm_head; }), shared) > 0.1);
}

TEST_CASE("the cpu backend gives transformers' logits on every ISA") {
  for (std::string_view isa : cpu::available_isas()) {
    CAPTURE(isa);
    for (const std::string& name : goldens) {
      check_golden(name, test::Observed<CpuBackend>(test::cpu(isa, 2, KvType::f32)), 1e-9);
      check_golden(name, test::Observed<CpuBackend>(test::cpu(isa, 2, KvType::f16)), 1e-5);
    }
  }
}

TEST_CASE("the cpu backend gives the MTP head's logits on every ISA") {
  for (std::string_view isa : cpu::available_isas()) {
    CAPTURE(isa);
    for (const std::string& name : goldens) check_mtp(name, CpuBackend(test::cpu(isa, 2, KvType::f32)), 1e-9);
  }
}
