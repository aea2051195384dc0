// Tensors from Python as tuples of plain numbers, made by backends/cuda/native.py. A tuple may end with the
// tensor itself, to keep it alive until the call returns:
//   Vector (address, dtype) or None; Rows (address, dtype, stride_n, stride_p, stride_c) or None;
//   Image (address, dtype, stride_n, stride_c, stride_h, stride_w) or None; Context (device, stream).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

namespace py = pybind11;
using Address = uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline DType dtype_of(int code) {
  if (code < 0 || code > 2) throw py::value_error("dtype: unknown code");
  return DType(code);
}

// One bind_*() per file of kernels.
void bind_dwconv(py::module_& m);
void bind_dwconv_wgrad(py::module_& m);
void bind_grn(py::module_& m);
void bind_layernorm(py::module_& m);
void bind_layernorm_backward(py::module_& m);
void bind_mlp_fused(py::module_& m);
void bind_mlp_fused_fp32(py::module_& m);
void bind_mlp_pointwise(py::module_& m);
void bind_reduce(py::module_& m);

}  // namespace cnk::cuda

namespace pybind11::detail {

template <class T, size_t Fields>
struct numbers_caster {
  PYBIND11_TYPE_CASTER(T, const_name("tuple"));
  // Copies the numbers to `numbers`. False unless `source`
  // is None or a tuple that begins with `Fields` numbers.
  static bool numbers_of(handle source, int64_t (&numbers)[Fields]) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) < Py_ssize_t(Fields)) return false;
    for (size_t i = 0; i < Fields; ++i) {
      numbers[i] = int64_t(PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(source.ptr(), Py_ssize_t(i))));
    }
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

template <>
struct type_caster<cnk::cuda::Context> : numbers_caster<cnk::cuda::Context, 2> {
  bool load(handle source, bool) {
    int64_t n[2] = {};
    if (source.is_none() || !numbers_of(source, n)) return false;
    value = {int(n[0]), cnk::cuda::pointer(cnk::cuda::Address(n[1]))};
    return true;
  }
};

template <>
struct type_caster<cnk::cuda::Vector> : numbers_caster<cnk::cuda::Vector, 2> {
  bool load(handle source, bool) {
    int64_t n[2] = {};
    if (!numbers_of(source, n)) return false;
    value = {cnk::cuda::pointer(cnk::cuda::Address(n[0])), cnk::cuda::dtype_of(int(n[1]))};
    return true;
  }
};

template <>
struct type_caster<cnk::cuda::Rows> : numbers_caster<cnk::cuda::Rows, 5> {
  bool load(handle source, bool) {
    int64_t n[5] = {};
    if (!numbers_of(source, n)) return false;
    value = {cnk::cuda::pointer(cnk::cuda::Address(n[0])), cnk::cuda::dtype_of(int(n[1])), n[2], n[3], n[4]};
    return true;
  }
};

template <>
struct type_caster<cnk::cuda::Image> : numbers_caster<cnk::cuda::Image, 6> {
  bool load(handle source, bool) {
    int64_t n[6] = {};
    if (!numbers_of(source, n)) return false;
    value = {
        cnk::cuda::pointer(cnk::cuda::Address(n[0])), cnk::cuda::dtype_of(int(n[1])), n[2], n[3], n[4], n[5]};
    return true;
  }
};

}  // namespace pybind11::detail
