// convnext_kernels._native_cuda: the CUDA kernels for Python. Private: only
// convnext_kernels/backends/cuda calls it. The same sources build
// _native_cuda_host, whose kernels run on the CPU, for tests (csrc/cuda/host).
//
// Tensors are passed as addresses, because the extension does not use torch. The caller has checked device,
// dtype, layout and shape, allocated the results and chosen the stream.

#include "bindings/cuda/arguments.h"
#include "common/variants.h"
#include "cuda/errors.h"
#ifdef CNK_CUDA_HOST
#include "cuda/host/launch.h"
#include "cuda/host/shim.h"
#define CNK_MODULE _native_cuda_host
#else
#define CNK_MODULE _native_cuda
#endif

namespace cnk::cuda {
namespace {

py::dict device_info_of(int device) {
  const DeviceInfo& info = device_info(device);
  py::dict found;
  found["arch"] = info.arch;
  found["multiprocessors"] = info.multiprocessors;
  found["shared_bytes"] = info.shared_bytes;
  return found;
}

}  // namespace

PYBIND11_MODULE(CNK_MODULE, m) {
  m.doc() = "CUDA kernels of convnext_kernels. Private; addresses are not checked.";
  py::register_exception<LaunchError>(m, "LaunchError", PyExc_RuntimeError);
  m.def("driver_problem", driver_problem);
  m.def("device_problem", device_problem, py::arg("device"));
  m.def("device_info", device_info_of, py::arg("device"));
  py::list norms, activations;
  for (const char* name : kNormNames) norms.append(name);
  for (const char* name : kActivationNames) activations.append(name);
  m.attr("NORMS") = py::tuple(norms);
  m.attr("ACTIVATIONS") = py::tuple(activations);
  bind_dwconv(m);
  bind_dwconv_wgrad(m);
  bind_grn(m);
  bind_layernorm(m);
  bind_layernorm_backward(m);
  bind_mlp_fused(m);
  bind_mlp_fused_fp32(m);
  bind_mlp_pointwise(m);
  bind_reduce(m);
#ifdef CNK_CUDA_HOST
  m.attr("HOST") = true;
  m.attr("ARCHITECTURES") = "";
  m.attr("TOOLKIT") = "";
  m.def("set_thread_order", host::set_thread_order, py::arg("last_first"));
  m.def(
      "set_device",
      [](int arch, int multiprocessors, int64_t shared_bytes, int64_t grid_limit) {
        host::set_device({arch, multiprocessors, shared_bytes}, grid_limit);
      },
      py::arg("arch") = 90, py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 232448,
      py::arg("grid_limit") = (int64_t{1} << 31) - 1);
  m.def(
      "set_recorder",
      [](const py::object& recorder) {
        if (recorder.is_none()) return host::set_recorder({});
        // Never released: if it is still set when Python ends, it must not be freed without Python's lock.
        const auto* kept = new py::object(recorder);
        host::set_recorder([kept](const host::Recorded& r) {
          (*kept)(r.symbol, r.grid, r.threads, r.shared_bytes, py::bytes(r.params));
        });
      },
      py::arg("recorder"));
#else
  m.attr("HOST") = false;
  m.attr("ARCHITECTURES") = CNK_CUDA_ARCHITECTURES;
  m.attr("TOOLKIT") = CNK_CUDA_TOOLKIT;
#endif
}

}  // namespace cnk::cuda
