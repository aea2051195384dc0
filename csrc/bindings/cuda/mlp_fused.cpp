#include "cuda/mlp/mlp_fused.h"

#include "bindings/cuda/mlp_arguments.h"

namespace cnk::cuda {

void bind_mlp_fused(py::module_& m) { bind_mlp(m, "mlp_fused", mlp_fused); }

}  // namespace cnk::cuda
