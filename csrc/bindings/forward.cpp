// Bindings of the forward kernels.

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings/repeats.h"
#include "bindings/support.h"

namespace cnk::bindings {

namespace {

// A dilation that reaches outside of every image. Larger ones would overflow.
constexpr int64_t kFar = int64_t{1} << 40;

// What calls of one signature have in common: dtypes of x and of the kept hidden, the image, an MlpSchedule.
struct MlpProblem {
  int dtype;
  int64_t n, h, w;
  int kept_dtype, schedule;
};

// All parameters of a block, or of the inverted bottleneck
// alone (kernel_h 0), packed for one instruction set.
class PackedMlp {
 public:
  PackedMlp(int isa, bool bf16_products, int weight_dtype, int64_t c, int64_t hidden, int kernel_h,
            int kernel_w, int64_t dilation_h, int64_t dilation_w, float eps, float grn_eps, int norm,
            int activation, Address dw_weight, Address dw_bias, Address norm_weight, Address norm_bias,
            Address w1, Address b1, Address grn_weight, Address w2, Address b2, Address gamma, int threads)
      : ops_(ops_of(isa)),
        products_(products_of(isa, bf16_products)),
        dw_weight_(dw_weight, {0, 0, kernel_h}, {0, 0, kernel_w}, c),
        dw_pairs_(Isa(isa), dw_weight_, {0, 0, kernel_h}, {0, 0, kernel_w}, c),
        dw_bias_(dw_bias, 1, c),
        norm_weight_(norm_weight, 1, c),
        norm_bias_(norm_bias, 1, c),
        b1_(b1, 1, hidden),
        grn_weight_(grn_weight, 1, hidden),
        b2_(b2, 1, c),
        gamma_(gamma, 1, c),
        w1_(ops_, products_, dtype_of(weight_dtype), w1, hidden, c, threads),
        w2_(ops_, products_, dtype_of(weight_dtype), w2, c, hidden, threads) {
    if (kernel_h || kernel_w) {
      require_axis({0, 0, kernel_h, dilation_h});
      require_axis({0, 0, kernel_w, dilation_w});
      require(dw_weight && dw_bias, "dw_weight, dw_bias: null");
    }
    require(norm_weight && norm_bias && b1 && b2 && gamma, "a parameter is null");
    args_ = {};
    args_.products = products_;
    args_.c = c;
    args_.hidden = hidden;
    args_.kernel_h = kernel_h;
    args_.kernel_w = kernel_w;
    args_.dilation_h = std::min(dilation_h, kFar);
    args_.dilation_w = std::min(dilation_w, kFar);
    args_.eps = eps;
    args_.grn_eps = grn_eps;
    args_.norm = norm_of(norm);
    args_.activation = activation_of(activation);
    args_.dw_weight = dw_weight_.data();
    args_.dw_pairs = dw_pairs_.data();
    args_.dw_bias = dw_bias_.data();
    args_.norm_weight = norm_weight_.data();
    args_.norm_bias = norm_bias_.data();
    args_.w1 = w1_.view();
    args_.w2 = w2_.view();
    args_.b1 = b1_.data();
    args_.grn_weight = grn_weight_.data();
    args_.b2 = b2_.data();
    args_.gamma = gamma_.data();
  }

  // kept_y and kept_hidden: what is kept for the gradient, or 0. phases: a row of MLP_PHASES doubles for each
  // thread, to which its seconds are added, or 0. norm_weight and norm_bias: those of each sample, (N, C), in
  // place of the packed ones, or 0.
  void forward(const MlpProblem& problem, Address x, Address residual, Address out, int threads,
               Address phases, Address drop_scale, Address kept_y, Address kept_hidden, Address norm_weight,
               Address norm_bias) const {
    require(!norm_weight == !norm_bias, "norm_weight, norm_bias: one of two");
    MlpArgs args = call(problem, x, residual, out, threads, phases);
    const Padded weight(norm_weight, problem.n, args.c), bias(norm_bias, problem.n, args.c);
    if (norm_weight) {
      args.norm_weight = weight.data();
      args.norm_bias = bias.data();
      args.norm_step = pad_channels(args.c);
    }
    args.drop_scale = pointer<const float>(drop_scale);
    args.kept_y = pointer<void>(kept_y);
    args.kept_hidden = pointer<void>(kept_hidden);
    args.kept_dtype = dtype_of(problem.kept_dtype);
    run(threads, args, ops_.mlp_workspace(args, threads), ops_.mlp);
  }

