// Gradients of the depthwise convolution for its weight and bias; P = KH / 2, Q = KW / 2:
//   dw[c,kh,kw] = sum_n,h,w dy[n,c,h,w] * x[n,c, h S + (kh - P) D, w S + (kw - Q) E],  S the stride
//   db[c] = sum_n,h,w dy[n,c,h,w]
// Bitwise the same every time: blocks write partial sums, which a second kernel adds in a fixed order. Bytes
// per pixel with 16-bit elements: 4C, and the partial sums.
#pragma once

#include "cuda/dwconv/dwconv.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

struct DwconvWeightArgs {
  Convolution of;
  Image dy, x;  // of one dtype
  Image dw;     // (C, 1, KH, KW), any strides; data may be null
  void* db;     // C elements of db_dtype, or null
  DType db_dtype;
  float* partials;  // dwconv_weight_parts() x (KH * KW + 1) x C
};

// How many partial sums there will be.
int64_t dwconv_weight_parts(int device, DType dtype, const Convolution& of);
void dwconv_weight_gradient(const Context& context, const DwconvWeightArgs& args);

}  // namespace cnk::cuda
