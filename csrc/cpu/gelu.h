// gelu(x) = max(x, 0) - a * Phi(-a), a = min(|x|, 6), Phi: the
// normal CDF. The error is at most 3.0e-7, half of it rounding.
//
// No division, no branch. With AVX-512, Phi(-a) is one of 32 cubic polynomials; two registers hold each
// coefficient of all of them, and a permutation selects (8.2 -> 4.5 cycles of 2.6 GHz for a register on Zen
// 5). Elsewhere Phi(-a) = 2^P(a). fit_gelu.py computes the numbers. NaN gives NaN; -Inf gives 0 to 7e-9.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

// 2^v by a polynomial for the fraction of v, relative error 1.2e-7; v >= -126.
CNK_INLINE Vec exp2(Vec v) {
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)v, 0);
#else
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold the nearest integer
  const Vec shifted = v + kMagic;
  const Vec f = v - (shifted - kMagic);
#endif
  Vec p = multiply_add(f, 0.00133908633f, 0.00967603177f);
  p = multiply_add(p, f, 0.0555035695f);
  p = multiply_add(p, f, 0.240221068f);
  p = multiply_add(p, f, 0.693147182f);
  p = multiply_add(p, f, 1.00000012f);
#if defined(__AVX512F__)
  // scalef multiplies by 2^floor(v - f), and v - f is exactly the integer.
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(v - f));
#else
  return (Vec)((VecI)p + ((VecI)shifted << 23));
#endif
}

#if defined(__AVX512F__)
// Phi(-a) around a = 6/31 * segment, by powers of d = 31/6 * a - segment.
// clang-format off
alignas(64) constexpr float kTail[4][32] = {
    {0.5f, 0.423264861f, 0.349342465f, 0.280740052f, 0.219408423f, 0.166586861f, 0.122762106f, 0.0877345875f,
     0.0607646145f, 0.0407598652f, 0.0264654327f, 0.016625734f, 0.0101007773f, 0.00593252247f, 0.00336737907f,
     0.00184665865f, 0.000978163444f, 0.000500341994f, 0.000247095391f, 0.000117794589f, 5.41973459e-05f,
     2.40635072e-05f, 1.03088605e-05f, 4.26070346e-06f, 1.6987284e-06f, 6.5327481e-07f, 2.42302804e-07f,
     8.667147e-08f, 2.98962526e-08f, 9.94375871e-09f, 3.18897042e-09f, 9.86033144e-10f},
    {-0.0772146136f, -0.0757818073f, -0.0716409534f, -0.0652361959f, -0.0572198704f, -0.0483432673f,
     -0.0393419638f, -0.030839473f, -0.0232856721f, -0.0169356335f, -0.01186438f, -0.00800607167f,
     -0.00520384917f, -0.003258073f, -0.0019648422f, -0.00114136713f, -0.000638636644f, -0.000344201719f,
     -0.000178691116f, -8.93559773e-05f, -4.30402652e-05f, -1.99690276e-05f, -8.92420394e-06f, -3.84160512e-06f,
     -1.59289243e-06f, -6.3619575e-07f, -2.4475159e-07f, -9.06965525e-08f, -3.2373265e-08f, -1.11304459e-08f,
     -3.68611586e-09f, -1.1758603e-09f},
    {0.0f, 0.00141615327f, 0.00267777871f, 0.00365810911f, 0.00427900115f, 0.0045201797f, 0.00441566855f,
     0.00403979281f, 0.00348757138f, 0.00285498565f, 0.00222354522f, 0.00165150315f, 0.00117183093f,
     0.000795390166f, 0.000516980595f, 0.000322034932f, 0.000192377076f, 0.000110270674f, 6.06760732e-05f,
     3.20618419e-05f, 1.62746201e-05f, 7.93783602e-06f, 3.72103295e-06f, 1.67680537e-06f, 7.26500559e-07f,
     3.02684754e-07f, 1.21284572e-07f, 4.67448196e-08f, 1.73308994e-08f, 6.18173202e-09f, 2.12147677e-09f,
     7.00550229e-10f},
    {0.000481412717f, 0.00045480454f, 0.000379822013f, 0.00026977263f, 0.000143163299f, 1.94046934e-05f,
     -8.52499288e-05f, -0.000160470838f, -0.000202790936f, -0.000214809057f, -0.000203228832f, -0.000176503396f,
     -0.000142770165f, -0.000108488464f, -7.78785397e-05f, -5.30163306e-05f, -3.43211395e-05f, -2.11724728e-05f,
     -1.24660564e-05f, -7.01418003e-06f, -3.77529136e-06f, -1.94538256e-06f, -9.60361263e-07f, -4.5444969e-07f,
     -2.06237317e-07f, -8.97961172e-08f, -3.75241385e-08f, -1.50543062e-08f, -5.79995563e-09f, -2.14637552e-09f,
     -7.63124286e-10f, -2.60720168e-10f},
};
// clang-format on
#endif

