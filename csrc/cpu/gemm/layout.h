// Changes of memory layout between NCHW and NHWC.
#pragma once

#include <cstdint>

#include "cpu/platform/parallel.h"

namespace cnk::cpu {

// to[b][column][row] = from[b][row][column] for elements of 2 or 4 bytes. NCHW to NHWC: rows C, columns H*W;
// NHWC to NCHW: rows H*W, columns C.
void transpose(const void* from, void* to, int64_t batch, int64_t rows, int64_t columns, int64_t element_size,
               Team& team);

}  // namespace cnk::cpu
