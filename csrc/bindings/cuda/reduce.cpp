#include "cuda/reduce.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_reduce(py::module_& m) {
  m.def("sum_partials", [](const Context& context, Address partials, Address out, int dtype, int64_t parts,
                           int64_t length, int64_t groups) {
    sum_partials(context, {static_cast<const float*>(pointer(partials)), pointer(out), dtype_of(dtype), parts,
                           length, groups});
  });
}

}  // namespace cnk::cuda
