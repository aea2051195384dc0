// What the gradients of the bottleneck and of downsampling share: sums over rows in an order that the shape
// alone decides.
//
// Rows come in groups, which are the k of the products that give the weights' gradients; within a group,
// units of kUnit rows have their sums (of biases, of LayerNorm's parameters) taken by one thread and are
// added up in order.
#pragma once

#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

constexpr int64_t kUnit = 32;
constexpr int64_t kGroupBytes = int64_t{16} << 20;  // of the operands of the products over rows

// Fewer rows than 256 would read and write the sums of the weights' gradients (8 C^2 floats) for little work;
// more than 1024 leave the caches.
CNK_INLINE int64_t group_rows(int64_t rows, int64_t row_bytes) {
  int64_t group = kGroupBytes / row_bytes;
  group = group < 256 ? 256 : group > 1024 ? 1024 : group;
  return round_up(ceil_div(rows, ceil_div(rows, group)), kUnit);
}

// An epilogue: dense fp32 rows, replaced or added to.
struct SumEpilogue {
  float* out;
  int64_t stride, columns;  // columns beyond are not written
  bool add;
  CNK_INLINE void operator()(int64_t row, int64_t column, Vec v) const {
    float* at = out + row * stride;
    store_channels(at, column, columns, add ? v + load_channels(at, column, columns) : v);
  }
  CNK_INLINE void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
    (*this)(row, column, low);
    (*this)(row, column + kLanes, high);
  }
};

// Rows [begin, end) of an operand of the products G.
template <class G>
CNK_INLINE void zero_rows(void* operand, int64_t columns, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < pad_channels(columns); c += kChannelAlign)
      G::store_block(operand, columns, r, c, {});
  }
}

// sums[c] = sum of rows [begin, end) of an operand.
template <class G>
CNK_INLINE void add_rows(const void* operand, int64_t columns, int64_t begin, int64_t end, float* sums) {
  for (int64_t c = 0; c < pad_channels(columns); c += kChannelAlign) {
    typename G::Block total = {};
    for (int64_t r = begin; r < end; ++r) {
      const typename G::Block b = G::load_block(operand, columns, r, c);
      unroll<kChannelAlign / kLanes>([&](auto v) { total.v[v.value] += b.v[v.value]; });
    }
    unroll<kChannelAlign / kLanes>([&](auto v) { store(sums + c + v.value * kLanes, total.v[v.value]); });
  }
}

}  // namespace cnk::cpu::CNK_ISA
