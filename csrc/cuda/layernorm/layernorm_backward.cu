#include "cuda/layernorm/layernorm.h"
#include "cuda/layernorm/layernorm_columns.h"
#include "cuda/layernorm/layernorm_rows.h"

namespace cnk::cuda {

constexpr int kGradientSlots = 3;         // of 16 bytes, in the registers of a thread
constexpr int kGradientColumnSlots = 16;  // channels, likewise
constexpr int64_t kSharedPixels = 16;     // of a part, at least: its sums are then a small part of the bytes

struct LayerNormBackwardParams {
  LayerNormBackwardArgs a;
  int64_t rows, tiles;  // pixels in all; blocks of one sample
  int64_t blocks;
  int c, lanes;
  bool packed_dy, packed_x, packed_dx;
  bool staged;      // for columns: all of the weight is in shared memory
  bool transposed;  // dy's channels are neighbours in memory, or dy has another dtype
};

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), with
// the terms that are the same for all channels precomputed.
struct Gradient {
  float mean, rstd, per_d, shift;
};
template <bool kLayer>
__device__ __forceinline__ Gradient gradient(const Statistics& s, const float (&along)[2], int c, Norm norm) {
  if constexpr (!kLayer) {
    const float count = float(norm == Norm::kSimple ? c - 1 : c);
    return {s.centre, s.rstd, s.rstd * (s.rstd * (along[1] / count)), 0.0f};
  }
  const float mean_g = along[0] / float(c), scaled = s.rstd * (along[1] / float(c));
  return {s.mean, s.rstd, s.rstd * scaled, fmaf(s.shift, scaled, s.rstd * mean_g)};
}
__device__ __forceinline__ float input_gradient(float x, float g, const Gradient& t) {
  return fmaf(g, t.rstd, -fmaf(x - t.mean, t.per_d, t.shift));
}

// Writes the block's sums for the gradient of one parameter, from those of its threads, to `out`.
template <class T>
__device__ __forceinline__ void store_sums(float (&sums)[kGradientSlots][Channels<T>::kCount], int c,
                                           int lane, int lanes, float* shared, float* out) {
  constexpr int kCount = Channels<T>::kCount;
#pragma unroll
  for (int k = 0; k < kGradientSlots; ++k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
        if (mask >= lanes) sums[k][i] += __shfl_xor_sync(kFullWarp, sums[k][i], mask);
      }
    }
  }
  const int across = max(lanes, kWarpSize);  // threads that share the rest
  const int groups = int(blockDim.x) / across, group = int(threadIdx.x) / across;
  const int width = lanes * kGradientSlots * kCount;
  if (int(threadIdx.x) % across < lanes) {
#pragma unroll
    for (int k = 0; k < kGradientSlots; ++k) {
      store_values(sums[k], shared + group * width + first_channel<T>(lane, lanes, k), 1, kCount, true);
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < c; i += int(blockDim.x)) {
    float sum = 0.0f;
    for (int g = 0; g < groups; ++g) sum += shared[g * width + i];
    out[i] = sum;
  }
  __syncthreads();
}

