// The gradients of LayerNorm over channels.

#include <doctest/doctest.h>

#include "reference_backward.h"

using namespace cnk;
using namespace cnk::test;

namespace {

struct Result {
  Tensor dx, dweight, dbias;
};

struct Problem {
  int64_t rows, c;
  Tensor x, dy;
  Values weight;
  Buffer padded_weight;
  static constexpr float kEps = 1e-6f;

  Problem(DType dtype, int64_t rows, int64_t c, double mean)
      : Problem(dtype, rows, c, mean, Random(uint32_t(rows * 1000 + c))) {}

  Result run(const Kernels& k, int threads) {
    const int64_t wide = pad_channels(c);
    Tensor dweight(DType::kFloat32, wide), dbias(DType::kFloat32, wide);
    Result out{Tensor(x.dtype(), x.count()), Tensor(DType::kFloat32, c), Tensor(DType::kFloat32, c)};
    LayernormBackwardArgs args = {};
    args.dtype = x.dtype();
    args.x = x.data();
    args.dy = dy.data();
    args.dx = out.dx.data();
    args.rows = rows;
    args.c = c;
    args.eps = kEps;
    args.weight = padded_weight.as<float>();
    args.dweight = static_cast<float*>(dweight.data());
    args.dbias = static_cast<float*>(dbias.data());
    Buffer work = workspace(k.ops.layernorm_backward_workspace(args));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.layernorm_backward(args, team); });
    for (int64_t i = 0; i < c; ++i) {
      out.dweight.set(i, dweight.get(i));
      out.dbias.set(i, dbias.get(i));
    }
    return out;
  }

 private:
  Problem(DType dtype, int64_t rows, int64_t c, double mean, Random random)
      : rows(rows),
        c(c),
        x(dtype, random.floats(rows * c, mean - 2, mean + 2)),
        dy(dtype, random.floats(rows * c, -1, 1)),
        weight(random.floats(c, -2, 2)),
        padded_weight(padded(weight, c)) {}
};

void check(Problem problem) {
  const double relative = 64 * reference::kUnit;
  const reference::LayernormGradient want =
      reference::layernorm_gradient(problem.x.values(), problem.dy.values(), {}, problem.c, problem.weight,
                                    double(Problem::kEps), relative);
  CAPTURE(dtype_name(problem.x.dtype()));
  CAPTURE(problem.rows);
  CAPTURE(problem.c);
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const Result out = problem.run(k, 1);
    CHECK(mismatch(out.dx, want.x) == "");
    CHECK(mismatch(out.dweight, want.weight.within(relative)) == "");
    CHECK(mismatch(out.dbias, want.bias.within(relative)) == "");
    for (int threads : kTeams) {
      CAPTURE(threads);
      if (threads == 1) continue;
      const Result again = problem.run(k, threads);
      CHECK(difference(again.dx, out.dx) == "");
      CHECK(difference(again.dweight, out.dweight) == "");
      CHECK(difference(again.dbias, out.dbias) == "");
    }
  }
}

}  // namespace

TEST_CASE("every channel count, in every dtype") {
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int64_t rows : {1, 2, 31, 32, 33, 100}) check(Problem(dtype, rows, c, 0.3));
    }
  }
}

TEST_CASE("many rows, many channels, a mean of many deviations") {
  check(Problem(DType::kFloat32, 3137, 33, 0.3));
  check(Problem(DType::kBFloat16, 7, 3072, 0.3));
  check(Problem(DType::kFloat32, 40, 96, 100));
}

TEST_CASE("NaN spoils its row of dx and the parameters' gradients, no other row") {
  Problem problem(DType::kBFloat16, 40, 19, 0.3);
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const Tensor clean = problem.run(k, 1).dx;
    const double kept = problem.x.get(33 * 19 + 18);
    problem.x.set(33 * 19 + 18, std::nan(""));
    const Result out = problem.run(k, 2);
    problem.x.set(33 * 19 + 18, kept);
    int64_t wrong = 0;
    for (int64_t i = 0; i < out.dx.count(); ++i)
      wrong += i / 19 == 33 ? !std::isnan(out.dx.get(i)) : !out.dx.same_bits(clean, i, i + 1);
    for (int64_t i = 0; i < 19; ++i) wrong += !std::isnan(out.dweight.get(i)) + std::isnan(out.dbias.get(i));
    CHECK(wrong == 0);
  }
}
