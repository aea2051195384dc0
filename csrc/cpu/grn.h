// Global response normalisation: from sums of squares to the factor of each channel.
#pragma once

#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

// In place: sums of squares over the pixels -> factor f with GRN(h) = h * f + bias, f = 1 + weight * G /
// (mean_c G + eps), G = sqrt(sum). What padded channels hold is ignored.
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

}  // namespace cnk::cpu::CNK_ISA
