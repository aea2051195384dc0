// Bindings of the gradient kernels. Results are fp32.
// "Padded C": C rounded up to a multiple of CHANNEL_ALIGN.

#include <pybind11/stl.h>

#include <array>

#include "bindings/support.h"

namespace cnk::bindings {

namespace {

// x (N, d, h, w, C), dw (KD * KH * KW, padded C), db padded C; in 2-D d and kernel_d are 1.
void dwconv_weight_gradient(int isa, int dtype, Address x, Address dy, int64_t n, int64_t d, int64_t h,
                            int64_t w, int64_t c, int kernel_d, int kernel_h, int kernel_w,
                            int64_t dilation_h, int64_t dilation_w, int stride, Address dw, Address db,
                            int threads, int64_t x_pixel, int64_t dy_pixel) {
  require(x && dy && dw && db && n >= 1 && h >= 1 && w >= 1 && c >= 1 && threads >= 1,
          "dwconv_weight_gradient: null address or empty image");
  require(stride >= 1, "stride out of range");
  require(x_pixel >= c && dy_pixel >= c, "x_pixel, dy_pixel: below c");
  const Axis planes = {d, (d - 1) / stride + 1, kernel_d, 1, stride};
  const Axis rows = {h, (h - 1) / stride + 1, kernel_h, dilation_h, stride};
  const Axis columns = {w, (w - 1) / stride + 1, kernel_w, dilation_w, stride};
  require_depth(planes);
  require_axis(rows);
  require_axis(columns);
  DwconvWeightGradientArgs args = {.dtype = dtype_of(dtype),
                                   .x = pointer<const void>(x),
                                   .dy = pointer<const void>(dy),
                                   .n = n,
                                   .c = c,
                                   .h = rows,
                                   .w = columns,
                                   .dw = pointer<float>(dw),
                                   .db = pointer<float>(db),
                                   .workspace = nullptr,
                                   .d = planes,
                                   .x_pixel = x_pixel,
                                   .dy_pixel = dy_pixel};
  const IsaOps& ops = ops_of(isa);
  run(threads, args, ops.dwconv_weight_gradient_workspace(args, threads), ops.dwconv_weight_gradient);
}

// dweight, dbias padded C.
void layernorm_backward(int isa, int dtype, Address x, Address dy, Address dx, int64_t rows, int64_t c,
                        float eps, int norm, Address weight, Address dweight, Address dbias, int threads) {
  require(x && dy && dx && weight && dweight && dbias && rows >= 1 && c >= 1 && threads >= 1,
          "layernorm_backward: out of range");
  const Padded padded_weight(weight, 1, c);
  LayernormBackwardArgs args = {.dtype = dtype_of(dtype),
                                .x = pointer<const void>(x),
                                .dy = pointer<const void>(dy),
                                .dx = pointer<void>(dx),
                                .rows = rows,
                                .c = c,
                                .eps = eps,
                                .norm = norm_of(norm),
                                .weight = padded_weight.data(),
                                .dweight = pointer<float>(dweight),
                                .dbias = pointer<float>(dbias),
                                .workspace = nullptr};
  const IsaOps& ops = ops_of(isa);
  run(threads, args, ops.layernorm_backward_workspace(args), ops.layernorm_backward);
}

// dweight, dbias padded C.
void grn_backward(int isa, int dtype, Address x, Address dy, Address dx, int64_t n, int64_t pixels, int64_t c,
                  float eps, Address weight, Address dweight, Address dbias, int threads) {
  require(x && dy && dx && weight && dweight && dbias && n >= 1 && pixels >= 1 && c >= 1 && threads >= 1,
          "grn_backward: out of range");
  const Padded padded_weight(weight, 1, c);
  const IsaOps& ops = ops_of(isa);
  const py::gil_scoped_release unlocked;
  const Workspace workspace(3 * n * pad_channels(c) * 4);
  const GrnBackwardArgs args = {.dtype = dtype_of(dtype),
                                .x = pointer<const void>(x),
                                .dy = pointer<const void>(dy),
                                .dx = pointer<void>(dx),
                                .n = n,
                                .pixels = pixels,
                                .c = c,
                                .eps = eps,
                                .weight = padded_weight.data(),
                                .dweight = pointer<float>(dweight),
                                .dbias = pointer<float>(dbias),
                                .sums = reinterpret_cast<float*>(workspace.data())};
  in_team(threads, [&](Team& team) { ops.grn_backward(args, team); });
}

// The parameters of an inverted bottleneck, packed for its gradient for one instruction set.
class PackedMlpBackward {
 public:
  // w1 (hidden, C) and w2 (C, hidden) are in weight_dtype, the others fp32; backward() reads w2 again.
  // needs_w1: whether the hidden must be computed again. grn_weight and grn_bias: both or neither.
  PackedMlpBackward(int isa, bool bf16_products, int weight_dtype, bool needs_w1, int64_t c, int64_t hidden,
                    float eps, float grn_eps, int norm, int activation, Address norm_weight,
                    Address norm_bias, Address w1, Address b1, Address grn_weight, Address grn_bias,
                    Address w2, Address b2, Address gamma, int threads)
      : ops_(ops_of(isa)),
        products_(products_of(isa, bf16_products)),
        norm_weight_(norm_weight, 1, c),
        norm_bias_(norm_bias, 1, c),
        b1_(b1, 1, hidden),
        grn_weight_(grn_weight, 1, hidden),
        grn_bias_(grn_bias, 1, hidden),
        b2_(b2, 1, c),
        gamma_(gamma, 1, c),
        w1_(needs_w1 ? Matrix(ops_, products_, dtype_of(weight_dtype), w1, hidden, c, threads) : Matrix()),
        w2_back_(Matrix::transposed(ops_, products_, dtype_of(weight_dtype), w2, hidden, c, gamma_.data(),
                                    threads)),
        w1_back_(
            Matrix::transposed(ops_, products_, dtype_of(weight_dtype), w1, c, hidden, nullptr, threads)) {
    require(norm_weight && norm_bias && b1 && b2 && gamma, "a parameter is null");
    require(!grn_weight == !grn_bias, "grn_weight, grn_bias: one is null");
    args_ = {};
    args_.products = products_;
    args_.w2_dtype = dtype_of(weight_dtype);
    args_.c = c;
    args_.hidden_size = hidden;
    args_.eps = eps;
    args_.grn_eps = grn_eps;
    args_.norm = norm_of(norm);
    args_.activation = activation_of(activation);
    args_.norm_weight = norm_weight_.data();
    args_.norm_bias = norm_bias_.data();
    args_.w1 = w1_.view();
    args_.w2_back = w2_back_.view();
    args_.w1_back = w1_back_.view();
    args_.b1 = b1_.data();
    args_.grn_weight = grn_weight_.data();
    args_.grn_bias = grn_bias_.data();
    args_.b2 = b2_.data();
    args_.gamma = gamma_.data();
  }

