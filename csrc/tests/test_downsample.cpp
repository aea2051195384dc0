// LayerNorm followed by a convolution whose stride is its kernel size.

#include <doctest/doctest.h>

#include "reference.h"

using namespace cnk;
using namespace cnk::test;
using reference::Image;

namespace {

struct Case {
  DType dtype, out_dtype;
  Image image;
  int patch;
  int64_t d;
  int64_t out_h() const { return image.h / patch; }
  int64_t out_w() const { return image.w / patch; }
  int64_t out_count() const { return image.n * out_h() * out_w() * d; }
};

struct Problem {
  Case s;
  Tensor x;
  Values norm_weight, norm_bias, weight, bias;  // weight (D, patch, patch, C)
  Buffer norm_weight_, norm_bias_, weight_, bias_;
  static constexpr float kEps = 1e-6f;

  Problem(const Case& s, uint32_t seed) : Problem(s, Random(seed)) {}

  Expected expected(Products products) const {
    const Expected y = reference::layernorm(x.values(), {}, s.image.c, norm_weight, norm_bias, double(kEps));
    const Values w = reference::operand(weight, products);
    const double unit = reference::product_unit(products), most = reference::largest(w);
    Expected out{Values(s.out_count()), Values(s.out_count())};
    const int64_t c = s.image.c, taps = s.patch * s.patch;
    for (int64_t p = 0; p < s.out_count() / s.d; ++p) {
      const int64_t n = p / (s.out_h() * s.out_w()), h = p / s.out_w() % s.out_h() * s.patch,
                    w0 = p % s.out_w() * s.patch;
      double* value = &out.value[p * s.d];
      double squares = 0, errors = 0;
      for (int64_t j = 0; j < s.d; ++j) value[j] = bias[j];
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t pixel = (n * s.image.h + h + tap / s.patch) * s.image.w + w0 + tap % s.patch;
        for (int64_t i = 0; i < c; ++i) {
          const double v = y.value[pixel * c + i], e = y.tolerance[pixel * c + i];
          squares += v * v;
          errors += e * e;
          for (int64_t j = 0; j < s.d; ++j) value[j] += v * w[(j * taps + tap) * c + i];
        }
      }
      for (int64_t j = 0; j < s.d; ++j) {
        out.tolerance[p * s.d + j] = 6 * most * (unit * std::sqrt(squares) + std::sqrt(errors)) +
                                     4 * reference::kUnit * (std::fabs(value[j]) + std::fabs(bias[j]));
      }
    }
    return out;
  }

  Tensor run(const Kernels& k, Products products, int threads) {
    const int64_t taps = s.patch * s.patch, depth = taps * pad_channels(s.image.c);
    Tensor out(s.out_dtype, s.out_count());
    Buffer packed(k.ops.packed_bytes(products, DType::kFloat32, s.d, depth));
    in_team(threads, [&](Team& team) {
      k.ops.pack_matrix(products, DType::kFloat32, weight_.as<float>(), s.d, depth, packed.as<void>(), team);
    });
    DownsampleArgs args = {};
    args.dtype = s.dtype;
    args.out_dtype = s.out_dtype;
    args.products = products;
    args.x = x.data();
    args.out = out.data();
    args.n = s.image.n;
    args.h = s.image.h;
    args.w = s.image.w;
    args.c = s.image.c;
    args.patch = s.patch;
    args.eps = kEps;
    args.norm_weight = norm_weight_.as<float>();
    args.norm_bias = norm_bias_.as<float>();
    args.weight = {packed.as<void>(), s.d, depth};
    args.bias = bias_.as<float>();
    Buffer work = workspace(k.ops.downsample_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.downsample(args, team); });
    return out;
  }

 private:
  Problem(const Case& s, Random random)
      : s(s),
        x(s.dtype, random.floats(s.image.count(), -1.5, 2)),
        norm_weight(random.floats(s.image.c, -2, 2)),
        norm_bias(random.floats(s.image.c, -1, 1)),
        weight(random.floats(s.d * s.patch * s.patch * s.image.c, -1, 1)),
        bias(random.floats(s.d, -1, 1)),
        norm_weight_(padded(norm_weight, s.image.c)),
        norm_bias_(padded(norm_bias, s.image.c)),
        weight_(padded(weight, s.image.c)),
        bias_(padded(bias, s.d)) {}
};

