#include "cuda/mlp_pointwise.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_mlp_pointwise(py::module_& m) {
  m.def("gelu", [](const Context& context, int dtype, Address u, Address h, int64_t count) {
    gelu(context, {dtype_of(dtype), pointer(u), pointer(h), count});
  });
}

}  // namespace cnk::cuda
