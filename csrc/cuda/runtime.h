// The CUDA language and runtime, or their replacement if the kernels are built for the host (host/shim.h).
#pragma once

#ifdef CNK_CUDA_HOST
#include "cuda/host/shim.h"
#else
#include <cuda_runtime.h>
#endif

// Dynamic shared memory, 16-byte aligned. Kernels use no other kind. The launcher computes its size.
#ifdef CNK_CUDA_HOST
#define CNK_SHARED(T, name) T* const name = reinterpret_cast<T*>(::cnk::cuda::host::shared_memory)
#else
extern __shared__ __align__(16) unsigned char cnk_shared_memory[];
#define CNK_SHARED(T, name) T* const name = reinterpret_cast<T*>(cnk_shared_memory)
#endif

namespace cnk::cuda {
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;
}  // namespace cnk::cuda