// One part: every parts-th block of pixels.
template <class T, bool kLayer>
__global__ void __launch_bounds__(kNormThreads, 2)
    layernorm_backward_rows_kernel(const LayerNormBackwardParams p) {
  constexpr int kCount = Channels<T>::kCount;
  CNK_SHARED(T, weight);
  const int width = slots_width<T>(p.lanes, kGradientSlots);
  const int lane = int(threadIdx.x) & (p.lanes - 1), warps = int(blockDim.x) / kWarpSize;
  float* const shared = reinterpret_cast<float*>(weight + width);  // five floats a warp
  float* const sums = shared + 5 * kNormThreads / kWarpSize;
  stage(p.a.weight, 1.0f, 0, p.c, width, weight);
  __syncthreads();
  for (int64_t part = blockIdx.x; part < p.a.parts; part += gridDim.x) {
    float dweight[kGradientSlots][kCount] = {}, dbias[kGradientSlots][kCount] = {};
    for (int64_t block = part; block < p.blocks; block += p.a.parts) {
      // Computed anew in every iteration: otherwise ptxas spills two registers.
      const int64_t row = block * (int(blockDim.x) / p.lanes) + int(threadIdx.x) / p.lanes;
      const bool inside = row < p.rows;
      const Divided at = divide(row, p.a.pixels);
      const int64_t q = patch_row(p.a.patches, at.remainder);  // pixels in no patch have no gradient
      Channels<T> x[kGradientSlots], dy[kGradientSlots];
      load_row(p.a.x, at, p.c, lane, p.lanes, p.packed_x, inside, x);
      const int64_t dy_base = offset(p.a.dy, {at.quotient, q}), dx_base = offset(p.a.dx, at);
#pragma unroll
      for (int k = 0; k < kGradientSlots; ++k) {
        const int first = first_channel<T>(lane, p.lanes, k);
        dy[k] = load_channels<T>(p.a.dy.data, p.a.dy.dtype, dy_base + first * p.a.dy.stride_c,
                                 p.a.dy.stride_c, inside && q >= 0 ? p.c - first : 0, p.packed_dy);
      }
      Statistics s = row_statistics<kLayer>(x, p.c, p.a.eps, p.a.norm, lane, p.lanes, shared);
      // With eps = 0 these would be infinite for pixels that do not exist, and the sums would get 0 * inf.
      if (!inside) s = {0.0f, 0.0f, 0.0f, 0.0f};
      float along[2] = {0.0f, 0.0f};  // sums of g and of g * xhat
#pragma unroll
      for (int k = 0; k < kGradientSlots; ++k) {
        float v[kCount], g[kCount], w[kCount];
        widen(again(x[k]), v);
        widen(dy[k], g);
        load(weight + first_channel<T>(lane, p.lanes, k), w);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float xhat = normalised(v[i], s);
          dweight[k][i] = fmaf(g[i], xhat, dweight[k][i]);
          dbias[k][i] += g[i];
          const float gw = g[i] * w[i];
          along[0] += gw;
          along[1] = fmaf(gw, xhat, along[1]);
        }
      }
      if (!p.a.dx.data) continue;
      team_sum(along, p.lanes, shared + 3 * warps);
      const Gradient t = gradient<kLayer>(s, along, p.c, p.a.norm);
#pragma unroll
      for (int k = 0; k < kGradientSlots; ++k) {
        const int first = first_channel<T>(lane, p.lanes, k);
        float v[kCount], g[kCount], w[kCount];
        widen(again(x[k]), v);
        widen(again(dy[k]), g);
        load(weight + first, w);
#pragma unroll
        for (int i = 0; i < kCount; ++i) v[i] = input_gradient(v[i], g[i] * w[i], t);
        store_values(v, static_cast<T*>(p.a.dx.data) + dx_base + first * p.a.dx.stride_c, p.a.dx.stride_c,
                     inside ? p.c - first : 0, p.packed_dx);
      }
    }
    if (p.a.partials) {
      float* const out = p.a.partials + part * 2 * p.c;
      store_sums<T>(dweight, p.c, lane, p.lanes, sums, out);
      store_sums<T>(dbias, p.c, lane, p.lanes, sums, out + p.c);
    }
  }
}

// Sums over the warp of 8 values: lane l < 8 gets that of value 4 (l % 2) + 2 (l / 2 % 2) + l / 4. Every step
// halves the number of values of a lane, so 9 shuffles are enough instead of 40.
__device__ __forceinline__ float warp_sums(float (&values)[2 * kGroup]) {
  const int lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int half = kGroup, mask = 1; half > 0; half /= 2, mask *= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i];
      const float given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kFullWarp, given, mask);
    }
  }
  float sum = values[0];
  sum += __shfl_xor_sync(kFullWarp, sum, 8);
  return sum + __shfl_xor_sync(kFullWarp, sum, 16);
}

