// Global response normalisation (ConvNeXt V2), per sample n and channel c:
//   G = ||x[n, :, c]||_2,    s = mean_c G + eps,    scale = 1 + weight * G / s,    y = x * scale + bias
// With q = weight * sum_p dy * x, dG = q / s - mean_c(q * G) / s^2, and dG / G = 0 where G = 0:
//   dx = dy * scale + x * dG / G,    dweight = sum_n G / s * sum_p dy * x,    dbias = sum_n,p dy
// Three launches each: sums over tiles of pixels, the values that each sample needs, the result. Sums are
// fp32, so fp16 does not overflow, and are added in a fixed order. Bytes per pixel with 16-bit elements:
// forward 6C, backward 10C; and 4C (backward 12C) for each tile.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

// Tiles of one sample.
int64_t grn_tiles(int64_t pixels);

// Sums over the pixels of each tile: of x^2 and, if dy is given, of dy * x and dy.
struct GrnSumsArgs {
  Rows x, dy;                      // of one dtype; dy's data may be null
  float *squares, *dy_x, *dy_sum;  // (n, grn_tiles(pixels), c)
  int64_t n, pixels, c;
};
void grn_sums(const Context& context, const GrnSumsArgs& args);

// scale, from the sums over tiles.
struct GrnResponseArgs {
  const float* squares;  // (n, tiles, c)
  Vector weight;
  float* scale;  // (n, c)
  float eps;
  int64_t n, tiles, c;
};
void grn_response(const Context& context, const GrnResponseArgs& args);

struct GrnResponseBackwardArgs {
  const float *squares, *dy_x, *dy_sum;  // (n, tiles, c)
  Vector weight;
  float *scale, *per_x;  // (n, c); per_x = dG / G
  float* parameters;     // (n, 2, c): each sample's dweight and dbias
  float eps;
  int64_t n, tiles, c;
};
void grn_response_backward(const Context& context, const GrnResponseBackwardArgs& args);

// out = a * scale + bias, or a * scale + b * per_b if b is given; out may be a or b.
struct GrnApplyArgs {
  Rows a, b, out;              // of one dtype; b's data may be null
  const float *scale, *per_b;  // (n, c)
  Vector bias;
  int64_t n, pixels, c;
};
void grn_apply(const Context& context, const GrnApplyArgs& args);

}  // namespace cnk::cuda
