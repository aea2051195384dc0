// Gradients of the depthwise convolution for its weight and bias; P = K / 2, D = dilation:
//   dw[c,kh,kw] = sum_n,h,w dy[n,c,h,w] * x[n,c, h + (kh - P) D, w + (kw - P) D]
//   db[c] = sum_n,h,w dy[n,c,h,w]
// Bitwise the same every time: blocks write partial sums, which a second kernel adds in a fixed order. Bytes
// per pixel with 16-bit elements: 4C, and the partial sums.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

struct DwconvWeightArgs {
  Image dy, x;  // of one dtype
  Image dw;     // (C, 1, K, K), any strides; data may be null
  void* db;     // C elements of db_dtype, or null
  DType db_dtype;
  float* partials;  // dwconv_weight_parts() x (K * K + 1) x C
  int64_t n, c, h, w;
  int side, dilation;
};

// How many partial sums there will be.
int64_t dwconv_weight_parts(int device, DType dtype, int64_t n, int64_t c, int64_t h, int64_t w, int side,
                            int dilation);
void dwconv_weight_gradient(const Context& context, const DwconvWeightArgs& args);

}  // namespace cnk::cuda
