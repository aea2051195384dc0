// Depthwise convolution, stride 1, "same" padding, and its input gradient; P = K / 2, D = dilation:
//   y[n,c,h,w] = bias[c] + sum_kh,kw weight[c,kh,kw] * x[n,c, h + (kh - P) D, w + (kw - P) D]   [+ residual]
// The input gradient is the same with the kernel flipped. Bytes per pixel with 16-bit elements: 4C, 6C with a residual.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

struct DwconvArgs {
  Image x, y, residual;  // residual.data may be null; any strides
  Image weight;          // (C, 1, K, K)
  Vector bias;
  int64_t n, c, h, w;
  int side, dilation;
  bool flip;
};
void dwconv(const Context& context, const DwconvArgs& args);

// dw[c,kh,kw] = sum_n,h,w dy[n,c,h,w] * x[n,c, h + (kh - P) D, w + (kw - P) D], db[c] = sum_n,h,w dy[n,c,h,w].
// Bitwise the same every time: blocks write partial sums, which a second kernel adds in one order.
struct DwconvWeightArgs {
  Image dy, x;
  Image dw;     // (C, 1, K, K); data may be null
  Vector db;    // data may be null
  float* partials;  // dwconv_weight_parts() x (K * K + 1) x C
  int64_t parts;
  int64_t n, c, h, w;
  int side, dilation;
};
int64_t dwconv_weight_parts(int device, int64_t n, int64_t c, int64_t h, int64_t w, int side, int dilation);
void dwconv_weight_gradient(const Context& context, const DwconvWeightArgs& args);

}  // namespace cnk::cuda
