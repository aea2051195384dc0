// LayerNorm's kernels for tensors whose neighbouring channels are neighbours
// in memory; other strides work too. A team of threads, a part of a warp or
// several warps, holds a pixel's channels in registers, in packs of 16 bytes.
#pragma once

#include <stdexcept>

#include "cuda/channels.h"
#include "cuda/launch.h"
#include "cuda/layernorm/layernorm.h"

namespace cnk::cuda {

constexpr int kNormThreads = 256;

// The row of pixel p of its sample in the order of patches, or -1.
__device__ __forceinline__ int64_t patch_row(const Patches& patches, int64_t p) {
  if (patches.side == 1) return p;
  const Divided at = divide(p, patches.width);
  const Divided h = divide(at.quotient, patches.side), w = divide(at.remainder, patches.side);
  if (h.quotient >= patches.down || w.quotient >= patches.across) return -1;
  const int64_t patch = h.quotient * patches.across + w.quotient;
  return (patch * patches.side + h.remainder) * patches.side + w.remainder;
}

// Sum over a team of `lanes` threads, a power of two; each of them gets it. A team of more than one warp uses
// `shared`, one float for each warp of the block. Two calls without a barrier between need two such arrays.
template <int N>
__device__ __forceinline__ void team_sum(float (&values)[N], int lanes, float* shared) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    if (mask >= lanes) continue;
#pragma unroll
    for (float& v : values) v += __shfl_xor_sync(kFullWarp, v, mask);
  }
  if (lanes <= kWarpSize) return;
  const int warps = int(blockDim.x) / kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i * warps + warp] = values[i];
  }
  __syncthreads();
  const int first = int(threadIdx.x) / lanes * (lanes / kWarpSize);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
    for (int w = 0; w < lanes / kWarpSize; ++w) values[i] += shared[i * warps + first + w];
  }
}

// Statistics of a pixel, from the sum of its channels and then from the sums of d = x - mean and d^2. Two
// passes, so that a mean far larger than the deviation costs no digits. The mean of d corrects the mean: C
// equal values give exactly 0 even if their mean is rounded. NaN stays NaN.
struct Statistics {
  float mean, rstd, shift;  // xhat = (x - mean) * rstd + shift
  float centre;             // of the other norms: what is subtracted from x for its gradient
};
template <bool kLayer>
__device__ __forceinline__ Statistics statistics(float mean, const float (&sums)[2], int c, float eps,
                                                 Norm norm) {
  if (!kLayer && norm == Norm::kRms) return {0.0f, rsqrtf(sums[1] / float(c) + eps), 0.0f, 0.0f};
  const float correction = sums[0] / float(c);
  const float variance = sums[1] / float(c) - correction * correction;
  const float positive = variance < 0.0f ? 0.0f : variance;
  if constexpr (!kLayer) {
    return {0.0f, rsqrtf(positive * (float(c) / float(c - 1)) + eps), 0.0f, mean + correction};
  }
  const float rstd = rsqrtf(positive + eps);
  return {mean, rstd, -correction * rstd, 0.0f};
}
__device__ __forceinline__ float normalised(float x, const Statistics& s) {
  return fmaf(x - s.mean, s.rstd, s.shift);
}

// A pixel's channels in the registers of a team: slot k of
// a lane has kCount channels from first_channel() on.
template <class T>
__device__ __forceinline__ int first_channel(int lane, int lanes, int k) {
  return (lane + k * lanes) * Channels<T>::kCount;
}

// Zeros for missing channels and, with `inside` false, for a missing pixel.
template <class T, int kSlots>
__device__ __forceinline__ void load_row(const Rows& from, const Divided& pixel, int c, int lane, int lanes,
                                         bool packed, bool inside, Channels<T> (&to)[kSlots]) {
  const T* row = static_cast<const T*>(from.data) + offset(from, pixel);
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const int first = first_channel<T>(lane, lanes, k);
    to[k] = load_channels(row + first * from.stride_c, from.stride_c, inside ? c - first : 0, packed);
  }
}

// Number of elements for `stage`: whole slots of every lane.
template <class T>
__host__ __device__ __forceinline__ int slots_width(int lanes, int slots) {
  return lanes * slots * Channels<T>::kCount;
}
// Copies a parameter's elements from `first` on, rounded to T, into shared memory, for all teams of a block.
// The caller must call the barrier.
template <class T>
__device__ __forceinline__ void stage(const Vector& parameter, float missing, int first, int c, int width,
                                      T* to) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < width; i += int(blockDim.x)) {
    narrow(first + i < c ? load(parameter, first + i, missing) : 0.0f, to[i]);
  }
}

// The statistics of a pixel in a team's registers. `shared`: three floats a warp. Between two calls there
// must be a barrier; those of the two sums are enough.
template <bool kLayer, class T, int kSlots>
__device__ __forceinline__ Statistics row_statistics(const Channels<T> (&x)[kSlots], int c, float eps,
                                                     Norm norm, int lane, int lanes, float* shared) {
  constexpr int kCount = Channels<T>::kCount;
  float sum[1] = {0.0f};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    float v[kCount];
    widen(x[k], v);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[0] += v[i];
  }
  team_sum(sum, lanes, shared);
  const float mean = !kLayer && norm == Norm::kRms ? 0.0f : sum[0] / float(c);
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const int left = c - first_channel<T>(lane, lanes, k);
    float v[kCount];
    widen(again(x[k]), v);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] -= mean;
    if (left < kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = i < left ? v[i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[0] += v[i];
      sums[1] = fmaf(v[i], v[i], sums[1]);
    }
  }
  team_sum(sums, lanes, shared + blockDim.x / kWarpSize);
  return statistics<kLayer>(mean, sums, c, eps, norm);
}

// Threads of a team: as few as can hold the channels in `slots` slots each; 0 if a block cannot.
inline int team_lanes(int64_t c, int count, int slots) {
  int lanes = 1;
  while (int64_t(lanes) * slots * count < c) lanes *= 2;
  return lanes <= kNormThreads ? lanes : 0;
}

// Only LayerNorm has kernels for rows that a team cannot hold.
inline void require_row(int lanes) {
  if (lanes == 0) throw std::invalid_argument("layernorm: too many channels for another norm");
}

// Threads of a block of teams: fewer than kNormThreads if there are too few pixels for `blocks` blocks.
inline int row_threads(int64_t rows, int lanes, int64_t blocks) {
  int threads = kNormThreads;
  while (threads > max(lanes, kWarpSize) && rows * lanes <= blocks * (threads / 2)) {
    threads /= 2;
  }
  return threads;
}

}  // namespace cnk::cuda
