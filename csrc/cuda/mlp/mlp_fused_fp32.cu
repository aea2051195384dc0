// A warp owns 16 pixels and all their channels: z = LN(x) in shared memory, the output as sums in registers.
// The block loops over the hidden in chunks as mlp_fused.cu does; h passes through shared memory. W2 of a
// chunk is copied while W1 is multiplied, and W1 of the next chunk while W2 is multiplied.
//
// Lane 8r + c has pixels r, r + 4... and every eighth column from c on. It reads four neighbours of a row at
// a time (16 bytes), of 4 of its pixels and of each of its columns, and multiplies them. Rows are an odd
// multiple of 16 bytes apart, so that eight neighbouring columns are in different banks.
#include "cuda/gelu.h"
#include "cuda/launch.h"
#include "cuda/mlp/mlp_fused_fp32.h"
#include "cuda/mlp/mlp_tile.h"
#include "cuda/mma.h"

namespace cnk::cuda {

constexpr int kFp32Rows = 16;  // pixels of a warp
constexpr int kFp32Own = 4;    // pixels of a lane
constexpr int kFp32Pad = 4;

// Shared memory of the block; that of the warps follows.
template <int kC, int kChunk>
struct Fp32Shared {
  MlpVectors<kC> vectors;
  MlpChunk<kChunk> chunk;
  float w1[kChunk][kC + kFp32Pad], w2[kC][kChunk + kFp32Pad];
};
template <int kC, int kChunk>
struct Fp32Warp {
  float z[kFp32Rows][kC + kFp32Pad];  // and at the end the output
  float h[kFp32Rows][kChunk + kFp32Pad];
};

// Start copying the rows of W1, or the columns of W2, of a chunk.
template <int kC, int kChunk>
__device__ __forceinline__ void copy_w1(const MlpFusedParams& p, int chunk, Fp32Shared<kC, kChunk>& to) {
  const int first = chunk * kChunk, channels = p.a.c;
  const float* from = static_cast<const float*>(p.a.w1) + int64_t(first) * channels;
  copy_matrix<kChunk, kC, kC + kFp32Pad>(from, channels, p.a.hidden - first, channels,
                                         p.vector_weights && channels % 4 == 0, to.w1[0]);
}
template <int kC, int kChunk>
__device__ __forceinline__ void copy_w2(const MlpFusedParams& p, int chunk, Fp32Shared<kC, kChunk>& to) {
  const int first = chunk * kChunk;
  const float* from = static_cast<const float*>(p.a.w2) + first;
  copy_matrix<kC, kChunk, kChunk + kFp32Pad>(from, p.a.hidden, p.a.c, p.a.hidden - first,
                                             p.vector_weights && p.a.hidden % 4 == 0, to.w2[0]);
}

// acc[i][j] += sum_k a[r + 4i][k] * b[c + 8j][k].
template <int kColumns, int kK>
__device__ __forceinline__ void add_products(const float (*a)[kK + kFp32Pad], const float (*b)[kK + kFp32Pad],
                                             float (&acc)[kFp32Own][kColumns]) {
  const int lane = thread_of_block() % kWarpSize;
#pragma unroll 1
  for (int k = 0; k < kK; k += 4) {
    float own[kFp32Own][4];
#pragma unroll
    for (int i = 0; i < kFp32Own; ++i) load(&a[lane / 8 + 4 * i][k], own[i]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float w[4];
      load(&b[lane % 8 + 8 * j][k], w);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int i = 0; i < kFp32Own; ++i) acc[i][j] = fmaf(own[i][e], w[e], acc[i][j]);
      }
    }
  }
}

// Call f(row, c, offset) for the warp's pixels and channels; neighbouring lanes get neighbours in memory.
template <class F>
__device__ __forceinline__ void for_each_element(const MlpFusedParams& p, const Rows& rows,
                                                 const MlpTile& tile, const F& f) {
  const int lane = thread_of_block() % kWarpSize;
  const bool along_pixels = rows.stride_p == 1;
  const int row_step = along_pixels ? kFp32Rows : 1,
            c_step = along_pixels ? kWarpSize / kFp32Rows : kWarpSize;
  const int64_t base = tile.sample * rows.stride_n + tile.first * rows.stride_p;
  const int64_t left = p.a.pixels - tile.first;
  for (int row = along_pixels ? lane % kFp32Rows : 0; row < kFp32Rows && row < left; row += row_step) {
#pragma unroll 4
    for (int c = along_pixels ? lane / kFp32Rows : lane; c < p.a.c; c += c_step) {
      f(row, c, base + row * rows.stride_p + c * rows.stride_c);
    }
  }
}

