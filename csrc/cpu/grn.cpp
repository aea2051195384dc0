// Global response normalisation of NHWC images, and its
// gradient: one pass for the sums over pixels, one that scales.
//
// Sums add the pixels in order, for any number of threads:
// the channels are divided among the threads, not the pixels.

#include "cpu/grn.h"

namespace cnk::cpu::CNK_ISA {

void grn(const GrnArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.dtype == DType::kBFloat16, grn, a, team);
  const int64_t padded = pad_channels(a.c), groups = padded / kChannelAlign;
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    int64_t begin, end;
    team.split(a.n * groups, 1, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, c = item % groups * kChannelAlign;
      Block square = {};
      for (int64_t p = 0; p < a.pixels; ++p) {
        const Block v = load_block(x + (n * a.pixels + p) * a.c, c, a.c);
        square.add_product(v, v);
      }
      store(a.scale + n * padded + c, square);
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
  CNK_SHARED_UNLESS(a.dtype == DType::kBFloat16, grn_backward, a, team);
  const int64_t padded = pad_channels(a.c), groups = padded / kChannelAlign, of_all = a.n * padded;
  float *square = a.sums, *cross = square + of_all, *plain = cross + of_all;
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    int64_t begin, end;
    team.split(a.n * groups, 1, &begin, &end);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / groups, c = item % groups * kChannelAlign, to = n * padded + c;
      grn_sums(a.pixels, square + to, cross + to, plain + to, [&](int64_t p, Block* v, Block* d) {
        const int64_t row = (n * a.pixels + p) * a.c;
        *v = load_block(x + row, c, a.c);
        *d = load_block(dy + row, c, a.c);
      });
    }
    team.barrier();
    if (team.rank() == 0) {  // little work: a few instructions a channel, and sums over the images
      for (int64_t c = 0; c < padded; c += kLanes) {
        store(a.dweight + c, Vec{});
        store(a.dbias + c, Vec{});
      }
      grn_gradients(a.n, a.c, a.weight, a.eps, square, cross, plain, a.dweight, a.dbias);
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
