// convnext_kernels._native: the CPU kernels for Python. Private: only convnext_kernels/backends/cpu calls it.
//
// Tensors are passed as addresses, because the extension does not use torch. The caller has checked device,
// dtype, layout and shape. What can be checked with plain numbers is checked here again.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/repeats.h"
#include "bindings/support.h"
#include "cpu/gemm/layout.h"
#include "cpu/platform/affinity.h"
#include "cpu/platform/isa.h"

using namespace cnk;
using namespace cnk::bindings;

namespace {

void transpose_images(Address from, Address to, int64_t batch, int64_t rows, int64_t columns,
                      int64_t element_size, int threads) {
  require(from && to && batch >= 1 && rows >= 1 && columns >= 1 && threads >= 1, "transpose: out of range");
  require(element_size == 2 || element_size == 4, "transpose: element_size is not 2 or 4");
  const py::gil_scoped_release unlocked;
  in_team(threads, [&](Team& team) {
    transpose(pointer<const void>(from), pointer<void>(to), batch, rows, columns, element_size, team);
  });
}

template <size_t N>
py::tuple names_of(const char* const (&names)[N]) {
  py::tuple found(N);
  for (size_t i = 0; i < N; ++i) found[i] = py::str(names[i]);
  return found;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_supported(Isa(i)) && isa_ops(Isa(i))) names.emplace_back(isa_name(Isa(i)));
  }
  return names;
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
  // backends/cpu/native.py compares it: Python files of another time would pass buffers of other sizes.
  m.attr("CALLS") = 1;
  m.attr("ISAS") = [] {
    py::list names;
    for (int i = 0; i < kIsaCount; ++i) names.append(isa_name(Isa(i)));
    return py::tuple(names);
  }();
  m.attr("NORMS") = names_of(kNormNames);
  m.attr("ACTIVATIONS") = names_of(kActivationNames);
  m.attr("CHANNEL_ALIGN") = kChannelAlign;
#if defined(__clang__)
  m.attr("COMPILER") = "clang " __clang_version__;
#else
  m.attr("COMPILER") = "g++ " __VERSION__;
#endif
  m.def("supported_isas", supported_isas);
  m.def("parallel_runtime", parallel_runtime);
  m.def("transpose", transpose_images);
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("cache_bytes", cache_bytes_of, py::arg("level"));
  m.def("set_affinity", set_affinity_of_team, unlocked, py::arg("masks"));
  bindings::bind_repeats(m);
  bindings::bind_forward(m);
  bindings::bind_backward(m);
}
