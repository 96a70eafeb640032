// How far to guess ahead: close to the best depth whatever guesses cost and how often they are right, and never much
// slower than without.

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "generate/speculate.hpp"

using namespace qwen3next;

namespace {

// A model whose pass of 1 + n tokens takes 1 + n cost seconds, and whose guesses are right with probability `right`.
struct Machine {
  double cost, right, noise;
  std::mt19937_64 random{5};

  double uniform() { return static_cast<double>(random() >> 11) * 0x1p-53; }
  int correct(int drafts) {
    int n = 0;
    while (n < drafts && uniform() < right) ++n;
    return n;
  }
  double seconds(int drafts) { return (1 + drafts * cost) * (1 + noise * (uniform() - 0.5)); }

  double expected_rate(int drafts) const {
    double tokens = 1, all = 1;
    for (int i = 0; i < drafts; ++i) tokens += all *= right;
    return tokens / (1 + drafts * cost);
  }
  double best_rate() const {
    double best = 0;
    for (int n = 0; n <= most_drafts; ++n) best = std::max(best, expected_rate(n));
    return best;
  }
  // Tokens per second of `tokens` tokens.
  double run(DraftDepth& depth, int tokens, int most = most_drafts) {
    double time = 0;
    int done = 0;
    while (done < tokens) {
      const int drafts = depth.choose(most);
      REQUIRE(drafts <= most);
      const int n = correct(drafts);
      const double s = seconds(drafts);
      depth.note(drafts, n, s);
      time += s;
      done += n + 1;
    }
    return done / time;
  }
};

}  // namespace

TEST_CASE("auto is never slower than no guessing by more than 2 %") {
  for (const double right : {0., 0.2, 0.5, 0.8, 0.95}) {
    for (const double cost : {0.05, 0.3, 0.6, 1.1}) {
      CAPTURE(right);
      CAPTURE(cost);
      Machine m{cost, right, 0.1};
      DraftDepth depth;
      CHECK(m.run(depth, 2000) > 0.98);
    }
  }
}

TEST_CASE("auto finds the depth that pays") {
  for (const double right : {0.5, 0.7, 0.9}) {
    for (const double cost : {0.05, 0.2, 0.4}) {
      CAPTURE(right);
      CAPTURE(cost);
      Machine m{cost, right, 0.1};
      DraftDepth depth;
      CHECK(m.run(depth, 4000) > 0.95 * m.best_rate());
    }
  }
}

TEST_CASE("auto follows a text that changes") {
  Machine m{0.3, 0.05, 0.1};
  DraftDepth depth;
  m.run(depth, 2000);
  m.right = 0.9;
  m.run(depth, 4000);  // until it is noticed
  CHECK(m.run(depth, 2000) > 0.93 * m.best_rate());
  m.right = 0.05;
  m.run(depth, 200);
  CHECK(m.run(depth, 2000) > 0.97);
}

TEST_CASE("no more guesses than there is room for") {
  Machine m{0.01, 0.99, 0};
  DraftDepth depth;
  m.run(depth, 500, 2);
  m.run(depth, 500, 0);
  m.run(depth, 500, 1);
}

TEST_CASE("statistics count what was guessed, and what came true of that") {
  MtpStatistics s;
  s.add(3, 1);
  s.add(3, 3);
  s.add(1, 0);
  s.add(0, 0);
  CHECK(s.passes == 4);
  CHECK(s.tokens == 8);
  CHECK(s.tokens_per_pass() == 2);
  CHECK(s.acceptance(0) == doctest::Approx(2. / 3));
  CHECK(s.acceptance(1) == doctest::Approx(0.5));
  CHECK(s.acceptance(3) == 0);
}
