// A warp owns 16 or 32 pixels and all their channels; the tile size decides how many warps a block has.
// z = LN(x) stays in registers as operand of the first product, the output as sums of the second. The block
// loops over the hidden in chunks of 32, as attention loops over its keys:
//   u = z W1[chunk]^T,  h = GELU(u + b1),  acc += h W2[:, chunk]^T
// Weights pass through shared memory; those of the next chunk are copied while this chunk is multiplied.
//
// The order in which a product adds its columns, and that of its results, is free. It is chosen so that lane
// 4g + t owns 8 neighbours, 8t..8t + 7, of every 32 channels or hidden units of pixels g, g + 8.... In global
// and in shared memory that is one access of 16 bytes, eight lanes cover 128 bytes (no bank conflicts), and
// the results of a product are in the lanes in which the next product needs them. Of these 8, elements 4s..4s
// + 3 are the lane's columns of k-step s, and 2q, 2q + 1 its columns of the q-th product of 8 columns, whose
// row of weights is 8 (g / 2) + 2q + g % 2.
#include "cuda/gelu.h"
#include "cuda/launch.h"
#include "cuda/mlp/mlp_fused.h"
#include "cuda/mlp/mlp_fused_rows.h"
#include "cuda/mma.h"

namespace cnk::cuda {

constexpr int kChunk = 32;  // hidden units

template <int kC>
struct FusedShared {  // before the weights
  MlpVectors<kC> vectors;
  MlpChunk<kChunk> chunk;
};

// Weights of a chunk: W1 (32, kC) with rows an odd number of 64 bytes apart, W2 (kC, 32).
template <int kC>
constexpr int kW1Pitch = kC % 64 ? kC : kC + 32;
template <int kC>
constexpr int kChunkElements = kChunk * kW1Pitch<kC> + kC * kChunk;

// Row of the weights that lane `lane` reads for the product of columns 2q, 2q + 1.
__device__ __forceinline__ int weight_row(int lane, int q) { return lane / 8 * 8 + lane / 4 % 2 + 2 * q; }

// Start copying the weights of hidden units from `first` on.
template <class T, int kC>
__device__ __forceinline__ void copy_weights(const MlpFusedParams& p, int first, T* to) {
  const int channels = p.a.c, left = p.a.hidden - first;
  const T* w1 = static_cast<const T*>(p.a.w1) + int64_t(first) * channels;
  const T* w2 = static_cast<const T*>(p.a.w2) + first;
  copy_matrix<kChunk, kC, kW1Pitch<kC>>(w1, channels, left, channels, p.vector_weights, to);
  copy_matrix<kC, kChunk, kChunk>(w2, p.a.hidden, channels, left, p.vector_weights,
                                  to + kChunk * kW1Pitch<kC>);
}

// The number of products of 8 columns that have their weights (and, in the first product, their sums) in
// registers at once; more spill. After each such group the loop may end at the last channel: this branch also
// keeps the compiler from loading the weights of more products.
template <int kC>
constexpr int kTogether = kC == 128 ? 2 : 4;

// u = z W1^T + b1 for kQ products of 8 columns from the chunk's q0-th on.
template <class T, int kC, int kM, int kQ>
__device__ __forceinline__ void expand(const uint32_t (&z)[kM][kC / 16][4], const T* w1, const float* bias,
                                       int q0, int channels, float (&u)[kM][kQ][4]) {
  const int lane = thread_of_block() % kWarpSize, t8 = lane % 4 * 8;
  float b[2 * kQ];
  load(bias + t8 + 2 * q0, b);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) u[m][q][i] = b[2 * q + i % 2];
    }
  }
  const T* row = w1 + weight_row(lane, q0) * kW1Pitch<kC> + t8;
#pragma unroll
  for (int j = 0; j < kC / kPiece; ++j) {
    if (j * kPiece >= channels) break;
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      const uint4 w = *reinterpret_cast<const uint4*>(row + 2 * q * kW1Pitch<kC> + j * kPiece);
#pragma unroll
      for (int m = 0; m < kM; ++m) mma<T>(z[m][2 * j], w.x, w.y, u[m][q]);
#pragma unroll
      for (int m = 0; m < kM; ++m) mma<T>(z[m][2 * j + 1], w.z, w.w, u[m][q]);
    }
  }
}

// acc += h W2[:, chunk]^T, for `groups` groups of columns.
template <class T, int kC, int kM>
__device__ __forceinline__ void project(const uint32_t (&h)[kM][2][4], const T* w2, int groups,
                                        float (&acc)[kM][kC / 8][4]) {
  const int lane = thread_of_block() % kWarpSize;
  const T* row = w2 + weight_row(lane, 0) * kChunk + lane % 4 * 8;
#pragma unroll
  for (int first = 0; first < kC / 8; first += kTogether<kC>) {
    if (first / kTogether<kC> >= groups) break;
#pragma unroll
    for (int q = first; q < first + kTogether<kC>; ++q) {
      const uint4 w = *reinterpret_cast<const uint4*>(row + (q / 4 * kPiece + q % 4 * 2) * kChunk);
#pragma unroll
      for (int m = 0; m < kM; ++m) mma<T>(h[m][0], w.x, w.y, acc[m][q]);
#pragma unroll
      for (int m = 0; m < kM; ++m) mma<T>(h[m][1], w.z, w.w, acc[m][q]);
    }
  }
}

