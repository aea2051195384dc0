// The two axes of a depthwise convolution, for the CPU's kernels and the GPU's.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace cnk {

// One axis of a depthwise convolution. Result o is the sum over the taps k of the weight times what is at
//   (o * down + (k - taps / 2) * dilation) / up
// of the input, where that is an integer and inside. `down` is the stride. The gradient of the input of a
// convolution with stride S is a convolution of dy with up = S. One of the two is 1, the other 1 or 2.
struct Axis {
  int64_t in, out;  // sizes of the input and of the result
  int taps = 1;     // odd
  int64_t dilation = 1;
  int down = 1, up = 1;
};

// Kernels of one column go along the columns of the image, all others along its rows: neighbouring taps share
// what they load.
CNK_INLINE bool along_columns(const Axis& h, const Axis& w) { return w.taps == 1 && h.taps > 1; }

// Taps that are so many apart read pixels that the results' pixels have in common: 2, or 1.
CNK_INLINE int tap_step(const Axis& axis) { return axis.down * axis.up > 1 && axis.dilation % 2 ? 2 : 1; }

}  // namespace cnk
