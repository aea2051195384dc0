// Fetching the weights that a product needs next.
#pragma once

#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

// The part of B that comes next, of which every stretch of work on the present one fetches a few lines into
// L2: weights larger than L2 come from L3 and, in a whole network, from memory. A few, since bursts fill the
// queues: a hundred lines before each micro-kernel left a block of C 768 (batch 1, bf16, weights from memory,
// Zen 5) at 839 us, spread they make it 661.
struct Ahead {
  const char* next;
  int64_t lines;
  CNK_INLINE void fetch() {
    for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

}  // namespace cnk::cpu::CNK_ISA