// Loads dy as load_column() loads x, rounded to T: row q of the sample, or zeros if q < 0.
template <class T>
__device__ __forceinline__ void load_gradient(const LayerNormBackwardParams& p, int64_t sample,
                                              int64_t first_pixel, int64_t q, int base, float* tile,
                                              float (&to)[kGradientColumnSlots]) {
  const Rows& dy = p.a.dy;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize, warps = block_warps();
  if (!p.transposed) {
    const int64_t at = offset(dy, {sample, q});
    load_column(static_cast<const T*>(dy.data) + at, dy.stride_c, base + warp, q >= 0 ? p.c : 0, to);
    return;
  }
  const int pitch = group_pitch(warps);
#pragma unroll 1
  for (int k = 0; k < kGradientColumnSlots; k += kGroup) {
    const int first = base + k * warps, channels = min(kGroup * warps, p.c - first);
    for (int i = warp; i < kWarpSize; i += warps) {
      const int64_t pixel = first_pixel + i, row = pixel < p.a.pixels ? patch_row(p.a.patches, pixel) : -1;
      const int64_t from = offset(dy, {sample, row}) + first * dy.stride_c;
#pragma unroll 1
      for (int j = lane; j < channels; j += kWarpSize) {
        tile[i * pitch + j] = row >= 0 ? rounded<T>(load(dy.data, dy.dtype, from + j * dy.stride_c)) : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll
    for (int slot = 0; slot < kGradientColumnSlots;
         slot += kGroup) {  // registers need numbers that the compiler knows; it does not know k
      if (slot != k) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        to[slot + j] = j * warps + warp < channels ? tile[lane * pitch + j * warps + warp] : 0.0f;
      }
    }
    __syncthreads();
  }
}

// One part: every parts-th tile of 32 pixels. Its sums are
// in global memory; only one lane adds to each element.
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 1)
    layernorm_backward_columns_kernel(const LayerNormBackwardParams p) {
  CNK_SHARED(float, shared);  // five for each thread
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int warps = block_warps(), span = warps * kGradientColumnSlots;
  float* const tile = shared + 5 * blockDim.x;
  T* const weight = reinterpret_cast<T*>(tile + (p.transposed ? kWarpSize * group_pitch(warps) : 0));
  const auto stage_from = [&](int first) {
    __syncthreads();  // all threads have finished the span before
    stage(p.a.weight, 1.0f, first, p.c, staged_width(p.c, span, p.staged), weight);
    __syncthreads();
  };
  if (p.staged) stage_from(0);
  const Rows& dx = p.a.dx;
  // Which sums this lane gets: 0 for dweight, 1 for dbias; and of which channel of the group.
  const int of_bias = lane % 2, of_group = 2 * (lane / 2 % 2) + lane / 4;
  for (int64_t part = blockIdx.x; part < p.a.parts; part += gridDim.x) {
    float* const partials = p.a.partials ? p.a.partials + part * 2 * p.c : nullptr;
    if (part >= p.blocks && partials) {  // nothing to sum
      for (int c = int(threadIdx.x); c < 2 * p.c; c += int(blockDim.x)) partials[c] = 0.0f;
    }
    for (int64_t block = part; block < p.blocks; block += p.a.parts) {
      const Divided at = divide(block, p.tiles);
      const int64_t first_pixel = at.remainder * kWarpSize, pixel = first_pixel + lane;
      const bool inside = pixel < p.a.pixels;
      // Lanes past the end compute the last pixel, with a gradient of 0, and do not store it.
      const int64_t here = min(pixel, p.a.pixels - 1);
      const T* x = static_cast<const T*>(p.a.x.data) + offset(p.a.x, {at.quotient, here});
      float v[kGradientColumnSlots], g[kGradientColumnSlots];
      const Statistics s = column_statistics(x, p.a.x.stride_c, p.c, p.a.eps, v, shared);
      const int64_t q = inside ? patch_row(p.a.patches, pixel) : -1;
      float along[2] = {0.0f, 0.0f};  // sums of g and of g * xhat
      for (int base = 0; base < p.c; base += span) {
        if (span < p.c) load_column(x, p.a.x.stride_c, base + warp, p.c, v);
        load_gradient<T>(p, at.quotient, first_pixel, q, base, tile, g);
        float w[kGradientColumnSlots];
        if (!p.staged) stage_from(base);
        load_parameter(weight, (p.staged ? base : 0) + warp, w);
#pragma unroll
        for (int k = 0; k < kGradientColumnSlots; k += kGroup) {
          float sums[2 * kGroup];
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            // With eps = 0 and no deviation xhat may be infinite, and 0 * inf is not 0.
            const bool there = q >= 0 && base + (k + j) * warps + warp < p.c;
            const float xhat = there ? normalised(v[k + j], s) : 0.0f;
            const float gw = g[k + j] * w[k + j];
            along[0] += gw;
            along[1] = fmaf(gw, xhat, along[1]);
            sums[j] = g[k + j] * xhat;
            sums[kGroup + j] = g[k + j];
          }
          if (!partials || base + k * warps >= p.c) continue;
          const float sum = warp_sums(sums);
          const int c = base + (k + of_group) * warps + warp;
          if (lane < 2 * kGroup && c < p.c) {
            float* const out = partials + of_bias * p.c + c;
            *out = block == part ? sum : *out + sum;
          }
        }
      }
      if (!dx.data) continue;
      column_sum(along, shared + 3 * blockDim.x);
      const Gradient t = gradient<true>(s, along, p.c, Norm::kLayer);
      T* to = static_cast<T*>(dx.data) + offset(dx, {at.quotient, here});
      for (int base = 0; base < p.c; base += span) {
        if (span < p.c) {
          load_column(x, p.a.x.stride_c, base + warp, p.c, v);
          load_gradient<T>(p, at.quotient, first_pixel, q, base, tile, g);
        }
        float w[kGradientColumnSlots];
        if (!p.staged) stage_from(base);
        load_parameter(weight, (p.staged ? base : 0) + warp, w);
#pragma unroll
        for (int k = 0; k < kGradientColumnSlots; ++k) g[k] = input_gradient(v[k], g[k] * w[k], t);
        if (inside) store_column(g, to, dx.stride_c, base + warp, p.c);
      }
    }
  }
}

