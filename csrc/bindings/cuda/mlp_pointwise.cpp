#include "cuda/mlp/mlp_pointwise.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

void bind_mlp_pointwise(py::module_& m) {
  m.def("activate",
        [](const Context& context, int dtype, int activation, Address u, Address h, int64_t count) {
          activate(context, {dtype_of(dtype), Activation(activation), pointer(u), pointer(h), count});
        });
  m.def("activate_backward", [](const Context& context, int dtype, int activation, Address dh, Address u,
                                Address du, int64_t count) {
    activate_backward(context,
                      {dtype_of(dtype), Activation(activation), pointer(dh), pointer(u), pointer(du), count});
  });
  m.def("mlp_output", [](const Context& context, int dtype, Address z, const Vector& bias,
                         const Vector& gamma, const Vector& drop_scale, const Rows& residual, const Rows& out,
                         int64_t n, int64_t pixels, int64_t c) {
    mlp_output(context, {dtype_of(dtype), pointer(z), bias, gamma, drop_scale, residual, out, n, pixels, c});
  });
  m.def("scaled_gradient",
        [](const Context& context, const Rows& dout, const Vector& gamma, const Vector& drop_scale, int dtype,
           Address d, Address dz, int64_t n, int64_t pixels, int64_t c) {
          scaled_gradient(context,
                          {dout, gamma, drop_scale, dtype_of(dtype), pointer(d), pointer(dz), n, pixels, c});
        });
}

}  // namespace cnk::cuda
