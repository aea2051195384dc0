// The matrix product that this instruction set compiles: in bf16 where it has such products. Those in fp32
// are then CNK_SHARED's, whole kernels of which are called.
#pragma once

#include "cpu/ops.h"

#if defined(CNK_HAS_BF16)

#include "cpu/gemm_bf16.h"

namespace cnk::cpu::CNK_ISA {
using Gemm = GemmBf16;
}

#else

#include "cpu/gemm_f32.h"

namespace cnk::cpu::CNK_ISA {
using Gemm = GemmF32;
}

#endif
