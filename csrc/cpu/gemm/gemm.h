// The matrix product that is compiled for this instruction set: in bf16 if the set has bf16 products. Kernels
// with fp32 products are then those of CNK_SHARED, which are called as a whole.
#pragma once

#include "cpu/ops.h"

#if defined(CNK_HAS_BF16)

#if defined(__aarch64__)
#include "cpu/gemm/gemm_bf16_neon.h"
#else
#include "cpu/gemm/gemm_bf16.h"
#endif

namespace cnk::cpu::CNK_ISA {
using Gemm = GemmBf16;
}

#else

#include "cpu/gemm/gemm_f32.h"

namespace cnk::cpu::CNK_ISA {
using Gemm = GemmF32;
}

#endif

namespace cnk::cpu::CNK_ISA {

// Epilogues of the products, which pass a register or two neighbouring ones: f(row, column, register) for each.
template <class F>
struct ForEach : F {
  using F::operator();
  CNK_INLINE void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
    (*this)(row, column, low);
    (*this)(row, column + kLanes, high);
  }
};

// What f(row, column, register) returns becomes an operand of the next product.
template <class G, class F>
struct Stored {
  F f;
  void* out;
  int64_t columns;
  CNK_INLINE void operator()(int64_t row, int64_t column, Vec v) const {
    G::store_register(out, columns, row, column, f(row, column, v));
  }
  CNK_INLINE void operator()(int64_t row, int64_t column, Vec low, Vec high) const {
    G::store_block(out, columns, row, column, {{f(row, column, low), f(row, column + kLanes, high)}});
  }
};

}  // namespace cnk::cpu::CNK_ISA
