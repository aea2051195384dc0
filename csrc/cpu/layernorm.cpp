// LayerNorm over the channels of NHWC pixels; one read and one write of each (a row stays in L1), statistics
// in fp32.

#include "cpu/layernorm.h"

namespace cnk::cpu::CNK_ISA {

void layernorm(const LayernormArgs& a, Team& team) {
  const Norm norm(a.c, a.eps, a.weight, a.bias);
  int64_t begin, end;
  team.split(a.rows, 1, &begin, &end);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t p = begin; p < end; ++p) {
      const T* x = static_cast<const T*>(a.x) + p * a.c;
      T* y = static_cast<T*>(a.y) + p * a.c;
      const auto read = [&](int64_t c) { return load_channels(x, c, a.c); };
      const Statistics s = statistics(norm, read);
      for (int64_t c = 0; c < a.c; c += kLanes) store_channels(y, c, a.c, normalize(norm, s, read(c), c));
    }
  });
}

}  // namespace cnk::cpu::CNK_ISA
