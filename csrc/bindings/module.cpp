// convnext_kernels._native: the CPU kernels for Python. Private: convnext_kernels/backends/cpu is its only
// caller.
//
// Tensors come as addresses, since the extension knows nothing of torch; the caller has checked device,
// dtype, layout and shape. What can be checked of plain numbers is checked here as well.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/affinity.h"
#include "cpu/ceilings.h"
#include "cpu/isa.h"
#include "cpu/layout.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using namespace cnk;
using namespace cnk::cpu;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// 64-byte aligned memory.
class Buffer {
 public:
  explicit Buffer(int64_t bytes = 0) { reserve(bytes); }
  void reserve(int64_t bytes) {
    if (bytes <= size_) return;
    data_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64)));
    size_ = data_ ? bytes : 0;
    if (!data_) throw std::bad_alloc();
  }
  void release() {
    data_.reset();
    size_ = 0;
  }
  char* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

// Workspace of the calling thread, kept between calls (a fresh one would cost its page faults every time)
// unless large.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    buffer().reserve(bytes);
    data_ = buffer().data();
  }
  ~Workspace() {
    if (buffer().size() > kKeep) buffer().release();
  }
  // A member, for all threads of a team: buffer() is another one in each.
  char* data() const { return data_; }

 private:
  static constexpr int64_t kKeep = int64_t{32} << 20;
  static Buffer& buffer() {
    thread_local Buffer instance;
    return instance;
  }
  char* data_;
};

// A (rows, columns) fp32 array copied with columns padded by zeros; missing without an address.
class Padded {
 public:
  Padded() = default;
  Padded(Address source, int64_t rows, int64_t columns) {
    if (!source) return;
    const int64_t padded = pad_channels(columns);
    buffer_.reserve(rows * padded * 4);
    float* to = reinterpret_cast<float*>(buffer_.data());
    const float* from = pointer<const float>(source);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < padded; ++c) to[r * padded + c] = c < columns ? from[r * columns + c] : 0.0f;
    }
  }
  const float* data() const { return reinterpret_cast<const float*>(buffer_.data()); }

 private:
  Buffer buffer_;
};

const IsaOps& ops_of(int isa) {
  require(isa >= 0 && isa < kIsaCount && isa_supported(Isa(isa)), "isa: not supported on this machine");
  const IsaOps* ops = isa_ops(Isa(isa));
  require(ops != nullptr, "isa: not part of this build");
  return *ops;
}

DType dtype_of(int code) {
  require(code >= 0 && code <= 2, "dtype: unknown code");
  return DType(code);
}

Products products_of(int isa, bool bf16) {
  return bf16 && Isa(isa) == Isa::kAmx ? Products::kAmxBFloat16 : Products::kFloat32;
}

// parallel() for a callable; the GIL must be released.
template <class F>
void run(int threads, const F& body) {
  parallel(threads, [](Team& team, const void* f) { (*static_cast<const F*>(f))(team); }, &body);
}

class Matrix {
 public:
  // weight: (n, k) fp32, row-major.
  Matrix(const IsaOps& ops, Products products, Address weight, int64_t n, int64_t k, int threads)
      : n_(n), k_(k), buffer_(ops.packed_bytes(products, n, k)) {
    require(weight != 0, "weight: null");
    const py::gil_scoped_release unlocked;
    run(threads, [&](Team& team) {
      ops.pack_matrix(products, pointer<const float>(weight), n, k, buffer_.data(), team);
    });
  }
  PackedMatrix view() const { return {buffer_.data(), n_, k_}; }
  int64_t bytes() const { return buffer_.size(); }

 private:
  int64_t n_, k_;
  Buffer buffer_;
};

