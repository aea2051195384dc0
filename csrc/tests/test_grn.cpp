// Global response normalisation of whole images.

#include <doctest/doctest.h>

#include "reference.h"

using namespace cnk;
using namespace cnk::test;

namespace {

struct Problem {
  int64_t n, pixels, c;
  Tensor x;
  Values weight, bias;
  Buffer padded_weight, padded_bias;
  static constexpr float kEps = 1e-6f;

  Problem(DType dtype, int64_t n, int64_t pixels, int64_t c, double spread)
      : Problem(dtype, n, pixels, c, spread, Random(uint32_t(pixels * 1000 + c))) {}

  Expected expected() const { return reference::grn(x.values(), n, pixels, c, weight, bias, kEps); }

  Tensor run(const Kernels& k, int threads) {
    Tensor y(x.dtype(), x.count());
    Buffer scale = workspace(n * pad_channels(c) * 4);
    const GrnArgs args = {x.dtype(),
                          x.data(),
                          y.data(),
                          n,
                          pixels,
                          c,
                          kEps,
                          padded_weight.as<float>(),
                          padded_bias.as<float>(),
                          scale.as<float>()};
    in_team(threads, [&](Team& team) { k.ops.grn(args, team); });
    return y;
  }

 private:
  Problem(DType dtype, int64_t n, int64_t pixels, int64_t c, double spread, Random random)
      : n(n),
        pixels(pixels),
        c(c),
        x(dtype, random.floats(n * pixels * c, -spread, spread)),
        weight(random.floats(c, -2, 2)),
        bias(random.floats(c, -1, 1)),
        padded_weight(padded(weight, c)),
        padded_bias(padded(bias, c)) {}
};

void check(Problem problem) {
  const Expected expected = problem.expected();
  CAPTURE(dtype_name(problem.x.dtype()));
  CAPTURE(problem.n);
  CAPTURE(problem.pixels);
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

TEST_CASE("sums of squares that fp16 could not hold, and an image of zeros") {
  check(Problem(DType::kFloat16, 2, 100, 40, 1000));
  check(Problem(DType::kFloat32, 2, 9, 40, 0));
}

TEST_CASE("NaN and infinity spoil their image, and nothing else") {
  for (DType dtype : kDTypes) {
    CAPTURE(dtype_name(dtype));
    Problem problem(dtype, 3, 10, 37, 1);
    const int64_t image = 10 * 37, spoilt = image + 4 * 37 + 36;
    for (const Kernels& k : kernels()) {
      CAPTURE(k.name());
      const Tensor clean = problem.run(k, 1);
      const double kept = problem.x.get(spoilt);
      problem.x.set(spoilt, std::nan(""));
      const Tensor y = problem.run(k, 2);
      problem.x.set(spoilt, HUGE_VAL);
      const Tensor z = problem.run(k, 2);
      problem.x.set(spoilt, kept);
      int64_t wrong = 0;
      for (int64_t i = image; i < 2 * image; ++i)
        wrong += !std::isnan(y.get(i));  // the mean over channels is NaN
      CHECK(wrong == 0);
      CHECK(std::isnan(z.get(spoilt)));  // Inf / Inf
      for (const Tensor* out : {&y, &z}) {
        CHECK(out->same_bits(clean, 0, image));
        CHECK(out->same_bits(clean, 2 * image, 3 * image));
      }
    }
  }
}