#if defined(__AVX512F__)
// Phi(-a) around a = 4.8/31 * segment, by powers of a; 0 in the last segment.
// clang-format off
alignas(64) constexpr float kRoughTail[3][32] = {
    {0.5f, 0.500196099f, 0.501723111f, 0.505333722f, 0.510792196f, 0.51674968f, 0.520938039f, 0.520625532f,
     0.513206244f, 0.496768743f, 0.470503986f, 0.434868276f, 0.391484886f, 0.342833757f, 0.291821152f,
     0.241332874f, 0.193860412f, 0.15125607f, 0.114633977f, 0.0844009668f, 0.0603796542f, 0.0419787243f,
     0.0283697024f, 0.0186406113f, 0.0119106993f, 0.00740244705f, 0.00447568996f, 0.00263313344f,
     0.0015076173f, 0.00084020925f, 0.000455858739f, 0.0f},
    {-0.398643583f, -0.403340578f, -0.416434675f, -0.435129106f, -0.455365419f, -0.472584993f, -0.482549071f,
     -0.48204869f, -0.469373524f, -0.444472402f, -0.408811659f, -0.364998043f, -0.316271931f, -0.26598379f,
     -0.21714893f, -0.172141403f, -0.132547274f, -0.0991634578f, -0.0721047148f, -0.0509726591f,
     -0.0350425504f, -0.023434408f, -0.0152482027f, -0.00965579879f, -0.00595186651f, -0.00357188075f,
     -0.00208735303f, -0.00118801091f, -0.000658620149f, -0.000355712487f, -0.000187183425f, 0.0f},
    {-6.17433063e-15f, 0.0304838214f, 0.058815632f, 0.0830946341f, 0.101881713f, 0.114336878f, 0.12026611f,
     0.120077401f, 0.114662141f, 0.105228886f, 0.0931216031f, 0.0796519965f, 0.0659681559f, 0.0529713593f,
     0.0412825048f, 0.0312510841f, 0.0229945648f, 0.0164543632f, 0.011455846f, 0.00776294246f, 0.00512172654f,
     0.00329090166f, 0.00205979054f, 0.00125611236f, 0.000746462145f, 0.000432342553f, 0.000244089038f,
     0.000134344911f, 7.20930766e-05f, 3.7723079e-05f, 1.92486168e-05f, 0.0f},
};
// clang-format on

// GELU with an error of 8e-6 |x|, for results that are rounded to bf16, whose rounding is 250 times that. 10 instead of 13
// instructions: beside AMX, GELU takes longer than the products (C 96).
CNK_INLINE Vec rough_gelu(Vec x) {
  const __m512 a = _mm512_range_ps((__m512)x, _mm512_set1_ps(4.8f), 0b1010);  // min(|x|, 4.8)
  const Vec shifted =
      multiply_add((Vec)a, splat(31.0f / 4.8f), splat(12582912.0f));  // low bits hold the segment
  const auto coefficient = [&](int power) CNK_INLINE_LAMBDA {
    return (Vec)_mm512_permutex2var_ps(_mm512_load_ps(kRoughTail[power]), (__m512i)shifted,
                                       _mm512_load_ps(kRoughTail[power] + 16));
  };
  Vec p = multiply_add(coefficient(2), (Vec)a, coefficient(1));
  p = multiply_add(p, (Vec)a, coefficient(0));
  return multiply_add(-(Vec)a, p, max(Vec{}, x));
}
#endif

// Phi(-a) for a in [0, 6], with an error of 3.0e-7 (AVX-512) or 1.8e-7.
CNK_INLINE Vec lower_tail(Vec a) {
#if defined(__AVX512F__)
  const Vec scale = splat(31.0f / 6.0f), magic = splat(12582912.0f);  // as in exp2: low bits hold the segment
  const Vec shifted = multiply_add(a, scale, magic);
  const Vec d = multiply_add(a, scale, magic - shifted);
  const auto coefficient = [&](int power) CNK_INLINE_LAMBDA {
    return (Vec)_mm512_permutex2var_ps(_mm512_load_ps(kTail[power]), (__m512i)shifted,
                                       _mm512_load_ps(kTail[power] + 16));
  };
  Vec p = multiply_add(coefficient(3), d, coefficient(2));
  p = multiply_add(p, d, coefficient(1));
  return multiply_add(p, d, coefficient(0));
#else
  Vec p = multiply_add(a, 6.1186156e-06f, -3.24729663e-05f);
  p = multiply_add(p, a, -0.000494727807f);
  p = multiply_add(p, a, 0.00750831049f);
  p = multiply_add(p, a, -0.0527847111f);
  p = multiply_add(p, a, -0.459120274f);
  p = multiply_add(p, a, -1.15111494f);
  p = multiply_add(p, a, -0.999999821f);
  return exp2(p);
#endif
}

CNK_INLINE Vec gelu(Vec x) {
  const Vec a = min(splat(6.0f), abs(x));
  return multiply_add(-a, lower_tail(a), max(Vec{}, x));
}

// The same for a result that is stored as T.
template <class T>
CNK_INLINE Vec gelu(Vec x, T) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, BFloat16)) return rough_gelu(x);
#endif
  return gelu(x);
}

// What GELU's gradient needs: gelu(x) and its slope Phi(x) + x * phi(x). For |x| > 13, phi is 2^-126, not 0.
struct Activated {
  Vec value, slope;
};

CNK_INLINE Activated gelu_with_slope(Vec x) {
  const Vec a = min(splat(6.0f), abs(x));
  const Vec tail = lower_tail(a);
  const Vec density = exp2(max(splat(-126.0f), x * x * -0.721347520f)) * 0.398942280f;
  const Vec cdf = x > 0 ? 1.0f - tail : tail;
  return {multiply_add(-a, tail, max(Vec{}, x)), multiply_add(x, density, cdf)};
}

}  // namespace cnk::cpu::CNK_ISA
