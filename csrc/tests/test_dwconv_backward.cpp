// The weight's and the bias's gradient of the depthwise convolution. (The input's gradient is the convolution
// itself with the flipped weight: test_dwconv.cpp, with its residual.)

#include <doctest/doctest.h>

#include "reference_backward.h"

using namespace cnk;
using namespace cnk::test;
using reference::Convolution;
using reference::Image;

namespace {

struct Result {
  Tensor dw, db;  // padded channels included
};

struct Problem {
  Image image;
  Convolution conv;
  Tensor x, dy;

  Problem(DType dtype, const Image& s, const Convolution& conv, uint32_t seed)
      : Problem(dtype, s, conv, Random(seed)) {}

  Result run(const Kernels& k, int threads) {
    const int64_t wide = pad_channels(image.c);
    Result out{Tensor(DType::kFloat32, conv.taps() * wide), Tensor(DType::kFloat32, wide)};
    DwconvWeightGradientArgs args = {};
    args.dtype = x.dtype();
    args.x = x.data();
    args.dy = dy.data();
    args.n = image.n;
    args.c = image.c;
    args.h = conv.h(image);
    args.w = conv.w(image);
    args.dw = static_cast<float*>(out.dw.data());
    args.db = static_cast<float*>(out.db.data());
    Buffer work = workspace(k.ops.dwconv_weight_gradient_workspace(args, threads));
    args.workspace = work.as<char>();
    in_team(threads, [&](Team& team) { k.ops.dwconv_weight_gradient(args, team); });
    return out;
  }

 private:
  Problem(DType dtype, const Image& s, const Convolution& conv, Random random)
      : image(s),
        conv(conv),
        x(dtype, random.floats(s.count(), -2, 2)),
        dy(dtype, random.floats(conv.result(s).count(), -1, 1)) {}
};

// The real channels of rows with padded channels.
Tensor without_padding(const Tensor& t, int64_t c) {
  const int64_t wide = pad_channels(c), rows = t.count() / wide;
  Tensor out(t.dtype(), rows * c);
  for (int64_t i = 0; i < rows * c; ++i) out.set(i, t.get(i / c * wide + i % c));
  return out;
}

void check(DType dtype, const Image& s, const Convolution& conv, uint32_t seed) {
  Problem problem(dtype, s, conv, seed);
  const reference::DwconvGradient want =
      reference::dwconv_gradient(problem.x.values(), problem.dy.values(), s, conv);
  // Products of 16-bit values are exact; bf16's own dot product rounds each once more.
  const double relative = 64 * reference::kUnit;
  CAPTURE(dtype_name(dtype));
  CAPTURE(s.n);
  CAPTURE(s.h);
  CAPTURE(s.w);
  CAPTURE(s.c);
  CAPTURE(conv.kernel_h);
  CAPTURE(conv.kernel_w);
  CAPTURE(conv.dilation_h);
  CAPTURE(conv.dilation_w);
  CAPTURE(conv.down);
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const Result out = problem.run(k, 1);
    CHECK(mismatch(without_padding(out.dw, s.c), want.weight.within(relative)) == "");
    CHECK(mismatch(without_padding(out.db, s.c), want.bias.within(relative)) == "");
    for (int threads : kTeams) {
      CAPTURE(threads);
      if (threads == 1) continue;
      const Result again = problem.run(k, threads);
      CHECK(difference(without_padding(again.dw, s.c), without_padding(out.dw, s.c)) == "");
      CHECK(difference(without_padding(again.db, s.c), without_padding(out.db, s.c)) == "");
    }
  }
}

void check(DType dtype, const Image& s, int kernel_size, int dilation, uint32_t seed) {
  check(dtype, s, Convolution::square(kernel_size, dilation), seed);
}

}  // namespace

