// Global response normalisation: from sums of squares to the factor of each channel.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

// In place, from sums of squares over the pixels to the factor f:
//
//   GRN(h) = h * f + bias,  f = 1 + weight * G / (mean_c G + eps),  G = sqrt(sum)
//
// Padded channels are ignored.
CNK_INLINE void grn_factors(float* row, int64_t channels, const float* weight, float eps) {
  Vec total = {};
  for (int64_t c = 0; c < pad_channels(channels); c += kLanes) {
    float lanes[kLanes];
    store(lanes, load(row + c));
    for (int i = 0; i < kLanes; ++i) lanes[i] = c + i < channels ? __builtin_sqrtf(lanes[i]) : 0.0f;
    const Vec g = load(lanes);
    store(row + c, g);
    total += g;
  }
  const float inverse = 1.0f / (sum(total) / float(channels) + eps);
  for (int64_t c = 0; c < pad_channels(channels); c += kLanes) {
    store(row + c, multiply_add(load(row + c) * inverse, load(weight + c), 1.0f));
  }
}

// Pixels whose terms are added in one chain; the total is the sum of the chains. One chain over all 3136
// pixels of an image would have ten times the rounding error of PyTorch's sums.
constexpr int64_t kGrnRun = 64;

// Of an image and a block of channels, the sums over the pixels of x^2, dy x and dy. read(pixel, &x, &dy).
template <class Read>
CNK_INLINE void grn_sums(int64_t pixels, float* square, float* cross, float* plain, const Read& read) {
  Block totals[3] = {};
  for (int64_t first = 0; first < pixels; first += kGrnRun) {
    Block sums[3] = {};
    for (int64_t p = first; p < pixels && p < first + kGrnRun; ++p) {
      Block x, dy;
      read(p, &x, &dy);
      sums[0].add_product(x, x);
      sums[1].add_product(dy, x);
      sums[2] += dy;
    }
    for (int i = 0; i < 3; ++i) totals[i] += sums[i];
  }
  store(square, totals[0]);
  store(cross, totals[1]);
  store(plain, totals[2]);
}

// What the gradient of an image needs for each channel. In place, from the sums over the pixels `square` of
// x^2 and `cross` of dy * x:
//
//   square -> f = 1 + weight * r, r = G / s, G = sqrt(square), s = mean_c G + eps
//   cross  -> e = dG / G (0 where G is), dG = q / s - sum_c(q G) / (C s^2), q = weight * cross
//
// Then dx = dy * f + x * e. Adds cross * r to dweight. All vectors have the padded length of C.
CNK_INLINE void grn_gradient_factors(float* square, float* cross, int64_t channels, const float* weight,
                                     float eps, float* dweight) {
  Vec total = {}, projection = {};
  for (int64_t c = 0; c < pad_channels(channels); c += kLanes) {
    float lanes[kLanes];
    store(lanes, load(square + c));
    for (int i = 0; i < kLanes; ++i) lanes[i] = c + i < channels ? __builtin_sqrtf(lanes[i]) : 0.0f;
    const Vec g = load(lanes);
    store(square + c, g);
    total += g;
    store(lanes, load(cross + c));
    for (int i = 0; i < kLanes; ++i) lanes[i] = c + i < channels ? lanes[i] : 0.0f;
    store(cross + c, load(lanes));
    projection = multiply_add(load(weight + c) * load(lanes), g, projection);
  }
  const float inverse = 1.0f / (sum(total) / float(channels) + eps);
  const float shared = sum(projection) / float(channels) * inverse * inverse;
  for (int64_t c = 0; c < pad_channels(channels); c += kLanes) {
    const Vec g = load(square + c), q = load(cross + c), w = load(weight + c), r = g * inverse;
    store(dweight + c, multiply_add(q, r, load(dweight + c)));
    store(square + c, multiply_add(w, r, 1.0f));
    const Vec change = (multiply_add(w * q, splat(inverse), splat(-shared))) / g;
    store(cross + c, g == 0 ? Vec{} : change);
  }
}

// The same for `images` images, whose sums are pad_channels(channels) apart; adds to dweight and dbias.
CNK_INLINE void grn_gradients(int64_t images, int64_t channels, const float* weight, float eps, float* square,
                              float* cross, const float* plain, float* dweight, float* dbias) {
  const int64_t padded = pad_channels(channels);
  for (int64_t n = 0; n < images; ++n) {
    grn_gradient_factors(square + n * padded, cross + n * padded, channels, weight, eps, dweight);
    for (int64_t c = 0; c < padded; c += kLanes)
      store(dbias + c, load(dbias + c) + load(plain + n * padded + c));
  }
}

}  // namespace cnk::cpu::CNK_ISA
