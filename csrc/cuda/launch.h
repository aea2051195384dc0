// All kernels are launched by these functions: on the caller's device and stream and without synchronising,
// so that CUDA graphs can capture them. An error becomes an exception that names the kernel and the shape.
#pragma once

#include <cstdint>

#include "cuda/tensors.h"

namespace cnk::cuda {

// Sizes for the message of an error; formatted only if there is one.
struct Shape {
  const char* names;  // one letter each, as in "NCHWK"
  int64_t sizes[8];
};

// The parameters of a launch. `blocks` may exceed the grid's limit of 2^31 - 1, because kernels loop:
//   for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x)
struct Launch {
  const char* kernel;  // its name, for users
  int64_t blocks;
  int threads;
  int64_t shared_bytes;  // dynamic
  Shape shape;
};

// A GPU's numbers, read once per process and device.
struct DeviceInfo {
  int arch;  // 10 * major + minor of the compute capability
  int multiprocessors;
  int64_t shared_bytes;  // of one block at most, opt-in
};
const DeviceInfo& device_info(int device);

// Throw LaunchError (errors.h): what a launcher cannot launch and why.
[[noreturn]] void refuse(const char* kernel, const Shape& shape, const char* why);

// A kernel of this build (reduce.cu), to check whether there is code for a device.
const void* any_kernel();

using Invoke = void (*)(const void* kernel, const void* params);
void launch_erased(const Context& context, const Launch& launch, const void* kernel, Invoke invoke,
                   const void* params, size_t params_bytes);

// Kernels take all their arguments as one struct.
template <class Params>
void launch(const Context& context, const Launch& what, void (*kernel)(Params), const Params& params) {
  if (what.blocks <= 0) return;
  const Invoke invoke = [](const void* k, const void* p) {
    reinterpret_cast<void (*)(Params)>(reinterpret_cast<uintptr_t>(k))(*static_cast<const Params*>(p));
  };
  launch_erased(context, what, reinterpret_cast<const void*>(kernel), invoke, &params, sizeof params);
}

}  // namespace cnk::cuda
