// LayerNorm's kernels for pixels that are neighbours in memory: a warp is 32 pixels, a lane holds every
// warps-th channel of its own in registers. More channels than the block holds are read again for every pass,
// mostly from L2, so that any number of them will do.
#pragma once

#include "cuda/layernorm_rows.h"

namespace cnk::cuda {

constexpr int kColumnThreads = 512;  // at most
constexpr int kGroup = 4;  // channels of a warp that pass shared memory, or are summed over pixels, together
constexpr int64_t kMostStaged = 16 << 10;  // bytes of parameters in shared memory at once

__device__ __forceinline__ int block_warps() { return int(blockDim.x) / kWarpSize; }

// Slot k: channel first + k * warps of the pixel that x stands at, as fp32; 0 where there is none.
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

// The statistics of the pixel that x stands at; leaves its channels in `v` if the block holds them all.
// `shared`: three floats a thread, reused by the next call only after a barrier has been passed since.
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
  return statistics(mean, sums, c, eps);
}

// Floats from a pixel to the next of a tile: 32 pixels x a group of every warp, through which rows whose
// channels are neighbours pass. Element j * warps + warp is the warp's j-th.
__host__ __device__ __forceinline__ int group_pitch(int warps) { return warps * kGroup + 1; }

// Slot k of a parameter that stands in shared memory, padded to whole spans of the block.
template <class T, int kSlots>
__device__ __forceinline__ void load_parameter(const T* staged, int first, float (&to)[kSlots]) {
  const int warps = block_warps();
#pragma unroll
  for (int k = 0; k < kSlots; ++k) to[k] = widen(staged[first + k * warps]);
}
// Its elements there: all, or those of one span at a time where they are too many.
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

// Threads of a block that holds c channels, or as many as it can.
inline int column_threads(int64_t c, int slots) {
  return kWarpSize * int(min(int64_t{kColumnThreads / kWarpSize}, (c + slots - 1) / slots));
}

}  // namespace cnk::cuda
