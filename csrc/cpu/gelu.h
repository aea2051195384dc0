// GELU: gelu(x) = max(x, 0) - a * 2^P(a), a = min(|x|, 6), where P approximates log2 of the normal CDF of -a.
//
// No division, no table, no branch. Coefficients by fit_gelu.py. kFloat32: 2.7e-7 from x * Phi(x), half of it
// rounding. kBFloat16, for results that are rounded to bf16 at once (2e-3 relative): 1.2e-4 relative plus
// 5e-7. NaN flows through; -Inf gives 0 to 7e-9.
#pragma once

#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

enum class Accuracy { kFloat32, kBFloat16 };

// p * 2^i for the integer i nearest below or at, with f = v - i left for the polynomial.
template <Accuracy accuracy>
CNK_INLINE Vec exp2(Vec v) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)v, 0);
#else
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the nearest integer
  const Vec shifted = v + kMagic;
  const Vec f = v - (shifted - kMagic);
#endif
  Vec p;
  if constexpr (accuracy == Accuracy::kFloat32) {
    p = multiply_add(f, 0.00133908633f, 0.00967603177f);
    p = multiply_add(p, f, 0.0555035695f);
    p = multiply_add(p, f, 0.240221068f);
    p = multiply_add(p, f, 0.693147182f);
    p = multiply_add(p, f, 1.00000012f);
  } else {
    p = multiply_add(f, 0.0558382832f, 0.242639482f);
    p = multiply_add(p, f, 0.693136752f);
    p = multiply_add(p, f, 0.999924541f);
  }
#if defined(__AVX512F__)
  // scalef multiplies by 2^floor: of v - f, which is the integer exactly.
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(v - f));
#else
  return (Vec)((VecI)p + ((VecI)shifted << 23));
#endif
}

template <Accuracy accuracy>
CNK_INLINE Vec gelu(Vec x) {
  const Vec a = min(splat(6.0f), abs(x));
  Vec p;
  if constexpr (accuracy == Accuracy::kFloat32) {
    p = multiply_add(a, 3.1517568e-06f, 2.95986638e-07f);
    p = multiply_add(p, a, -0.000635938544f);
    p = multiply_add(p, a, 0.0078107249f);
    p = multiply_add(p, a, -0.0531238243f);
    p = multiply_add(p, a, -0.458928347f);
    p = multiply_add(p, a, -1.15116286f);
    p = multiply_add(p, a, -0.999996126f);
  } else {
    p = multiply_add(a, -0.000473309687f, 0.00708456011f);
    p = multiply_add(p, a, -0.0518273897f);
    p = multiply_add(p, a, -0.459992439f);
    p = multiply_add(p, a, -1.15078783f);
    p = multiply_add(p, a, -1.00003767f);
  }
  return multiply_add(-a, exp2<accuracy>(p), max(Vec{}, x));
}

// What GELU's gradient needs: gelu(x) and its slope Phi(x) + x * phi(x).
struct Gelu {
  Vec value, slope;
};

// P is another polynomial, for the error of Phi itself: 1.2e-7 in fp32, where GELU's own has 1.5e-6 at 0. In
// bf16 2e-6. Beyond |x| = 13 phi is 2^-126, not 0.
template <Accuracy accuracy>
CNK_INLINE Gelu gelu_with_slope(Vec x) {
  const Vec a = min(splat(6.0f), abs(x));
  Vec p;
  if constexpr (accuracy == Accuracy::kFloat32) {
    p = multiply_add(a, -2.27599321e-06f, 3.29693576e-05f);
    p = multiply_add(p, a, -0.000157284638f);
    p = multiply_add(p, a, -0.00020246605f);
    p = multiply_add(p, a, 0.00714276684f);
    p = multiply_add(p, a, -0.0525464267f);
    p = multiply_add(p, a, -0.459193051f);
    p = multiply_add(p, a, -1.15110695f);
    p = multiply_add(p, a, -0.99999994f);
  } else {
    p = multiply_add(a, -0.000500274473f, 0.00728245778f);
    p = multiply_add(p, a, -0.0523433834f);
    p = multiply_add(p, a, -0.459413975f);
    p = multiply_add(p, a, -1.15105212f);
    p = multiply_add(p, a, -1.00000191f);
  }
  const Vec tail = exp2<accuracy>(p);  // Phi(-a)
  const Vec density = exp2<accuracy>(max(splat(-126.0f), x * x * -0.721347520f)) * 0.398942280f;
  const Vec cdf = x > 0 ? 1.0f - tail : tail;
  return {multiply_add(-a, tail, max(Vec{}, x)), multiply_add(x, density, cdf)};
}

}  // namespace cnk::cpu::CNK_ISA