// z = LN(x), two lanes for a row. Two passes; the mean of the deviations corrects the rounding of the mean.
template <int kC>
__device__ __forceinline__ void normalise_rows(const MlpFusedParams& p, const MlpVectors<kC>& vectors,
                                               float (&z)[kFp32Rows][kC + kFp32Pad]) {
  const int lane = thread_of_block() % kWarpSize;
  float* const row = z[lane / 2];
  const auto both = [](float value) { return value + __shfl_xor_sync(kFullWarp, value, 1); };
  const float count = float(p.a.c);
  float sum = 0.0f, first = 0.0f, second = 0.0f;
  for (int c = lane % 2; c < p.a.c; c += 2) sum += row[c];
  const float mean = both(sum) / count;
  for (int c = lane % 2; c < p.a.c; c += 2) {
    const float d = row[c] - mean;
    first += d;
    second = fmaf(d, d, second);
  }
  const float correction = both(first) / count;
  const float variance = both(second) / count - correction * correction;
  const float rstd = rsqrtf((variance < 0.0f ? 0.0f : variance) + p.a.eps);
  for (int c = lane % 2; c < p.a.c; c += 2) {
    const float xhat = (row[c] - mean - correction) * rstd;
    row[c] = rounded_to(p.a.x.dtype, xhat * vectors.norm_weight[c] + vectors.norm_bias[c]);
  }
}

// z = LN(x) of the warp's pixels; zeros after the last pixel and channel.
template <int kC, int kChunk>
__device__ __forceinline__ void load_rows(const MlpFusedParams& p, const MlpTile& tile,
                                          const MlpVectors<kC>& vectors, Fp32Warp<kC, kChunk>& own) {
  float* const z = own.z[0];
  for (int i = thread_of_block() % kWarpSize; i < kFp32Rows * (kC + kFp32Pad); i += kWarpSize) z[i] = 0.0f;
  __syncwarp();
  for_each_element(p, p.a.x, tile,
                   [&](int row, int c, int64_t at) { own.z[row][c] = load(p.a.x.data, p.a.x.dtype, at); });
  __syncwarp();
  normalise_rows<kC>(p, vectors, own.z);
  __syncwarp();
}

// Writes h = GELU(u), with GRN's scale and shift, to shared memory, and u and the sums of h^2 to global
// memory if they are requested.
template <int kC, int kChunk>
__device__ __forceinline__ void activate_rows(const MlpFusedParams& p, const MlpTile& tile, int chunk,
                                              MlpChunk<kChunk>& vectors,
                                              const float (&u)[kFp32Own][kChunk / 8],
                                              Fp32Warp<kC, kChunk>& own) {
  const int lane = thread_of_block() % kWarpSize, r = lane / 8;
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
    const int column = lane % 8 + 8 * j, hid = chunk * kChunk + column;
    const float scale = vectors.scale[chunk % 2][column], shift = vectors.shift[chunk % 2][column];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kFp32Own; ++i) {
      const int64_t pixel = tile.first + r + 4 * i;
      const bool inside = pixel < p.a.pixels && hid < p.a.hidden;
      if (p.a.u && inside) {
        static_cast<float*>(p.a.u)[(tile.sample * p.a.pixels + pixel) * p.a.hidden + hid] = u[i][j];
      }
      const float h = gelu(u[i][j]);
      if (inside) squares = fmaf(h, h, squares);
      own.h[r + 4 * i][column] = fmaf(h, scale, shift);
    }
    if (p.a.sums) {
      squares += __shfl_xor_sync(kFullWarp, squares, 8);
      squares += __shfl_xor_sync(kFullWarp, squares, 16);
      if (r == 0) vectors.squares[chunk % 2][thread_of_block() / kWarpSize][column] = squares;
    }
  }
}

