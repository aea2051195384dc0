// LayerNorm followed by a convolution whose stride is its kernel size, and its gradients.

#include <doctest/doctest.h>

#include "shapes.h"

using namespace cnk;
using namespace cnk::test;

namespace {

void check(DType dtype, DType out_dtype, const Image& image, int patch, int64_t d, uint32_t seed,
           const Teams& teams, bool gradients = true) {
  INFO("seed ", seed, ", dtype ", dtype_name(dtype), ", out_dtype ", dtype_name(out_dtype), ", c ", image.c,
       ", patch ", patch, ", d ", d);
  const int64_t c = image.c, wide = pad_channels(c), taps = int64_t{patch} * patch, depth = taps * wide;
  const int64_t rows = image.h / patch, columns = image.w / patch, count = image.n * rows * columns * d;
  Random random(seed);
  const Tensor x(dtype, random.floats(image.count(), -1.5, 2)), dout(out_dtype, random.floats(count, -1, 1));
  const Buffer norm_weight = padded(random.floats(c, -2, 2), c),
               norm_bias = padded(random.floats(c, -1, 1), c);
  const Buffer weight = padded(random.floats(d * taps * c, -1, 1), c),
               bias = padded(random.floats(d, -1, 1), d);

  // What both directions are told of the problem.
  const auto described = [&](auto args, Products products) {
    args.dtype = dtype;
    args.out_dtype = out_dtype;
    args.products = products;
    args.x = x.data();
    args.n = image.n;
    args.h = image.h;
    args.w = image.w;
    args.c = c;
    args.patch = patch;
    args.eps = 1e-6f;
    args.norm_weight = norm_weight.as<float>();
    args.norm_bias = norm_bias.as<float>();
    return args;
  };
  const auto forward = [&](const Kernels& k, Products products, int threads) {
    Tensor out(out_dtype, count);
    Buffer packed(k.ops.packed_bytes(products, DType::kFloat32, d, depth));
    in_team(threads, [&](Team& team) {
      k.ops.pack_matrix(products, DType::kFloat32, weight.as<float>(), d, depth, packed.as<void>(), team);
    });
    DownsampleArgs args = described(DownsampleArgs{}, products);
    args.out = out.data();
    args.weight = {packed.as<void>(), d, depth};
    args.bias = bias.as<float>();
    Buffer work = workspace(k.ops.downsample_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.downsample(args, team); });
    return out;
  };

  // dx with the gradients of the norm, or the weight's and the bias's, or both; what was not asked for is empty.
  const auto backward = [&](const Kernels& k, Products products, int threads, bool inputs, bool weights) {
    Tensor dx(dtype, inputs ? x.count() : 0), dweight(DType::kFloat32, weights ? d * depth : 0);
    Tensor dbias(DType::kFloat32, weights ? d : 0);
    Tensor dnorm[] = {{DType::kFloat32, inputs ? wide : 0}, {DType::kFloat32, inputs ? wide : 0}};
    Buffer packed(k.ops.packed_bytes(products, DType::kFloat32, depth, d));
    in_team(threads, [&](Team& team) {
      k.ops.pack_transposed(products, DType::kFloat32, weight.as<float>(), depth, d, nullptr,
                            packed.as<void>(), team);
    });
    DownsampleBackwardArgs args = described(DownsampleBackwardArgs{}, products);
    args.dout = dout.data();
    args.weight_back = {packed.as<void>(), depth, d};
    args.weights = weights;
    if (inputs) {
      args.dx = dx.data();
      args.dnorm_weight = static_cast<float*>(dnorm[0].data());
      args.dnorm_bias = static_cast<float*>(dnorm[1].data());
    }
    if (weights) {
      args.dweight = static_cast<float*>(dweight.data());
      args.dbias = static_cast<float*>(dbias.data());
    }
    Buffer work = workspace(k.ops.downsample_backward_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.downsample_backward(args, team); });
    // Pixels outside of every patch are not written: they keep the NaN that a buffer is filled with.
    const Tensor untouched(dtype, dx.count());
    int64_t touched = 0;
    for (int64_t i = 0; i < dx.count(); ++i) {
      if (i / c / image.w % image.h < rows * patch && i / c % image.w < columns * patch) continue;
      touched += !dx.same_bits(untouched, i, i + 1);
      dx.set(i, 0);
    }
    CHECK(touched == 0);
    return results(std::move(dx), without_padding(dweight, c), std::move(dbias), without_padding(dnorm[0], c),
                   without_padding(dnorm[1], c));
  };

  const bool exact = dtype == DType::kFloat32 && out_dtype == DType::kFloat32;
  const auto run = [&](const Kernels& k, Products products, int threads) {
    if (!gradients) return results(forward(k, products, threads));
    std::vector<Tensor> all = backward(k, products, threads, true, true);
    for (bool inputs : {false, true}) {
      if (threads == 1) break;
      const std::vector<Tensor> some = backward(k, products, threads, inputs, !inputs);
      for (size_t i = 0; i < all.size(); ++i)
        if (some[i].count()) CHECK(difference(some[i], all[i]) == "");
    }
    all.push_back(forward(k, products, threads));
    return all;
  };
  check_sets(exact ? dtype : DType::kBFloat16, run, teams);
}

}  // namespace

TEST_CASE("every channel count, in and out, in every dtype") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : kChannels) {
      for (int patch : {1, 2, 3, 4}) {
        ++seed;
        const int64_t d = kChannels[(seed * 7) % std::size(kChannels)];
        // Sizes that are no multiple of the patch: the remainder is neither read nor written.
        check(dtype, kDTypes[seed / 3 % 3], {2, 5, 6 + seed % 3, c}, patch, d, seed, one_team(seed));
      }
    }
  }
}

TEST_CASE("one patch, images one patch high or wide, several tiles and groups of patches") {
  for (DType dtype : kDTypes) {
    check(dtype, dtype, {1, 2, 2, 17}, 2, 33, 1, every_team());
    check(dtype, dtype, {1, 2, 57, 5}, 2, 7, 2, every_team());
    check(dtype, dtype, {1, 57, 3, 5}, 2, 7, 3, every_team());
  }
  check(DType::kFloat32, DType::kFloat32, {3, 57, 55, 5}, 2, 6, 4, {2});
  check(DType::kBFloat16, DType::kBFloat16, {3, 56, 57, 100}, 2, 17, 2, {3});
}

TEST_CASE("few patches, weights larger than L2") {
  int64_t d = 100;
  while (2 * 2 * 96 * d * 2 <= l2_cache_bytes()) d += 100;  // in bf16; more in fp32
  check(DType::kFloat32, DType::kFloat32, {1, 7, 11, 90}, 2, d + 5, 1, {2}, false);
  check(DType::kBFloat16, DType::kBFloat16, {3, 14, 12, 96}, 2, d, 2, {3},
        false);  // above 64 rows: two threads or more
}
