#include "cuda/dwconv_wgrad.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_dwconv_wgrad(py::module_& m) {
  m.def("dwconv_weight_parts", [](const Context& context, int dtype, int64_t n, int64_t c, int64_t h,
                                  int64_t w, int side_h, int side_w, int dilation_h, int dilation_w) {
    const Convolution of{n, c, h, w, side_h, side_w, dilation_h, dilation_w};
    return dwconv_weight_parts(context.device, dtype_of(dtype), of);
  });
  m.def("dwconv_weight_gradient", [](const Context& context, const Image& dy, const Image& x, const Image& dw,
                                     const Vector& db, Address partials, int64_t n, int64_t c, int64_t h,
                                     int64_t w, int side_h, int side_w, int dilation_h, int dilation_w) {
    const Convolution of{n, c, h, w, side_h, side_w, dilation_h, dilation_w};
    dwconv_weight_gradient(context, {of, dy, x, dw, const_cast<void*>(db.data), db.dtype,
                                     static_cast<float*>(pointer(partials))});
  });
}

}  // namespace cnk::cuda
