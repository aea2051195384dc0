// LayerNorm over channels.

#include <doctest/doctest.h>

#include "reference.h"

using namespace cnk;
using namespace cnk::test;

namespace {

struct Problem {
  int64_t rows, c;
  float eps;
  Tensor x;
  Values weight, bias;
  Buffer padded_weight, padded_bias;

  Problem(DType dtype, int64_t rows, int64_t c, double mean, double spread, float eps = 1e-6f)
      : Problem(dtype, rows, c, mean, spread, eps, Random(uint32_t(rows * 1000 + c))) {}

  Expected expected() const { return reference::layernorm(x.values(), {}, c, weight, bias, eps); }

  Tensor run(const Kernels& k, int threads) {
    Tensor y(x.dtype(), x.count());
    const LayernormArgs args = {
        x.dtype(), x.data(), y.data(), rows, c, eps, padded_weight.as<float>(), padded_bias.as<float>()};
    in_team(threads, [&](Team& team) { k.ops.layernorm(args, team); });
    return y;
  }

 private:
  Problem(DType dtype, int64_t rows, int64_t c, double mean, double spread, float eps, Random random)
      : rows(rows),
        c(c),
        eps(eps),
        x(dtype, random.floats(rows * c, mean - spread, mean + spread)),
        weight(random.floats(c, -2, 2)),
        bias(random.floats(c, -1, 1)),
        padded_weight(padded(weight, c)),
        padded_bias(padded(bias, c)) {}
};

void check(Problem problem) {
  const Expected expected = problem.expected();
  CAPTURE(dtype_name(problem.x.dtype()));
  CAPTURE(problem.rows);
  CAPTURE(problem.c);
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const Tensor y = problem.run(k, 1);
    CHECK(mismatch(y, expected) == "");
    for (int threads : kTeams) {
      CAPTURE(threads);
      if (threads > 1) CHECK(difference(problem.run(k, threads), y) == "");
    }
  }
}

}  // namespace

TEST_CASE("every channel count, in every dtype, with one row and with several") {
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int64_t rows : {1, 2, 7, 57}) check(Problem(dtype, rows, c, 0.3, 2));
    }
    for (int64_t c : {63, 64, 65, 127, 128, 129, 192, 384, 768, 1000}) check(Problem(dtype, 5, c, 0.3, 2));
  }
}

TEST_CASE("long rows") {
  for (DType dtype : kDTypes) {
    for (int64_t c : {8191, 8192, 8193, 9001, 16384}) check(Problem(dtype, 3, c, 0.3, 2));
  }
}

TEST_CASE("a mean a hundred times the deviation, and rows that are constant") {
  for (int64_t c : {5, 96, 768, 9001}) {
    check(Problem(DType::kFloat32, 9, c, 100, 1.7));
    check(Problem(DType::kFloat32, 9, c, -3, 0));
    check(Problem(DType::kBFloat16, 9, c, 40, 0, 1e-5f));
  }
}

TEST_CASE("statistics that fp16 could not hold") {
  check(Problem(DType::kFloat16, 4, 768, 0, 60000));
  check(Problem(DType::kFloat16, 4, 96, 60000, 5000));
}

TEST_CASE("NaN and infinity spoil their row, and nothing else") {
  for (int64_t c : {17, 96, 8200}) {
    for (DType dtype : kDTypes) {
      CAPTURE(dtype_name(dtype));
      Problem problem(dtype, 5, c, 0, 1);
      for (const Kernels& k : kernels()) {
        CAPTURE(k.name());
        const Tensor clean = problem.run(k, 1);
        const int64_t spoilt = 3 * c - 1;  // last channel of row 2
        const double kept = problem.x.get(spoilt);
        for (double poison : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
          problem.x.set(spoilt, poison);
          const Tensor y = problem.run(k, 2);
          int64_t wrong = 0;
          for (int64_t i = 2 * c; i < 3 * c; ++i) wrong += !std::isnan(y.get(i));
          CHECK(wrong == 0);
          CHECK(y.same_bits(clean, 0, 2 * c));
          CHECK(y.same_bits(clean, 3 * c, 5 * c));
        }
        problem.x.set(spoilt, kept);
      }
    }
  }
}
