#include "cuda/layernorm/layernorm.h"
#include "cuda/layernorm/layernorm_columns.h"
#include "cuda/layernorm/layernorm_rows.h"

namespace cnk::cuda {

constexpr int kNormSlots = 3;     // of 16 bytes, in the registers of a thread
constexpr int kColumnSlots = 24;  // channels in the registers of a thread

struct LayerNormParams {
  LayerNormArgs a;
  int64_t rows, tiles;  // pixels in all; blocks of one sample
  int64_t blocks;
  int c, lanes;
  bool packed_x, packed_y;
  bool staged;      // for columns: all parameters are in shared memory
  bool transposed;  // y's channels are neighbours in memory, or y has another dtype
};

template <class T, bool kLayer>
__global__ void __launch_bounds__(kNormThreads, 3) layernorm_rows_kernel(const LayerNormParams p) {
  constexpr int kCount = Channels<T>::kCount;
  CNK_SHARED(T, weight);
  const int width = slots_width<T>(p.lanes, kNormSlots);
  T* const bias = weight + width;
  float* const shared = reinterpret_cast<float*>(bias + width);
  const int lane = int(threadIdx.x) & (p.lanes - 1), team = int(threadIdx.x) / p.lanes;
  const int teams = int(blockDim.x) / p.lanes;
  const int64_t step = int64_t(gridDim.x) * teams;
  int64_t row = int64_t(blockIdx.x) * teams + team;
  // The next pixel is loaded while this one is computed, the first one while the parameters are loaded.
  Divided next_at = divide(row, p.a.pixels);
  Channels<T> next[kNormSlots];
  load_row(p.a.x, next_at, p.c, lane, p.lanes, p.packed_x, row < p.rows, next);
  stage(p.a.weight, 1.0f, 0, p.c, width, weight);
  stage(p.a.bias, 0.0f, 0, p.c, width, bias);
  __syncthreads();
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x, row += step) {
    Channels<T> x[kNormSlots];
#pragma unroll
    for (int k = 0; k < kNormSlots; ++k) x[k] = next[k];
    const Divided at = next_at;
    next_at = divide(row + step, p.a.pixels);
    load_row(p.a.x, next_at, p.c, lane, p.lanes, p.packed_x, row + step < p.rows, next);
    const Statistics s = row_statistics<kLayer>(x, p.c, p.a.eps, p.a.norm, lane, p.lanes, shared);
    const int64_t q = patch_row(p.a.patches, at.remainder);
    const bool stored = row < p.rows && q >= 0;
    const int64_t base = offset(p.a.y, {at.quotient, q});
#pragma unroll
    for (int k = 0; k < kNormSlots; ++k) {
      const int first = first_channel<T>(lane, p.lanes, k);
      float v[kCount], w[kCount], b[kCount];
      widen(again(x[k]), v);
      load(weight + first, w);
      load(bias + first, b);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = fmaf(normalised(v[i], s), w[i], b[i]);
      Channels<T> y;
      narrow(v, y);
      store_channels(y, p.a.y.data, p.a.y.dtype, base + first * p.a.y.stride_c, p.a.y.stride_c,
                     stored ? p.c - first : 0, p.packed_y);
    }
  }
}

