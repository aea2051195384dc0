// Depthwise convolutions of images and volumes, with a residual, and the gradients of weight and bias. (The input's
// gradient is the convolution itself with the flipped weight.) Sizes near those of every tile.

#include <doctest/doctest.h>

#include "shapes.h"

using namespace cnk;
using namespace cnk::test;

namespace {

// `planes` of `plane` are a volume with a kernel of `deep` planes.
void check(DType dtype, const Image& plane, const Convolution& conv, uint32_t seed, bool add = false,
           int64_t planes = 1, int deep = 1) {
  INFO("seed ", seed, ", dtype ", dtype_name(dtype), ", c ", plane.c, ", kernel_h ", conv.kernel_h, ", deep ",
       deep);
  const int64_t c = plane.c, wide = pad_channels(c);
  const Axis depth = conv.axis(planes, deep, 1), h = conv.h(plane), w = conv.w(plane);
  const int64_t count = plane.n * (deep > 1 ? depth.out : 1) * h.out * w.out * c, taps = deep * conv.taps();
  Random random(seed);
  const Tensor x(dtype, random.floats(planes * plane.count(), -2, 2)), dy(dtype, random.floats(count, -1, 1));
  const Tensor residual(dtype, random.floats(count, -2, 2));
  const Values weight = Tensor(dtype, random.floats(taps * c, -1, 1)).values();
  const Buffer bias = padded(random.floats(c, -1, 1), c);
  Buffer packed(packed_taps_bytes(h, w, c, deep));
  pack_taps(floats(weight).as<float>(), h, w, c, packed.as<float>(), deep);
  const auto run = [&](const Kernels& k, Products, int threads) {
    Tensor y(dtype, count), dw(DType::kFloat32, taps * wide), db(DType::kFloat32, wide);
    DwconvArgs args = {
        dtype, x.data(), y.data(),           plane.n,          c,
        h,     w,        packed.as<float>(), bias.as<float>(), add ? residual.data() : nullptr};
    if (deep > 1) args.d = depth;
    Buffer pairs(0);
    if (dtype == DType::kBFloat16 && k.pairs()) {
      pairs = packed_pairs(packed, h, w, c, deep);
      args.pairs = pairs.as<float>();
    }
    args.streaming = threads == 3;
    in_team(threads, [&](Team& team) { k.ops.dwconv(args, team); });
    if (conv.up > 1 || conv.dilation_h > 1 << 20) return results(std::move(y));
    DwconvWeightGradientArgs back = {};
    back.dtype = dtype;
    back.x = x.data();
    back.dy = dy.data();
    back.n = plane.n;
    back.c = c;
    back.h = h;
    back.w = w;
    if (deep > 1) back.d = depth;
    back.dw = static_cast<float*>(dw.data());
    back.db = static_cast<float*>(db.data());
    Buffer work = workspace(k.ops.dwconv_weight_gradient_workspace(back, threads));
    back.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.dwconv_weight_gradient(back, team); });
    return results(std::move(y), without_padding(dw, c), without_padding(db, c));
  };
  check_sets(dtype, run, one_team(seed), false);
}

}  // namespace

TEST_CASE("every kernel size and channel count, in every dtype, each with one dilation and size") {
  // Smaller than the kernel, near 7 and 14 columns, one row, one column.
  const Image sizes[] = {{1, 1, 1, 0},  {2, 2, 3, 0},   {1, 1, 29, 0}, {1, 23, 1, 0},  {2, 5, 7, 0},
                         {1, 7, 8, 0},  {3, 9, 6, 0},   {1, 6, 13, 0}, {2, 13, 14, 0}, {1, 11, 15, 0},
                         {1, 4, 21, 0}, {1, 17, 16, 0}, {1, 3, 57, 0}};
  uint32_t seed = 0;
  Random choice(1);
  for (DType dtype : kDTypes) {
    for (int kernel_size : {1, 3, 5, 7, 9, 11, 13, 15, 31}) {
      for (int64_t c : kChannels) {
        Image s = sizes[choice.bits() % std::size(sizes)];
        s.c = c;
        ++seed;
        check(dtype, s, Convolution::square(kernel_size, 1 + choice.bits() % 3), seed, seed % 2);
      }
    }
  }
}

TEST_CASE("rectangles, a dilation of each axis, stride 2 and its input gradient, in every dtype") {
  const int sides[][2] = {{1, 11}, {11, 1}, {3, 5}, {51, 5}, {5, 51}, {1, 51}, {51, 1}, {7, 7}, {1, 1}};
  const int64_t dilations[][2] = {{1, 1}, {2, 3}, {3, 2}, {4, 4}, {int64_t{1} << 40, 1}};
  const Image sizes[] = {{1, 1, 1, 0},  {2, 2, 3, 0},   {1, 9, 70, 0},
                         {1, 70, 9, 0}, {2, 13, 14, 0}, {1, 16, 29, 0}};
  const int64_t channels[] = {3, 16, 40};
  uint32_t seed = 0;
  Random choice(2);
  for (DType dtype : kDTypes) {
    for (const auto& side : sides) {
      for (const auto& dilation : dilations) {
        for (int stride : {-2, 1, 2}) {  // -2: the input gradient of stride 2
          Image s = sizes[choice.bits() % std::size(sizes)];
          s.c = channels[choice.bits() % std::size(channels)];
          check(dtype, s,
                {side[0], side[1], dilation[0], dilation[1], stride == 2 ? 2 : 1, stride < 0 ? 2 : 1},
                ++seed);
        }
      }
    }
  }
}

TEST_CASE("3x3: pairs of rows, whose lines are complete or not, stored past the caches and not") {
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t c : {40, 64}) {
      for (bool add : {false, true}) check(dtype, {2, 13, 16, c}, Convolution::square(3, 1), ++seed, add);
    }
  }
}

TEST_CASE("every width and height from 1 to 57, and many images") {
  for (int64_t size = 1; size <= 57; ++size) {
    check(DType::kFloat32, {1, 3, size, 17}, Convolution::square(7, 1), uint32_t(size));
    check(DType::kBFloat16, {2, size, 2, 16}, Convolution::square(7, 1), uint32_t(size));
  }
  check(DType::kBFloat16, {17, 7, 7, 40}, Convolution::square(7, 1), 2);
}

TEST_CASE("volumes: planes in the scratch, planes copied for each kernel plane, chunks of planes") {
  struct Volume {
    int kernel[3];
    int64_t n, d, h, w, c;
  };
  // The fourth: too wide to keep seven planes. The last: more planes than a chunk.
  const Volume volumes[] = {{{3, 3, 3}, 2, 5, 6, 15, 17}, {{7, 7, 7}, 1, 2, 1, 3, 3},
                            {{3, 5, 7}, 2, 1, 9, 14, 40}, {{7, 5, 5}, 1, 3, 9, 200, 5},
                            {{5, 7, 3}, 1, 3, 40, 5, 33}, {{3, 3, 3}, 1, 20, 4, 5, 19}};
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (const Volume& v : volumes) {
      for (int stride : {-2, 1, 2}) {
        const Convolution conv = {v.kernel[1], v.kernel[2], 1, 1, stride == 2 ? 2 : 1, stride < 0 ? 2 : 1};
        check(dtype, {v.n, v.h, v.w, v.c}, conv, ++seed, false, v.d, v.kernel[0]);
      }
    }
  }
}
