// LayerNorm of one pixel: what layernorm.cpp, the fused block and downsampling share.
#pragma once

#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

struct Norm {
  int64_t c;
  float eps;
  const float *weight, *bias;  // padded C
  Vec mask;                    // of the last register that holds channels
  Norm(int64_t c, float eps, const float* weight, const float* bias)
      : c(c), eps(eps), weight(weight), bias(bias), mask(channel_mask((c - 1) / kLanes * kLanes, c)) {}
};

struct Statistics {
  float mean, rstd;
};

// Statistics of `row`, padded with zeros, in two passes: the variance of what is left after the mean, so that
// |mean| / std = 100 costs no digits.
CNK_INLINE Statistics statistics(const Norm& norm, const float* row) {
  const int64_t last = (norm.c - 1) / kLanes * kLanes;
  Vec total[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= last; c += 4 * kLanes) {
    unroll<4>([&](auto i) { total[i.value] += load(row + c + i.value * kLanes); });
  }
  for (; c <= last; c += kLanes) total[0] += load(row + c);
  const float mean = sum((total[0] + total[1]) + (total[2] + total[3])) / float(norm.c);
  Vec square[4] = {};
  for (c = 0; c + 4 * kLanes <= last; c += 4 * kLanes) {
    unroll<4>([&](auto i) {
      const Vec d = load(row + c + i.value * kLanes) - mean;
      square[i.value] += d * d;
    });
  }
  for (; c < last; c += kLanes) {
    const Vec d = load(row + c) - mean;
    square[0] += d * d;
  }
  const Vec d = (load(row + last) - mean) * norm.mask;
  const Vec total_square = (square[0] + square[1]) + (square[2] + square[3]) + d * d;
  const float variance = sum(total_square) / float(norm.c);
  return {mean, 1.0f / __builtin_sqrtf(variance + norm.eps)};
}

// Register c of the normalised row; padded channels give zero, since their weight and bias are zero.
CNK_INLINE Vec normalize(const Norm& norm, const Statistics& s, const float* row, int64_t c) {
  return (load(row + c) - s.mean) * s.rstd * load(norm.weight + c) + load(norm.bias + c);
}

// Read a row of channels as fp32 into `row`, with zeros up to the padding.
template <class T>
CNK_INLINE void read_row(const T* x, int64_t channels, float* row) {
  for (int64_t c = 0; c < pad_channels(channels); c += kLanes) store(row + c, load_channels(x, c, channels));
}

}  // namespace cnk::cpu::CNK_ISA
