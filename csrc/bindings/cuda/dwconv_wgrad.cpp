#include "cuda/dwconv/dwconv_wgrad.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_dwconv_wgrad(py::module_& m) {
  m.def("dwconv_weight_parts", [](const Context& context, int dtype, const Convolution& of) {
    return dwconv_weight_parts(context.device, dtype_of(dtype), of);
  });
  m.def("dwconv_weight_gradient", [](const Context& context, const Convolution& of, const Image& dy,
                                     const Image& x, const Image& dw, const Vector& db, Address partials) {
    dwconv_weight_gradient(context, {of, dy, x, dw, const_cast<void*>(db.data), db.dtype,
                                     static_cast<float*>(pointer(partials))});
  });
}

}  // namespace cnk::cuda