  // Consecutive blocks, each with its input as the residual: from x to out by way of `between`, which may be
  // null for a single one. All have the same shape, so one workspace serves them.
  static void forward_blocks(const std::vector<const PackedMlp*>& blocks, const MlpProblem& problem,
                             Address x, Address out, Address between, int threads, Address phases) {
    require(!blocks.empty() && (between || blocks.size() == 1), "forward_blocks: no block, or between: null");
    std::vector<MlpArgs> calls;
    int64_t bytes = 0;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Address target = (blocks.size() - i) % 2 ? out : between;
      calls.push_back(blocks[i]->call(problem, x, x, target, threads, phases));
      bytes = std::max(bytes, blocks[i]->ops_.mlp_workspace(calls[i], threads));
      x = target;
    }
    const py::gil_scoped_release unlocked;
    const Workspace workspace(bytes);
    for (size_t i = 0; i < blocks.size(); ++i) {
      calls[i].workspace = workspace.data();
      in_team(threads, [&](Team& team) { blocks[i]->ops_.mlp(calls[i], team); });
    }
  }

  // forward_blocks with everything but tensors.
  static std::shared_ptr<Launch> launch_blocks(const std::vector<const PackedMlp*>& blocks,
                                               const MlpProblem& problem, int threads) {
    struct Blocks final : Launch {
      void run(Address x, Address out, Address between) const override {
        forward_blocks(blocks, problem, x, out, between, threads, 0);
      }
      std::vector<const PackedMlp*> blocks;
      MlpProblem problem;
      int threads;
    };
    auto launch = std::make_shared<Blocks>();
    launch->blocks = blocks, launch->problem = problem, launch->threads = threads;
    return launch;
  }

  int64_t bytes() const { return w1_.bytes() + w2_.bytes(); }

 private:
  MlpArgs call(const MlpProblem& problem, Address x, Address residual, Address out, int threads,
               Address phases) const {
    const auto [dtype, n, h, w, kept_dtype, schedule] = problem;
    require(schedule >= kByShape && schedule < kMlpSchedules, "forward: schedule out of range");
    require(x && out && n >= 1 && h >= 1 && w >= 1 && threads >= 1, "forward: null address or empty image");
    MlpArgs args = args_;
    args.dtype = dtype_of(dtype);
    args.x = pointer<const void>(x);
    args.residual = pointer<const void>(residual);
    args.out = pointer<void>(out);
    args.n = n;
    args.h = h;
    args.w = w;
    args.phases = pointer<double>(phases);
    args.schedule = schedule;
    return args;
  }

  const IsaOps& ops_;
  Products products_;
  Taps dw_weight_;
  TapPairs dw_pairs_;
  Padded dw_bias_, norm_weight_, norm_bias_, b1_, grn_weight_, b2_, gamma_;
  Matrix w1_, w2_;
  MlpArgs args_;
};

class Depthwise {
 public:
  // down: the stride; up: the stride of the convolution whose input gradient this is (Axis).
  // kernel_d: of a 3-D convolution, else 1.
  Depthwise(int isa, int64_t c, int kernel_d, int kernel_h, int kernel_w, int64_t dilation_h,
            int64_t dilation_w, int down, int up, Address weight, Address bias)
      : ops_(ops_of(isa)),
        c_(c),
        d_{0, 0, kernel_d, 1, down, up},
        h_{0, 0, kernel_h, std::min(dilation_h, kFar), down, up},
        w_{0, 0, kernel_w, std::min(dilation_w, kFar), down, up},
        weight_(weight, h_, w_, c, kernel_d),
        pairs_(Isa(isa), weight_, h_, w_, c, kernel_d),
        bias_(bias, 1, c) {
    require_depth(d_);
    require_axis(h_);
    require_axis(w_);
    require(weight && bias, "Depthwise: null address");
  }

