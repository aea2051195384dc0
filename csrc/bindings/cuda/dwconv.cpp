#include "cuda/dwconv.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_dwconv(py::module_& m) {
  m.def("dwconv", [](const Context& context, const Image& x, const Image& y, const Image& residual,
                     Address weight, const Vector& bias, int64_t n, int64_t c, int64_t h, int64_t w,
                     int side_h, int side_w, int dilation_h, int dilation_w, bool flip) {
    const Convolution of{n, c, h, w, side_h, side_w, dilation_h, dilation_w};
    dwconv(context, {of, x, y, residual, pointer(weight), bias, flip});
  });
}

}  // namespace cnk::cuda
