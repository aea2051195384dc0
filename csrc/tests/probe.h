// Inner functions of the kernels, applied to arrays, per instruction set.
#pragma once

#include "cpu/ops.h"

namespace cnk::test {

// Counts are multiples of 16.
struct Probe {
  int lanes;
  void (*load)(DType dtype, const void* x, float* y, int64_t count);
  void (*store)(DType dtype, const float* x, void* y, int64_t count);
  // One register, of which the first n < lanes elements are in memory.
  void (*load_partial)(DType dtype, const void* x, int64_t n, float* y);
  void (*store_partial)(DType dtype, const float* x, int64_t n, void* y);
  // The 64 bytes of this thread's tile configuration; null without AMX.
  void (*set_tiles)(const uint8_t* configuration);
  void (*get_tiles)(uint8_t* configuration);
};

// Null if the instruction set is not part of this build.
const Probe* isa_probe(cpu::Isa isa);

// The code for AVX512_BF16 and AMX with these instructions emulated (cpu/platform/vec.h, cpu/platform/tiles.h), for machines
// with AVX-512. Null for other instruction sets, and on other processors than x86.
struct Emulated {
  const cpu::IsaOps* ops;
  const Probe* probe;
};
Emulated isa_emulated(cpu::Isa isa);

}  // namespace cnk::test
