// The inverted bottleneck of up to 256 channels in one kernel, the hidden on chip:
//   out = residual + s * gamma * (GRN?(GELU(LN(x) W1^T + b1)) W2^T + b2)
// GRN needs the sums over a sample's pixels of the squared hidden: a first launch
// with `sums` and without `out`, a second with their response as `grn_scale`. Bytes
// per pixel with 16-bit elements: 6C (x, residual, out), 2C more with GRN, and 2 *
// hidden if u is kept for the gradient. Every block reads both weights, from L2.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

struct MlpFusedArgs {
  DType dtype;            // of w1, w2 and u
  Rows x, residual, out;  // of one dtype; residual.data may be null; out.data null: only the sums
  Vector norm_weight, norm_bias;
  const void *w1, *w2;  // dense (hidden, C) and (C, hidden)
  Vector b1, b2, gamma, drop_scale, grn_bias;
  const float* grn_scale;   // (N, hidden) or null
  void* u;                  // (samples * pixels, hidden) or null
  float* sums;              // (samples, tiles, hidden) or null: sums of h^2 over a tile
  int64_t samples, pixels;  // samples that follow each other without a gap may count as one
  int64_t sample_pixels;    // of one sample always
  int c, hidden;
  float eps;
  int tile;  // pixels of a block
};

// bf16 and fp16 products on tensor cores; bf16 needs compute capability 8.0. `tile`: up to eight times 32
// pixels for up to 128 channels, up to eight times 16 pixels for more.
void mlp_fused(const Context& context, const MlpFusedArgs& args);

}  // namespace cnk::cuda
