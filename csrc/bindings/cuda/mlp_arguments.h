// The arguments of the fused bottleneck's kernels, the same for tensor cores and for fp32.
#pragma once

#include "bindings/cuda/arguments.h"
#include "cuda/mlp/mlp_fused.h"

namespace cnk::cuda {

template <class Launcher>
void bind_mlp(py::module_& m, const char* name, Launcher* launcher) {
  m.def(name,
        [launcher](const Context& context, int dtype, const Rows& x, const Rows& residual, const Rows& out,
                   const Vector& norm_weight, const Vector& norm_bias, Address w1, const Vector& b1,
                   Address w2, const Vector& b2, const Vector& gamma, const Vector& drop_scale,
                   Address grn_scale, const Vector& grn_bias, Address u, Address sums, int64_t samples,
                   int64_t pixels, int64_t sample_pixels, int c, int hidden, double eps, int tile) {
          launcher(context, {.dtype = dtype_of(dtype),
                             .x = x,
                             .residual = residual,
                             .out = out,
                             .norm_weight = norm_weight,
                             .norm_bias = norm_bias,
                             .w1 = pointer(w1),
                             .w2 = pointer(w2),
                             .b1 = b1,
                             .b2 = b2,
                             .gamma = gamma,
                             .drop_scale = drop_scale,
                             .grn_bias = grn_bias,
                             .grn_scale = static_cast<const float*>(pointer(grn_scale)),
                             .u = pointer(u),
                             .sums = static_cast<float*>(pointer(sums)),
                             .samples = samples,
                             .pixels = pixels,
                             .sample_pixels = sample_pixels,
                             .c = c,
                             .hidden = hidden,
                             .eps = float(eps),
                             .tile = tile});
        });
}

}  // namespace cnk::cuda
