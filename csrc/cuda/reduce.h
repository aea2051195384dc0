// The last stage of every reduction: out[l] = sum_p partials[p, l] of fp32 (P, L), dense, in a fixed order.
// Bytes: 4 P L read, L elements written.
#pragma once

#include "cuda/tensors.h"

namespace cnk::cuda {

struct SumPartialsArgs {
  const float* partials;  // (parts, length)
  void* out;              // (groups, length) of `dtype`
  DType dtype;
  int64_t parts, length;
  int64_t groups;  // group g sums parts [g * ceil(parts / groups), ...)
};
void sum_partials(const Context& context, const SumPartialsArgs& args);

}  // namespace cnk::cuda
