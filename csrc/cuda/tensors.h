// The interface between the bindings and the launchers: tensors as addresses, strides in elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace cnk::cuda {

// The GPU and the stream to launch on.
struct Context {
  int device;
  void* stream;  // cudaStream_t
};

// A parameter, dense, of its own dtype; data is null if there is none.
struct Vector {
  const void* data;
  DType dtype;
};

// (N, C, H, W) as N samples x HW pixels x C channels. Element (n, p, c) is at
//   n * stride_n + p * stride_p + c * stride_c
struct Rows {
  void* data;
  DType dtype;
  int64_t stride_n, stride_p, stride_c;
};

// (N, C, H, W) with any strides.
struct Image {
  void* data;
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

}  // namespace cnk::cuda
