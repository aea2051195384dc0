// LayerNorm over channels, global response normalisation of whole images, and their gradients.

#include <doctest/doctest.h>

#include "support.h"

using namespace cnk;
using namespace cnk::test;

namespace {

// GRN of n images of `pixels`; 0: LayerNorm of n rows.
void check(DType dtype, int64_t n, int64_t pixels, int64_t c, const Teams& teams = every_team(),
           double mean = 0.3, double spread = 2) {
  INFO("dtype ", dtype_name(dtype), ", n ", n, ", pixels ", pixels, ", c ", c);
  const int64_t count = n * std::max<int64_t>(pixels, 1) * c, wide = pad_channels(c);
  Random random{uint32_t((n + pixels) * 1000 + c)};
  const Tensor x(dtype, random.floats(count, mean - spread, mean + spread)),
      dy(dtype, random.floats(count, -1, 1));
  const Buffer weight = padded(random.floats(c, -2, 2), c), bias = padded(random.floats(c, -1, 1), c);
  const auto run = [&](const Kernels& k, Products, int threads) {
    Tensor y(dtype, count), dx(dtype, count), dweight(DType::kFloat32, wide), dbias(DType::kFloat32, wide);
    const auto described = [&](auto args) {
      args.dtype = dtype;
      args.x = x.data();
      args.c = c;
      args.eps = 1e-6f;
      args.weight = weight.as<float>();
      if constexpr (requires { args.rows; }) args.rows = n;
      if constexpr (requires { args.pixels; }) args.n = n, args.pixels = pixels;
      if constexpr (requires { args.y; }) args.y = y.data(), args.bias = bias.as<float>();
      if constexpr (requires { args.dy; }) {
        args.dy = dy.data();
        args.dx = dx.data();
        args.dweight = static_cast<float*>(dweight.data());
        args.dbias = static_cast<float*>(dbias.data());
      }
      return args;
    };
    if (pixels) {
      Buffer scale = workspace(n * wide * 4), sums = workspace(3 * n * wide * 4);
      GrnArgs args = described(GrnArgs{});
      args.scale = scale.as<float>();
      in_team(threads, [&](Team& team) { k.ops.grn(args, team); });
      GrnBackwardArgs back = described(GrnBackwardArgs{});
      back.sums = sums.as<float>();
      in_team(threads, [&](Team& team) { k.ops.grn_backward(back, team); });
    } else {
      const LayernormArgs args = described(LayernormArgs{});
      in_team(threads, [&](Team& team) { k.ops.layernorm(args, team); });
      LayernormBackwardArgs back = described(LayernormBackwardArgs{});
      Buffer work = workspace(k.ops.layernorm_backward_workspace(back));
      back.workspace = work.as<char>();
      in_team(threads, [&](Team& team) { k.ops.layernorm_backward(back, team); });
    }
    return results(std::move(y), std::move(dx), without_padding(dweight, c), without_padding(dbias, c));
  };
  check_sets(dtype, run, teams, false);
}

}  // namespace

TEST_CASE("every channel count, in every dtype, with one row or image and with several") {
  uint32_t turn = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int64_t rows : {1, 2, 31, 32, 33, 57, 100}) check(dtype, rows, 0, c, one_team(++turn));
      for (int64_t n : {1, 3}) {
        for (int64_t pixels : {1, 2, 35}) check(dtype, n, pixels, c, one_team(++turn));
      }
    }
    for (int64_t c : {63, 64, 65, 127, 128, 129, 192, 384, 768, 1000, 3072}) check(dtype, 5, 0, c);
  }
  check(DType::kFloat32, 3137, 0, 33);
  check(DType::kFloat32, 1, 57 * 55, 33);
  check(DType::kBFloat16, 2, 49, 3072);
}

TEST_CASE("LayerNorm: a mean a hundred times the deviation") {
  for (int64_t c : {96, 768}) check(DType::kFloat32, 9, 0, c, every_team(), 100, 1.7);
}
