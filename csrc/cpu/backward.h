// What the gradients of the bottleneck and of downsampling share:
// sums over rows in an order that depends only on the shape.
//
// Rows are divided into groups: a group's rows are the k of the matrix products for the weights' gradients.
// A group is divided into units of kUnit rows: one thread sums a unit (for the gradients of biases and of
// LayerNorm's parameters), and the units' sums are added in order.
#pragma once

#include "cpu/gemm/gemm.h"

namespace cnk::cpu::CNK_ISA {

constexpr int64_t kUnit = 32;
constexpr int64_t kGroupBytes = int64_t{16} << 20;  // of the operands of the products over rows

// With fewer than 256 rows, reading and writing the sums of the weights' gradients (8 C^2 floats) would cost more than
// the work on the rows; more than 1024 do not fit the caches. Twice as many where the sums are large: a bf16 block of
// C 384 at batch 8 takes 5 % less on AMX, of C 96 2 % more.
CNK_INLINE int64_t group_rows(int64_t rows, int64_t row_bytes) {
  const int64_t most = row_bytes < 4096 ? 1024 : 2048;
  int64_t group = kGroupBytes / row_bytes;
  group = group < 256 ? 256 : group > most ? most : group;
  return round_up(ceil_div(rows, ceil_div(rows, group)), kUnit);
}

// An epilogue that writes rows of T, or what was in `before` plus these. `before` has the same shape, or is null.
template <class T>
struct SumEpilogue {
  T* out;
  int64_t stride, columns;  // columns from `columns` on are not written
  const float* before;
  CNK_INLINE auto at(int64_t row, int64_t column) const {
    return [=, first = row * stride, *this](int64_t r, Vec v) CNK_INLINE_LAMBDA {
      const int64_t at = first + r * stride;
      store_channels(out + at, column, columns, before ? v + load_channels(before + at, column, columns) : v);
    };
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

// A row of `columns` elements as row r of an operand, times `factor`.
template <class G, class T>
CNK_INLINE void write_row(void* operand, int64_t columns, int64_t r, const T* row, float factor = 1) {
  for (int64_t c = 0; c < pad_channels(columns); c += kChannelAlign) {
    G::store_block(operand, columns, r, c,
                   block_of([&](int k) { return load_channels(row, c + k, columns) * factor; }));
  }
}

// Adds the sums of `units` units of `width` floats each to `totals`, or replaces them; each thread a part.
CNK_INLINE void add_units(Team& team, const float* sums, int64_t units, int64_t width, bool add,
                          float* totals) {
  int64_t begin, end;
  team.split(width, kLanes, &begin, &end);
  for (int64_t c = begin; c < end; c += kLanes) {
    Vec total = add ? load(totals + c) : Vec{};
    for (int64_t i = 0; i < units; ++i) total += load(sums + i * width + c);
    store(totals + c, total);
  }
}

// The parts of a workspace: take() returns the offset of the next one.
struct Offsets {
  int64_t end = 0;
  int64_t take(int64_t bytes) {
    const int64_t offset = end;
    end += align64(bytes);
    return offset;
  }
};

// sums[c] = sum of rows [begin, end) of an operand.
template <class G>
CNK_INLINE void add_rows(const void* operand, int64_t columns, int64_t begin, int64_t end, float* sums) {
  for (int64_t c = 0; c < pad_channels(columns); c += kChannelAlign) {
    Block total = {};
    for (int64_t r = begin; r < end; ++r) total += G::load_block(operand, columns, r, c);
    store(sums + c, total);
  }
}

}  // namespace cnk::cpu::CNK_ISA
