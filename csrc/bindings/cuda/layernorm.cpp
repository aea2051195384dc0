#include "cuda/layernorm/layernorm.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_layernorm(py::module_& m) {
  m.def("layernorm", [](const Context& context, const Rows& x, const Rows& y, const Vector& weight,
                        const Vector& bias, float eps, int64_t n, int64_t pixels, int64_t c, int64_t patch,
                        int64_t height, int64_t width, int norm) {
    layernorm(
        context,
        {x, y, weight, bias, eps, n, pixels, c, {patch, width, height / patch, width / patch}, Norm(norm)});
  });
}

}  // namespace cnk::cuda
