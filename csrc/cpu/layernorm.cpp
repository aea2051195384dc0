// LayerNorm over the channels of NHWC pixels; one read and one write of each, statistics in fp32.

#include "cpu/layernorm.h"

namespace cnk::cpu::CNK_ISA {

void layernorm(const LayernormArgs& a, Team& team) {
  const Norm norm(a.c, a.eps, a.weight, a.bias);
  int64_t begin, end;
  team.split(a.rows, 1, &begin, &end);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    // Rows of up to kFast channels pass through the stack; longer ones through the output's own row, in fp32 steps.
    constexpr int64_t kFast = 8192;
    alignas(64) float row[kFast];
    for (int64_t p = begin; p < end; ++p) {
      const T* x = static_cast<const T*>(a.x) + p * a.c;
      T* y = static_cast<T*>(a.y) + p * a.c;
      if (pad_channels(a.c) <= kFast) {
        read_row(x, a.c, row);
        const Statistics s = statistics(norm, row);
        for (int64_t c = 0; c < a.c; c += kLanes) store_channels(y, c, a.c, normalize(norm, s, row, c));
        continue;
      }
      Vec total = {}, square = {};
      for (int64_t c = 0; c < a.c; c += kLanes) total += load_channels(x, c, a.c);
      const float mean = sum(total) / float(a.c);
      for (int64_t c = 0; c < a.c; c += kLanes) {
        const Vec d = (load_channels(x, c, a.c) - mean) * (c + kLanes <= a.c ? splat(1.0f) : norm.mask);
        square += d * d;
      }
      const float rstd = 1.0f / __builtin_sqrtf(sum(square) / float(a.c) + a.eps);
      for (int64_t c = 0; c < a.c; c += kLanes) {
        const Vec v = (load_channels(x, c, a.c) - mean) * rstd;
        store_channels(y, c, a.c, v * load(a.weight + c) + load(a.bias + c));
      }
    }
  });
}

}  // namespace cnk::cpu::CNK_ISA
