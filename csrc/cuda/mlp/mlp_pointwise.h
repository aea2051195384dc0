// The steps of the bottleneck between the matrix products of cuBLAS; each kernel reads and writes its data
// once. Rows z, d, dz are (N * pixels, C), dense, of `dtype`, the dtype of the products.
#pragma once

#include "common/variants.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

// h = act(u), `count` dense elements; h may be u.
struct ActivationArgs {
  DType dtype;
  Activation activation;
  const void* u;
  void* h;
  int64_t count;
};
void activate(const Context& context, const ActivationArgs& args);

// du = dh * act'(u), `count` dense elements; du may be dh.
struct ActivationBackwardArgs {
  DType dtype;
  Activation activation;
  const void *dh, *u;
  void* du;
  int64_t count;
};
void activate_backward(const Context& context, const ActivationBackwardArgs& args);

// out = residual + s[n] * gamma * (z + bias); residual may be
// missing, or be out. Bytes per pixel with 16-bit elements: 6C.
struct MlpOutputArgs {
  DType dtype;
  const void* z;
  Vector bias, gamma, drop_scale;
  Rows residual, out;
  int64_t n, pixels, c;
};
void mlp_output(const Context& context, const MlpOutputArgs& args);

// d = s[n] * dout and, where dz is not null, dz = gamma * d. Bytes per pixel with 16-bit elements: 6C.
struct ScaledGradientArgs {
  Rows dout;
  Vector gamma, drop_scale;
  DType dtype;
  void *d, *dz;
  int64_t n, pixels, c;
};
void scaled_gradient(const Context& context, const ScaledGradientArgs& args);

}  // namespace cnk::cuda