void check(const Case& s, uint32_t seed) {
  Problem problem(s, seed);
  CAPTURE(dtype_name(s.dtype));
  CAPTURE(dtype_name(s.out_dtype));
  CAPTURE(s.image.n);
  CAPTURE(s.image.h);
  CAPTURE(s.image.w);
  CAPTURE(s.image.c);
  CAPTURE(s.patch);
  CAPTURE(s.d);
  Expected expected[2];
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (Products products : k.products()) {
      CAPTURE(products_name(products));
      Expected& want = expected[int(products)];
      if (want.value.empty()) want = problem.expected(products);
      const Tensor out = problem.run(k, products, 1);
      CHECK(mismatch(out, want) == "");
      for (int threads : kTeams) {
        CAPTURE(threads);
        if (threads > 1) CHECK(difference(problem.run(k, products, threads), out) == "");
      }
    }
  }
}

}  // namespace

TEST_CASE("every channel count, in and out, in every dtype") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int patch : {1, 2, 3, 4}) {
        ++seed;
        const int64_t d = kChannels[(seed * 7) % std::size(kChannels)];
        // Sizes that are no multiple of the patch: the remainder is not read.
        check({dtype, kDTypes[seed / 3 % 3], {2, 9, 14 + seed % 3, c}, patch, d}, seed);
      }
    }
  }
}

TEST_CASE("one patch, and images one patch high or wide") {
  for (DType dtype : kDTypes) {
    check({dtype, dtype, {1, 2, 2, 17}, 2, 33}, 1);
    check({dtype, dtype, {1, 2, 57, 5}, 2, 7}, 2);
    check({dtype, dtype, {1, 57, 3, 5}, 2, 7}, 3);
  }
}

TEST_CASE("several tiles of patches") {
  check({DType::kFloat32, DType::kFloat32, {2, 55, 57, 96}, 2, 5}, 1);
  check({DType::kBFloat16, DType::kBFloat16, {3, 56, 57, 100}, 2, 17}, 2);
}

TEST_CASE("few patches, weights larger than L2") {
  int64_t d = 100;
  while (2 * 2 * 96 * d * 2 <= l2_cache_bytes()) d += 100;  // in bf16; more in fp32
  check({DType::kFloat32, DType::kFloat32, {1, 7, 11, 90}, 2, d + 5}, 1);
  check({DType::kBFloat16, DType::kBFloat16, {3, 14, 12, 96}, 2, d},
        2);  // above 64 rows: two threads or more
}

TEST_CASE("NaN and infinity spoil their patch, and nothing else") {
  const Case s = {DType::kFloat32, DType::kFloat32, {2, 6, 11, 19}, 2, 35};
  Problem problem(s, 8);
  const int64_t spoilt = ((s.image.h + 3) * s.image.w + 4) * s.image.c + 18;  // second image, patch (1, 2)
  const int64_t row = ((s.out_h() + 1) * s.out_w() + 2) * s.d;
  const int64_t cut = ((s.image.h + 3) * s.image.w + 10) * s.image.c;  // in the column that fills no patch
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    for (Products products : k.products()) {
      const Tensor clean = problem.run(k, products, 1);
      const double kept = problem.x.get(spoilt), kept_cut = problem.x.get(cut);
      for (double poison : {std::nan(""), HUGE_VAL}) {
        problem.x.set(spoilt, poison);
        problem.x.set(cut, poison);
        const Tensor out = problem.run(k, products, 2);
        int64_t wrong = 0;
        for (int64_t i = row; i < row + s.d; ++i) wrong += !std::isnan(out.get(i));
        CHECK(wrong == 0);
        CHECK(out.same_bits(clean, 0, row));
        CHECK(out.same_bits(clean, row + s.d, out.count()));
      }
      problem.x.set(spoilt, kept);
      problem.x.set(cut, kept_cut);
    }
  }
}
