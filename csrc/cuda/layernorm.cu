#include "cuda/layernorm.h"
#include "cuda/layernorm_rows.h"

namespace cnk::cuda {

constexpr int kNormSlots = 3;    // of 16 bytes, in the registers of a thread
constexpr int kColumnsEach = 4;  // channels of a warp, of each turn of layernorm_columns_kernel

struct LayerNormParams {
  LayerNormArgs a;
  int64_t rows, tiles;  // pixels in all; blocks of one sample
  int64_t blocks;
  int c, lanes;
  bool packed_x, packed_y;
  bool transposed;  // y has its channels next to each other
};

template <class T>
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
  // The next pixel is on its way while this one is worked on, the first one while the parameters come.
  Divided next_at = divide(row, p.a.pixels);
  Channels<T> next[kNormSlots];
  load_row(p.a.x, next_at, p.c, lane, p.lanes, p.packed_x, row < p.rows, next);
  stage(p.a.weight, 1.0f, p.c, width, weight);
  stage(p.a.bias, 0.0f, p.c, width, bias);
  __syncthreads();
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x, row += step) {
    Channels<T> x[kNormSlots];
#pragma unroll
    for (int k = 0; k < kNormSlots; ++k) x[k] = next[k];
    const Divided at = next_at;
    next_at = divide(row + step, p.a.pixels);
    load_row(p.a.x, next_at, p.c, lane, p.lanes, p.packed_x, row + step < p.rows, next);
    const Statistics s = row_statistics(x, p.c, p.a.eps, lane, p.lanes, shared);
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

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2) layernorm_columns_kernel(const LayerNormParams p) {
  CNK_SHARED(float, shared);
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int warps = int(blockDim.x) / kWarpSize, width = warps * kColumnsEach, pitch = width + 1;
  float* const tile = shared + 3 * blockDim.x;  // 32 pixels x `width` channels, to store along the channels
  const Rows& y = p.a.y;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Divided at = divide_blocks(block, p.tiles);
    const int64_t first_pixel = at.remainder * kWarpSize, pixel = first_pixel + lane;
    // Lanes past the end work on the last pixel and do not store.
    const T* x = static_cast<const T*>(p.a.x.data) + offset(p.a.x, {at.quotient, min(pixel, p.a.pixels - 1)});
    const Statistics s = column_statistics(x, p.a.x.stride_c, p.c, p.a.eps, shared);
    const int64_t q = pixel < p.a.pixels ? patch_row(p.a.patches, pixel) : -1;
    const int64_t base = offset(y, {at.quotient, q});
    for (int first = 0; first < p.c; first += width) {
      const int channel = first + warp * kColumnsEach;
#pragma unroll
      for (int i = 0; i < kColumnsEach; ++i) {
        const int c = channel + i;
        if (c >= p.c) break;
        const float w = rounded<T>(load(p.a.weight, c, 1.0f)), b = rounded<T>(load(p.a.bias, c, 0.0f));
        const float v = rounded<T>(fmaf(normalised(widen(x[c * p.a.x.stride_c]), s), w, b));
        if (p.transposed) {
          tile[lane * pitch + warp * kColumnsEach + i] = v;
        } else if (q >= 0) {
          store(v, y.data, y.dtype, base + c * y.stride_c);
        }
      }
      if (!p.transposed) continue;
      __syncthreads();
      for (int i = warp; i < kWarpSize && first_pixel + i < p.a.pixels; i += warps) {
        const int64_t row = patch_row(p.a.patches, first_pixel + i);
        if (row < 0) continue;
        const int64_t start = offset(y, {at.quotient, row});
        for (int j = lane; j < width && first + j < p.c; j += kWarpSize) {
          store(tile[i * pitch + j], y.data, y.dtype, start + (first + j) * y.stride_c);
        }
      }
      __syncthreads();
    }
  }
}

void layernorm(const Context& context, const LayerNormArgs& args) {
  LayerNormParams p{args, args.n * args.pixels, 0, 0, int(args.c), 0, false, false, false};
  const int64_t multiprocessors = device_info(context.device).multiprocessors;
  const Shape shape{"NPC", {args.n, args.pixels, args.c}};
  with_element(args.x.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    p.lanes = team_lanes(args.c, kCount, kNormSlots);
    if (p.lanes == 0 || along_pixels(args.x, args.pixels)) {
      p.tiles = (args.pixels + kWarpSize - 1) / kWarpSize;
      p.blocks = args.n * p.tiles;
      p.transposed = args.y.stride_c == 1 && args.y.stride_p != 1;
      const int threads = column_threads(p.blocks, multiprocessors, args.c);
      const int warps = threads / kWarpSize;
      const int shared = 3 * threads + (p.transposed ? kWarpSize * (warps * kColumnsEach + 1) : 0);
      launch(context, {"layernorm_columns_kernel", p.blocks, threads, shared * int64_t(sizeof(float)), shape},
             layernorm_columns_kernel<T>, p);
      return;
    }
    p.packed_x = is_packed(args.x, args.c, kCount);
    p.packed_y = is_packed(args.y, args.c, kCount);
    const int threads = row_threads(p.rows, p.lanes, multiprocessors);
    const int64_t teams = threads / p.lanes;
    p.blocks = (p.rows + teams - 1) / teams;
    // Blocks that fill the GPU loop over pixels, for the parameters are loaded once.
    const int64_t blocks = std::min(p.blocks, multiprocessors * (2048 / threads));
    const int64_t shared = 2 * slots_width<T>(p.lanes, kNormSlots) * int64_t(sizeof(T)) +
                           (p.lanes > kWarpSize ? 3 * (threads / kWarpSize) * int64_t(sizeof(float)) : 0);
    launch(context, {"layernorm_rows_kernel", blocks, threads, shared, shape}, layernorm_rows_kernel<T>, p);
  });
}

}  // namespace cnk::cuda
