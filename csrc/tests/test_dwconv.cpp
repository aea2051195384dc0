// Depthwise convolution: kernel sizes, dilations, channels, and
// sizes near those of every tile; errors within the bound of fp32.

#include <doctest/doctest.h>

#include "reference.h"

using namespace cnk;
using namespace cnk::test;
using reference::Convolution;
using reference::Image;

namespace {

struct Problem {
  Image image;
  Convolution conv;
  Tensor x;
  Values weight, bias;
  Buffer packed_weight, padded_bias;

  Problem(DType dtype, const Image& s, const Convolution& conv, uint32_t seed)
      : Problem(dtype, s, conv, Random(seed)) {}

  Expected expected() const { return reference::dwconv(x.values(), image, conv, weight, bias); }

  Tensor run(const Kernels& k, int threads, const void* residual = nullptr, bool streaming = false) {
    Tensor y(x.dtype(), conv.result(image).count());
    DwconvArgs args = {x.dtype(),
                       x.data(),
                       y.data(),
                       image.n,
                       image.c,
                       conv.h(image),
                       conv.w(image),
                       packed_weight.as<float>(),
                       padded_bias.as<float>(),
                       residual};
    Buffer pairs(0);
    if (x.dtype() == DType::kBFloat16 && k.pairs()) {
      pairs = packed_pairs(packed_weight, conv.h(image), conv.w(image), image.c);
      args.pairs = pairs.as<float>();
    }
    args.streaming = streaming;
    in_team(threads, [&](Team& team) { k.ops.dwconv(args, team); });
    return y;
  }

 private:
  Problem(DType dtype, const Image& s, const Convolution& conv, Random random)
      : image(s),
        conv(conv),
        x(dtype, random.floats(s.count(), -2, 2)),
        weight(Tensor(dtype, random.floats(conv.taps() * s.c, -1, 1)).values()),
        bias(random.floats(s.c, -1, 1)),
        packed_weight(packed_taps(weight, conv.h(s), conv.w(s), s.c)),
        padded_bias(padded(bias, s.c)) {}
};

void check(DType dtype, const Image& s, const Convolution& conv, uint32_t seed) {
  Problem problem(dtype, s, conv, seed);
  const Expected expected = problem.expected();
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
  CAPTURE(conv.up);
  for (const Kernels& k : kernels()) {
    CAPTURE(k.name());
    const Tensor y = problem.run(k, 1);
    CHECK(mismatch(y, expected) == "");
    for (int threads : kTeams) {
      CAPTURE(threads);
      if (threads > 1) CHECK(difference(problem.run(k, threads), y) == "");
      if (threads == 3) CHECK(difference(problem.run(k, threads, nullptr, true), y) == "");
    }
  }
}

void check(DType dtype, const Image& s, int kernel_size, int dilation, uint32_t seed) {
  check(dtype, s, Convolution::square(kernel_size, dilation), seed);
}

}  // namespace

TEST_CASE("every kernel size, dilation and channel count, in every dtype") {
  // Smaller than the kernel, near 7 and 14 columns, one row, one column.
  const Image sizes[] = {{1, 1, 1, 0},  {2, 2, 3, 0},   {1, 1, 29, 0}, {1, 23, 1, 0},  {2, 5, 7, 0},
                         {1, 7, 8, 0},  {1, 9, 6, 0},   {1, 6, 13, 0}, {2, 13, 14, 0}, {1, 11, 15, 0},
                         {1, 4, 21, 0}, {1, 17, 16, 0}, {1, 3, 57, 0}};
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int kernel_size : {1, 3, 5, 7, 9, 11, 13, 15, 31}) {
      for (int dilation : {1, 2, 3}) {
        for (int64_t c : kChannels) {
          Image s = sizes[++seed % std::size(sizes)];
          s.c = c;
          check(dtype, s, kernel_size, dilation, seed);
        }
      }
    }
  }
}

