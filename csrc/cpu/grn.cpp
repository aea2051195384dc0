// Global response normalisation of NHWC images, and its
// gradient: one pass for the sums over pixels, one that scales.
//
// Sums add the pixels in order, for any number of threads:
// the channels are divided among the threads, not the pixels.

#include "cpu/grn.h"

namespace cnk::cpu::CNK_ISA {

void grn(const GrnArgs& a, Team& team) {
#if defined(CNK_HAS_BF16)
  if (a.dtype != DType::kBFloat16) return CNK_SHARED::kOps.grn(a, team);
#endif
  const int64_t padded = pad_channels(a.c), groups = padded / kChannelAlign;
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    int64_t begin, end;
    team.split(a.n * groups, 1, &begin, &end);
    constexpr int kGroup = kChannelAlign / kLanes;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, c = item % groups * kChannelAlign;
      Vec square[kGroup] = {};
      for (int64_t p = 0; p < a.pixels; ++p) {
        const T* row = x + (n * a.pixels + p) * a.c;
        unroll<kGroup>([&](auto i) {
          const Vec v = load_channels(row, c + i.value * kLanes, a.c);
          square[i.value] = multiply_add(v, v, square[i.value]);
        });
      }
      unroll<kGroup>([&](auto i) { store(a.scale + n * padded + c + i.value * kLanes, square[i.value]); });
    }
    team.barrier();
    team.split(a.n, 1, &begin, &end);
    for (int64_t n = begin; n < end; ++n) grn_factors(a.scale + n * padded, a.c, a.weight, a.eps);
    team.barrier();
    team.split(a.n * a.pixels, 1, &begin, &end);
    for (int64_t p = begin; p < end; ++p) {
      const float* scale = a.scale + p / a.pixels * padded;
      for (int64_t c = 0; c < a.c; c += kLanes) {
        const Vec v = load_channels(x + p * a.c, c, a.c);
        store_channels(y + p * a.c, c, a.c, multiply_add(v, load(scale + c), load(a.bias + c)));
      }
    }
  });
}

void grn_backward(const GrnBackwardArgs& a, Team& team) {
#if defined(CNK_HAS_BF16)
  if (a.dtype != DType::kBFloat16) return CNK_SHARED::kOps.grn_backward(a, team);
#endif
  const int64_t padded = pad_channels(a.c), groups = padded / kChannelAlign, of_all = a.n * padded;
  float *square = a.sums, *cross = square + of_all, *plain = cross + of_all;
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    int64_t begin, end;
    team.split(a.n * groups, 1, &begin, &end);
    constexpr int kGroup = kChannelAlign / kLanes;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, c = item % groups * kChannelAlign;
      Vec totals[3][kGroup] = {};
      for (int64_t first = 0; first < a.pixels; first += kGrnRun) {
        Vec sums[3][kGroup] = {};
        for (int64_t p = first; p < a.pixels && p < first + kGrnRun; ++p) {
          const int64_t row = (n * a.pixels + p) * a.c;
          unroll<kGroup>([&](auto i) {
            const Vec v = load_channels(x + row, c + i.value * kLanes, a.c);
            const Vec d = load_channels(dy + row, c + i.value * kLanes, a.c);
            sums[0][i.value] = multiply_add(v, v, sums[0][i.value]);
            sums[1][i.value] = multiply_add(d, v, sums[1][i.value]);
            sums[2][i.value] += d;
          });
        }
        unroll<3>([&](auto k) {
          unroll<kGroup>([&](auto i) { totals[k.value][i.value] += sums[k.value][i.value]; });
        });
      }
      unroll<kGroup>([&](auto i) {
        const int64_t at = n * padded + c + i.value * kLanes;
        store(square + at, totals[0][i.value]);
        store(cross + at, totals[1][i.value]);
        store(plain + at, totals[2][i.value]);
      });
    }
    team.barrier();
    if (team.rank() == 0) {  // little work: a few instructions a channel, and sums over the images
      for (int64_t c = 0; c < padded; c += kLanes) {
        store(a.dweight + c, Vec{});
        store(a.dbias + c, Vec{});
      }
      for (int64_t n = 0; n < a.n; ++n) {
        grn_gradient_factors(square + n * padded, cross + n * padded, a.c, a.weight, a.eps, a.dweight);
        for (int64_t c = 0; c < padded; c += kLanes)
          store(a.dbias + c, load(a.dbias + c) + load(plain + n * padded + c));
      }
    }
    team.barrier();
    team.split(a.n * a.pixels, 1, &begin, &end);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = p / a.pixels;
      for (int64_t c = 0; c < a.c; c += kLanes) {
        const Vec v = load_channels(x + p * a.c, c, a.c), d = load_channels(dy + p * a.c, c, a.c);
        store_channels(dx + p * a.c, c, a.c,
                       multiply_add(d, load(square + n * padded + c), v * load(cross + n * padded + c)));
      }
    }
  });
}

}  // namespace cnk::cpu::CNK_ISA