// Stores a column of every lane through the tile in shared memory, so that neighbouring lanes store
// neighbouring channels; in any dtype.
__device__ __forceinline__ void store_transposed(const LayerNormParams& p, int64_t sample,
                                                 int64_t first_pixel, int base,
                                                 const float (&from)[kColumnSlots], float* tile) {
  const Rows& y = p.a.y;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int warps = block_warps(), pitch = group_pitch(warps);
#pragma unroll 1
  for (int k = 0; k < kColumnSlots; k += kGroup) {
    const int first = base + k * warps, channels = min(kGroup * warps, p.c - first);
#pragma unroll
    for (int slot = 0; slot < kColumnSlots;
         slot += kGroup) {  // registers need numbers that the compiler knows; it does not know k
      if (slot != k) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) tile[lane * pitch + j * warps + warp] = from[slot + j];
    }
    __syncthreads();
    for (int i = warp; i < kWarpSize && first_pixel + i < p.a.pixels; i += warps) {
      const int64_t row = patch_row(p.a.patches, first_pixel + i);
      if (row < 0) continue;
      const int64_t to = offset(y, {sample, row}) + first * y.stride_c;
#pragma unroll 1
      for (int j = lane; j < channels; j += kWarpSize) {
        store(tile[i * pitch + j], y.data, y.dtype, to + j * y.stride_c);
      }
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1) layernorm_columns_kernel(const LayerNormParams p) {
  CNK_SHARED(float, sums);  // three for each thread
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int warps = block_warps(), span = warps * kColumnSlots, pitch = group_pitch(warps);
  float* const tile = sums + 3 * blockDim.x;
  T* const weight = reinterpret_cast<T*>(tile + (p.transposed ? kWarpSize * pitch : 0));
  const int width = staged_width(p.c, span, p.staged);
  T* const bias = weight + width;
  const auto stage_from = [&](int first) {
    __syncthreads();  // all threads have finished the span before
    stage(p.a.weight, 1.0f, first, p.c, width, weight);
    stage(p.a.bias, 0.0f, first, p.c, width, bias);
    __syncthreads();
  };
  if (p.staged) stage_from(0);
  const Rows& y = p.a.y;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Divided at = divide(block, p.tiles);
    const int64_t first_pixel = at.remainder * kWarpSize, pixel = first_pixel + lane;
    // Lanes past the end compute the last pixel and do not store it.
    const T* x = static_cast<const T*>(p.a.x.data) + offset(p.a.x, {at.quotient, min(pixel, p.a.pixels - 1)});
    float v[kColumnSlots];
    const Statistics s = column_statistics(x, p.a.x.stride_c, p.c, p.a.eps, v, sums);
    const int64_t q = pixel < p.a.pixels ? patch_row(p.a.patches, pixel) : -1;
    const int64_t to = offset(y, {at.quotient, q});
    for (int base = 0; base < p.c; base += span) {
      if (span < p.c) load_column(x, p.a.x.stride_c, base + warp, p.c, v);
      if (!p.staged) stage_from(base);
      const int first = (p.staged ? base : 0) + warp;
      float w[kColumnSlots], b[kColumnSlots];
      load_parameter(weight, first, w);
      load_parameter(bias, first, b);
#pragma unroll
      for (int k = 0; k < kColumnSlots; ++k) v[k] = rounded<T>(fmaf(normalised(v[k], s), w[k], b[k]));
      if (p.transposed) {
        store_transposed(p, at.quotient, first_pixel, base, v, tile);
      } else if (q >= 0) {
        store_column(v, static_cast<T*>(y.data) + to, y.stride_c, base + warp, p.c);
      }
    }
  }
}

void layernorm(const Context& context, const LayerNormArgs& args) {
  LayerNormParams p{args, args.n * args.pixels, 0, 0, int(args.c), 0, false, false, false, false};
  const int64_t multiprocessors = device_info(context.device).multiprocessors;
  const Shape shape{"NPC", {args.n, args.pixels, args.c}};
  const bool layer = args.norm == Norm::kLayer;
  with_element(args.x.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    p.lanes = team_lanes(args.c, kCount, kNormSlots);
    if (layer && (p.lanes == 0 || along_pixels(args.x, args.pixels))) {
      p.tiles = (args.pixels + kWarpSize - 1) / kWarpSize;
      p.blocks = args.n * p.tiles;
      p.transposed = (args.y.stride_c == 1 && args.y.stride_p != 1) || args.y.dtype != args.x.dtype;
      const int threads = column_threads(args.c, kColumnSlots);
      const auto parameters = [&](bool all) {
        return 2 * int64_t(sizeof(T)) * staged_width(p.c, threads / kWarpSize * kColumnSlots, all);
      };
      p.staged = parameters(true) <= kMostStaged;
      const int64_t floats = 3 * threads + (p.transposed ? kWarpSize * group_pitch(threads / kWarpSize) : 0);
      const int64_t shared = floats * int64_t(sizeof(float)) + parameters(p.staged);
      const int64_t blocks = min(p.blocks, multiprocessors * (2048 / threads));
      launch(context, {"layernorm_columns_kernel", blocks, threads, shared, shape},
             layernorm_columns_kernel<T>, p);
      return;
    }
    require_row(p.lanes);
    p.packed_x = is_packed(args.x, args.c, kCount);
    p.packed_y = is_packed(args.y, args.c, kCount);
    const int threads = row_threads(p.rows, p.lanes, multiprocessors);
    const int64_t teams = threads / p.lanes;
    p.blocks = (p.rows + teams - 1) / teams;
    // As many blocks as fill the GPU, which loop over the pixels, so that parameters are loaded once a block.
    const int64_t blocks = min(p.blocks, multiprocessors * (2048 / threads));
    const int64_t shared = 2 * slots_width<T>(p.lanes, kNormSlots) * int64_t(sizeof(T)) +
                           (p.lanes > kWarpSize ? 3 * (threads / kWarpSize) * int64_t(sizeof(float)) : 0);
    launch(context, {"layernorm_rows_kernel", blocks, threads, shared, shape},
           layer ? layernorm_rows_kernel<T, true> : layernorm_rows_kernel<T, false>, p);
  });
}

}  // namespace cnk::cuda
