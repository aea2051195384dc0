// What is left of the bottleneck when the library (cuBLAS) does the matrix products: one pass per kernel.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

// h = gelu(u), `count` dense elements; h may be u.
struct GeluArgs {
  DType dtype;
  const void* u;
  void* h;
  int64_t count;
};
void gelu(const Context& context, const GeluArgs& args);

}  // namespace cnk::cuda
