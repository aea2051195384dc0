// Errors as text. Not in launch.h, because <string> and <stdexcept>
// would add a second to the compile time of every file of kernels.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace cnk::cuda {

class LaunchError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// "N=2, C=96"
inline std::string text(const Shape& shape) {
  std::string found;
  for (int i = 0; shape.names[i]; ++i) {
    found += std::string(i ? ", " : "") + shape.names[i] + "=" + std::to_string(shape.sizes[i]);
  }
  return found;
}

// "" if the driver can run kernels of this build on some device, else the reason why not.
std::string driver_problem();
// "" if this build has code for the device, else what is missing.
std::string device_problem(int device);

}  // namespace cnk::cuda
