#include "cuda/dwconv/dwconv.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_dwconv(py::module_& m) {
  // n, c; of each axis what common/axis.h says: h, out_h, side_h, dilation_h, w...; down, up.
  py::class_<Convolution>(m, "Convolution")
      .def(py::init([](int64_t n, int64_t c, int64_t h, int64_t out_h, int side_h, int64_t dilation_h,
                       int64_t w, int64_t out_w, int side_w, int64_t dilation_w, int down, int up) {
        return Convolution{
            n, c, {h, out_h, side_h, dilation_h, down, up}, {w, out_w, side_w, dilation_w, down, up}};
      }));
  m.def("dwconv", [](const Context& context, const Convolution& of, const Image& x, const Image& y,
                     const Image& residual, Address weight, const Vector& bias,
                     bool flip) { dwconv(context, {of, x, y, residual, pointer(weight), bias, flip}); });
}

}  // namespace cnk::cuda
