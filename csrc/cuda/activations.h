// The activations and their derivatives; formulas and sources are in variants.py. NaN stays NaN.
#pragma once

#include "common/variants.h"
#include "cuda/gelu.h"

namespace cnk::cuda {

// 1 / x, with an error of 1 unit in the last place on the GPU; 0 for infinity.
__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_fast(1.0f + exp2_fast(x * -1.4426950408889634f));
}

struct Gelu {
  static __device__ __forceinline__ float value(float x) { return gelu(x); }
  static __device__ __forceinline__ float derivative(float x) { return gelu_derivative(x); }
};

// x * sigmoid(inner(x)), where inner(x) = x (Inner::kLinear + Inner::kCubic x^2).
template <class Inner>
struct Gated {
  static __device__ __forceinline__ float gate(float x) {
    return sigmoid(x * fmaf(x * x, Inner::kCubic, Inner::kLinear));
  }
  static __device__ __forceinline__ float value(float x) { return x * gate(x); }
  static __device__ __forceinline__ float derivative(float x) {
    const float s = gate(x);
    return fmaf(x * s * (1.0f - s), fmaf(x * x, 3.0f * Inner::kCubic, Inner::kLinear), s);
  }
};
struct TanhInner {  // (1 + tanh(z)) / 2 = sigmoid(2 z): 2 sqrt(2 / pi) times 1 and 0.044715
  static constexpr float kLinear = 1.5957691216057308f, kCubic = 0.07135481282809582f;
};
struct QuickInner {
  static constexpr float kLinear = 1.702f, kCubic = 0.0f;
};
struct SiluInner {
  static constexpr float kLinear = 1.0f, kCubic = 0.0f;
};

struct Mish {
  // tanh(log(1 + n)) = w / (w + 2) with n = e^x, w = n (n + 2). For x > 28 it is 1; fminf would lose a NaN, but
  // the result is multiplied by x.
  static __device__ __forceinline__ float n(float x) {
    return exp2_fast(fminf(x, 28.0f) * 1.4426950408889634f);
  }
  static __device__ __forceinline__ float value(float x) {
    const float e = n(x), w = e * (e + 2.0f);
    return x * (w * reciprocal_fast(w + 2.0f));
  }
  static __device__ __forceinline__ float derivative(float x) {
    const float e = n(x), w = e * (e + 2.0f), inverse = reciprocal_fast(w + 2.0f);
    return fmaf(x, 4.0f * e * (e + 1.0f) * inverse * inverse, w * inverse);
  }
};

struct Relu {
  static __device__ __forceinline__ float value(float x) { return x < 0.0f ? 0.0f : x; }
  static __device__ __forceinline__ float derivative(float x) { return x <= 0.0f ? 0.0f : 1.0f; }
};

struct Relu6 {
  static __device__ __forceinline__ float value(float x) { return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x; }
  static __device__ __forceinline__ float derivative(float x) { return x <= 0.0f || x >= 6.0f ? 0.0f : 1.0f; }
};

struct Hardswish {
  static __device__ __forceinline__ float value(float x) {
    return x * (Relu6::value(x + 3.0f) * 0.16666666666666666f);
  }
  static __device__ __forceinline__ float derivative(float x) {
    return x <= -3.0f ? 0.0f : x < 3.0f ? fmaf(x, 0.3333333333333333f, 0.5f) : 1.0f;
  }
};

// Calls f with the class of an activation other than GELU.
template <class F>
__device__ __forceinline__ void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu:
      break;  // has kernels of its own
    case Activation::kGeluTanh:
      f(Gated<TanhInner>{});
      break;
    case Activation::kQuickGelu:
      f(Gated<QuickInner>{});
      break;
    case Activation::kSilu:
      f(Gated<SiluInner>{});
      break;
    case Activation::kMish:
      f(Mish{});
      break;
    case Activation::kRelu:
      f(Relu{});
      break;
    case Activation::kRelu6:
      f(Relu6{});
      break;
    case Activation::kHardswish:
      f(Hardswish{});
      break;
  }
}

}  // namespace cnk::cuda
