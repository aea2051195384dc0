// What the products do with their sums: bias, activation, residual, conversion.
//
// epilogue.at(row, column) returns what takes the register of sums at that column: f(r, sums) for row row + r. It is
// called once for up to 32 rows and holds what does not depend on the row: bias, pointers, masks. (Found anew for each
// register, they were some 45 scalar instructions a row.) Products of two neighbouring registers (gemm_bf16.h) call
// f(r, low, high), of epilogue.pair(row, column) if there is one.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

template <class F>
struct TwoRegisters {
  F first, second;
  CNK_INLINE void operator()(int64_t r, Vec low, Vec high) const {
    first(r, low);
    second(r, high);
  }
};

template <class Epilogue>
CNK_INLINE auto pair_at(const Epilogue& epilogue, int64_t row, int64_t column) {
  if constexpr (requires { epilogue.pair(row, column); }) {
    return epilogue.pair(row, column);
  } else {
    using F = decltype(epilogue.at(row, column));
    return TwoRegisters<F>{epilogue.at(row, column), epilogue.at(row, column + kLanes)};
  }
}

// What f(row, column) returns makes of sums, g(r, v), becomes an operand of the next product.
template <class G, class F>
struct Stored {
  F f;
  void* out;
  int64_t columns;
  CNK_INLINE auto at(int64_t row, int64_t column) const {
    return [=, out = out, columns = columns, g = f(row, column)](int64_t r, Vec v)
               CNK_INLINE_LAMBDA { G::store_register(out, columns, row + r, column, g(r, v)); };
  }
  CNK_INLINE auto pair(int64_t row, int64_t column) const {
    return [=, out = out, columns = columns, g = f(row, column), h = f(row, column + kLanes)](
               int64_t r, Vec low, Vec high) CNK_INLINE_LAMBDA {
      G::store_block(out, columns, row + r, column, {{g(r, low), h(r, high)}});
    };
  }
};

}  // namespace cnk::cpu::CNK_ISA
