// Host code, so not a .cu file, which would be compiled again for every architecture.
#include "cuda/launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "cuda/errors.h"

namespace cnk::cuda {
namespace {

constexpr int64_t kGridLimit = (int64_t{1} << 31) - 1;
constexpr int64_t kDefaultShared = 48 << 10;  // for more the kernel needs an attribute

std::string text(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

[[noreturn]] void fail(const Launch& launch, cudaError_t error) {
  cudaGetLastError();  // clears an error that is not sticky, so that it is reported only once
  throw LaunchError(std::string("CUDA kernel ") + launch.kernel + " (" + text(launch.shape) + "; " +
                    std::to_string(launch.blocks) + " blocks of " + std::to_string(launch.threads) +
                    " threads, " + std::to_string(launch.shared_bytes) +
                    " bytes of shared memory): " + text(error));
}

// Sets the device for a launch: the runtime that is linked here has its own current device.
class CurrentDevice {
 public:
  CurrentDevice(const Launch& launch, int device) : wanted_(device) {
    if (const cudaError_t error = cudaGetDevice(&before_)) fail(launch, error);
    if (before_ != wanted_) {
      if (const cudaError_t error = cudaSetDevice(wanted_)) fail(launch, error);
    }
  }
  ~CurrentDevice() {
    if (before_ != wanted_) cudaSetDevice(before_);
  }

 private:
  int wanted_, before_ = 0;
};

}  // namespace

void refuse(const char* kernel, const Shape& shape, const char* why) {
  throw LaunchError(std::string(kernel) + " (" + text(shape) + "): " + why);
}

const DeviceInfo& device_info(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceInfo> known;  // a map, because its elements do not move
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int major = 0, minor = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error) throw LaunchError("CUDA device " + std::to_string(device) + ": " + text(error));
  return known.emplace(device, DeviceInfo{10 * major + minor, multiprocessors, shared}).first->second;
}

std::string driver_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver) {
    int version = 0;
    if (cudaDriverGetVersion(&version) || version == 0) return "no CUDA driver is installed";
    const auto dotted = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    return "it supports CUDA " + dotted(version) + ", the kernels need " + dotted(CUDART_VERSION);
  }
  if (error) return text(error);
  return count ? "" : "no CUDA device";
}

std::string device_problem(int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (!error) error = cudaSetDevice(device);
  if (!error) {
    error = cudaFuncGetAttributes(&attributes, any_kernel());
    cudaSetDevice(before);
  }
  cudaGetLastError();
  return error ? text(error) : "";
}

void launch_erased(const Context& context, const Launch& launch, const void* kernel, Invoke,
                   const void* params, size_t) {
  const CurrentDevice current(launch, context.device);
  if (launch.shared_bytes > kDefaultShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(launch.shared_bytes));
    if (error) fail(launch, error);
  }
  void* arguments[] = {const_cast<void*>(params)};
  const dim3 grid(unsigned(std::min(launch.blocks, kGridLimit)));
  const cudaError_t error =
      cudaLaunchKernel(kernel, grid, dim3(unsigned(launch.threads)), arguments, size_t(launch.shared_bytes),
                       static_cast<cudaStream_t>(context.stream));
  if (error) fail(launch, error);
}

}  // namespace cnk::cuda
