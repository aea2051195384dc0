// LayerNorm or another norm over the channels of NHWC pixels, and its gradient. Each value is read and written once (a row
// stays in L1). Statistics are in fp32 and are computed again for the gradient.

#include "cpu/layernorm.h"

namespace cnk::cpu::CNK_ISA {

void layernorm(const LayernormArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.dtype == DType::kBFloat16, layernorm, a, team);
  const RowNorm norm(a.c, a.eps, a.weight, a.bias, a.norm);
  int64_t begin, end;
  team.split(a.rows, 1, &begin, &end);
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(a.x) + begin * a.c;
    T* y = static_cast<T*>(a.y) + begin * a.c;
    normalize(
        norm, end - begin,
        [&](int64_t i, int64_t c) CNK_INLINE_LAMBDA { return load_channels(x + i * a.c, c, a.c); },
        [&](int64_t i, const Block& b, int64_t c) CNK_INLINE_LAMBDA {
          unroll<Block::kVecs>([&](auto j) CNK_INLINE_LAMBDA {
            store_channels(y + i * a.c, c + j.value * kLanes, a.c, b.v[j.value]);
          });
        });
  });
}

// Rows that are summed together for the parameters' gradients, by whichever thread; at most kUnits such
// units, because their sums are added at the end.
namespace {
constexpr int64_t kUnitRows = 64, kUnits = 1024;
int64_t unit_rows(int64_t rows) {
  return (rows + kUnits - 1) / kUnits > kUnitRows ? (rows + kUnits - 1) / kUnits : kUnitRows;
}
int64_t units(int64_t rows) { return (rows + unit_rows(rows) - 1) / unit_rows(rows); }
}  // namespace

#if !defined(CNK_HAS_BF16)
int64_t layernorm_backward_workspace(const LayernormBackwardArgs& a) {
  return units(a.rows) * 2 * pad_channels(a.c) * 4;
}
#endif

void layernorm_backward(const LayernormBackwardArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.dtype == DType::kBFloat16, layernorm_backward, a, team);
  const RowNorm norm(a.c, a.eps, a.weight, a.weight, a.norm);  // the bias does not matter
  const int64_t padded = pad_channels(a.c), step = unit_rows(a.rows), count = units(a.rows);
  float* sums = reinterpret_cast<float*>(a.workspace);
  int64_t begin, end;
  team.split(count, 1, &begin, &end);
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t unit = begin; unit < end; ++unit) {
      float *dweight = sums + unit * 2 * padded, *dbias = dweight + padded;
      for (int64_t c = 0; c < 2 * padded; c += kLanes) store(dweight + c, Vec{});
      const int64_t last = min64((unit + 1) * step, a.rows);
      for (int64_t p = unit * step; p < last; p += kLanes) {
        const T *x = static_cast<const T*>(a.x) + p * a.c, *dy = static_cast<const T*>(a.dy) + p * a.c;
        T* dx = static_cast<T*>(a.dx) + p * a.c;
        layernorm_gradient(
            norm, min64(last - p, kLanes),
            [&](int64_t i, int64_t c) CNK_INLINE_LAMBDA { return load_channels(x + i * a.c, c, a.c); },
            [&](int64_t i, int64_t c) CNK_INLINE_LAMBDA { return load_channels(dy + i * a.c, c, a.c); },
            dweight, dbias,
            [&](int64_t i, int64_t c, Vec v) CNK_INLINE_LAMBDA { store_channels(dx + i * a.c, c, a.c, v); });
      }
    }
  });
  team.barrier();
  team.split(padded, kLanes, &begin, &end);
  for (int64_t c = begin; c < end; c += kLanes) {
    Vec dweight = {}, dbias = {};
    for (int64_t unit = 0; unit < count; ++unit) {
      dweight += load(sums + unit * 2 * padded + c);
      dbias += load(sums + (unit * 2 + 1) * padded + c);
    }
    store(a.dweight + c, dweight);
    store(a.dbias + c, dbias);
  }
}

}  // namespace cnk::cpu::CNK_ISA
