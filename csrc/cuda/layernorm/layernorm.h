// LayerNorm over the channels, with the biased variance. xhat = (x - mean) * rstd, g = dy * weight:
//   y = xhat * weight + bias
//   dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)),    dweight = sum dy * xhat,    dbias = sum dy
// RMSNorm and SimpleNorm have xhat = x * rstd, no bias and no mean_c(g); SimpleNorm's dx has (x - mean) * rstd
// instead of its xhat, and the sum divided by C - 1. They share one instance of the kernels for rows; those for
// columns are LayerNorm's alone, so rows must fit a block's registers: 12 KB.
// Parameters, the result and the incoming gradient are rounded to x's dtype, as PyTorch does under autocast;
// y and dy may be stored in another dtype. Everything between is fp32. Bytes per pixel with 16-bit elements:
// forward 4C, backward 6C, and 8C for each block's partial sums.
#pragma once

#include "common/variants.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

// Side 1: the pixels of y and dy have x's order. Otherwise they are in the order of side x side patches,
// without the pixels that are in no whole patch.
struct Patches {
  int64_t side, width;   // of a patch, of the image
  int64_t down, across;  // whole patches in the image
};

struct LayerNormArgs {
  Rows x, y;
  Vector weight, bias;
  float eps;
  int64_t n, pixels, c;  // pixels of one sample
  Patches patches;
  Norm norm;
};
void layernorm(const Context& context, const LayerNormArgs& args);

struct LayerNormBackwardArgs {
  Rows dy, x, dx;  // dx of x's dtype; its data may be null
  Vector weight;
  float* partials;  // (parts, 2, c): of dweight and dbias; or null
  int64_t parts;    // layernorm_parts(), if there are partials
  float eps;
  int64_t n, pixels, c;
  Patches patches;
  Norm norm;
};
// The number of partial sums for `pixels` pixels in all.
int64_t layernorm_parts(int device, int64_t pixels);
void layernorm_backward(const Context& context, const LayerNormBackwardArgs& args);

}  // namespace cnk::cuda
