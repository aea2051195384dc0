#include "cuda/activations.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/mlp/mlp_pointwise.h"
#include "cuda/tiles.h"

namespace cnk::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int kPackBytes = 16;

template <class T>
constexpr int64_t kPerBlock = kThreads * kPackBytes / int64_t(sizeof(T));

template <class T>
int64_t elementwise_blocks(int64_t count) {
  return (count + kPerBlock<T> - 1) / kPerBlock<T>;
}
}  // namespace

struct ActivationParams {
  const void* u;
  void* h;
  int64_t count, blocks;
  Activation activation;
};

// A thread computes 16 bytes, the last one the rest. The activations beside GELU share one instance.
template <class T, bool kGelu>
__global__ void __launch_bounds__(kThreads) activation_kernel(const ActivationParams p) {
  constexpr int kPack = kPackBytes / int(sizeof(T));
  const T* u = static_cast<const T*>(p.u);
  T* h = static_cast<T*>(p.h);
  const auto run = [&](auto function) {
    using F = decltype(function);
    for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
      const int64_t first = (block * kThreads + threadIdx.x) * kPack;
      if (first + kPack <= p.count) {
        float value[kPack];
        load(u + first, value);
#pragma unroll
        for (float& v : value) v = F::value(v);
        store(value, h + first);
      } else {
        for (int64_t i = first; i < p.count; ++i) narrow(F::value(widen(u[i])), h[i]);
      }
    }
  };
  if constexpr (kGelu) {
    run(Gelu{});
  } else {
    with_activation(p.activation, run);
  }
}

struct ActivationBackwardParams {
  const void *dh, *u;
  void* du;
  int64_t count, blocks;
  Activation activation;
};

template <class T, bool kGelu>
__global__ void __launch_bounds__(kThreads) activation_backward_kernel(const ActivationBackwardParams p) {
  constexpr int kPack = kPackBytes / int(sizeof(T));
  const T* dh = static_cast<const T*>(p.dh);
  const T* u = static_cast<const T*>(p.u);
  T* du = static_cast<T*>(p.du);
  const auto run = [&](auto function) {
    using F = decltype(function);
    for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
      const int64_t first = (block * kThreads + threadIdx.x) * kPack;
      if (first + kPack <= p.count) {
        float gradient[kPack], value[kPack];
        load(dh + first, gradient);
        load(u + first, value);
#pragma unroll
        for (int i = 0; i < kPack; ++i) gradient[i] *= F::derivative(value[i]);
        store(gradient, du + first);
      } else {
        for (int64_t i = first; i < p.count; ++i) narrow(widen(dh[i]) * F::derivative(widen(u[i])), du[i]);
      }
    }
  };
  if constexpr (kGelu) {
    run(Gelu{});
  } else {
    with_activation(p.activation, run);
  }
}

struct MlpOutputParams {
  MlpOutputArgs a;
  Tiling t;
  bool packed_z, packed_parameters, packed_residual, packed_out;
  bool transposed;  // out's pixels are neighbours in memory: z passes through shared memory
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, 3) mlp_output_kernel(const MlpOutputParams p) {
  constexpr int kCount = Channels<T>::kCount, kWidth = kTileChannels<T>, kPitch = kWidth + 1;
  CNK_SHARED(float, tile);  // 32 pixels x kPitch
  const int pack = int(threadIdx.x) % kTilePacks, row = int(threadIdx.x) / kTilePacks;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const Rows &residual = p.a.residual, &out = p.a.out;
  for (int64_t block = blockIdx.x; block < p.t.blocks; block += gridDim.x) {
    const TilePlace at = tile_place<T>(p.t, block);
    const int channel = at.channel + pack * kCount;
    float bias[kCount], factor[kCount];
    load_parameter(p.a.bias, channel, p.t.c - channel, p.packed_parameters, 0.0f, bias);
    load_parameter(p.a.gamma, channel, p.t.c - channel, p.packed_parameters, 1.0f, factor);
    const float s = load(p.a.drop_scale, at.sample, 1.0f);
    for (int turn = 0; turn < p.t.turns && at.pixel + turn * kTilePixels < p.t.pixels; ++turn) {
      const int64_t first_pixel = at.pixel + turn * kTilePixels, pixel = first_pixel + row;
      const int left = pixel < p.t.pixels ? p.t.c - channel : 0;
      const T* z = static_cast<const T*>(p.a.z) + (at.sample * p.t.pixels + pixel) * p.t.c + channel;
      float v[kCount];
      load_values(z, 1, left, p.packed_z, v);
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = (v[i] + bias[i]) * factor[i] * s;
      if (!p.transposed) {
        if (residual.data) {
          float r[kCount];
          load_values(residual.data, residual.dtype,
                      offset(residual, {at.sample, pixel}) + channel * residual.stride_c, residual.stride_c,
                      left, p.packed_residual, r);
#pragma unroll
          for (int i = 0; i < kCount; ++i) v[i] += r[i];
        }
        store_values(v, out.data, out.dtype, offset(out, {at.sample, pixel}) + channel * out.stride_c,
                     out.stride_c, left, p.packed_out);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) tile[row * kPitch + pack * kCount + i] = v[i];
      __syncthreads();
      const int64_t here = first_pixel + lane;
      const int64_t residual_base = offset(residual, {at.sample, here});
      const int64_t out_base = offset(out, {at.sample, here});
      if (here < p.t.pixels) {
#pragma unroll 4
        for (int i = warp; i < min(kWidth, p.t.c - at.channel); i += kTileWarps) {
          const int c = at.channel + i;
          float value = tile[lane * kPitch + i];
          if (residual.data)
            value += load(residual.data, residual.dtype, residual_base + c * residual.stride_c);
          store(value, out.data, out.dtype, out_base + c * out.stride_c);
        }
      }
      __syncthreads();
    }
  }
}

