# The CUDA kernels: _native_cuda by nvcc, or _native_cuda_host by the C++ compiler, for tests.
#
#   CNK_CUDA                 auto: where there is nvcc, for the GPUs that the driver reports; 1: for all architectures
#                            where it reports none, and an error without nvcc; 0: never
#   CNK_CUDA_ARCHITECTURES   such as "80 90", or "all": machine code for these, PTX for the newest, GPU or not
#
# Both come from the environment, else from -D.

set(CNK_CUDA_KERNELS dwconv/dwconv dwconv/dwconv_wgrad grn layernorm/layernorm layernorm/layernorm_backward mlp/mlp_fused
  mlp/mlp_fused_fp32 mlp/mlp_pointwise reduce)

set(bindings csrc/bindings/cuda/module.cpp)
set(kernels "")
foreach(path ${CNK_CUDA_KERNELS})
  list(APPEND kernels csrc/cuda/${path}.cu)
  get_filename_component(name ${path} NAME)
  list(APPEND bindings csrc/bindings/cuda/${name}.cpp)
endforeach()
# The compiler gets one file: that takes only a third longer than any of the ten alone, because most of each is
# pybind11's headers.
set_source_files_properties(${bindings} PROPERTIES UNITY_GROUP bindings)

# The environment's value, unless empty, else that of -D, else the default. Nothing is kept from one configuration to
# the next, so that a build directory that pip uses again follows the present environment.
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
  message(STATUS "CUDA kernels: skipped, CNK_CUDA=0")
  return()
endif()
if(NOT wanted MATCHES "^(auto|1|on|yes|true)$")
  message(FATAL_ERROR "CNK_CUDA: expected auto, 0 or 1, got \"${CNK_CUDA}\"")
endif()

# The compute capabilities from 75 on of this machine's GPUs, such as 80;90, without PyTorch.
function(cnk_find_gpus result)
  set(found "")
  find_program(nvidia_smi nvidia-smi NO_CACHE)
  if(nvidia_smi)
    execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE printed ERROR_QUIET RESULT_VARIABLE status TIMEOUT 60)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" found "${printed}")
      list(TRANSFORM found REPLACE "\\." "")
      list(REMOVE_DUPLICATES found)
      list(FILTER found INCLUDE REGEX "^(7[5-9]|[89][0-9]|[0-9][0-9][0-9])$")
    endif()
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

cnk_setting(CNK_CUDA_ARCHITECTURES "")
string(REGEX MATCHALL "[^ ,;]+" architectures "${CNK_CUDA_ARCHITECTURES}")
set(gpus "")
if(NOT architectures)
  cnk_find_gpus(gpus)
  if(NOT gpus AND wanted STREQUAL "auto")
    message(STATUS "CUDA kernels: skipped, the driver reports no GPU of compute capability 7.5 or newer; CNK_CUDA=1 "
                   "compiles for all of them, CNK_CUDA_ARCHITECTURES=\"80 90\" for some")
    return()
  endif()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # a compiler may have been installed since the last configuration
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(wanted STREQUAL "auto")
    message(STATUS "CUDA kernels: skipped, no working nvcc was found")
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
    message(STATUS "CUDA kernels: skipped, nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0 and knows no C++20")
    return()
  endif()
  message(FATAL_ERROR "CNK_CUDA=1, but nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0 and knows no C++20")
endif()

# The architectures of "all" that this nvcc knows (12.8 brought sm_100 and sm_120, 13.0 dropped sm_70).
set(all 75 80 86 89 90)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND all 100 120)
endif()

if("${architectures}" STREQUAL "all" OR NOT architectures AND NOT gpus)
  set(architectures ${all})
endif()
# For a GPU that this nvcc does not know, the newest older architecture is compiled.
if(gpus)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE printed COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9]+" known "${printed}")
  list(SORT known COMPARE NATURAL)
endif()
foreach(gpu ${gpus})
  foreach(architecture ${known})
    if(NOT architecture GREATER gpu)
      set(newest ${architecture})
    endif()
  endforeach()
  list(APPEND architectures ${newest})
endforeach()
list(REMOVE_DUPLICATES architectures)
foreach(architecture ${architectures})
  if(NOT architecture MATCHES "^[0-9]+[af]?$" OR architecture LESS 75)
    message(FATAL_ERROR "CNK_CUDA_ARCHITECTURES: expected \"all\" or compute capabilities from 75 on such as \"80 90\", "
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
# Two architectures at once: the largest file alone would take minutes.
target_compile_options(_native_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:--threads 2>")
if(CNK_WERROR)  # a spill is a warning, too
  target_compile_options(_native_cuda PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xptxas -warn-spills>")
endif()
target_link_libraries(_native_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _native_cuda DESTINATION convnext_kernels)
message(STATUS "CUDA kernels: ${architectures_text}, PTX for ${newest}, nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
