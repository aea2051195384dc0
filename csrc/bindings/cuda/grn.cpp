#include "cuda/grn.h"

#include "bindings/cuda/arguments.h"

namespace cnk::cuda {

namespace {
float* floats(Address address) { return static_cast<float*>(pointer(address)); }
}  // namespace

void bind_grn(py::module_& m) {
  m.def("grn_tiles", grn_tiles);
  m.def("grn_sums", [](const Context& context, const Rows& x, const Rows& dy, Address squares, Address dy_x,
                       Address dy_sum, int64_t n, int64_t pixels, int64_t c) {
    grn_sums(context, {x, dy, floats(squares), floats(dy_x), floats(dy_sum), n, pixels, c});
  });
  m.def("grn_response", [](const Context& context, Address squares, const Vector& weight, Address scale,
                           float eps, int64_t n, int64_t tiles, int64_t c) {
    grn_response(context, {floats(squares), weight, floats(scale), eps, n, tiles, c});
  });
  m.def("grn_response_backward", [](const Context& context, Address squares, Address dy_x, Address dy_sum,
                                    const Vector& weight, Address scale, Address per_x, Address parameters,
                                    float eps, int64_t n, int64_t tiles, int64_t c) {
    grn_response_backward(context, {floats(squares), floats(dy_x), floats(dy_sum), weight, floats(scale),
                                    floats(per_x), floats(parameters), eps, n, tiles, c});
  });
  m.def("grn_apply", [](const Context& context, const Rows& a, const Rows& b, const Rows& out, Address scale,
                        Address per_b, const Vector& bias, int64_t n, int64_t pixels, int64_t c) {
    grn_apply(context, {a, b, out, floats(scale), floats(per_b), bias, n, pixels, c});
  });
}

}  // namespace cnk::cuda
