#include "cuda/grn.h"
#include "cuda/launch.h"
#include "cuda/tiles.h"

namespace cnk::cuda {

constexpr int kGrnTurns = 4;  // of a tile (tiles.h)
constexpr int kGrnSums = 3;
constexpr int kResponseThreads = 512;

struct GrnSumsParams {
  GrnSumsArgs a;
  Tiling t;
  bool packed;
  bool along_pixels;
};

// Sums of one tile whose channels are neighbours in memory: over a thread's rows, then over the rows of a
// warp, then over the warps.
template <class T>
__device__ __forceinline__ void sum_rows(const GrnSumsParams& p, const TilePlace& at, float* shared) {
  constexpr int kCount = Channels<T>::kCount, kWidth = kTileChannels<T>;
  const int pack = int(threadIdx.x) % kTilePacks, row = int(threadIdx.x) / kTilePacks;
  const int warp = int(threadIdx.x) / kWarpSize, channel = at.channel + pack * kCount;
  float sums[kGrnSums][kCount] = {};
#pragma unroll
  for (int turn = 0; turn < kGrnTurns; ++turn) {
    const int64_t pixel = at.pixel + turn * kTilePixels + row;
    const int left = pixel < p.t.pixels ? p.t.c - channel : 0;
    float x[kCount];
    load_values(
        static_cast<const T*>(p.a.x.data) + offset(p.a.x, {at.sample, pixel}) + channel * p.a.x.stride_c,
        p.a.x.stride_c, left, p.packed, x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[0][i] = fmaf(x[i], x[i], sums[0][i]);
    if (!p.a.dy.data) continue;
    float dy[kCount];
    load_values(
        static_cast<const T*>(p.a.dy.data) + offset(p.a.dy, {at.sample, pixel}) + channel * p.a.dy.stride_c,
        p.a.dy.stride_c, left, p.packed, dy);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sums[1][i] = fmaf(dy[i], x[i], sums[1][i]);
      sums[2][i] += dy[i];
    }
  }
  const int count = p.a.dy.data ? kGrnSums : 1;
#pragma unroll
  for (int k = 0; k < kGrnSums; ++k) {
    if (k >= count) break;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int mask = kTilePacks; mask < kWarpSize; mask *= 2) {
        sums[k][i] += __shfl_xor_sync(kFullWarp, sums[k][i], mask);
      }
    }
    if (int(threadIdx.x) % kWarpSize < kTilePacks) {
      store_values(sums[k], shared + (k * kTileWarps + warp) * kWidth + pack * kCount, 1, kCount, true);
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < count * kWidth; i += kTileThreads) {
    const int k = i / kWidth, c = i - k * kWidth;
    if (at.channel + c >= p.t.c) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kTileWarps; ++w) sum += shared[(k * kTileWarps + w) * kWidth + c];
    float* const out = k == 0 ? p.a.squares : k == 1 ? p.a.dy_x : p.a.dy_sum;
    out[at.tile * p.t.c + at.channel + c] = sum;
  }
  __syncthreads();
}

// The same for pixels that are neighbours in memory: a warp sums a channel.
template <class T>
__device__ __forceinline__ void sum_columns(const GrnSumsParams& p, const TilePlace& at) {
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const T* x = static_cast<const T*>(p.a.x.data) + offset(p.a.x, {at.sample, at.pixel + lane});
  const T* dy = static_cast<const T*>(p.a.dy.data) + offset(p.a.dy, {at.sample, at.pixel + lane});
  const int64_t left = p.t.pixels - at.pixel - lane;
#pragma unroll 2
  for (int i = warp; i < min(kTileChannels<T>, p.t.c - at.channel); i += kTileWarps) {
    const int c = at.channel + i;
    float sums[kGrnSums] = {};
#pragma unroll
    for (int turn = 0; turn < kGrnTurns; ++turn) {
      if (turn * kTilePixels >= left) break;
      const float v = widen(x[turn * kTilePixels * p.a.x.stride_p + c * p.a.x.stride_c]);
      sums[0] = fmaf(v, v, sums[0]);
      if (!p.a.dy.data) continue;
      const float g = widen(dy[turn * kTilePixels * p.a.dy.stride_p + c * p.a.dy.stride_c]);
      sums[1] = fmaf(g, v, sums[1]);
      sums[2] += g;
    }
    const int64_t to = at.tile * p.t.c + c;
    const float squares = warp_sum(sums[0]);
    if (lane == 0) p.a.squares[to] = squares;
    if (!p.a.dy.data) continue;
    const float dy_x = warp_sum(sums[1]), dy_sum = warp_sum(sums[2]);
    if (lane == 0) {
      p.a.dy_x[to] = dy_x;
      p.a.dy_sum[to] = dy_sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 2) grn_sums_kernel(const GrnSumsParams p) {
  CNK_SHARED(float, shared);  // (sums, warps, channels of a tile)
  for (int64_t block = blockIdx.x; block < p.t.blocks; block += gridDim.x) {
    const TilePlace at = tile_place<T>(p.t, block);
    if (p.along_pixels) {
      sum_columns<T>(p, at);
    } else {
      sum_rows<T>(p, at, shared);
    }
  }
}

// Sums over the block, in every thread. `shared` has N floats
// for each warp and may be reused after the next barrier.
template <int N>
__device__ __forceinline__ void block_sum(float (&values)[N], float* shared) {
  const int warp = int(threadIdx.x) / kWarpSize, warps = int(blockDim.x) / kWarpSize;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % kWarpSize == 0) shared[i * warps + warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
    for (int w = 0; w < warps; ++w) values[i] += shared[i * warps + w];
  }
}

__device__ __forceinline__ float sum_tiles(const float* from, int64_t tiles, int64_t c) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t t = 0; t < tiles; ++t) sum += from[t * c];
  return sum;
}

