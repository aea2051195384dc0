// Exact (erf) GELU and its derivative with one exponential. The tail of the normal CDF is Phi(-a) = 2^P(a)
// with a polynomial P of degree 6 on [0, 6]. Then
//   gelu(x) = max(x, 0) - a * 2^P(a),  a = min(|x|, 6)
// The error is at most 3.4e-7, that of the derivative 3.1e-7. csrc/cuda/fit_gelu.py
// fits P, which is the same in backends/triton/kernels/gelu.py. NaN stays NaN; below -6 and
// at -inf gelu is -6e-9; gelu' is NaN at +-inf, as it is with erf.
#pragma once

#include "cuda/runtime.h"

namespace cnk::cuda {

// 2^x; with an error of 2 units in the last place on the GPU.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ __forceinline__ float upper_tail(float a) {
  float p = 2.766467514447868e-05f;
  p = fmaf(p, a, -0.0007205010624602437f);
  p = fmaf(p, a, 0.007916360162198544f);
  p = fmaf(p, a, -0.05315113440155983f);
  p = fmaf(p, a, -0.4589698016643524f);
  p = fmaf(p, a, -1.1511367559432983f);
  p = fmaf(p, a, -0.9999993443489075f);
  return exp2_fast(p);
}

// min(|x|, 6). NaN stays NaN; fminf would return 6.
__device__ __forceinline__ float clamped_magnitude(float x) {
  const float a = fabsf(x);
  return a > 6.0f ? 6.0f : a;
}

__device__ __forceinline__ float gelu(float x) {
  const float a = clamped_magnitude(x);
  return fmaf(-a, upper_tail(a), fmaxf(x, 0.0f));
}

// gelu'(x) = Phi(x) + x phi(x)
__device__ __forceinline__ float gelu_derivative(float x) {
  const float q = upper_tail(clamped_magnitude(x));
  const float cdf = x > 0.0f ? 1.0f - q : q;
  return fmaf(x, 0.3989422804014327f * exp2_fast(x * x * -0.7213475204444817f), cdf);
}

}  // namespace cnk::cuda
