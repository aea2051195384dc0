// The activations beside the exact GELU, and their slopes; formulas and sources are in variants.py. Two functions
// for all of them, which are not inlined: so kernels are compiled once for GELU and once for the others.
//
// NaN gives NaN; below -87 a sigmoid is 0.
#pragma once

#include "common/variants.h"
#include "cpu/gelu.h"

namespace cnk::cpu::CNK_ISA {

constexpr float kLog2E = 1.44269504f;

// 1 / (1 + e^-v)
CNK_INLINE Vec sigmoid(Vec v) {
  const Vec s = 1.0f / (1.0f + exp2(max(splat(-126.0f), min(splat(126.0f), v * -kLog2E))));
  return v < -87.0f ? Vec{} : s;
}

// x * sigmoid(inner(x)) and its slope, given inner and its slope.
CNK_INLINE Activated gated(Vec x, Vec inner, Vec inner_slope) {
  const Vec s = sigmoid(inner);
  return {x * s, multiply_add(x * s * (1.0f - s), inner_slope, s)};
}

CNK_INLINE Activated compute(Vec x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu_with_slope(x);
    case Activation::kGeluTanh: {                                     // tanh(z) = 2 sigmoid(2 z) - 1
      constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;  // 2 sqrt(2 / pi) times 1, 0.044715
      const Vec square = x * x;
      return gated(x, x * multiply_add(square, kCubic, kLinear), multiply_add(square, 3 * kCubic, kLinear));
    }
    case Activation::kQuickGelu:
      return gated(x, x * 1.702f, splat(1.702f));
    case Activation::kSilu:
      return gated(x, x, splat(1.0f));
    case Activation::kMish: {  // tanh(log(1 + n)) = w / (w + 2) with n = e^x, w = n (n + 2)
      const Vec n = x < -87.0f ? Vec{} : exp2(max(splat(-126.0f), min(splat(28.0f), x * kLog2E)));
      const Vec w = n * (n + 2.0f), inverse = 1.0f / (w + 2.0f), t = w * inverse;
      return {x * t, multiply_add(x, 4.0f * n * (n + 1.0f) * inverse * inverse, t)};
    }
    case Activation::kRelu:
      return {max(Vec{}, x), x <= 0 ? Vec{} : splat(1.0f)};
    case Activation::kRelu6:
      return {min(splat(6.0f), max(Vec{}, x)), x <= 0 ? Vec{} : x >= 6 ? Vec{} : splat(1.0f)};
    case Activation::kHardswish: {
      constexpr float kSixth = 1.0f / 6;
      const Vec slope = multiply_add(x, 2 * kSixth, 0.5f);
      return {x * (min(splat(6.0f), max(Vec{}, x + 3.0f)) * kSixth), x <= -3 ? Vec{}
                                                                     : x < 3 ? slope
                                                                             : splat(1.0f)};
    }
  }
  return {Vec{}, Vec{}};
}

inline __attribute__((noinline)) Activated activated_with_slope(Vec x, Activation activation) {
  return compute(x, activation);
}
inline __attribute__((noinline)) Vec activated(Vec x, Activation activation) {
  return compute(x, activation).value;
}

}  // namespace cnk::cpu::CNK_ISA
