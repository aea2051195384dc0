#include "bindings/cuda/arguments.h"
#include "cuda/layernorm/layernorm.h"

namespace cnk::cuda {

void bind_layernorm_backward(py::module_& m) {
  m.def("layernorm_parts",
        [](const Context& context, int64_t pixels) { return layernorm_parts(context.device, pixels); });
  m.def("layernorm_backward",
        [](const Context& context, const Rows& dy, const Rows& x, const Rows& dx, const Vector& weight,
           Address partials, int64_t parts, float eps, int64_t n, int64_t pixels, int64_t c, int64_t patch,
           int64_t height, int64_t width, int norm) {
          layernorm_backward(context, {dy,
                                       x,
                                       dx,
                                       weight,
                                       static_cast<float*>(pointer(partials)),
                                       parts,
                                       eps,
                                       n,
                                       pixels,
                                       c,
                                       {patch, width, height / patch, width / patch},
                                       Norm(norm)});
        });
}

}  // namespace cnk::cuda
