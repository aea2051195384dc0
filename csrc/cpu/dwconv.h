// Depthwise convolution of consecutive pixels into fp32 rows, for dwconv.cpp and the fused block.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_SHARED {

// y[p - begin, c] = bias[c] + sum over the KxK taps, for pixels begin <= p < end of all N*H*W; rows of y have
// ldy floats. Writes the padded channels too (as zeros). T: element type of x.
template <class T>
void dwconv_pixels(const DwconvArgs& args, int64_t begin, int64_t end, float* y, int64_t ldy);

}  // namespace cnk::cpu::CNK_SHARED

#if defined(CNK_HAS_BF16)
namespace cnk::cpu::CNK_ISA {

// The same for BFloat16, by products of pairs (DwconvArgs::pairs). Not compiled for sets with tiles.
template <class T>
void dwconv_pixels(const DwconvArgs& args, int64_t begin, int64_t end, float* y, int64_t ldy);

}  // namespace cnk::cpu::CNK_ISA
#endif