TEST_CASE("every kernel size, dilation and channel count, in every dtype") {
  const Image sizes[] = {{1, 1, 1, 0},   {2, 2, 3, 0},   {1, 1, 29, 0}, {1, 23, 1, 0},
                         {2, 5, 7, 0},   {1, 7, 8, 0},   {3, 9, 6, 0},  {1, 6, 13, 0},
                         {2, 13, 14, 0}, {1, 11, 15, 0}, {1, 17, 16, 0}};
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int kernel_size : {1, 3, 5, 7, 13, 31}) {
      for (int dilation : {1, 2}) {
        for (int64_t c : kChannels) {
          Image s = sizes[++seed % std::size(sizes)];
          s.c = c;
          check(dtype, s, kernel_size, dilation, seed);
        }
      }
    }
  }
}

TEST_CASE("rectangles, a dilation of each axis, stride 2, in every dtype") {
  const int sides[][2] = {{1, 11}, {11, 1}, {3, 5}, {51, 5}, {5, 51}, {1, 51}, {51, 1}, {7, 7}, {1, 1}};
  const int64_t dilations[][2] = {{1, 1}, {2, 3}, {3, 2}, {4, 4}, {int64_t{1} << 4, 1}};
  const Image sizes[] = {{1, 1, 1, 0},  {2, 2, 3, 0},   {1, 9, 70, 0},
                         {1, 70, 9, 0}, {2, 13, 14, 0}, {1, 16, 29, 0}};
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (const auto& side : sides) {
      for (const auto& dilation : dilations) {
        for (int stride : {1, 2}) {
          for (int64_t c : {3, 16, 40}) {
            Image s = sizes[++seed % std::size(sizes)];
            s.c = c;
            check(dtype, s, {side[0], side[1], dilation[0], dilation[1], stride}, seed);
          }
        }
      }
    }
  }
}

TEST_CASE("every width and height from 1 to 57") {
  for (int64_t size = 1; size <= 57; ++size) {
    check(DType::kFloat32, {1, 3, size, 17}, 7, 1, uint32_t(size));
    check(DType::kBFloat16, {2, size, 2, 16}, 7, 1, uint32_t(size));
    check(DType::kBFloat16, {1, 2, size, 33}, 7, 1, uint32_t(size));
    check(DType::kFloat16, {1, size, 3, 5}, 3, 2, uint32_t(size));
  }
}

TEST_CASE("many images, and more rows than one thread's share") {
  check(DType::kFloat32, {9, 14, 14, 20}, 7, 1, 1);
  check(DType::kBFloat16, {17, 7, 7, 40}, 7, 1, 2);
  check(DType::kBFloat16, {2, 57, 29, 3}, 7, 1, 3);
}

