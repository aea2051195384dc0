// The gradients of global response normalisation.

#include <doctest/doctest.h>

#include "reference_backward.h"

using namespace cnk;
using namespace cnk::test;

namespace {

struct Result {
  Tensor dx, dweight, dbias;
};

struct Problem {
  int64_t n, pixels, c;
  Tensor x, dy;
  Values weight;
  Buffer padded_weight;
  static constexpr float kEps = 1e-6f;

  Problem(DType dtype, int64_t n, int64_t pixels, int64_t c, double spread)
      : Problem(dtype, n, pixels, c, spread, Random(uint32_t(pixels * 1000 + c))) {}

  Result run(const Kernels& k, int threads) {
    const int64_t wide = pad_channels(c);
    Tensor dweight(DType::kFloat32, wide), dbias(DType::kFloat32, wide);
    Result out{Tensor(x.dtype(), x.count()), Tensor(DType::kFloat32, c), Tensor(DType::kFloat32, c)};
    Buffer sums = workspace(3 * n * wide * 4);
    GrnBackwardArgs args = {};
    args.dtype = x.dtype();
    args.x = x.data();
    args.dy = dy.data();
    args.dx = out.dx.data();
    args.n = n;
    args.pixels = pixels;
    args.c = c;
    args.eps = kEps;
    args.weight = padded_weight.as<float>();
    args.dweight = static_cast<float*>(dweight.data());
    args.dbias = static_cast<float*>(dbias.data());
    args.sums = sums.as<float>();
    in_team(threads, [&](Team& team) { k.ops.grn_backward(args, team); });
    for (int64_t i = 0; i < c; ++i) {
      out.dweight.set(i, dweight.get(i));
      out.dbias.set(i, dbias.get(i));
    }
    return out;
  }

 private:
  Problem(DType dtype, int64_t n, int64_t pixels, int64_t c, double spread, Random random)
      : n(n),
        pixels(pixels),
        c(c),
        x(dtype, random.floats(n * pixels * c, -spread, spread)),
        dy(dtype, random.floats(n * pixels * c, -1, 1)),
        weight(random.floats(c, -2, 2)),
        padded_weight(padded(weight, c)) {}
};

void check(Problem problem) {
  const double relative = 64 * reference::kUnit;
  const reference::GrnGradient want =
      reference::grn_gradient(problem.x.values(), problem.dy.values(), problem.n, problem.pixels, problem.c,
                              problem.weight, double(Problem::kEps));
  Expected dx{want.x, Values(want.x.size(), relative * (2 + reference::largest(want.x)))};
  CAPTURE(dtype_name(problem.x.dtype()));
  CAPTURE(problem.n);
  CAPTURE(problem.pixels);
  CAPTURE(problem.c);
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const Result out = problem.run(k, 1);
    CHECK(mismatch(out.dx, dx) == "");
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

TEST_CASE("every channel count, in every dtype, with one image and with several") {
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int64_t n : {1, 3}) {
        for (int64_t pixels : {1, 2, 35}) check(Problem(dtype, n, pixels, c, 2));
      }
    }
  }
}

TEST_CASE("a large image, and many channels") {
  check(Problem(DType::kFloat32, 1, 57 * 55, 33, 2));
  check(Problem(DType::kBFloat16, 2, 49, 3072, 2));
}

TEST_CASE("a channel of zeros has a gradient, by its factor alone; so has an image of zeros") {
  check(Problem(DType::kFloat32, 2, 9, 40, 0));
  Problem problem(DType::kFloat32, 2, 9, 40, 2);
  for (int64_t p = 0; p < 9; ++p) problem.x.set(p * 40 + 7, 0);
  check(std::move(problem));
}

TEST_CASE("NaN spoils its image, and no other") {
  Problem problem(DType::kBFloat16, 3, 10, 37, 1);
  const int64_t image = 10 * 37, spoilt = image + 4 * 37 + 36;
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const Tensor clean = problem.run(k, 1).dx;
    const double kept = problem.x.get(spoilt);
    problem.x.set(spoilt, std::nan(""));
    const Result out = problem.run(k, 2);
    problem.x.set(spoilt, kept);
    int64_t wrong = 0;
    for (int64_t i = image; i < 2 * image; ++i) wrong += !std::isnan(out.dx.get(i));
    CHECK(wrong == 0);
    CHECK(out.dx.same_bits(clean, 0, image));
    CHECK(out.dx.same_bits(clean, 2 * image, 3 * image));
  }
}
