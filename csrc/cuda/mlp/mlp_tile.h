// What the two kernels of the fused bottleneck share: where a
// block's tile lies, the parameters in shared memory, GRN's sums.
#pragma once

#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/mlp/mlp_fused.h"
#include "cuda/mma.h"
#include "cuda/runtime.h"

namespace cnk::cuda {

constexpr int kMlpMaxWarps = 8;

// threadIdx.x, read anew by every call, so that addresses that depend on it are computed where they are used.
// Hoisted out of the loops they would take the registers that the accumulators need.
__device__ __forceinline__ int thread_of_block() {
#ifdef __CUDA_ARCH__
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return int(threadIdx.x);
#endif
}

struct MlpFusedParams {
  MlpFusedArgs a;
  unsigned tiles, blocks;     // of a sample, of all samples
  bool vector_x, vector_out;  // rows of 8 channels that can be loaded and stored at once
  bool vector_weights, vector_u;
  bool two_buffers;  // for the weights
  int groups;        // of columns of the output, in the second product
};

// Where the tile of a block lies; computed anew by every call, for the same reason.
struct MlpTile {
  int64_t sample, first;  // pixel
};
__device__ __forceinline__ MlpTile mlp_tile(const MlpFusedParams& p, unsigned block) {
  unsigned tiles = p.tiles;
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(block), "+r"(tiles));
#endif
  const unsigned sample = block / tiles;
  return {sample, int64_t(block - sample * tiles) * p.a.tile};
}

// The same of a warp of kRows pixels.
template <int kRows>
__device__ __forceinline__ MlpTile warp_tile(const MlpFusedParams& p, unsigned block) {
  const MlpTile tile = mlp_tile(p, block);
  return {tile.sample, tile.first + thread_of_block() / kWarpSize * kRows};
}

// The drop-path factors of a warp's kRows pixels, for all its lanes: one division per pixel.
template <int kRows>
__device__ __forceinline__ void share_drop_factors(const MlpFusedParams& p, const MlpTile& tile, float* to) {
  const int row = thread_of_block() % kWarpSize;
  const int64_t pixel = tile.first + row;
  float factor = 0.0f;
  if (pixel < p.a.pixels) {
    int64_t sample = tile.sample;
    if (p.a.pixels != p.a.sample_pixels) sample += divide(pixel, p.a.sample_pixels).quotient;
    factor = load(p.a.drop_scale, sample, 1.0f);
  }
  if (row < kRows) to[row] = factor;
  __syncwarp();
}

// Rounded to x's dtype, as eager's LayerNorm rounds its parameters and its result.
__device__ __forceinline__ float rounded_to(DType dtype, float value) {
  if (dtype == DType::kBFloat16) return rounded<BFloat16>(value);
  if (dtype == DType::kFloat16) return rounded<Float16>(value);
  return value;
}

// Parameters of all channels in shared memory, as fp32; zeros after the last channel.
template <int kC>
struct MlpVectors {
  float norm_weight[kC], norm_bias[kC], b2[kC], gamma[kC];
};
template <int kC>
__device__ __forceinline__ void load_parameters(const MlpFusedParams& p, MlpVectors<kC>& to) {
#pragma unroll 1
  for (int c = thread_of_block(); c < kC; c += int(blockDim.x)) {
    const bool inside = c < p.a.c;
    to.norm_weight[c] = inside ? rounded_to(p.a.x.dtype, load(p.a.norm_weight, c, 1.0f)) : 0.0f;
    to.norm_bias[c] = inside ? rounded_to(p.a.x.dtype, load(p.a.norm_bias, c, 0.0f)) : 0.0f;
    to.b2[c] = inside ? load(p.a.b2, c, 0.0f) : 0.0f;
    to.gamma[c] = inside ? load(p.a.gamma, c, 1.0f) : 0.0f;
  }
}

// Parameters of a chunk of the hidden, b1 and GRN's, and the warps' sums of squares. There are two of each,
// so that those of the next chunk can be written while those of this one are read.
template <int kChunk>
struct MlpChunk {
  float bias[2][kChunk], scale[2][kChunk], shift[2][kChunk];
  float squares[2][kMlpMaxWarps][kChunk];
};