// All parameters of a block, or of the inverted bottleneck alone (kernel_size 0), packed for one instruction
// set.
class Bottleneck {
 public:
  Bottleneck(int isa, bool bf16_products, int64_t c, int64_t hidden, int kernel_size, int dilation, float eps,
             float grn_eps, Address dw_weight, Address dw_bias, Address norm_weight, Address norm_bias,
             Address w1, Address b1, Address grn_weight, Address w2, Address b2, Address gamma, int threads)
      : ops_(ops_of(isa)),
        products_(products_of(isa, bf16_products)),
        dw_weight_(dw_weight, int64_t{kernel_size} * kernel_size, c),
        dw_bias_(dw_bias, 1, c),
        norm_weight_(norm_weight, 1, c),
        norm_bias_(norm_bias, 1, c),
        b1_(b1, 1, hidden),
        grn_weight_(grn_weight, 1, hidden),
        b2_(b2, 1, c),
        gamma_(gamma, 1, c),
        w1_(ops_, products_, w1, hidden, c, threads),
        w2_(ops_, products_, w2, c, hidden, threads) {
    require(kernel_size >= 0 && kernel_size <= 31 && dilation >= 1, "kernel_size or dilation out of range");
    require(!kernel_size || (dw_weight && dw_bias), "dw_weight, dw_bias: null");
    require(norm_weight && norm_bias && b1 && b2 && gamma, "a parameter is null");
    args_ = {};
    args_.products = products_;
    args_.c = c;
    args_.hidden = hidden;
    args_.kernel_size = kernel_size;
    args_.dilation = dilation;
    args_.eps = eps;
    args_.grn_eps = grn_eps;
    args_.dw_weight = dw_weight_.data();
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

  void forward(int dtype, Address x, Address residual, Address out, int64_t n, int64_t h, int64_t w,
               Address drop_scale, int threads) const {
    require(x && out && n >= 1 && h >= 1 && w >= 1 && threads >= 1, "forward: null address or empty image");
    MlpArgs args = args_;
    args.dtype = dtype_of(dtype);
    args.x = pointer<const void>(x);
    args.residual = pointer<const void>(residual);
    args.out = pointer<void>(out);
    args.n = n;
    args.h = h;
    args.w = w;
    args.drop_scale = pointer<const float>(drop_scale);
    const py::gil_scoped_release unlocked;
    const Workspace workspace(ops_.mlp_workspace(args, threads));
    args.workspace = workspace.data();
    run(threads, [&](Team& team) { ops_.mlp(args, team); });
  }

  int64_t bytes() const { return w1_.bytes() + w2_.bytes(); }

 private:
  const IsaOps& ops_;
  Products products_;
  Padded dw_weight_, dw_bias_, norm_weight_, norm_bias_, b1_, grn_weight_, b2_, gamma_;
  Matrix w1_, w2_;
  MlpArgs args_;
};

class Depthwise {
 public:
  Depthwise(int isa, int64_t c, int kernel_size, int dilation, Address weight, Address bias)
      : ops_(ops_of(isa)),
        c_(c),
        kernel_size_(kernel_size),
        dilation_(dilation),
        weight_(weight, int64_t{kernel_size} * kernel_size, c),
        bias_(bias, 1, c) {
    require(weight && bias && kernel_size >= 1 && kernel_size <= 31 && dilation >= 1,
            "Depthwise: out of range");
  }

  void forward(int dtype, Address x, Address y, int64_t n, int64_t h, int64_t w, int threads) const {
    require(x && y && n >= 1 && h >= 1 && w >= 1 && threads >= 1, "forward: null address or empty image");
    const DwconvArgs args = {
        dtype_of(dtype), pointer<const void>(x), pointer<void>(y), n, h, w, c_, kernel_size_,
        dilation_,       weight_.data(),         bias_.data()};
    const py::gil_scoped_release unlocked;
    const Workspace workspace(ops_.dwconv_workspace(args, threads));
    run(threads, [&](Team& team) { ops_.dwconv(args, team, workspace.data()); });
  }

 private:
  const IsaOps& ops_;
  int64_t c_;
  int kernel_size_, dilation_;
  Padded weight_, bias_;
};

class Downsample {
 public:
  // weight: (d, patch * patch * padded c) fp32.
  Downsample(int isa, bool bf16_products, int64_t c, int64_t d, int patch, float eps, Address norm_weight,
             Address norm_bias, Address weight, Address bias, int threads)
      : ops_(ops_of(isa)),
        norm_weight_(norm_weight, 1, c),
        norm_bias_(norm_bias, 1, c),
        bias_(bias, 1, d),
        weight_(ops_, products_of(isa, bf16_products), weight, d, int64_t{patch} * patch * pad_channels(c),
                threads) {
    require(norm_weight && norm_bias && bias && patch >= 1, "Downsample: out of range");
    args_ = {};
    args_.products = products_of(isa, bf16_products);
    args_.c = c;
    args_.patch = patch;
    args_.eps = eps;
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
    const py::gil_scoped_release unlocked;
    const Workspace workspace(ops_.downsample_workspace(args, threads));
    args.workspace = workspace.data();
    run(threads, [&](Team& team) { ops_.downsample(args, team); });
  }

 private:
  const IsaOps& ops_;
  Padded norm_weight_, norm_bias_, bias_;
  Matrix weight_;
  DownsampleArgs args_;
};

void layernorm(int isa, int dtype, Address x, Address y, int64_t rows, int64_t c, float eps, Address weight,
               Address bias, int threads) {
  require(x && y && weight && bias && rows >= 1 && c >= 1 && threads >= 1, "layernorm: out of range");
  const Padded padded_weight(weight, 1, c), padded_bias(bias, 1, c);
  const LayernormArgs args = {dtype_of(dtype),      pointer<const void>(x), pointer<void>(y), rows, c, eps,
                              padded_weight.data(), padded_bias.data()};
  const IsaOps& ops = ops_of(isa);
  const py::gil_scoped_release unlocked;
  run(threads, [&](Team& team) { ops.layernorm(args, team); });
}

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
  run(threads, [&](Team& team) { ops.grn(args, team); });
}

