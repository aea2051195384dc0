// What goes wrong as text: apart from launch.h, since <string> and <stdexcept> cost every file of kernels
// that sees them a second to compile.
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

// "" when the driver can run kernels of this build on some device, else why not.
std::string driver_problem();
// "" when this build holds code for the device, else what it lacks.
std::string device_problem(int device);

}  // namespace cnk::cuda