TEST_CASE("volumes: planes in the scratch, planes copied for each kernel plane, chunks of planes") {
  struct Volume {
    int kernel[3];
    int64_t n, d, h, w, c;
  };
  // The sixth: too wide to keep seven planes. The last two: more planes than a chunk.
  const Volume volumes[] = {{{3, 3, 3}, 2, 5, 6, 15, 17}, {{7, 7, 7}, 1, 2, 1, 3, 3},
                            {{5, 5, 5}, 1, 6, 8, 13, 32}, {{3, 5, 7}, 2, 1, 9, 14, 40},
                            {{7, 3, 1}, 1, 4, 13, 2, 16}, {{7, 5, 5}, 1, 3, 9, 200, 5},
                            {{3, 3, 3}, 1, 20, 4, 5, 19}, {{1, 3, 3}, 3, 7, 5, 4, 33}};
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    CAPTURE(dtype_name(dtype));
    for (const Volume& v : volumes) {
      for (int stride : {1, 2}) {
        CAPTURE(v.d);
        CAPTURE(v.c);
        CAPTURE(stride);
        const Convolution conv = {v.kernel[1], v.kernel[2], 1, 1, stride};
        const Axis depth = conv.axis(v.d, v.kernel[0], 1);
        const Image plane = {1, v.h, v.w, v.c}, result = conv.result(plane);
        Random random(++seed);
        const Tensor x(dtype, random.floats(v.n * v.d * plane.count(), -2, 2));
        const Tensor dy(dtype, random.floats(v.n * depth.out * result.count(), -1, 1));
        const int64_t taps = depth.taps * conv.taps(), wide = pad_channels(v.c);
        reference::DwconvGradient want{reference::Sums(taps * v.c), reference::Sums(v.c)};
        for (int64_t p = 0; p < v.n * depth.out * result.pixels(); ++p) {
          const int64_t z = p / result.pixels(), h = p / result.w % result.h, w = p % result.w;
          for (int64_t c = 0; c < v.c; ++c) want.bias.add(c, dy.get(p * v.c + c));
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t from_d = reference::from(depth, z % depth.out, int(tap / conv.taps()));
            const int64_t from_h =
                reference::from(conv.h(plane), h, int(tap / conv.kernel_w % conv.kernel_h));
            const int64_t from_w = reference::from(conv.w(plane), w, int(tap % conv.kernel_w));
            if (from_d < 0 || from_h < 0 || from_w < 0) continue;
            const int64_t at = ((z / depth.out * v.d + from_d) * v.h + from_h) * v.w + from_w;
            for (int64_t c = 0; c < v.c; ++c)
              want.weight.add(tap * v.c + c, dy.get(p * v.c + c) * x.get(at * v.c + c));
          }
        }
        const auto run = [&](const Kernels& k, int threads) {
          Result out{Tensor(DType::kFloat32, taps * wide), Tensor(DType::kFloat32, wide)};
          DwconvWeightGradientArgs args = {};
          args.dtype = dtype;
          args.x = x.data();
          args.dy = dy.data();
          args.n = v.n;
          args.c = v.c;
          args.h = conv.h(plane);
          args.w = conv.w(plane);
          args.d = depth;
          args.dw = static_cast<float*>(out.dw.data());
          args.db = static_cast<float*>(out.db.data());
          Buffer work = workspace(k.ops.dwconv_weight_gradient_workspace(args, threads));
          args.workspace = work.as<char>();
          in_team(threads, [&](Team& team) { k.ops.dwconv_weight_gradient(args, team); });
          return Result{without_padding(out.dw, v.c), without_padding(out.db, v.c)};
        };
        for (const Kernels& k : kernels()) {
          CAPTURE(k.name());
          const Result out = run(k, 1);
          CHECK(mismatch(out.dw, want.weight.within(64 * reference::kUnit)) == "");
          CHECK(mismatch(out.db, want.bias.within(64 * reference::kUnit)) == "");
          const Result again = run(k, 3);
          CHECK(difference(again.dw, out.dw) == "");
          CHECK(difference(again.db, out.db) == "");
        }
      }
    }
  }
}

TEST_CASE("NaN in x or dy spoils its channel, and nothing else") {
  for (DType dtype : kDTypes) {
    CAPTURE(dtype_name(dtype));
    const Image s = {2, 9, 10, 19};
    for (bool in_dy : {false, true}) {
      Problem problem(dtype, s, Convolution::square(5, 1), 4);
      const int64_t spoilt = ((s.h + 4) * s.w + 6) * s.c + 17;
      for (const Kernels& k : kernels()) {
        CAPTURE(k.name());
        Tensor& in = in_dy ? problem.dy : problem.x;
        const double kept = in.get(spoilt);
        const Tensor clean = without_padding(problem.run(k, 1).dw, s.c);
        in.set(spoilt, std::nan(""));
        const Result out = problem.run(k, 2);
        const Tensor dw = without_padding(out.dw, s.c);
        in.set(spoilt, kept);
        int64_t wrong = 0;
        for (int64_t i = 0; i < dw.count(); ++i)
          wrong += i % s.c == 17 ? !std::isnan(dw.get(i)) : !dw.same_bits(clean, i, i + 1);
        CHECK(wrong == 0);
        CHECK(std::isnan(out.db.get(17)) == in_dy);
      }
    }
  }
}