struct ScaledGradientParams {
  ScaledGradientArgs a;
  Tiling t;
  bool packed_dout, packed_parameters, packed_results;
  bool transposed;  // dout's pixels are neighbours in memory: it passes through shared memory
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, 3) scaled_gradient_kernel(const ScaledGradientParams p) {
  constexpr int kCount = Channels<T>::kCount, kWidth = kTileChannels<T>, kPitch = kWidth + 1;
  CNK_SHARED(float, tile);  // 32 pixels x kPitch
  const int pack = int(threadIdx.x) % kTilePacks, row = int(threadIdx.x) / kTilePacks;
  const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) / kWarpSize;
  const Rows& dout = p.a.dout;
  for (int64_t block = blockIdx.x; block < p.t.blocks; block += gridDim.x) {
    const TilePlace at = tile_place<T>(p.t, block);
    const int channel = at.channel + pack * kCount;
    float gamma[kCount];
    load_parameter(p.a.gamma, channel, p.t.c - channel, p.packed_parameters, 1.0f, gamma);
    const float s = load(p.a.drop_scale, at.sample, 1.0f);
    for (int turn = 0; turn < p.t.turns && at.pixel + turn * kTilePixels < p.t.pixels; ++turn) {
      const int64_t first_pixel = at.pixel + turn * kTilePixels, pixel = first_pixel + row;
      const int left = pixel < p.t.pixels ? p.t.c - channel : 0;
      float d[kCount];
      if (p.transposed) {
        // Lanes past the end load the last pixel, which no thread stores.
        const int64_t base = offset(dout, {at.sample, min(first_pixel + lane, p.t.pixels - 1)});
#pragma unroll 4
        for (int i = warp; i < kWidth; i += kTileWarps) {
          const int c = min(at.channel + i, p.t.c - 1);
          tile[lane * kPitch + i] = load(dout.data, dout.dtype, base + c * dout.stride_c);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kCount; ++i) d[i] = tile[row * kPitch + pack * kCount + i];
        __syncthreads();
      } else {
        load_values(dout.data, dout.dtype, offset(dout, {at.sample, pixel}) + channel * dout.stride_c,
                    dout.stride_c, left, p.packed_dout, d);
      }
      const int64_t to = (at.sample * p.t.pixels + pixel) * p.t.c + channel;
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] *= s;
      store_values(d, static_cast<T*>(p.a.d) + to, 1, left, p.packed_results);
      if (!p.a.dz) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] *= gamma[i];
      store_values(d, static_cast<T*>(p.a.dz) + to, 1, left, p.packed_results);
    }
  }
}

namespace {
template <class T>
int64_t tile_bytes(bool transposed) {
  return transposed ? kTilePixels * (kTileChannels<T> + 1) * int64_t(sizeof(float)) : 0;
}
}  // namespace

void activate(const Context& context, const ActivationArgs& args) {
  with_element(args.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    const int64_t blocks = elementwise_blocks<T>(args.count);
    const bool gelu = args.activation == Activation::kGelu;
    launch(context, {"activation_kernel", blocks, kThreads, 0, {"n", {args.count}}},
           gelu ? activation_kernel<T, true> : activation_kernel<T, false>,
           ActivationParams{args.u, args.h, args.count, blocks, args.activation});
  });
}

void activate_backward(const Context& context, const ActivationBackwardArgs& args) {
  with_element(args.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    const int64_t blocks = elementwise_blocks<T>(args.count);
    const bool gelu = args.activation == Activation::kGelu;
    launch(context, {"activation_backward_kernel", blocks, kThreads, 0, {"n", {args.count}}},
           gelu ? activation_backward_kernel<T, true> : activation_backward_kernel<T, false>,
           ActivationBackwardParams{args.dh, args.u, args.du, args.count, blocks, args.activation});
  });
}

void mlp_output(const Context& context, const MlpOutputArgs& args) {
  with_element(args.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    MlpOutputParams p{args, pointwise_tiling<T>(context, args.n, args.pixels, args.c)};
    p.packed_z = args.c % kCount == 0 && is_packed(args.z, args.dtype, kCount);
    p.packed_parameters = is_packed(args.bias, args.c, kCount) && is_packed(args.gamma, args.c, kCount);
    p.packed_residual = is_packed(args.residual, args.c, kCount);
    p.packed_out = is_packed(args.out, args.c, kCount);
    p.transposed = along_pixels(args.out, args.pixels);
    launch(context,
           {"mlp_output_kernel",
            p.t.blocks,
            kTileThreads,
            tile_bytes<T>(p.transposed),
            {"NPC", {args.n, args.pixels, args.c}}},
           mlp_output_kernel<T>, p);
  });
}

void scaled_gradient(const Context& context, const ScaledGradientArgs& args) {
  with_element(args.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    constexpr int kCount = Channels<T>::kCount;
    ScaledGradientParams p{args, pointwise_tiling<T>(context, args.n, args.pixels, args.c)};
    p.packed_dout = is_packed(args.dout, args.c, kCount);
    p.packed_parameters = is_packed(args.gamma, args.c, kCount);
    p.packed_results = args.c % kCount == 0 && is_packed(args.d, args.dtype, kCount) &&
                       is_packed(args.dz, args.dtype, kCount);
    p.transposed = along_pixels(args.dout, args.pixels);
    launch(context,
           {"scaled_gradient_kernel",
            p.t.blocks,
            kTileThreads,
            tile_bytes<T>(p.transposed),
            {"NPC", {args.n, args.pixels, args.c}}},
           scaled_gradient_kernel<T>, p);
  });
}

}  // namespace cnk::cuda
