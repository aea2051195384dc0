// LayerNorm over channels, and its gradients.

#include <doctest/doctest.h>

#include "support.h"

using namespace cnk;
using namespace cnk::test;

namespace {

void check(DType dtype, int64_t rows, int64_t c, double mean = 0.3, double spread = 2) {
  INFO("dtype ", dtype_name(dtype), ", rows ", rows, ", c ", c);
  Random random{uint32_t(rows * 1000 + c)};
  const Tensor x(dtype, random.floats(rows * c, mean - spread, mean + spread));
  const Tensor dy(dtype, random.floats(rows * c, -1, 1));
  const Buffer weight = padded(random.floats(c, -2, 2), c), bias = padded(random.floats(c, -1, 1), c);
  const auto run = [&](const Kernels& k, Products, int threads) {
    Tensor y(dtype, x.count()), dx(dtype, x.count());
    Tensor dweight(DType::kFloat32, pad_channels(c)), dbias(DType::kFloat32, pad_channels(c));
    const LayernormArgs forward = {dtype,        x.data(),           y.data(),        rows, c, 1e-6f,
                                   Norm::kLayer, weight.as<float>(), bias.as<float>()};
    in_team(threads, [&](Team& team) { k.ops.layernorm(forward, team); });
    LayernormBackwardArgs args = {};
    args.dtype = dtype;
    args.x = x.data();
    args.dy = dy.data();
    args.dx = dx.data();
    args.rows = rows;
    args.c = c;
    args.eps = 1e-6f;
    args.weight = weight.as<float>();
    args.dweight = static_cast<float*>(dweight.data());
    args.dbias = static_cast<float*>(dbias.data());
    Buffer work = workspace(k.ops.layernorm_backward_workspace(args));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.layernorm_backward(args, team); });
    return results(std::move(y), std::move(dx), without_padding(dweight, c), without_padding(dbias, c));
  };
  check_sets(dtype, run, every_team(), false);
}

}  // namespace

TEST_CASE("every channel count, in every dtype, with one row and with several") {
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int64_t rows : {1, 2, 31, 32, 33, 57, 100}) check(dtype, rows, c);
    }
    for (int64_t c : {63, 64, 65, 127, 128, 129, 192, 384, 768, 1000, 3072}) check(dtype, 5, c);
  }
  check(DType::kFloat32, 3137, 33);
}

TEST_CASE("a mean a hundred times the deviation") {
  for (int64_t c : {96, 768}) check(DType::kFloat32, 9, c, 100, 1.7);
}