  // x (N, d, h, w, C), y (N, out_d, out_h, out_w, C); in 2-D d and out_d are 1. x_pixel, y_pixel: elements from
  // pixel to pixel. The residual is dense.
  void forward(int dtype, Address x, Address y, Address residual, int64_t n, int64_t d, int64_t h, int64_t w,
               int64_t out_d, int64_t out_h, int64_t out_w, int threads, int64_t x_pixel,
               int64_t y_pixel) const {
    require(x && y && n >= 1 && h >= 1 && w >= 1 && threads >= 1, "forward: null address or empty image");
    require(x_pixel >= c_ && y_pixel >= c_ && (!residual || y_pixel == c_), "x_pixel, y_pixel: out of range");
    Axis planes = d_, rows = h_, columns = w_;
    planes.in = d, planes.out = out_d;
    require_sizes(planes);
    rows.in = h, rows.out = out_h, columns.in = w, columns.out = out_w;
    require_sizes(rows);
    require_sizes(columns);
    // Past the caches from a quarter of the last one on: x is as large, and other processes use it too (96 channels,
    // 8x56x56, fp32, K 3, one thread of a busy Zen 4: 2.26 -> 1.22 ms). In 16 bits a line is two stores: on a Xeon that
    // gains only where y does not fit into the whole cache.
    const DType type = dtype_of(dtype);
    const int64_t y_bytes = n * out_d * out_h * out_w * c_ * element_size(type);
    const int64_t cache = type == DType::kFloat32 ? last_cache_bytes(threads) : last_cache_bytes();
    const DwconvArgs args = {.dtype = type,
                             .x = pointer<const void>(x),
                             .y = pointer<void>(y),
                             .n = n,
                             .c = c_,
                             .h = rows,
                             .w = columns,
                             .weight = weight_.data(),
                             .bias = bias_.data(),
                             .residual = pointer<const void>(residual),
                             .d = planes,
                             .pairs = pairs_.data(),
                             .streaming = y_bytes > cache / 4,
                             .x_pixel = x_pixel,
                             .y_pixel = y_pixel};
    const py::gil_scoped_release unlocked;
    in_team(threads, [&](Team& team) { ops_.dwconv(args, team); });
  }

 private:
  const IsaOps& ops_;
  int64_t c_;
  Axis d_, h_, w_;
  Taps weight_;
  TapPairs pairs_;
  Padded bias_;
};

class Downsample {
 public:
  // weight: (d, patch * patch * padded c) fp32.
  Downsample(int isa, bool bf16_products, int64_t c, int64_t d, int patch, float eps, int norm,
             Address norm_weight, Address norm_bias, Address weight, Address bias, int threads)
      : ops_(ops_of(isa)),
        norm_weight_(norm_weight, 1, c),
        norm_bias_(norm_bias, 1, c),
        bias_(bias, 1, d),
        weight_(ops_, products_of(isa, bf16_products), DType::kFloat32, weight, d,
                int64_t{patch} * patch * pad_channels(c), threads) {
    require(norm_weight && norm_bias && bias && patch >= 1, "Downsample: out of range");
    args_ = {};
    args_.products = products_of(isa, bf16_products);
    args_.c = c;
    args_.patch = patch;
    args_.eps = eps;
    args_.norm = norm_of(norm);
    args_.norm_weight = norm_weight_.data();
    args_.norm_bias = norm_bias_.data();
    args_.weight = weight_.view();
    args_.bias = bias_.data();
  }

  void forward(int dtype, int out_dtype, Address x, Address out, int64_t n, int64_t h, int64_t w,
               int threads) const {
    require(x && out && n >= 1 && h >= args_.patch && w >= args_.patch && threads >= 1,
            "forward: out of range");
    DownsampleArgs args = args_;
    args.dtype = dtype_of(dtype);
    args.out_dtype = dtype_of(out_dtype);
    args.x = pointer<const void>(x);
    args.out = pointer<void>(out);
    args.n = n;
    args.h = h;
    args.w = w;
    run(threads, args, ops_.downsample_workspace(args, threads), ops_.downsample);
  }

  // forward with everything but tensors.
  std::shared_ptr<Launch> launch(int dtype, int out_dtype, int64_t n, int64_t h, int64_t w,
                                 int threads) const {
    struct Once final : Launch {
      void run(Address x, Address out, Address) const override {
        kernel->forward(dtype, out_dtype, x, out, n, h, w, threads);
      }
      const Downsample* kernel;
      int dtype, out_dtype, threads;
      int64_t n, h, w;
    };
    auto launch = std::make_shared<Once>();
    launch->kernel = this, launch->dtype = dtype, launch->out_dtype = out_dtype, launch->threads = threads;
    launch->n = n, launch->h = h, launch->w = w;
    return launch;
  }

