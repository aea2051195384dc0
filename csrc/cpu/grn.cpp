// Global response normalisation of NHWC images: one pass for the sums of squares, one that scales.
//
// Sums run over the pixels in order, whatever the number of threads: threads share channels, not pixels.

#include "cpu/grn.h"

namespace cnk::cpu::CNK_ISA {

void grn(const GrnArgs& a, Team& team) {
  const int64_t padded = pad_channels(a.c), groups = padded / kChannelAlign;
  with_type(a.dtype, [&](auto type) {
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

}  // namespace cnk::cpu::CNK_ISA