// out = residual + s * gamma * (acc + b2), through shared memory.
template <int kC, int kChunk>
__device__ __forceinline__ void store_rows(const MlpFusedParams& p, const MlpTile& tile,
                                           const MlpVectors<kC>& vectors, float* factors,
                                           const float (&acc)[kFp32Own][kC / 8], Fp32Warp<kC, kChunk>& own) {
  const int lane = thread_of_block() % kWarpSize;
  share_drop_factors<kFp32Rows>(p, tile, factors);
#pragma unroll
  for (int i = 0; i < kFp32Own; ++i) {
    const int row = lane / 8 + 4 * i;
    const float factor = factors[row];
#pragma unroll
    for (int j = 0; j < kC / 8; ++j) {
      const int c = lane % 8 + 8 * j;
      own.z[row][c] = (acc[i][j] + vectors.b2[c]) * vectors.gamma[c] * factor;
    }
  }
  __syncwarp();
  const Rows& residual = p.a.residual;
  const int64_t added = tile.sample * residual.stride_n + tile.first * residual.stride_p;
  for_each_element(p, p.a.out, tile, [&](int row, int c, int64_t at) {
    float value = own.z[row][c];
    if (residual.data) {
      value += load(residual.data, residual.dtype, added + row * residual.stride_p + c * residual.stride_c);
    }
    store(value, p.a.out.data, p.a.out.dtype, at);
  });
}

template <int kC, int kChunk>
__global__ void __launch_bounds__(kMlpMaxWarps* kWarpSize, kC <= 96 ? 2 : 1)
    mlp_fused_fp32_kernel(const MlpFusedParams p) {
  CNK_SHARED(unsigned char, bytes);
  auto& shared = *reinterpret_cast<Fp32Shared<kC, kChunk>*>(bytes);
  auto& own = reinterpret_cast<Fp32Warp<kC, kChunk>*>(bytes + sizeof shared)[thread_of_block() / kWarpSize];
  const int lane = thread_of_block() % kWarpSize, chunks = (p.a.hidden + kChunk - 1) / kChunk;
  load_parameters(p, shared.vectors);

  for (unsigned block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const MlpTile tile = warp_tile<kFp32Rows>(p, block);
    __syncthreads();
    copy_w1(p, 0, shared);
    store_chunk(load_chunk<kChunk>(p, block, 0), 0, shared.chunk);
    load_rows(p, tile, shared.vectors, own);
    float acc[kFp32Own][kC / 8] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copies_wait();
      __syncthreads();  // W1 has arrived, and no thread reads the W2 before
      copy_w2(p, chunk, shared);
      const MlpChunkElement next = load_chunk<kChunk>(p, block, chunk + 1);
      store_squares(p, block, chunk - 1, shared.chunk);
      float u[kFp32Own][kChunk / 8];
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
        for (int i = 0; i < kFp32Own; ++i) u[i][j] = shared.chunk.bias[chunk % 2][lane % 8 + 8 * j];
      }
      add_products<kChunk / 8, kC>(own.z, shared.w1, u);
      activate_rows(p, tile, chunk, shared.chunk, u, own);
      store_chunk(next, chunk + 1, shared.chunk);
      copies_wait();
      __syncthreads();  // W2 has arrived, and no thread reads W1
      if (chunk + 1 < chunks) {
        copy_w1(p, chunk + 1, shared);
      }
      if (p.a.out.data) add_products<kC / 8, kChunk>(own.h, shared.w2, acc);
      __syncwarp();
    }
    __syncthreads();
    store_squares(p, block, chunks - 1, shared.chunk);
    // The factors overwrite the sums of squares that no thread reads any more.
    float* const factors = shared.chunk.squares[chunks % 2][thread_of_block() / kWarpSize];
    if (p.a.out.data) store_rows(p, tile, shared.vectors, factors, acc, own);
  }
}

namespace {

template <int kC, int kChunk>
void launch_mlp(const Context& context, const MlpFusedArgs& a) {
  const int warps = a.tile / kFp32Rows;
  const int64_t shared =
      int64_t(sizeof(Fp32Shared<kC, kChunk>)) + warps * int64_t(sizeof(Fp32Warp<kC, kChunk>));
  MlpFusedParams p = mlp_params(a, kFp32Rows, "mlp_fused_fp32_kernel");
  launch(context,
         {"mlp_fused_fp32_kernel",
          p.blocks,
          warps * kWarpSize,
          shared,
          {"NPCHT", {a.samples, a.pixels, a.c, a.hidden, a.tile}}},
         mlp_fused_fp32_kernel<kC, kChunk>, p);
}

}  // namespace

void mlp_fused_fp32(const Context& context, const MlpFusedArgs& args) {
  if (args.c <= 64) return launch_mlp<64, 32>(context, args);
  if (args.c <= 96) return launch_mlp<96, 32>(context, args);
  if (args.c <= 128) return launch_mlp<128, 32>(context, args);
  if (args.c <= 192) return launch_mlp<192, 16>(context, args);
  launch_mlp<256, 16>(context, args);
}

}  // namespace cnk::cuda
