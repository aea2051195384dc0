// LayerNorm's kernels for tensors whose neighbouring pixels are neighbours in memory.
// The 32 lanes of a warp are 32 pixels, and the warps of a block divide their channels:
// a lane has every warps-th channel of its pixel in registers. Channels that do not fit
// are read again for every pass, mostly from L2, so there is no limit to their number.
#pragma once

#include "cuda/layernorm/layernorm_rows.h"

namespace cnk::cuda {

constexpr int kColumnThreads = 512;  // at most
constexpr int kGroup = 4;  // channels of a warp that are transposed, or summed over pixels, at a time
constexpr int64_t kMostStaged = 16 << 10;  // bytes of parameters in shared memory at once

__device__ __forceinline__ int block_warps() { return int(blockDim.x) / kWarpSize; }

// Slot k: channel first + k * warps of the pixel at x, as fp32; 0 if there is no such channel.
template <class T, int kSlots>
__device__ __forceinline__ void load_column(const T* x, int64_t stride_c, int first, int c,
                                            float (&to)[kSlots]) {
  const int warps = block_warps();
  x += first * stride_c;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    to[k] = first + k * warps < c ? widen(*x) : 0.0f;
    x += warps * stride_c;
  }
}

// Sum over the warps of the block for each of their 32 pixels; `shared` holds N floats for each thread.
template <int N>
__device__ __forceinline__ void column_sum(float (&values)[N], float* shared) {
  const int threads = int(blockDim.x), lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < N; ++i) shared[i * threads + int(threadIdx.x)] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
    for (int at = lane; at < threads; at += kWarpSize) values[i] += shared[i * threads + at];
  }
}

// The statistics of the pixel at x. If the block can hold all its channels, they are in `v` afterwards.
// `shared`: three floats a thread; between two calls there must be a barrier.
template <class T, int kSlots>
__device__ __forceinline__ Statistics column_statistics(const T* x, int64_t stride_c, int c, float eps,
                                                        float (&v)[kSlots], float* shared) {
  const int warps = block_warps(), warp = int(threadIdx.x) / kWarpSize, span = warps * kSlots;
  float sum[1] = {0.0f};
  for (int base = 0; base < c; base += span) {
    load_column(x, stride_c, base + warp, c, v);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) sum[0] += v[k];
  }
  column_sum(sum, shared);
  const float mean = sum[0] / float(c);
  float sums[2] = {0.0f, 0.0f};
  for (int base = 0; base < c; base += span) {
    if (span < c) load_column(x, stride_c, base + warp, c, v);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const float d = base + warp + k * warps < c ? v[k] - mean : 0.0f;
      sums[0] += d;
      sums[1] = fmaf(d, d, sums[1]);
    }
  }
  column_sum(sums, shared + blockDim.x);
  return statistics<true>(mean, sums, c, eps, Norm::kLayer);
}

// A tile in shared memory, 32 pixels x a group of every warp, transposes rows whose channels are neighbours.
// This is the number of floats from a pixel to the next. Element j * warps + warp is the warp's j-th.
__host__ __device__ __forceinline__ int group_pitch(int warps) { return warps * kGroup + 1; }

// Slot k of a parameter in shared memory, padded to whole spans of the block.
template <class T, int kSlots>
__device__ __forceinline__ void load_parameter(const T* staged, int first, float (&to)[kSlots]) {
  const int warps = block_warps();
#pragma unroll
  for (int k = 0; k < kSlots; ++k) to[k] = widen(staged[first + k * warps]);
}
// Its number of elements there: all, or those of one span at a time if they are too many.
__host__ __device__ __forceinline__ int staged_width(int c, int span, bool all) {
  return all ? (c + span - 1) / span * span : span;
}

template <class T, int kSlots>
__device__ __forceinline__ void store_column(const float (&from)[kSlots], T* to, int64_t stride_c, int first,
                                             int c) {
  const int warps = block_warps();
  to += first * stride_c;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (first + k * warps < c) narrow(from[k], *to);
    to += warps * stride_c;
  }
}

// Threads of a block for c channels; at most kColumnThreads.
inline int column_threads(int64_t c, int slots) {
  return kWarpSize * int(min(int64_t{kColumnThreads / kWarpSize}, (c + slots - 1) / slots));
}

}  // namespace cnk::cuda
