// What the gradients of the bottleneck and of downsampling share:
// sums over rows in an order that depends only on the shape.
//
// Rows are divided into groups: a group's rows are the k of the matrix products for the weights' gradients.
// A group is divided into units of kUnit rows: one thread sums a unit (for the gradients of biases and of
// LayerNorm's parameters), and the units' sums are added in order.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

constexpr int64_t kUnit = 32;
constexpr int64_t kGroupBytes = int64_t{16} << 20;  // of the operands of the products over rows

// With fewer than 256 rows, reading and writing the sums of the weights' gradients (8 C^2 floats) would cost
// more than the work on the rows; more than 1024 rows do not fit the caches.
CNK_INLINE int64_t group_rows(int64_t rows, int64_t row_bytes) {
  int64_t group = kGroupBytes / row_bytes;
  group = group < 256 ? 256 : group > 1024 ? 1024 : group;
  return round_up(ceil_div(rows, ceil_div(rows, group)), kUnit);
}

// An epilogue that writes dense fp32 rows or adds to them.
struct SumEpilogue {
  float* out;
  int64_t stride, columns;  // columns from `columns` on are not written
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
