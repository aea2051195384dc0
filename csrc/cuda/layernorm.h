// LayerNorm over the channels: y = (x - mean) * rstd * weight + bias, biased variance; with xhat = (x - mean)
// * rstd and g = dy * weight:
//   dx = rstd * (g - mean_c(g) - xhat * mean_c(g * xhat)),    dweight = sum dy * xhat,    dbias = sum dy
// Parameters, the result and the incoming gradient are rounded to x's dtype, as PyTorch does under autocast;
// y may then be of another dtype, and so may dy. Everything between is fp32. Bytes per pixel with 16-bit
// elements: forward 4C, backward 6C and 8C for each block's partial sums.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

// Side 1: y and dy have their pixels in x's order. Else in the order of side x side patches; pixels that no
// patch holds are left out.
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
};
void layernorm(const Context& context, const LayerNormArgs& args);

struct LayerNormBackwardArgs {
  Rows dy, x, dx;  // dx of x's dtype; its data may be null
  Vector weight;
  float* partials;  // (parts, 2, c): of dweight and dbias; or null
  int64_t parts;    // layernorm_parts(), where there are partials
  float eps;
  int64_t n, pixels, c;
  Patches patches;
};
// How many partial sums there will be of `pixels` pixels in all.
int64_t layernorm_parts(int device, int64_t pixels);
void layernorm_backward(const Context& context, const LayerNormBackwardArgs& args);

}  // namespace cnk::cuda
