#include "cuda/layernorm.h"
#include "cuda/layernorm_rows.h"

namespace cnk::cuda {

constexpr int kGradientSlots = 3;      // of 16 bytes, in the registers of a thread
constexpr int kGradientColumns = 4;    // channels of a warp, of each turn of the columns kernel
constexpr int64_t kSharedPixels = 16;  // that a part has at least: its sums then are few of the bytes

struct LayerNormBackwardParams {
  LayerNormBackwardArgs a;
  int64_t rows, tiles;  // pixels in all; blocks of one sample
  int64_t blocks;
  int c, lanes;
  bool packed_dy, packed_x, packed_dx;
};

// The block's sums of one of the parameters' gradients, from those that its threads hold, to `out`.
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
  const int across = max(lanes, kWarpSize);  // threads that share what is left
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

// A part: every parts-th block of pixels.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    layernorm_backward_rows_kernel(const LayerNormBackwardParams p) {
  constexpr int kCount = Channels<T>::kCount;
  CNK_SHARED(T, weight);
  const int width = slots_width<T>(p.lanes, kGradientSlots);
  const int lane = int(threadIdx.x) & (p.lanes - 1), warps = int(blockDim.x) / kWarpSize;
  float* const shared = reinterpret_cast<float*>(weight + width);  // five floats a warp
  float* const sums = shared + 5 * kNormThreads / kWarpSize;
  stage(p.a.weight, 1.0f, p.c, width, weight);
  __syncthreads();
  for (int64_t part = blockIdx.x; part < p.a.parts; part += gridDim.x) {
    float dweight[kGradientSlots][kCount] = {}, dbias[kGradientSlots][kCount] = {};
    for (int64_t block = part; block < p.blocks; block += p.a.parts) {
      // Computed anew in every turn: two registers that ptxas would spill.
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
      Statistics s = row_statistics(x, p.c, p.a.eps, lane, p.lanes, shared);
      // With eps = 0 these would be infinite for pixels that are not there, and 0 * inf reach the sums.
      if (!inside) s = {0.0f, 0.0f, 0.0f};
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
          along[0] = fmaf(g[i], w[i], along[0]);
          along[1] = fmaf(g[i] * w[i], xhat, along[1]);
        }
      }
      if (!p.a.dx.data) continue;
      team_sum(along, p.lanes, shared + 3 * warps);
      const float mean_g = along[0] / float(p.c), mean_g_xhat = along[1] / float(p.c);
#pragma unroll
      for (int k = 0; k < kGradientSlots; ++k) {
        const int first = first_channel<T>(lane, p.lanes, k);
        float v[kCount], g[kCount], w[kCount];
        widen(again(x[k]), v);
        widen(again(dy[k]), g);
        load(weight + first_channel<T>(lane, p.lanes, k), w);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          v[i] = s.rstd * (fmaf(g[i], w[i], -mean_g) - normalised(v[i], s) * mean_g_xhat);
        }
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

// Sums over the warp of 8 values: lane l < 8 has that of the value 4 (l % 2) + 2 (l / 2 % 2) + l / 4. Every
// step halves the values of a lane, so that 9 shuffles do what 40 would.
__device__ __forceinline__ float warp_sums(float (&values)[8]) {
  const int lane = int(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int half = 4, mask = 1; half > 0; half /= 2, mask *= 2) {
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

// A part: every parts-th tile of 32 pixels. Its sums stand in memory, each element of them one lane's to add
// to.
template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2)
    layernorm_backward_columns_kernel(const LayerNormBackwardParams p) {
  CNK_SHARED(float, shared);
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const int warps = int(blockDim.x) / kWarpSize;
  const Rows &dy = p.a.dy, &dx = p.a.dx;
  // Of the sums that this lane gets: 0 for dweight, 1 for dbias, and which of the channels.
  const int of_bias = lane % 2, of_channel = 2 * (lane / 2 % 2) + lane / 4;
  for (int64_t part = blockIdx.x; part < p.a.parts; part += gridDim.x) {
    if (part >= p.blocks && p.a.partials) {  // nothing to sum
      for (int c = int(threadIdx.x); c < 2 * p.c; c += int(blockDim.x))
        p.a.partials[part * 2 * p.c + c] = 0.0f;
    }
    for (int64_t block = part; block < p.blocks; block += p.a.parts) {
      const Divided at = divide_blocks(block, p.tiles);
      const int64_t pixel = at.remainder * kWarpSize + lane;
      const bool inside = pixel < p.a.pixels;
      // Lanes past the end work on the last pixel, with a gradient of 0, and do not store.
      const int64_t here = min(pixel, p.a.pixels - 1);
      const T* x = static_cast<const T*>(p.a.x.data) + offset(p.a.x, {at.quotient, here});
      const Statistics s = column_statistics(x, p.a.x.stride_c, p.c, p.a.eps, shared);
      const int64_t q = patch_row(p.a.patches, here);
      const bool held = inside && q >= 0;
      const int64_t dy_base = offset(dy, {at.quotient, q});
      float along[2] = {0.0f, 0.0f};
      for (int first = warp * kGradientColumns; first < p.c; first += warps * kGradientColumns) {
        float sums[2 * kGradientColumns];
#pragma unroll
        for (int i = 0; i < kGradientColumns; ++i) {
          const int c = first + i;
          const bool there = c < p.c;
          const float xhat = there ? normalised(widen(x[c * p.a.x.stride_c]), s) : 0.0f;
          const float g =
              there && held ? rounded<T>(load(dy.data, dy.dtype, dy_base + c * dy.stride_c)) : 0.0f;
          const float gw = there ? g * rounded<T>(load(p.a.weight, c, 1.0f)) : 0.0f;
          along[0] += gw;
          along[1] = fmaf(gw, xhat, along[1]);
          sums[i] = held ? g * xhat : 0.0f;
          sums[kGradientColumns + i] = g;
        }
        if (!p.a.partials) continue;
        const float sum = warp_sums(sums);
        if (lane < 2 * kGradientColumns && first + of_channel < p.c) {
          float* const out = p.a.partials + (part * 2 + of_bias) * p.c + first + of_channel;
          *out = block == part ? sum : *out + sum;
        }
      }
      if (!dx.data) continue;
      column_sum(along, shared + 3 * blockDim.x);
      const float mean_g = along[0] / float(p.c), mean_g_xhat = along[1] / float(p.c);
      T* to = static_cast<T*>(dx.data) + offset(dx, {at.quotient, here});
#pragma unroll 4
      for (int c = warp; c < p.c; c += warps) {
        const float xhat = normalised(widen(x[c * p.a.x.stride_c]), s);
        const float g = held ? rounded<T>(load(dy.data, dy.dtype, dy_base + c * dy.stride_c)) : 0.0f;
        const float w = rounded<T>(load(p.a.weight, c, 1.0f));
        if (inside) narrow(s.rstd * (fmaf(g, w, -mean_g) - xhat * mean_g_xhat), to[c * dx.stride_c]);
      }
    }
  }
}

int64_t layernorm_parts(int device, int64_t pixels) {
  return std::min<int64_t>(2 * device_info(device).multiprocessors,
                           (pixels + kSharedPixels - 1) / kSharedPixels);
}

void layernorm_backward(const Context& context, const LayerNormBackwardArgs& args) {
  LayerNormBackwardParams p{args, args.n * args.pixels, 0, 0, int(args.c), 0, false, false, false};
  const int64_t multiprocessors = device_info(context.device).multiprocessors;
  const Shape shape{"NPC", {args.n, args.pixels, args.c}};
  with_element(args.x.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    p.lanes = team_lanes(args.c, kCount, kGradientSlots);
    if (p.lanes == 0 || along_pixels(args.x, args.pixels)) {
      p.tiles = (args.pixels + kWarpSize - 1) / kWarpSize;
      p.blocks = args.n * p.tiles;
      const int threads = column_threads(p.blocks, multiprocessors, args.c);
      launch(context,
             {"layernorm_backward_columns_kernel", args.parts, threads, 5 * threads * int64_t(sizeof(float)),
              shape},
             layernorm_backward_columns_kernel<T>, p);
      return;
    }
    p.packed_dy = is_packed(args.dy, args.c, kCount);
    p.packed_x = is_packed(args.x, args.c, kCount);
    p.packed_dx = is_packed(args.dx, args.c, kCount);
    const int threads = row_threads(p.rows, p.lanes, multiprocessors);
    const int64_t teams = threads / p.lanes;
    p.blocks = (p.rows + teams - 1) / teams;
    const int64_t groups = threads / std::max(p.lanes, kWarpSize);
    const int64_t width = slots_width<T>(p.lanes, kGradientSlots);
    const int64_t sums = args.partials ? groups * width : 0;
    const int64_t shared =
        width * int64_t(sizeof(T)) + (5 * kNormThreads / kWarpSize + sums) * int64_t(sizeof(float));
    launch(context, {"layernorm_backward_rows_kernel", args.parts, threads, shared, shape},
           layernorm_backward_rows_kernel<T>, p);
  });
}

}  // namespace cnk::cuda