// One block computes one sample. A thread keeps the values of its channels in the memory of the results until
// the sums over all channels are known.
__global__ void __launch_bounds__(kResponseThreads, 2) grn_response_kernel(const GrnResponseArgs p) {
  CNK_SHARED(float, shared);
  for (int64_t n = blockIdx.x; n < p.n; n += gridDim.x) {
    float* const scale = p.scale + n * p.c;
    float total[1] = {0.0f};
    for (int64_t c = threadIdx.x; c < p.c; c += blockDim.x) {
      scale[c] = sqrtf(sum_tiles(p.squares + n * p.tiles * p.c + c, p.tiles, p.c));
      total[0] += scale[c];
    }
    block_sum(total, shared);
    const float s = total[0] / float(p.c) + p.eps;
    for (int64_t c = threadIdx.x; c < p.c; c += blockDim.x) {
      scale[c] = fmaf(load(p.weight, c, 1.0f), scale[c] / s, 1.0f);
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kResponseThreads, 2)
    grn_response_backward_kernel(const GrnResponseBackwardArgs p) {
  CNK_SHARED(float, shared);
  for (int64_t n = blockIdx.x; n < p.n; n += gridDim.x) {
    float *const scale = p.scale + n * p.c, *const per_x = p.per_x + n * p.c;
    float *const dweight = p.parameters + n * 2 * p.c, *const dbias = dweight + p.c;
    const int64_t first = n * p.tiles * p.c;
    float totals[2] = {0.0f, 0.0f};  // of G and of q * G
    for (int64_t c = threadIdx.x; c < p.c; c += blockDim.x) {
      const float norm = sqrtf(sum_tiles(p.squares + first + c, p.tiles, p.c));
      const float dy_x = sum_tiles(p.dy_x + first + c, p.tiles, p.c);
      dbias[c] = sum_tiles(p.dy_sum + first + c, p.tiles, p.c);
      scale[c] = norm;
      dweight[c] = dy_x;
      totals[0] += norm;
      totals[1] = fmaf(load(p.weight, c, 1.0f) * dy_x, norm, totals[1]);
    }
    block_sum(totals, shared);
    const float s = totals[0] / float(p.c) + p.eps;
    const float shared_part = totals[1] / s / float(p.c);  // mean_c(q * G) / s
    for (int64_t c = threadIdx.x; c < p.c; c += blockDim.x) {
      const float norm = scale[c], dy_x = dweight[c], weight = load(p.weight, c, 1.0f);
      const float response = norm / s;
      per_x[c] = norm > 0.0f ? (weight * dy_x - shared_part) / s / norm : 0.0f;
      scale[c] = fmaf(weight, response, 1.0f);
      dweight[c] = dy_x * response;
    }
    __syncthreads();
  }
}

struct GrnApplyParams {
  GrnApplyArgs a;
  Tiling t;
  bool packed, packed_factors, packed_bias;
  bool along_pixels;
};

template <class T>
__device__ __forceinline__ void apply_rows(const GrnApplyParams& p, const TilePlace& at) {
  constexpr int kCount = Channels<T>::kCount;
  const int pack = int(threadIdx.x) % kTilePacks, row = int(threadIdx.x) / kTilePacks;
  const int channel = at.channel + pack * kCount;
  const int64_t factors = at.sample * p.t.c + channel;
  float scale[kCount], other[kCount];
  load_values(p.a.scale + factors, 1, p.t.c - channel, p.packed_factors, scale);
  if (p.a.b.data) {
    load_values(p.a.per_b + factors, 1, p.t.c - channel, p.packed_factors, other);
  } else {
    load_parameter(p.a.bias, channel, p.t.c - channel, p.packed_bias, 0.0f, other);
  }
  for (int turn = 0; turn < p.t.turns; ++turn) {
    const int64_t pixel = at.pixel + turn * kTilePixels + row;
    if (pixel >= p.t.pixels) break;
    const int left = p.t.c - channel;
    float v[kCount];
    load_values(
        static_cast<const T*>(p.a.a.data) + offset(p.a.a, {at.sample, pixel}) + channel * p.a.a.stride_c,
        p.a.a.stride_c, left, p.packed, v);
    if (p.a.b.data) {
      float b[kCount];
      load_values(
          static_cast<const T*>(p.a.b.data) + offset(p.a.b, {at.sample, pixel}) + channel * p.a.b.stride_c,
          p.a.b.stride_c, left, p.packed, b);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = fmaf(v[i], scale[i], b[i] * other[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = fmaf(v[i], scale[i], other[i]);
    }
    store_values(
        v, static_cast<T*>(p.a.out.data) + offset(p.a.out, {at.sample, pixel}) + channel * p.a.out.stride_c,
        p.a.out.stride_c, left, p.packed);
  }
}

template <class T>
__device__ __forceinline__ void apply_columns(const GrnApplyParams& p, const TilePlace& at) {
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const T* a = static_cast<const T*>(p.a.a.data);
  const T* b = static_cast<const T*>(p.a.b.data);
  T* out = static_cast<T*>(p.a.out.data);
  for (int turn = 0; turn < p.t.turns; ++turn) {
    const int64_t pixel = at.pixel + turn * kTilePixels + lane;
    if (pixel >= p.t.pixels) break;
    const int64_t a_base = offset(p.a.a, {at.sample, pixel}), b_base = offset(p.a.b, {at.sample, pixel});
    const int64_t out_base = offset(p.a.out, {at.sample, pixel});
#pragma unroll 4
    for (int i = warp; i < min(kTileChannels<T>, p.t.c - at.channel); i += kTileWarps) {
      const int c = at.channel + i;
      const int64_t factor = at.sample * p.t.c + c;
      const float other =
          b ? widen(b[b_base + c * p.a.b.stride_c]) * p.a.per_b[factor] : load(p.a.bias, c, 0.0f);
      narrow(fmaf(widen(a[a_base + c * p.a.a.stride_c]), p.a.scale[factor], other),
             out[out_base + c * p.a.out.stride_c]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 3) grn_apply_kernel(const GrnApplyParams p) {
  for (int64_t block = blockIdx.x; block < p.t.blocks; block += gridDim.x) {
    const TilePlace at = tile_place<T>(p.t, block);
    if (p.along_pixels) {
      apply_columns<T>(p, at);
    } else {
      apply_rows<T>(p, at);
    }
  }
}

int64_t grn_tiles(int64_t pixels) {
  constexpr int64_t kPixels = kGrnTurns * kTilePixels;
  return (pixels + kPixels - 1) / kPixels;
}

void grn_sums(const Context& context, const GrnSumsArgs& args) {
  with_element(args.x.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    GrnSumsParams p{args, tiling(args.n, args.pixels, args.c, kTileChannels<T>, kGrnTurns)};
    p.packed = is_packed(args.x, args.c, kCount) && (!args.dy.data || is_packed(args.dy, args.c, kCount));
    p.along_pixels = along_pixels(args.x, args.pixels);
    const int64_t sums = p.along_pixels ? 0 : args.dy.data ? kGrnSums : 1;
    launch(context,
           {"grn_sums_kernel",
            p.t.blocks,
            kTileThreads,
            sums * kTileWarps * kTileChannels<T> * int64_t(sizeof(float)),
            {"NPC", {args.n, args.pixels, args.c}}},
           grn_sums_kernel<T>, p);
  });
}

void grn_response(const Context& context, const GrnResponseArgs& args) {
  launch(context,
         {"grn_response_kernel",
          args.n,
          kResponseThreads,
          kResponseThreads / kWarpSize * int64_t(sizeof(float)),
          {"NTC", {args.n, args.tiles, args.c}}},
         grn_response_kernel, args);
}

void grn_response_backward(const Context& context, const GrnResponseBackwardArgs& args) {
  launch(context,
         {"grn_response_backward_kernel",
          args.n,
          kResponseThreads,
          2 * kResponseThreads / kWarpSize * int64_t(sizeof(float)),
          {"NTC", {args.n, args.tiles, args.c}}},
         grn_response_backward_kernel, args);
}

void grn_apply(const Context& context, const GrnApplyArgs& args) {
  with_element(args.a.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    GrnApplyParams p{args, pointwise_tiling<T>(context, args.n, args.pixels, args.c)};
    p.packed = is_packed(args.a, args.c, kCount) && is_packed(args.out, args.c, kCount) &&
               (!args.b.data || is_packed(args.b, args.c, kCount));
    p.packed_factors = args.c % kCount == 0 && is_packed(args.scale, DType::kFloat32, kCount) &&
                       is_packed(args.per_b, DType::kFloat32, kCount);
    p.packed_bias = is_packed(args.bias, args.c, kCount);
    p.along_pixels = along_pixels(args.a, args.pixels);
    launch(context, {"grn_apply_kernel", p.t.blocks, kTileThreads, 0, {"NPC", {args.n, args.pixels, args.c}}},
           grn_apply_kernel<T>, p);
  });
}

}  // namespace cnk::cuda