// Store u for the gradient: the lane's 2 kQ neighbours of every pixel.
template <class T, int kM, int kQ>
__device__ __forceinline__ void store_hidden(const MlpFusedParams& p, const MlpTile& tile, int hid,
                                             const float (&u)[kM][kQ][4]) {
  const int lane = thread_of_block() % kWarpSize;
  hid += lane % 4 * 8;
  if (hid >= p.a.hidden) return;
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    const int64_t pixel = tile.first + lane / 4 + 8 * slot;
    if (pixel >= p.a.pixels) continue;
    T* to = static_cast<T*>(p.a.u) + (tile.sample * p.a.pixels + pixel) * p.a.hidden + hid;
    float value[2 * kQ];
#pragma unroll
    for (int i = 0; i < 2 * kQ; ++i) value[i] = u[slot / 2][i / 2][slot % 2 * 2 + i % 2];
    if (p.vector_u) {
      store(value, to);
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kQ; ++i) {
        if (hid + i < p.a.hidden) narrow(value[i], to[i]);
      }
    }
  }
}

// Sums of h^2 over the warp's pixels.
template <class T, int kM>
__device__ __forceinline__ void sum_squares(const MlpFusedParams& p, int64_t first,
                                            const uint32_t (&h)[kM][2][4], float* squares) {
  const int lane = thread_of_block() % kWarpSize;
  float sum[8] = {};
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    const bool inside = first + lane / 4 + 8 * slot < p.a.pixels;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float value[2];
      widen_pair(h[slot / 2][i / 4][slot % 2 + i % 4], value[0], value[1], T{});
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[i + e] = inside ? fmaf(value[e], value[e], sum[i + e]) : sum[i + e];
    }
  }
#pragma unroll
  for (float& s : sum) {
#pragma unroll
    for (int mask = 4; mask < kWarpSize; mask *= 2) s += __shfl_xor_sync(kFullWarp, s, mask);
  }
  if (lane < 4) store(sum, squares + lane * 8);
}

// h = GELU(u) of the products from q0 on.
template <class T, int kM, int kQ>
__device__ __forceinline__ void activate(const float (&u)[kM][kQ][4], int q0, uint32_t (&h)[kM][2][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        h[m][(q0 + q) / 2][(q0 + q) % 2 * 2 + b] =
            narrow_pair(gelu(u[m][q][2 * b]), gelu(u[m][q][2 * b + 1]), T{});
      }
    }
  }
}

// GRN's scale and shift.
template <class T, int kM>
__device__ __forceinline__ void respond(const float* scale, const float* shift, uint32_t (&h)[kM][2][4]) {
  const int t8 = thread_of_block() % 4 * 8;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float a[2], b[2];
    load(scale + t8 + i, a);
    load(shift + t8 + i, b);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        uint32_t& pair = h[m][i / 4][i % 4 + row];
        float first, second;
        widen_pair(pair, first, second, T{});
        pair = narrow_pair(fmaf(first, a[0], b[0]), fmaf(second, a[1], b[1]), T{});
      }
    }
  }
}

