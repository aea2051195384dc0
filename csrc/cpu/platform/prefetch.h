// Fetching the weights that a product needs next.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

// The part of B that comes next. While the present part is used, its lines are fetched into L2, a few at a
// time: weights larger than L2 come from L3 and, in a whole network, from memory. A few at a time, because
// bursts fill the queues: with a hundred lines before each micro-kernel a block of C 768 takes 839 us (batch
// 1, bf16, weights from memory, Zen 5), with the fetches spread 661 us.
struct Ahead {
  const char* next;
  int64_t lines;
  CNK_INLINE void fetch() {
    for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

}  // namespace cnk::cpu::CNK_ISA
