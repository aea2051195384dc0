// Launches of the host build: kernels run as fibers, or are
// passed to a recorder, which may execute their PTX.
#pragma once

#include <functional>
#include <string>

#include "cuda/launch.h"

namespace cnk::cuda::host {

struct Recorded {
  std::string symbol;  // the kernel's mangled name, which is its name in nvcc's PTX
  unsigned grid;
  int threads;
  int64_t shared_bytes;
  std::string params;  // the bytes of the kernel's argument
};
using Recorder = std::function<void(const Recorded&)>;

// With an empty recorder kernels run as fibers.
void set_recorder(Recorder recorder);
// The GPU that launchers plan for, and the largest grid:
// with a small one kernels must loop over their blocks.
void set_device(const DeviceInfo& info, int64_t grid_limit);

}  // namespace cnk::cuda::host
