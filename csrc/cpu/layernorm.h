// LayerNorm, RMSNorm or SimpleNorm of one pixel, for layernorm.cpp, the fused block and downsampling.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

struct RowNorm {
  int64_t c;
  float eps;
  const float *weight, *bias;  // padded C
  Vec mask;                    // of the last register that holds channels
  Norm kind;
  RowNorm(int64_t c, float eps, const float* weight, const float* bias, Norm kind)
      : c(c),
        eps(eps),
        weight(weight),
        bias(bias),
        mask(channel_mask((c - 1) / kLanes * kLanes, c)),
        kind(kind) {}
};

// xhat = (x - mean) rstd. The variance is that of x - centre: in LayerNorm both are the mean, RMSNorm has neither,
// SimpleNorm has no mean.
struct Statistics {
  float mean, rstd, centre;
};

// Statistics of a row. read(c) is the register at channel c, zero above the last channel. There are two
// passes. The first computes the mean. The second computes variance and mean of the deviations from it: so
// |mean| / std = 100 costs no digits, and the mean of the deviations corrects the mean, so that a row of
// equal values gives exactly the bias.
template <class Read>
CNK_INLINE Statistics statistics(const RowNorm& norm, const Read& read) {
  const int64_t last = (norm.c - 1) / kLanes * kLanes;
  const float count = float(norm.c);
  if (norm.kind == Norm::kRms) {
    Vec square[2] = {};
    for (int64_t c = 0; c <= last; c += kLanes) {
      const Vec v = read(c);
      square[c / kLanes % 2] = multiply_add(v, v, square[c / kLanes % 2]);
    }
    return {0, 1.0f / __builtin_sqrtf(sum(square[0] + square[1]) / count + norm.eps), 0};
  }
  Vec total[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= last; c += 4 * kLanes) {
    unroll<4>([&](auto i) { total[i.value] += read(c + i.value * kLanes); });
  }
  for (; c <= last; c += kLanes) total[0] += read(c);
  const float mean = sum((total[0] + total[1]) + (total[2] + total[3])) / count;
  Vec left[2] = {}, square[2] = {};
  for (c = 0; c + 2 * kLanes <= last; c += 2 * kLanes) {
    unroll<2>([&](auto i) {
      const Vec d = read(c + i.value * kLanes) - mean;
      left[i.value] += d;
      square[i.value] = multiply_add(d, d, square[i.value]);
    });
  }
  for (; c <= last; c += kLanes) {
    Vec d = read(c) - mean;
    if (c == last) d *= norm.mask;
    left[0] += d;
    square[0] = multiply_add(d, d, square[0]);
  }
  const float correction = sum(left[0] + left[1]) / count;
  const float variance = sum(square[0] + square[1]) / count - correction * correction;
  // Written so that NaN stays NaN.
  const float positive = variance < 0 ? 0 : variance;
  if (norm.kind == Norm::kSimple) {
    return {0, 1.0f / __builtin_sqrtf(positive * (count / (count - 1)) + norm.eps), mean + correction};
  }
  return {mean + correction, 1.0f / __builtin_sqrtf(positive + norm.eps), mean + correction};
}

CNK_INLINE Statistics statistics(const RowNorm& norm, const float* row) {
  return statistics(norm, [row](int64_t c) { return load(row + c); });
}

// The normalised register v of channels c...; padded channels give zero, because their weight and bias are 0.
CNK_INLINE Vec normalize(const RowNorm& norm, const Statistics& s, Vec v, int64_t c) {
  return multiply_add((v - s.mean) * s.rstd, load(norm.weight + c), load(norm.bias + c));
}

// The gradient of a row, dx[c] = rstd (g - mean(g) - xhat mean(g xhat)) with g = dy * weight, is passed to
// write(c, dx). The other norms do not have mean(g), and SimpleNorm has (x - centre) rstd instead of the first
// xhat and divides its sum by C - 1. Adds dy * xhat and dy to the sums of the weight's and the bias's gradient (padded C). x(c)
// and dy(c) read registers; dy must be zero above the last channel.
template <class ReadX, class ReadDy, class Write>
CNK_INLINE void layernorm_gradient(const RowNorm& norm, const ReadX& x, const ReadDy& dy, float* dweight,
                                   float* dbias, const Write& write) {
  const Statistics s = statistics(norm, x);
  Vec total = {}, total_xhat = {};
  for (int64_t c = 0; c < norm.c; c += kLanes) {
    const Vec d = dy(c), xhat = (x(c) - s.mean) * s.rstd, g = d * load(norm.weight + c);
    store(dweight + c, multiply_add(d, xhat, load(dweight + c)));
    store(dbias + c, d + load(dbias + c));
    total += g;
    total_xhat = multiply_add(g, xhat, total_xhat);
  }
  const float mean = norm.kind == Norm::kLayer ? sum(total) / float(norm.c) : 0;
  const float mean_xhat = sum(total_xhat) / float(norm.kind == Norm::kSimple ? norm.c - 1 : norm.c);
  for (int64_t c = 0; c < norm.c; c += kLanes) {
    const Vec xhat = (x(c) - s.centre) * s.rstd, g = dy(c) * load(norm.weight + c);
    write(c, (multiply_add(xhat, splat(-mean_xhat), g) - mean) * s.rstd);
  }
}

// Read a row of channels as fp32 into `row`, with zeros up to the padding.
template <class T>
CNK_INLINE void read_row(const T* x, int64_t channels, float* row) {
  for (int64_t c = 0; c < pad_channels(channels); c += kLanes) store(row + c, load_channels(x, c, channels));
}

}  // namespace cnk::cpu::CNK_ISA
