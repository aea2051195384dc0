// Depthwise convolution, stride 1, "same" padding, and its input gradient; P = K / 2, D = dilation:
//   y[n,c,h,w] = bias[c] + sum_kh,kw weight[c,kh,kw] * x[n,c, h + (kh - P) D, w + (kw - P) D]   [+ residual]
// The input gradient is the same sum with the kernel flipped.
// Bytes per pixel with 16-bit elements: 4C, with a residual 6C.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

struct DwconvArgs {
  Image x, y, residual;  // residual.data may be null; any strides
  const void* weight;    // (C, 1, K, K), dense, of x's dtype
  Vector bias;
  int64_t n, c, h, w;
  int side, dilation;
  bool flip;
};
void dwconv(const Context& context, const DwconvArgs& args);

}  // namespace cnk::cuda