// Checksum of memory regions (address, bytes, whole): all of what is small or asked for whole, else 512 words
// spread evenly, which sees every dense change. Order and position count (FNV-1a over 8-byte words, rotated).
uint64_t checksum(const std::vector<std::tuple<Address, int64_t, bool>>& regions) {
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&hash](uint64_t word) {
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 29;
  };
  for (const auto& [start, bytes, whole] : regions) {
    const char* data = pointer<const char>(start);
    const int64_t words = bytes / 8;
    const int64_t step = whole || words <= 2048 ? 1 : words / 512;
    for (int64_t i = 0; i < words; i += step) {
      uint64_t word;
      std::memcpy(&word, data + i * 8, 8);
      add(word);
    }
    for (int64_t i = words * 8; i < bytes; ++i) add(uint8_t(data[i]));
  }
  return hash;
}

void transpose_images(Address from, Address to, int64_t batch, int64_t rows, int64_t columns,
                      int64_t element_size, int threads) {
  require(from && to && batch >= 1 && rows >= 1 && columns >= 1 && threads >= 1, "transpose: out of range");
  require(element_size == 2 || element_size == 4, "transpose: element_size is not 2 or 4");
  const py::gil_scoped_release unlocked;
  run(threads, [&](Team& team) {
    transpose(pointer<const void>(from), pointer<void>(to), batch, rows, columns, element_size, team);
  });
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_supported(Isa(i)) && isa_ops(Isa(i))) names.emplace_back(isa_name(Isa(i)));
  }
  return names;
}

std::vector<std::string> arithmetic_kinds() {
  std::vector<std::string> names;
  for (int i = 0; i < kArithmeticCount; ++i) {
    if (arithmetic_supported(Arithmetic(i))) names.emplace_back(arithmetic_name(Arithmetic(i)));
  }
  return names;
}

double arithmetic_rate_of(const std::string& kind, int threads, double seconds) {
  require(threads >= 1 && seconds >= 0 && std::isfinite(seconds), "threads or seconds: out of range");
  for (int i = 0; i < kArithmeticCount; ++i) {
    if (kind != arithmetic_name(Arithmetic(i))) continue;
    if (!arithmetic_supported(Arithmetic(i)))
      throw std::invalid_argument("kind: this machine has no '" + kind + "'");
    return arithmetic_rate(Arithmetic(i), threads, seconds);
  }
  throw std::invalid_argument("kind: fma_fp32, dot_bf16 or tile_bf16 expected, got '" + kind + "'");
}

double copy_rate_of(int64_t bytes_per_thread, int threads, double seconds) {
  require(bytes_per_thread >= 128, "bytes_per_thread: less than 128");
  require(threads >= 1 && seconds >= 0 && std::isfinite(seconds), "threads or seconds: out of range");
  return copy_rate(bytes_per_thread, threads, seconds);
}

int64_t cache_bytes_of(int level) {
  require(level >= 1 && level <= 3, "level: not 1, 2 or 3");
  return cache_bytes(level);
}

std::vector<CpuMask> set_affinity_of_team(const std::vector<CpuMask>& masks) {
  require(!masks.empty(), "masks: none");
  for (const CpuMask& mask : masks) {
    require(!mask.empty(), "masks: one is empty");
    for (int cpu : mask) require(cpu >= 0 && cpu < 1 << 20, "masks: a CPU number is out of range");
  }
  return set_affinity(masks);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of convnext_kernels. Private; addresses are not checked.";
  m.attr("ISAS") = [] {
    py::list names;
    for (int i = 0; i < kIsaCount; ++i) names.append(isa_name(Isa(i)));
    return py::tuple(names);
  }();
  m.attr("CHANNEL_ALIGN") = kChannelAlign;
  m.def("supported_isas", supported_isas);
  m.def("parallel_runtime", parallel_runtime);
  m.def("checksum", checksum);
  m.def("transpose", transpose_images);
  m.def("layernorm", layernorm);
  m.def("grn", grn);
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("arithmetic_kinds", arithmetic_kinds);
  m.def("arithmetic_rate", arithmetic_rate_of, unlocked, py::arg("kind"), py::arg("threads"),
        py::arg("seconds"));
  m.def("copy_rate", copy_rate_of, unlocked, py::arg("bytes_per_thread"), py::arg("threads"),
        py::arg("seconds"));
  m.def("cache_bytes", cache_bytes_of, py::arg("level"));
  m.def("set_affinity", set_affinity_of_team, unlocked, py::arg("masks"));
  py::class_<Bottleneck>(m, "Bottleneck")
      .def(py::init<int, bool, int64_t, int64_t, int, int, float, float, Address, Address, Address, Address,
                    Address, Address, Address, Address, Address, Address, int>())
      .def("forward", &Bottleneck::forward)
      .def_property_readonly("bytes", &Bottleneck::bytes);
  py::class_<Depthwise>(m, "Depthwise")
      .def(py::init<int, int64_t, int, int, Address, Address>())
      .def("forward", &Depthwise::forward);
  py::class_<Downsample>(m, "Downsample")
      .def(py::init<int, bool, int64_t, int64_t, int, float, Address, Address, Address, Address, int>())
      .def("forward", &Downsample::forward);
}