  // hidden: what the forward pass kept, or 0. dx: 0 if it is not needed; then the gradients of LayerNorm's
  // parameters are not computed either. weights: (dw1, db1, dw2, db2, dgamma), or five times 0; dw1 and dw2 are in
  // weight_dtype, the others fp32. norm, grn:
  // the gradients of their weight and bias; norm is 0 without dx, grn is 0 without GRN.
  void backward(int dtype, Address x, Address dout, Address hidden, int hidden_dtype, int64_t n,
                int64_t pixels, Address drop_scale, Address w2, Address dx,
                const std::array<Address, 5>& weights, const std::array<Address, 2>& norm,
                const std::array<Address, 2>& grn, int threads) const {
    require(x && dout && w2 && n >= 1 && pixels >= 1 && threads >= 1,
            "backward: null address or empty image");
    require(hidden || args_.w1.n, "hidden: null, and w1 was not packed");
    for (const Address address : weights) require(!address == !weights[0], "weights: one is null");
    for (const Address address : norm) require(!address == !dx, "norm: null, or not null without dx");
    for (const Address address : grn)
      require(!address == !args_.grn_weight, "grn: null, or not null without GRN");
    MlpBackwardArgs args = args_;
    args.dtype = dtype_of(dtype);
    args.x = pointer<const void>(x);
    args.dout = pointer<const void>(dout);
    args.hidden = pointer<const void>(hidden);
    args.hidden_dtype = dtype_of(hidden_dtype);
    args.n = n;
    args.pixels = pixels;
    args.w2 = pointer<const void>(w2);
    args.drop_scale = pointer<const float>(drop_scale);
    args.weights = weights[0] != 0;
    args.dx = pointer<void>(dx);
    args.dw1 = pointer<void>(weights[0]);
    args.db1 = pointer<float>(weights[1]);
    args.dw2 = pointer<void>(weights[2]);
    args.db2 = pointer<float>(weights[3]);
    args.dgamma = pointer<float>(weights[4]);
    args.dnorm_weight = pointer<float>(norm[0]);
    args.dnorm_bias = pointer<float>(norm[1]);
    args.dgrn_weight = pointer<float>(grn[0]);
    args.dgrn_bias = pointer<float>(grn[1]);
    run(threads, args, ops_.mlp_backward_workspace(args, threads), ops_.mlp_backward);
  }