template <class T, int kC, int kM>
__global__ void __launch_bounds__(kMlpMaxWarps* kWarpSize) mlp_fused_kernel(const MlpFusedParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (std::is_same_v<T, BFloat16>) {  // never launched: there are no bf16 products
    asm volatile("trap;");
    return;
  }
#endif
  constexpr int kRows = 16 * kM;  // pixels of a warp
  constexpr int kQ = kTogether<kC>;
  CNK_SHARED(unsigned char, bytes);
  auto& shared = *reinterpret_cast<FusedShared<kC>*>(bytes);
  T* const weights = reinterpret_cast<T*>(bytes + sizeof shared);
  // After the first buffer, which is already filled while pieces pass through this memory.
  const auto piece = [&] {
    return reinterpret_cast<float*>(weights + kChunkElements<kC>) +
           thread_of_block() / kWarpSize * kRows * kPiecePitch;
  };
  load_parameters(p, shared.vectors);

  for (unsigned block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    copy_weights<T, kC>(p, 0, weights);
    store_chunk(load_chunk<kChunk>(p, block, 0), 0, shared.chunk);
    __syncthreads();
    uint32_t z[kM][kC / 16][4];
    load_normalised<T, kC, kM>(p, warp_tile<kRows>(p, block), shared.vectors, piece(), z);
    float acc[kM][kC / 8][4] = {};

    const int chunks = (p.a.hidden + kChunk - 1) / kChunk;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const T* const here = weights + (p.two_buffers ? chunk % 2 * kChunkElements<kC> : 0);
      copies_wait();
      __syncthreads();  // this chunk has arrived, and no thread reads the one before
      // With one buffer the chunk itself is copied now; its copy is not hidden behind products.
      const int copied = p.two_buffers ? chunk + 1 : chunk;
      if (copied > 0 && copied < chunks) {
        copy_weights<T, kC>(p, copied * kChunk,
                            weights + (p.two_buffers ? copied % 2 * kChunkElements<kC> : 0));
        if (!p.two_buffers) {
          copies_wait();
          __syncthreads();  // the only buffer is filled
        }
      }
      const MlpChunkElement next = load_chunk<kChunk>(p, block, chunk + 1);
      store_squares(p, block, chunk - 1, shared.chunk);

      uint32_t h[kM][2][4];
#pragma unroll
      for (int q = 0; q < 4; q += kQ) {
        float u[kM][kQ][4];
        expand<T, kC, kM, kQ>(z, here, shared.chunk.bias[chunk % 2], q, p.a.c, u);
        if (p.a.u) store_hidden<T, kM, kQ>(p, warp_tile<kRows>(p, block), chunk * kChunk + 2 * q, u);
        activate<T, kM, kQ>(u, q, h);
      }
      store_chunk(next, chunk + 1, shared.chunk);
      if (p.a.sums) {
        sum_squares<T, kM>(p, warp_tile<kRows>(p, block).first, h,
                           shared.chunk.squares[chunk % 2][thread_of_block() / kWarpSize]);
      }
      if (p.a.grn_scale) respond<T, kM>(shared.chunk.scale[chunk % 2], shared.chunk.shift[chunk % 2], h);
      if (p.a.out.data) project<T, kC, kM>(h, here + kChunk * kW1Pitch<kC>, p.groups, acc);
    }
    __syncthreads();
    store_squares(p, block, chunks - 1, shared.chunk);
    if (!p.a.out.data) continue;
    // In the sums of squares that no thread reads any more.
    float* const factors = shared.chunk.squares[chunks % 2][thread_of_block() / kWarpSize];
    store_output<T, kC, kM>(p, warp_tile<kRows>(p, block), shared.vectors, factors, piece(), acc);
  }
}

namespace {

template <class T, int kC>
void launch_mlp(const Context& context, const MlpFusedArgs& a) {
  constexpr int kM = kC <= 128 ? 2 : 1;
  constexpr int kChunkBytes = kChunkElements<kC> * int(sizeof(T));
  const int warps = a.tile / (16 * kM);
  MlpFusedParams p = mlp_params(a, 16 * kM, "mlp_fused_kernel");
  p.vector_x = has_vectors(a.x, a);
  p.vector_out = has_vectors(a.out, a) && has_vectors(a.residual, a);
  p.vector_weights = p.vector_weights && a.c % 8 == 0 && a.hidden % 8 == 0;
  p.vector_u = a.hidden % 8 == 0 && is_aligned(a.u);
  p.groups = (a.c + kPiece - 1) / kPiece * (4 / kTogether<kC>);
  const bool staged = !p.vector_x || (a.out.data && !p.vector_out);
  const int64_t staging = staged ? int64_t(warps) * 16 * kM * kPiecePitch * int64_t(sizeof(float)) : 0;
  const int64_t one = int64_t(sizeof(FusedShared<kC>)) + kChunkBytes;
  const int64_t two = one + max(int64_t{kChunkBytes}, staging);
  p.two_buffers = two <= device_info(context.device).shared_bytes;
  launch(context,
         {"mlp_fused_kernel",
          p.blocks,
          warps * kWarpSize,
          p.two_buffers ? two : one + staging,
          {"NPCHT", {a.samples, a.pixels, a.c, a.hidden, a.tile}}},
         mlp_fused_kernel<T, kC, kM>, p);
}

// Each width adds two seconds to the compile time of every architecture. A narrower tensor uses the instance
// of the next width, which skips pieces of channels that do not exist: 64 channels with the instance for 96
// execute 7 % more instructions, 160 channels with that for 192 no more.
template <class T>
void launch_mlp(const Context& context, const MlpFusedArgs& a) {
  if (a.c <= 96) return launch_mlp<T, 96>(context, a);
  if (a.c <= 128) return launch_mlp<T, 128>(context, a);
  if (a.c <= 192) return launch_mlp<T, 192>(context, a);
  return launch_mlp<T, 256>(context, a);
}

}  // namespace

void mlp_fused(const Context& context, const MlpFusedArgs& args) {
  if (args.x.dtype != DType::kFloat32 && args.x.dtype != args.dtype) {
    refuse("mlp_fused_kernel", {"NPCHT", {args.samples, args.pixels, args.c, args.hidden, args.tile}},
           "bf16 pixels and fp16 products, or the other way round");
  }
  if (args.dtype == DType::kFloat16) return launch_mlp<Float16>(context, args);
  launch_mlp<BFloat16>(context, args);
}

}  // namespace cnk::cuda
