#include "cuda/host/launch.h"

#include <dlfcn.h>

#include <algorithm>
#include <utility>

#include "cuda/errors.h"
#include "cuda/host/shim.h"

namespace cnk::cuda {
namespace {

DeviceInfo device{90, 132, 232448};
int64_t grid_limit = (int64_t{1} << 31) - 1;
host::Recorder recorder;

std::string symbol_of(const void* kernel, const char* name) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel) {
    throw LaunchError(std::string("the symbol of kernel ") + name + " is not exported");
  }
  return info.dli_sname;
}

}  // namespace

namespace host {
void set_recorder(Recorder r) { recorder = std::move(r); }
void set_device(const DeviceInfo& info, int64_t limit) {
  device = info;
  grid_limit = limit;
}
}  // namespace host

void refuse(const char* kernel, const Shape& shape, const char* why) {
  throw LaunchError(std::string(kernel) + " (" + text(shape) + "): " + why);
}

const DeviceInfo& device_info(int) { return device; }
std::string driver_problem() { return ""; }
std::string device_problem(int) { return ""; }

void launch_erased(const Context&, const Launch& launch, const void* kernel, Invoke invoke,
                   const void* params, size_t params_bytes) {
  if (launch.shared_bytes > device.shared_bytes) {
    throw LaunchError(std::string("kernel ") + launch.kernel + " asks for " +
                      std::to_string(launch.shared_bytes) + " bytes of shared memory, the device has " +
                      std::to_string(device.shared_bytes));
  }
  const auto grid = unsigned(std::min(launch.blocks, grid_limit));
  if (recorder) {
    recorder({symbol_of(kernel, launch.kernel), grid, launch.threads, launch.shared_bytes,
              std::string(static_cast<const char*>(params), params_bytes)});
  } else {
    host::run(kernel, invoke, params, grid, launch.threads, launch.shared_bytes);
  }
}

}  // namespace cnk::cuda
