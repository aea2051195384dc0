#include "cuda/dwconv.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_dwconv(py::module_& m) {
  m.def("dwconv", [](const Context& context, const Image& x, const Image& y, const Image& residual,
                     Address weight, const Vector& bias, int64_t n, int64_t c, int64_t h, int64_t w, int side,
                     int dilation, bool flip) {
    dwconv(context, {x, y, residual, pointer(weight), bias, n, c, h, w, side, dilation, flip});
  });
}

}  // namespace cnk::cuda
