# The CUDA kernels: _native_cuda by nvcc, or _native_cuda_host by the C++ compiler, for tests.
#
#   CNK_CUDA                 auto (where nvcc is found), 0, or 1 (an error where it is not); environment or cache
#   CNK_CUDA_ARCHITECTURES   such as "80 90": machine code for these, PTX for the newest; environment or cache

set(CNK_CUDA_KERNELS dwconv dwconv_wgrad grn layernorm layernorm_backward mlp_fused mlp_fused_fp32 mlp_pointwise reduce)

set(bindings csrc/bindings/cuda/module.cpp)
set(kernels "")
foreach(name ${CNK_CUDA_KERNELS})
  list(APPEND kernels csrc/cuda/${name}.cu)
  list(APPEND bindings csrc/bindings/cuda/${name}.cpp)
endforeach()
# One file to the compiler, which takes a third longer than any of the ten alone: most of it are pybind11's headers.
set_source_files_properties(${bindings} PROPERTIES UNITY_GROUP bindings)

# The environment's value, unless empty, else that of -D, else the default. Nothing is kept from one configuration to
# the next, so that a build directory that pip uses again follows the environment it is called in.
macro(cnk_setting name default)
  if(NOT "$ENV{${name}}" STREQUAL "")
    set(${name} "$ENV{${name}}")
  elseif(NOT DEFINED CACHE{${name}})
    set(${name} "${default}")
  endif()
endmacro()

if(CNK_CUDA_HOST)
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  pybind11_add_module(_native_cuda_host NO_EXTRAS ${bindings} ${kernels} csrc/cuda/host/launch.cpp
    csrc/cuda/host/shim.cpp)
  target_include_directories(_native_cuda_host PRIVATE csrc)
  set_target_properties(_native_cuda_host PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  target_compile_definitions(_native_cuda_host PRIVATE CNK_CUDA_HOST)
  # GCC knows neither `#pragma unroll` nor that a kernel's name must be seen from outside, which dladdr needs.
  target_compile_options(_native_cuda_host PRIVATE -Wno-unknown-pragmas -fvisibility=default)
  target_link_libraries(_native_cuda_host PRIVATE ${CMAKE_DL_LIBS})
  return()
endif()

cnk_setting(CNK_CUDA auto)
string(TOLOWER "${CNK_CUDA}" wanted)
if(NOT CNK_PYTHON OR wanted MATCHES "^(0|off|no|false)$")
  message(STATUS "CUDA kernels: not asked for")
  return()
endif()
if(NOT wanted MATCHES "^(auto|1|on|yes|true)$")
  message(FATAL_ERROR "CNK_CUDA: expected auto, 0 or 1, got \"${CNK_CUDA}\"")
endif()
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # that there was none last time says nothing
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(wanted STREQUAL "auto")
    message(STATUS "CUDA kernels: left out, no working nvcc was found")
    return()
  endif()
  message(FATAL_ERROR "CNK_CUDA=1, but no working nvcc was found: put it on PATH or name it with "
                      "CUDACXX=/path/to/nvcc, or build without the CUDA kernels (CNK_CUDA=0).")
endif()
# CMake wants an architecture to try the compiler with; the targets set their own.
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  if(wanted STREQUAL "auto")
    message(STATUS "CUDA kernels: left out, nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0 and knows no C++20")
    return()
  endif()
  message(FATAL_ERROR "CNK_CUDA=1, but nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0 and knows no C++20")
endif()

# What the default list holds as far as this nvcc knows it (12.8 brought sm_100 and sm_120, 13.0 dropped sm_70).
set(known 75 80 86 89 90)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND known 100 120)
endif()
list(JOIN known " " known)
cnk_setting(CNK_CUDA_ARCHITECTURES "${known}")
string(REGEX MATCHALL "[^ ,;]+" architectures "${CNK_CUDA_ARCHITECTURES}")
foreach(architecture ${architectures})
  if(NOT architecture MATCHES "^[0-9]+[af]?$" OR architecture LESS 75)
    message(FATAL_ERROR "CNK_CUDA_ARCHITECTURES: expected compute capabilities from 75 on such as \"80 90\", "
                        "got \"${CNK_CUDA_ARCHITECTURES}\"")
  endif()
endforeach()
list(SORT architectures COMPARE NATURAL)
list(JOIN architectures " " architectures_text)
list(GET architectures -1 newest)
list(TRANSFORM architectures APPEND "-real")

find_package(CUDAToolkit REQUIRED)
pybind11_add_module(_native_cuda NO_EXTRAS ${bindings} ${kernels} csrc/cuda/launch.cpp)
set_target_properties(_native_cuda PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP CUDA_ARCHITECTURES "${architectures};${newest}-virtual"
  CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden)
target_include_directories(_native_cuda PRIVATE csrc)
target_compile_definitions(_native_cuda PRIVATE CNK_CUDA_ARCHITECTURES="${architectures_text}"
  CNK_CUDA_TOOLKIT="${CUDAToolkit_VERSION}")
# A spill is a warning, and a warning an error. Two architectures at once: the largest file alone would take minutes.
target_compile_options(_native_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xptxas -warn-spills --threads 2>")
target_link_libraries(_native_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _native_cuda DESTINATION convnext_kernels)
message(STATUS "CUDA kernels: ${architectures_text}, PTX for ${newest}, nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