 private:
  const IsaOps& ops_;
  Padded norm_weight_, norm_bias_, bias_;
  Matrix weight_;
  DownsampleArgs args_;
};

class Layernorm {
 public:
  Layernorm(int isa, int64_t c, float eps, int norm, Address weight, Address bias)
      : ops_(ops_of(isa)), weight_(weight, 1, c), bias_(bias, 1, c) {
    require(weight && bias && c >= 1, "Layernorm: out of range");
    args_ = {};
    args_.c = c;
    args_.eps = eps;
    args_.norm = norm_of(norm);
    args_.weight = weight_.data();
    args_.bias = bias_.data();
  }

  void forward(int dtype, Address x, Address y, int64_t rows, int threads) const {
    require(x && y && rows >= 1 && threads >= 1, "forward: out of range");
    LayernormArgs args = args_;
    args.dtype = dtype_of(dtype);
    args.x = pointer<const void>(x);
    args.y = pointer<void>(y);
    args.rows = rows;
    const py::gil_scoped_release unlocked;
    in_team(threads, [&](Team& team) { ops_.layernorm(args, team); });
  }

  // forward with everything but tensors.
  std::shared_ptr<Launch> launch(int dtype, int64_t rows, int threads) const {
    struct Once final : Launch {
      void run(Address x, Address out, Address) const override {
        kernel->forward(dtype, x, out, rows, threads);
      }
      const Layernorm* kernel;
      int dtype, threads;
      int64_t rows;
    };
    auto launch = std::make_shared<Once>();
    launch->kernel = this, launch->dtype = dtype, launch->rows = rows, launch->threads = threads;
    return launch;
  }

 private:
  const IsaOps& ops_;
  Padded weight_, bias_;
  LayernormArgs args_;
};

void grn(int isa, int dtype, Address x, Address y, int64_t n, int64_t pixels, int64_t c, float eps,
         Address weight, Address bias, int threads) {
  require(x && y && weight && bias && n >= 1 && pixels >= 1 && c >= 1 && threads >= 1, "grn: out of range");
  const Padded padded_weight(weight, 1, c), padded_bias(bias, 1, c);
  const IsaOps& ops = ops_of(isa);
  const py::gil_scoped_release unlocked;
  const Workspace workspace(n * pad_channels(c) * 4);
  const GrnArgs args = {dtype_of(dtype),
                        pointer<const void>(x),
                        pointer<void>(y),
                        n,
                        pixels,
                        c,
                        eps,
                        padded_weight.data(),
                        padded_bias.data(),
                        reinterpret_cast<float*>(workspace.data())};
  in_team(threads, [&](Team& team) { ops.grn(args, team); });
}

}  // namespace

void bind_forward(py::module_& m) {
  m.def("grn", grn);
  py::class_<MlpProblem>(m, "MlpProblem")
      .def(py::init([](int dtype, int64_t n, int64_t h, int64_t w, int kept_dtype, int schedule) {
        return MlpProblem{dtype, n, h, w, kept_dtype, schedule};
      }))
      .def_readonly("schedule", &MlpProblem::schedule);
  py::class_<PackedMlp>(m, "PackedMlp")
      .def(py::init<int, bool, int, int64_t, int64_t, int, int, int64_t, int64_t, float, float, int, int,
                    Address, Address, Address, Address, Address, Address, Address, Address, Address, Address,
                    int>())
      .def("forward", &PackedMlp::forward, py::arg("problem"), py::arg("x"), py::arg("residual"),
           py::arg("out"), py::arg("threads"), py::arg("phases") = 0, py::arg("drop_scale") = 0,
           py::arg("kept_y") = 0, py::arg("kept_hidden") = 0, py::arg("norm_weight") = 0,
           py::arg("norm_bias") = 0)
      .def_property_readonly("bytes", &PackedMlp::bytes);
  m.def("forward_blocks", &PackedMlp::forward_blocks);
  m.def("launch_blocks", &PackedMlp::launch_blocks);
  py::class_<Depthwise>(m, "Depthwise")
      .def(py::init<int, int64_t, int, int, int, int64_t, int64_t, int, int, Address, Address>())
      .def("forward", &Depthwise::forward);
  py::class_<Layernorm>(m, "Layernorm")
      .def(py::init<int, int64_t, float, int, Address, Address>())
      .def("forward", &Layernorm::forward)
      .def("launch", &Layernorm::launch);
  py::class_<Downsample>(m, "Downsample")
      .def(py::init<int, bool, int64_t, int64_t, int, float, int, Address, Address, Address, Address, int>())
      .def("forward", &Downsample::forward)
      .def("launch", &Downsample::launch);
}

}  // namespace cnk::bindings
