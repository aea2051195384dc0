// Depthwise convolution, "same" padding, and its input gradient; P = KH / 2, Q = KW / 2:
//   y[n,c,h,w] = bias[c] + sum_kh,kw weight[c,kh,kw] * x[n,c, h + (kh - P) D, w + (kw - Q) E]   [+ residual]
// The input gradient is the same sum with the kernel flipped. With a stride: common/axis.h.
// Bytes per pixel with 16-bit elements: 4C, with a residual 6C.
#pragma once

#include "common/axis.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

// What a convolution is, apart from its tensors.
struct Convolution {
  int64_t n, c;
  Axis h, w;
};

struct DwconvArgs {
  Convolution of;
  Image x, y, residual;  // residual.data may be null; any strides
  const void* weight;    // (C, 1, KH, KW), dense, of x's dtype
  Vector bias;
  bool flip;
};
void dwconv(const Context& context, const DwconvArgs& args);

}  // namespace cnk::cuda