 private:
  const IsaOps& ops_;
  Products products_;
  Padded norm_weight_, norm_bias_, b1_, grn_weight_, grn_bias_, b2_, gamma_;
  Matrix w1_, w2_back_, w1_back_;
  MlpBackwardArgs args_;
};

class DownsampleBackward {
 public:
  // weight: (d, patch * patch * padded c) fp32.
  DownsampleBackward(int isa, bool bf16_products, int64_t c, int64_t d, int patch, float eps, int norm,
                     Address norm_weight, Address norm_bias, Address weight, int threads)
      : ops_(ops_of(isa)),
        norm_weight_(norm_weight, 1, c),
        norm_bias_(norm_bias, 1, c),
        weight_(Matrix::transposed(ops_, products_of(isa, bf16_products), DType::kFloat32, weight,
                                   int64_t{patch} * patch * pad_channels(c), d, nullptr, threads)) {
    require(norm_weight && norm_bias && patch >= 1, "DownsampleBackward: out of range");
    args_ = {};
    args_.products = products_of(isa, bf16_products);
    args_.c = c;
    args_.patch = patch;
    args_.eps = eps;
    args_.norm = norm_of(norm);
    args_.norm_weight = norm_weight_.data();
    args_.norm_bias = norm_bias_.data();
    args_.weight_back = weight_.view();
  }

  // dx: 0 if it is not needed; then the gradients of LayerNorm's parameters (padded
  // C) are not computed either. Pixels outside of whole patches are not written.
  // weights: (dweight, dbias), or 0 and 0; dweight has the weight's shape.
  void backward(int dtype, int out_dtype, Address x, Address dout, int64_t n, int64_t h, int64_t w,
                Address dx, const std::array<Address, 2>& weights, const std::array<Address, 2>& norm,
                int threads) const {
    require(x && dout && n >= 1 && h >= args_.patch && w >= args_.patch && threads >= 1,
            "backward: out of range");
    require(!weights[0] == !weights[1], "weights: one is null");
    for (const Address address : norm) require(!address == !dx, "norm: null, or not null without dx");
    DownsampleBackwardArgs args = args_;
    args.dtype = dtype_of(dtype);
    args.out_dtype = dtype_of(out_dtype);
    args.x = pointer<const void>(x);
    args.dout = pointer<const void>(dout);
    args.n = n;
    args.h = h;
    args.w = w;
    args.weights = weights[0] != 0;
    args.dx = pointer<void>(dx);
    args.dweight = pointer<float>(weights[0]);
    args.dbias = pointer<float>(weights[1]);
    args.dnorm_weight = pointer<float>(norm[0]);
    args.dnorm_bias = pointer<float>(norm[1]);
    run(threads, args, ops_.downsample_backward_workspace(args, threads), ops_.downsample_backward);
  }

 private:
  const IsaOps& ops_;
  Padded norm_weight_, norm_bias_;
  Matrix weight_;
  DownsampleBackwardArgs args_;
};

}  // namespace

void bind_backward(py::module_& m) {
  m.def("dwconv_weight_gradient", dwconv_weight_gradient);
  m.def("layernorm_backward", layernorm_backward);
  m.def("grn_backward", grn_backward);
  py::class_<PackedMlpBackward>(m, "PackedMlpBackward")
      .def(py::init<int, bool, int, bool, int64_t, int64_t, float, float, int, int, Address, Address, Address,
                    Address, Address, Address, Address, Address, Address, int>())
      .def("backward", &PackedMlpBackward::backward);
  py::class_<DownsampleBackward>(m, "DownsampleBackward")
      .def(py::init<int, bool, int64_t, int64_t, int, float, int, Address, Address, Address, int>())
      .def("backward", &DownsampleBackward::backward);
}

}  // namespace cnk::bindings