TEST_CASE("rectangles, a dilation of each axis, stride 2 and its input gradient, in every dtype") {
  const int sides[][2] = {{1, 11}, {11, 1}, {3, 5}, {51, 5}, {5, 51}, {1, 51}, {51, 1}, {7, 7}, {1, 1}};
  const int64_t dilations[][2] = {{1, 1}, {2, 3}, {3, 2}, {4, 4}, {int64_t{1} << 40, 1}};
  const Image sizes[] = {{1, 1, 1, 0},  {2, 2, 3, 0},   {1, 9, 70, 0},
                         {1, 70, 9, 0}, {2, 13, 14, 0}, {1, 16, 29, 0}};
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    for (const auto& side : sides) {
      for (const auto& dilation : dilations) {
        for (int stride : {-2, 1, 2}) {  // -2: the input gradient of stride 2
          for (int64_t c : {3, 16, 40}) {
            Image s = sizes[++seed % std::size(sizes)];
            s.c = c;
            check(dtype, s,
                  {side[0], side[1], dilation[0], dilation[1], stride == 2 ? 2 : 1, stride < 0 ? 2 : 1},
                  seed);
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
    check(DType::kFloat32, {1, 2, size, 5}, 15, 2, uint32_t(size));
  }
}

TEST_CASE("more pixels than one step of rows") {
  check(DType::kFloat32, {2, 57, 29, 3}, 7, 1, 1);
  check(DType::kBFloat16, {3, 19, 31, 100}, 3, 1, 2);
}

TEST_CASE("a residual is added before the result is rounded, for any number of threads") {
  for (DType dtype : kDTypes) {
    CAPTURE(dtype_name(dtype));
    for (int64_t c : kChannels) {
      for (int kernel_size : {3, 7, 13}) {
        const Image s = {2, 5, 9, c};
        Problem problem(dtype, s, Convolution::square(kernel_size, 1), uint32_t(c));
        const Tensor residual(dtype, Random(uint32_t(c + 1)).floats(s.count(), -2, 2));
        Expected expected = problem.expected();
        for (int64_t i = 0; i < s.count(); ++i) {
          expected.value[i] += residual.get(i);
          expected.tolerance[i] +=
              2 * reference::kUnit * (std::fabs(expected.value[i]) + std::fabs(residual.get(i)));
        }
        CAPTURE(c);
        CAPTURE(kernel_size);
        for (const Kernels& k : kernels()) {
          CAPTURE(k.name());
          const Tensor y = problem.run(k, 1, residual.data());
          CHECK(mismatch(y, expected) == "");
          for (int threads : {2, 5})
            CHECK(difference(problem.run(k, threads, residual.data(), threads == 2), y) == "");
        }
      }
    }
  }
}

TEST_CASE("NaN and infinity spoil their channel within the kernel's reach, and nothing else") {
  for (DType dtype : kDTypes) {
    CAPTURE(dtype_name(dtype));
    for (int dilation : {1, 2}) {
      const Image s = {2, 12, 17, 19};
      Problem problem(dtype, s, Convolution::square(5, dilation), 4);
      for (const Kernels& k : kernels()) {
        CAPTURE(k.name());
        const Tensor clean = problem.run(k, 1);
        const int64_t h = 4, w = 9, channel = 18,
                      spoilt = ((s.h + h) * s.w + w) * s.c + channel;  // of the second image
        const double kept = problem.x.get(spoilt);
        for (double poison : {std::nan(""), HUGE_VAL}) {
          problem.x.set(spoilt, poison);
          const Tensor y = problem.run(k, 2);
          int64_t wrong = 0, reached = 0;
          for (int64_t i = 0; i < y.count(); ++i) {
            const int64_t p = i / s.c, dh = p / s.w - s.h - h, dw = p % s.w - w;
            const bool reach = i % s.c == channel && std::abs(dh) <= 2 * dilation &&
                               std::abs(dw) <= 2 * dilation && dh % dilation == 0 && dw % dilation == 0;
            reached += reach;
            wrong += reach ? std::isfinite(y.get(i)) : !y.same_bits(clean, i, i + 1);
          }
          CHECK(reached == 25);
          CHECK(wrong == 0);
        }
        problem.x.set(spoilt, kept);
      }
    }
  }
}

TEST_CASE("volumes: the sum over kernel planes of the convolutions of the planes of x") {
  // Kernel, the sizes of a volume of one channel count each; -2: the input gradient of stride 2.
  struct Volume {
    int kernel[3];
    int64_t n, d, h, w, c;
  };
  const Volume volumes[] = {{{3, 3, 3}, 2, 5, 6, 15, 17}, {{7, 7, 7}, 1, 2, 1, 3, 3},
                            {{5, 5, 5}, 1, 9, 8, 29, 32}, {{3, 5, 7}, 2, 1, 9, 14, 40},
                            {{7, 3, 1}, 1, 4, 13, 2, 16}, {{1, 3, 3}, 1, 3, 5, 8, 5},
                            {{5, 7, 3}, 1, 3, 40, 5, 33}, {{3, 3, 3}, 1, 4, 64, 64, 32}};
  uint32_t seed = 0;
  for (DType dtype : kDTypes) {
    CAPTURE(dtype_name(dtype));
    for (const Volume& v : volumes) {
      for (int stride : {-2, 1, 2}) {
        CAPTURE(v.d);
        CAPTURE(v.c);
        CAPTURE(stride);
        const Convolution conv = {v.kernel[1], v.kernel[2], 1, 1, stride == 2 ? 2 : 1, stride < 0 ? 2 : 1};
        const Axis depth = conv.axis(v.d, v.kernel[0], 1);
        const Image plane = {1, v.h, v.w, v.c}, result = conv.result(plane);
        Random random(++seed);
        const Tensor x(dtype, random.floats(v.n * v.d * plane.count(), -2, 2));
        const Values weight = Tensor(dtype, random.floats(depth.taps * conv.taps() * v.c, -1, 1)).values();
        const Values bias = random.floats(v.c, -1, 1);
        const Values in = x.values();
        Expected expected{Values(v.n * depth.out * result.count()), Values(v.n * depth.out * result.count())};
        for (int64_t z = 0; z < v.n * depth.out; ++z) {
          double *value = &expected.value[z * result.count()],
                 *most = &expected.tolerance[z * result.count()];
          for (int64_t i = 0; i < result.count(); ++i) value[i] = bias[i % v.c];
          for (int k = 0; k < depth.taps; ++k) {
            const int64_t at = reference::from(depth, z % depth.out, k);
            if (at < 0) continue;
            const auto of_plane = in.begin() + (z / depth.out * v.d + at) * plane.count();
            const auto of_kernel = weight.begin() + k * conv.taps() * v.c;
            const Expected part = reference::dwconv(Values(of_plane, of_plane + plane.count()), plane, conv,
                                                    Values(of_kernel, of_kernel + conv.taps() * v.c), bias);
            for (int64_t i = 0; i < result.count(); ++i) {
              value[i] += part.value[i] - bias[i % v.c];
              most[i] += part.tolerance[i] * depth.taps;  // a term is rounded in each later addition
            }
          }
          for (int64_t i = 0; i < result.count(); ++i) most[i] += reference::kUnit * std::fabs(value[i]);
        }
        Buffer packed(packed_taps_bytes(conv.h(plane), conv.w(plane), v.c, depth.taps));
        pack_taps(floats(weight).as<float>(), conv.h(plane), conv.w(plane), v.c, packed.as<float>(),
                  depth.taps);
        const Buffer padded_bias = padded(bias, v.c);
        const auto run = [&](const Kernels& k, int threads) {
          Tensor y(dtype, v.n * depth.out * result.count());
          DwconvArgs args = {dtype,
                             x.data(),
                             y.data(),
                             v.n,
                             v.c,
                             conv.h(plane),
                             conv.w(plane),
                             packed.as<float>(),
                             padded_bias.as<float>(),
                             nullptr,
                             depth};
          Buffer pairs(0);
          if (dtype == DType::kBFloat16 && k.pairs()) {
            pairs = packed_pairs(packed, conv.h(plane), conv.w(plane), v.c, depth.taps);
            args.pairs = pairs.as<float>();
          }
          args.streaming = threads == 5;
          in_team(threads, [&](Team& team) { k.ops.dwconv(args, team); });
          return y;
        };
        for (const Kernels& k : kernels()) {
          CAPTURE(k.name());
          const Tensor y = run(k, 1);
          CHECK(mismatch(y, expected) == "");
          for (int threads : {2, 5}) CHECK(difference(run(k, threads), y) == "");
        }
      }
    }
  }
}
