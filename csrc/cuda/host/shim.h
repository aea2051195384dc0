// CUDA C++ on the host: the part of the language that the kernels of csrc/cuda use. A C++ compiler builds the
// same sources, and each thread of a block runs as a fiber. For tests only; no CUDA toolkit is needed.
//
// Between barriers the fibers of a block run one after the other, from the first to the last or from the last
// to the first (`set_thread_order`): a kernel that lacks a barrier gives a wrong result in one of the orders.
// Dynamic shared memory is a heap block of exactly the requested size, filled with 0xFF (NaN) for every block
// of threads, so that the address sanitizer detects an access outside, and a read of memory that was never
// written gives a wrong result. A barrier or shuffle that not all threads reach throws std::logic_error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cnk::cuda::host {

// The position of the running fiber. Kernels use one dimension only.
extern dim3 thread_index, block_index, block_size, grid_size;
extern char* shared_memory;

void barrier();       // all threads of the block that have not returned
void warp_barrier();  // all threads of the warp that have not returned
// Give `bytes` of this lane to the warp and wait for the others: those of lane l are at + 64 * l. The last
// lane to arrive calls `combine` on all of them, which may write results there.
constexpr int kExchangeBytes = 64;
const unsigned char* exchange(const void* own, int bytes, void (*combine)(unsigned char* all) = nullptr);

template <class T>
T from_lane(const unsigned char* exchanged, int lane) {
  T value;
  std::memcpy(&value, exchanged + kExchangeBytes * lane, sizeof value);
  return value;
}

// Run a kernel: `invoke(kernel, params)` is the body of one thread.
using Invoke = void (*)(const void* kernel, const void* params);
void run(const void* kernel, Invoke invoke, const void* params, unsigned blocks, int threads,
         int64_t shared_bytes);
void set_thread_order(bool last_first);

}  // namespace cnk::cuda::host

#define threadIdx (::cnk::cuda::host::thread_index)
#define blockIdx (::cnk::cuda::host::block_index)
#define blockDim (::cnk::cuda::host::block_size)
#define gridDim (::cnk::cuda::host::grid_size)

inline void __syncthreads() { cnk::cuda::host::barrier(); }
inline void __syncwarp() { cnk::cuda::host::warp_barrier(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= cnk::cuda::host::kExchangeBytes);
  const unsigned char* all = cnk::cuda::host::exchange(&value, sizeof value);
  return cnk::cuda::host::from_lane<T>(all, int(threadIdx.x % 32) ^ mask);
}
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
