#include "cuda/mlp/mlp_fused_fp32.h"

#include "bindings/cuda/mlp_arguments.h"

namespace cnk::cuda {

void bind_mlp_fused_fp32(py::module_& m) { bind_mlp(m, "mlp_fused_fp32", mlp_fused_fp32); }

}  // namespace cnk::cuda
