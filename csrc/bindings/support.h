// What the bindings of the CPU kernels share: addresses, memory, teams, packed matrices.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "cpu/ops.h"
#include "cpu/platform/parallel.h"

namespace cnk::bindings {

namespace py = pybind11;
using namespace cnk::cpu;

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Norm norm_of(int code) {
  if (code < 0 || code >= kNorms) throw std::invalid_argument("norm: unknown code");
  return Norm(code);
}

inline Activation activation_of(int code) {
  if (code < 0 || code >= kActivations) throw std::invalid_argument("activation: unknown code");
  return Activation(code);
}

inline void require(bool condition, const char* what) {
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

// Workspace of the calling thread. Kept between calls unless
// it is large: a new one would cost page faults every time.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    buffer().reserve(bytes);
    data_ = buffer().data();
  }
  ~Workspace() {
    if (buffer().size() > kKeep) buffer().release();
  }
  // A member, for all threads of a team: buffer() is a different one in each.
  char* data() const { return data_; }

 private:
  static constexpr int64_t kKeep = int64_t{32} << 20;
  static Buffer& buffer() {
    thread_local Buffer instance;
    return instance;
  }
  char* data_;
};

// A copy of a (rows, columns) fp32 array, its columns padded with zeros; empty if the address is 0.
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

// The weights of a depthwise convolution, (KD * KH * KW, C) fp32, packed; empty if the address is 0.
class Taps {
 public:
  Taps(Address source, const Axis& h, const Axis& w, int64_t c, int depth = 1) {
    if (!source) return;
    buffer_.reserve(packed_taps_bytes(h, w, c, depth));
    pack_taps(pointer<const float>(source), h, w, c, reinterpret_cast<float*>(buffer_.data()), depth);
  }
  const float* data() const { return reinterpret_cast<const float*>(buffer_.data()); }

 private:
  Buffer buffer_;
};

// The same as pairs of bf16, if the instruction set multiplies these faster; empty otherwise, and for one kernel row.
class TapPairs {
 public:
  TapPairs(Isa isa, const Taps& taps, const Axis& h, const Axis& w, int64_t c, int depth = 1) {
    const int rows = depth * (along_columns(h, w) ? w.taps : h.taps);
    if (isa != Isa::kAvx512Bf16 || !taps.data() || rows == 1) return;
    buffer_.reserve(packed_taps_bytes(h, w, c, depth));
    exist_ = pack_tap_pairs(taps.data(), h, w, c, reinterpret_cast<uint32_t*>(buffer_.data()), depth);
  }
  const float* data() const { return exist_ ? reinterpret_cast<const float*>(buffer_.data()) : nullptr; }

 private:
  Buffer buffer_;
  bool exist_ = false;
};

inline const IsaOps& ops_of(int isa) {
  require(isa >= 0 && isa < kIsaCount && isa_supported(Isa(isa)), "isa: not supported on this machine");
  const IsaOps* ops = isa_ops(Isa(isa));
  require(ops != nullptr, "isa: not part of this build");
  return *ops;
}

// What an axis of a depthwise convolution must be, except for its sizes.
inline void require_axis(const Axis& axis) {
  require(axis.taps >= 1 && axis.taps <= 51 && axis.taps % 2 && axis.dilation >= 1,
          "taps or dilation out of range");
  require(axis.down >= 1 && axis.up >= 1 && axis.down * axis.up <= 2, "stride out of range");
}

// The depth of a 3-D convolution.
inline void require_depth(const Axis& axis) {
  require_axis(axis);
  require(axis.taps <= kMaxDepthTaps, "taps of the depth out of range");
}

inline void require_sizes(const Axis& axis) {
  const bool fits =
      axis.up == 1 ? axis.out == (axis.in - 1) / axis.down + 1 : axis.in == (axis.out - 1) / axis.up + 1;
  require(axis.in >= 1 && axis.out >= 1 && fits, "sizes of input and result");
}

inline DType dtype_of(int code) {
  require(code >= 0 && code <= 2, "dtype: unknown code");
  return DType(code);
}

inline Products products_of(int isa, bool bf16) {
  return bf16 && has_bf16_products(Isa(isa)) ? Products::kBFloat16 : Products::kFloat32;
}

// Runs a kernel of the table, with a workspace of so many bytes and without the GIL.
template <class Args>
void run(int threads, Args& args, int64_t bytes, void (*kernel)(const Args&, Team&)) {
  const py::gil_scoped_release unlocked;
  const Workspace workspace(bytes);
  args.workspace = workspace.data();
  in_team(threads, [&](Team& team) { kernel(args, team); });
}

class Matrix {
 public:
  // An empty one, for a matrix that is not used.
  Matrix() : Matrix(0, 0, DType::kFloat32, 0) {}
  // weight: (n, k), row-major.
  Matrix(const IsaOps& ops, Products products, DType dtype, Address weight, int64_t n, int64_t k, int threads)
      : Matrix(n, k, dtype, ops.packed_bytes(products, dtype, n, k)) {
    require(weight != 0, "weight: null");
    const py::gil_scoped_release unlocked;
    in_team(threads, [&](Team& team) {
      ops.pack_matrix(products, dtype, pointer<const void>(weight), n, k, buffer_.data(), team);
    });
  }
  // weight: (k, n), row-major; row i is multiplied by scale[i] unless scale is null.
  static Matrix transposed(const IsaOps& ops, Products products, DType dtype, Address weight, int64_t n,
                           int64_t k, const float* scale, int threads) {
    require(weight != 0, "weight: null");
    Matrix matrix(n, k, DType::kFloat32, ops.packed_bytes(products, DType::kFloat32, n, k));
    const py::gil_scoped_release unlocked;
    in_team(threads, [&](Team& team) {
      ops.pack_transposed(products, dtype, pointer<const void>(weight), n, k, scale, matrix.buffer_.data(),
                          team);
    });
    return matrix;
  }
  PackedMatrix view() const { return {buffer_.data(), n_, k_, dtype_}; }
  int64_t bytes() const { return buffer_.size(); }

 private:
  Matrix(int64_t n, int64_t k, DType dtype, int64_t bytes) : n_(n), k_(k), dtype_(dtype), buffer_(bytes) {}
  int64_t n_, k_;
  DType dtype_;
  Buffer buffer_;
};

void bind_forward(py::module_& m);
void bind_backward(py::module_& m);

}  // namespace cnk::bindings
