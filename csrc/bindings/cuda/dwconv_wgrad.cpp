#include "cuda/dwconv_wgrad.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_dwconv_wgrad(py::module_& m) {
  m.def("dwconv_weight_parts", [](const Context& context, int dtype, int64_t n, int64_t c, int64_t h,
                                  int64_t w, int side, int dilation) {
    return dwconv_weight_parts(context.device, dtype_of(dtype), n, c, h, w, side, dilation);
  });
  m.def("dwconv_weight_gradient", [](const Context& context, const Image& dy, const Image& x, const Image& dw,
                                     const Vector& db, Address partials, int64_t n, int64_t c, int64_t h,
                                     int64_t w, int side, int dilation) {
    dwconv_weight_gradient(context, {dy, x, dw, const_cast<void*>(db.data), db.dtype,
                                     static_cast<float*>(pointer(partials)), n, c, h, w, side, dilation});
  });
}

}  // namespace cnk::cuda