int64_t layernorm_parts(int device, int64_t pixels) {
  return min(int64_t(2 * device_info(device).multiprocessors), (pixels + kSharedPixels - 1) / kSharedPixels);
}

void layernorm_backward(const Context& context, const LayerNormBackwardArgs& args) {
  LayerNormBackwardParams p{args, args.n * args.pixels, 0, 0, int(args.c), 0, false, false, false, false,
                            false};
  const int64_t multiprocessors = device_info(context.device).multiprocessors;
  const Shape shape{"NPC", {args.n, args.pixels, args.c}};
  const bool layer = args.norm == Norm::kLayer;
  with_element(args.x.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    p.lanes = team_lanes(args.c, kCount, kGradientSlots);
    if (layer && (p.lanes == 0 || along_pixels(args.x, args.pixels))) {
      p.tiles = (args.pixels + kWarpSize - 1) / kWarpSize;
      p.blocks = args.n * p.tiles;
      if (!args.partials) p.a.parts = p.blocks;
      p.transposed = (args.dy.stride_c == 1 && args.dy.stride_p != 1) || args.dy.dtype != args.x.dtype;
      const int threads = column_threads(args.c, kGradientColumnSlots);
      const auto parameters = [&](bool all) {
        return int64_t(sizeof(T)) * staged_width(p.c, threads / kWarpSize * kGradientColumnSlots, all);
      };
      p.staged = parameters(true) <= kMostStaged;
      const int64_t floats = 5 * threads + (p.transposed ? kWarpSize * group_pitch(threads / kWarpSize) : 0);
      const int64_t shared = floats * int64_t(sizeof(float)) + parameters(p.staged);
      launch(context, {"layernorm_backward_columns_kernel", p.a.parts, threads, shared, shape},
             layernorm_backward_columns_kernel<T>, p);
      return;
    }
    require_row(p.lanes);
    p.packed_dy = is_packed(args.dy, args.c, kCount);
    p.packed_x = is_packed(args.x, args.c, kCount);
    p.packed_dx = is_packed(args.dx, args.c, kCount);
    const int threads = row_threads(p.rows, p.lanes, args.partials ? args.parts : multiprocessors);
    const int64_t teams = threads / p.lanes;
    p.blocks = (p.rows + teams - 1) / teams;
    if (!args.partials) p.a.parts = min(p.blocks, 2 * multiprocessors * (kNormThreads / threads));
    const int64_t groups = threads / max(p.lanes, kWarpSize);
    const int64_t width = slots_width<T>(p.lanes, kGradientSlots);
    const int64_t sums = args.partials ? groups * width : 0;
    const int64_t shared =
        width * int64_t(sizeof(T)) + (5 * kNormThreads / kWarpSize + sums) * int64_t(sizeof(float));
    launch(context, {"layernorm_backward_rows_kernel", p.a.parts, threads, shared, shape},
           layer ? layernorm_backward_rows_kernel<T, true> : layernorm_backward_rows_kernel<T, false>, p);
  });
}

}  // namespace cnk::cuda