// A thread's element of them, between global and shared memory: loaded well before it is stored.
struct MlpChunkElement {
  float bias, scale, shift;
};
template <int kChunk>
__device__ __forceinline__ MlpChunkElement load_chunk(const MlpFusedParams& p, unsigned block, int chunk) {
  const unsigned thread = unsigned(thread_of_block()), hid = unsigned(chunk * kChunk) + thread;
  MlpChunkElement e{0.0f, 1.0f, 0.0f};
  if (thread >= kChunk || hid >= unsigned(p.a.hidden)) return e;
  e.bias = load(p.a.b1, hid, 0.0f);
  if (p.a.grn_scale) {
    e.scale = p.a.grn_scale[mlp_tile(p, block).sample * p.a.hidden + hid];
    e.shift = load(p.a.grn_bias, hid, 0.0f);
  }
  return e;
}
template <int kChunk>
__device__ __forceinline__ void store_chunk(const MlpChunkElement& from, int chunk, MlpChunk<kChunk>& to) {
  const int thread = thread_of_block();
  if (thread >= kChunk) return;
  to.bias[chunk % 2][thread] = from.bias;
  to.scale[chunk % 2][thread] = from.scale;
  to.shift[chunk % 2][thread] = from.shift;
}

// The tile's sums of squares from those of its warps, for a chunk that all warps have finished.
template <int kChunk>
__device__ __forceinline__ void store_squares(const MlpFusedParams& p, unsigned block, int chunk,
                                              const MlpChunk<kChunk>& from) {
  const int thread = thread_of_block(), hid = chunk * kChunk + thread;
  if (!p.a.sums || chunk < 0 || thread >= kChunk || hid >= p.a.hidden) return;
  float sum = 0.0f;
  for (int w = 0; w < int(blockDim.x) / kWarpSize; ++w) sum += from.squares[chunk % 2][w][thread];
  p.a.sums[int64_t(block) * p.a.hidden + hid] = sum;
}

// Start copying kRows x kColumns elements of a dense matrix to rows that are kPitch apart in shared memory;
// zeros outside of the matrix. A thread stays in its column. `vectors`: 16 bytes can be read at once.
template <int kRows, int kColumns, int kPitch, class T>
__device__ __forceinline__ void copy_matrix(const T* from, int64_t stride, int rows, int columns,
                                            bool vectors, T* to) {
  constexpr int kPack = 16 / int(sizeof(T)), kPacks = kColumns / kPack;
  constexpr int kTeam = kPacks > kWarpSize ? kPacks / 2 : kPacks;  // threads of a row
  const int thread = thread_of_block();
  if (vectors) {
    const int column = thread % kTeam * kPack, step = int(blockDim.x) / kTeam;
    int row = thread / kTeam;
    if (row >= step) return;
    from += row * stride + column;
    to += row * kPitch + column;
#pragma unroll 2
    for (; row < kRows; row += step, from += step * stride, to += step * kPitch) {
#pragma unroll
      for (int c = 0; c < kColumns; c += kTeam * kPack) {
        copy16(to + c, from + c, row < rows && column + c < columns);
      }
    }
    return;
  }
  for (int i = thread; i < kRows * kColumns; i += int(blockDim.x)) {
    const int row = i / kColumns, column = i % kColumns;
    to[row * kPitch + column] = row < rows && column < columns ? from[row * stride + column] : T{};
  }
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// The first steps of both launchers; `rows` are the pixels of a warp.
inline MlpFusedParams mlp_params(const MlpFusedArgs& a, int rows, const char* kernel) {
  const int64_t tiles = a.tile > 0 ? (a.pixels + a.tile - 1) / a.tile : 0;
  if (a.tile <= 0 || a.tile % rows != 0 || a.tile > kMlpMaxWarps * rows ||
      tiles * a.samples >= int64_t{1} << 31) {
    refuse(kernel, {"NPCHT", {a.samples, a.pixels, a.c, a.hidden, a.tile}}, "no grid of such tiles");
  }
  MlpFusedParams p{a, unsigned(tiles), unsigned(a.samples * tiles)};
  p.vector_weights = is_aligned(a.w1) && is_aligned(a.w2);
  return p;
}

}  // namespace cnk::cuda
