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

// Of up to kLanes rows: xhat = (x - mean) rstd. The variance is that of x - centre: in LayerNorm both are the mean, RMSNorm
// has neither, SimpleNorm has no mean.
struct Statistics {
  alignas(sizeof(Vec)) float mean[kLanes], rstd[kLanes], centre[kLanes];
};

// Lane i: the sum of the lanes of rows[i]. Half the lanes and half the registers in each round: 3 instructions a row, where
// the sum of one register takes 9 that wait for each other.
template <int WIDTH = kLanes>
CNK_INLINE Vec sum_rows(Vec* rows) {
  if constexpr (WIDTH == 1) {
    return rows[0];
  } else {
    unroll<WIDTH / 2>([&](auto i) CNK_INLINE_LAMBDA {
      rows[i.value] = detail::add_halves<WIDTH>(rows[2 * i.value], rows[2 * i.value + 1]);
    });
    return sum_rows<WIDTH / 2>(rows);
  }
}

// Statistics of `rows` <= kLanes rows. read(i, c) is the register at channel c of row i, zero above the last channel. There
// are two passes. The first computes the mean. The second computes variance and mean of the deviations from it: so |mean| /
// std = 100 costs no digits, and the mean of the deviations corrects the mean, so that a row of equal values gives exactly
// the bias.
template <class Read>
CNK_INLINE Statistics statistics(const RowNorm& norm, int64_t rows, const Read& read) {
  Statistics s = {};
  const int64_t last = (norm.c - 1) / kLanes * kLanes;
  const float count = float(norm.c);
  Vec left[kLanes] = {}, square[kLanes] = {};
  if (norm.kind != Norm::kRms) {
    for (int64_t i = 0; i < rows; ++i) {
      Vec total[2] = {};
      int64_t c = 0;
      for (; c + kLanes <= last; c += 2 * kLanes) {
        unroll<2>([&](auto j) CNK_INLINE_LAMBDA { total[j.value] += read(i, c + j.value * kLanes); });
      }
      if (c <= last) total[0] += read(i, c);
      left[i] = total[0] + total[1];
    }
    store(s.mean, sum_rows(left) / count);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Vec mean = splat(s.mean[i]);
    Vec deviation = {}, squares = {};
    for (int64_t c = 0; c < last; c += kLanes) {
      const Vec d = read(i, c) - mean;
      deviation += d;
      squares = multiply_add(d, d, squares);
    }
    const Vec d = (read(i, last) - mean) * norm.mask;
    left[i] = deviation + d;
    square[i] = multiply_add(d, d, squares);
  }
  Vec centre = load(s.mean), variance = sum_rows(square) / count;
  if (norm.kind != Norm::kRms) {
    const Vec correction = sum_rows(left) / count;
    centre += correction;
    variance = max(Vec{}, variance - correction * correction);  // NaN stays NaN
  }
  store(s.centre, centre);
  store(s.mean, norm.kind == Norm::kLayer ? centre : Vec{});
  if (norm.kind == Norm::kSimple) variance *= splat(count / (count - 1));
  store(s.rstd, 1.0f / square_root(variance + norm.eps));
  return s;
}

// write(i, block, c) gets the normalised channels c... (kChannelAlign of them) of row i; padded ones are zero, because their
// weight and bias are 0.
template <class Read, class Write>
CNK_INLINE void normalize(const RowNorm& norm, int64_t rows, const Read& read, const Write& write) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = rows - first < kLanes ? rows - first : kLanes;
    const auto read_part = [&](int64_t i, int64_t c) CNK_INLINE_LAMBDA { return read(first + i, c); };
    const Statistics s = statistics(norm, count, read_part);
    for (int64_t i = 0; i < count; ++i) {
      const Vec mean = splat(s.mean[i]), rstd = splat(s.rstd[i]);
      for (int64_t c = 0; c < norm.c; c += kChannelAlign) {
        const Block b = block_of([&](int k) CNK_INLINE_LAMBDA {
          const Vec xhat = (read(first + i, c + k) - mean) * rstd;
          return multiply_add(xhat, load(norm.weight + c + k), load(norm.bias + c + k));
        });
        write(first + i, b, c);
      }
    }
  }
}

// The same as rows `row`... of an operand A of the products G, k wide, from column `offset` on.
template <class G, class Read>
CNK_INLINE void write_normalized(void* a, int64_t k, int64_t row, int64_t offset, const RowNorm& norm,
                                 int64_t rows, const Read& read) {
  normalize(norm, rows, read, [&](int64_t i, const Block& b, int64_t c) CNK_INLINE_LAMBDA {
    G::store_block(a, k, row + i, offset + c, b);
  });
}

// The gradient of `rows` <= kLanes rows, dx[c] = rstd (g - mean(g) - xhat mean(g xhat)) with g = dy * weight, is passed to
// write(i, c, dx). The other norms do not have mean(g), and SimpleNorm has (x - centre) rstd instead of the first
// xhat and divides its sum by C - 1. Adds dy * xhat and dy to the sums of the weight's and the bias's gradient (padded C).
// x(i, c) and dy(i, c) read registers, which must be zero above the last channel.
template <class ReadX, class ReadDy, class Write>
CNK_INLINE void layernorm_gradient(const RowNorm& norm, int64_t rows, const ReadX& x, const ReadDy& dy,
                                   float* dweight, float* dbias, const Write& write) {
  const Statistics s = statistics(norm, rows, x);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec mean = splat(s.mean[i]), rstd = splat(s.rstd[i]), centre = splat(s.centre[i]);
    Vec total = {}, total_xhat = {};
    for (int64_t c = 0; c < norm.c; c += kLanes) {
      const Vec d = dy(i, c), xhat = (x(i, c) - mean) * rstd, g = d * load(norm.weight + c);
      store(dweight + c, multiply_add(d, xhat, load(dweight + c)));
      store(dbias + c, d + load(dbias + c));
      total += g;
      total_xhat = multiply_add(g, xhat, total_xhat);
    }
    const float mean_g = norm.kind == Norm::kLayer ? sum(total) / float(norm.c) : 0;
    const float mean_xhat = sum(total_xhat) / float(norm.kind == Norm::kSimple ? norm.c - 1 : norm.c);
    for (int64_t c = 0; c < norm.c; c += kLanes) {
      const Vec xhat = (x(i, c) - centre) * rstd, g = dy(i, c) * load(norm.weight + c);
      write(i, c, (multiply_add(xhat, splat(-mean_xhat), g) - mean_g) * rstd);
    }
  }
}

}  // namespace cnk::cpu::CNK_ISA
