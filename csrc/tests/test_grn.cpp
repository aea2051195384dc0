// Global response normalisation of whole images, and its gradients.

#include <doctest/doctest.h>

#include "support.h"

using namespace cnk;
using namespace cnk::test;

namespace {

void check(DType dtype, int64_t n, int64_t pixels, int64_t c) {
  INFO("dtype ", dtype_name(dtype), ", n ", n, ", pixels ", pixels, ", c ", c);
  Random random{uint32_t(pixels * 1000 + c)};
  const Tensor x(dtype, random.floats(n * pixels * c, -2, 2)),
      dy(dtype, random.floats(n * pixels * c, -1, 1));
  const Buffer weight = padded(random.floats(c, -2, 2), c), bias = padded(random.floats(c, -1, 1), c);
  const int64_t wide = pad_channels(c);
  const auto run = [&](const Kernels& k, Products, int threads) {
    Tensor y(dtype, x.count()), dx(dtype, x.count()), dweight(DType::kFloat32, wide),
        dbias(DType::kFloat32, wide);
    Buffer scale = workspace(n * wide * 4), sums = workspace(3 * n * wide * 4);
    const GrnArgs forward = {dtype,
                             x.data(),
                             y.data(),
                             n,
                             pixels,
                             c,
                             1e-6f,
                             weight.as<float>(),
                             bias.as<float>(),
                             scale.as<float>()};
    in_team(threads, [&](Team& team) { k.ops.grn(forward, team); });
    GrnBackwardArgs args = {};
    args.dtype = dtype;
    args.x = x.data();
    args.dy = dy.data();
    args.dx = dx.data();
    args.n = n;
    args.pixels = pixels;
    args.c = c;
    args.eps = 1e-6f;
    args.weight = weight.as<float>();
    args.dweight = static_cast<float*>(dweight.data());
    args.dbias = static_cast<float*>(dbias.data());
    args.sums = sums.as<float>();
    in_team(threads, [&](Team& team) { k.ops.grn_backward(args, team); });
    return results(std::move(y), std::move(dx), without_padding(dweight, c), without_padding(dbias, c));
  };
  check_sets(dtype, run, every_team(), false);
}

}  // namespace

TEST_CASE("every channel count, in every dtype, with one image and with several") {
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int64_t n : {1, 3}) {
        for (int64_t pixels : {1, 2, 35}) check(dtype, n, pixels, c);
      }
    }
  }
  check(DType::kFloat32, 1, 57 * 55, 33);
  check(DType::kBFloat16, 2, 49, 3072);
}
