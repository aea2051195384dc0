// Depthwise convolution of a run of pixels into fp32 rows: what dwconv.cpp and the fused block share.
#pragma once

#include "cpu/vec.h"

namespace cnk::cpu::CNK_SHARED {

// y[p - begin, c] = bias[c] + sum over the KxK taps, for pixels begin <= p < end of all N*H*W, rows of ldy
// floats. Writes the padded channels too (as zeros). T: element type of x.
template <class T>
void dwconv_pixels(const DwconvArgs& args, int64_t begin, int64_t end, float* y, int64_t ldy);

}  // namespace cnk::cpu::CNK_SHARED
