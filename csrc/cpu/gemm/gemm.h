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
