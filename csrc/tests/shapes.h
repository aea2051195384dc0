// Images and convolutions: sizes.
#pragma once

#include "support.h"

namespace cnk::test {

struct Image {
  int64_t n, h, w, c;
  int64_t pixels() const { return n * h * w; }
  int64_t count() const { return pixels() * c; }
};

// A depthwise convolution, or the gradient of its input: Axis in cpu/ops.h.
struct Convolution {
  int kernel_h, kernel_w;
  int64_t dilation_h = 1, dilation_w = 1;
  int down = 1, up = 1;

  static Convolution square(int kernel_size, int64_t dilation) {
    return {kernel_size, kernel_size, dilation, dilation};
  }
  int64_t taps() const { return int64_t{kernel_h} * kernel_w; }
  // Of an input of `in` pixels; an input gradient has the most pixels that it can have.
  Axis axis(int64_t in, int kernel, int64_t dilation) const {
    return {in, down > 1 ? (in + 1) / 2 : in * up, kernel, dilation, down, up};
  }
  Axis h(const Image& s) const { return axis(s.h, kernel_h, dilation_h); }
  Axis w(const Image& s) const { return axis(s.w, kernel_w, dilation_w); }
  Image result(const Image& s) const { return {s.n, h(s).out, w(s).out, s.c}; }
};

}  // namespace cnk::test
