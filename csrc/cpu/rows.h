// The input rows of the first product: pixels of x, convolved and normalised.
#pragma once

#include "cpu/dwconv.h"
#include "cpu/layernorm.h"

namespace cnk::cpu::CNK_ISA {

// fp32 rows of one step: 128 KB, so that the convolution's output is still in L2 when LayerNorm reads it.
inline int64_t step_rows(int64_t channels) {
  const int64_t rows = (int64_t{128} << 10) / (4 * pad_channels(channels));
  return rows < 16 ? 16 : rows;
}
inline int64_t step_bytes(int64_t channels) { return step_rows(channels) * pad_channels(channels) * 4; }

}  // namespace cnk::cpu::CNK_ISA
