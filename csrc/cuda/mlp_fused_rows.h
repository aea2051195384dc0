// Pixels of the fused bottleneck on tensor cores: from global memory to operands of the first product,
// normalised, and from sums of the second to global memory. The lanes' share is that of mlp_fused.cu: lane 4g
// + t has 8 neighbours, 8t..8t + 7, of every 32 channels of pixels g, g + 8... Where a tensor's layout lets a
// lane load them at once it does; else pieces of 32 channels pass through shared memory, neighbouring lanes
// along what is next to each other.
#pragma once

#include <type_traits>

#include "cuda/mlp_tile.h"

namespace cnk::cuda {

constexpr int kPiece = 32;       // channels
constexpr int kPiecePitch = 33;  // floats from one pixel to the next: no two lanes of a column in one bank

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

// Element i of kRows pixels x kPiece channels that lane `i % 32` handles: neighbours along pixels where these
// are next to each other in memory, else along channels.
struct PieceElement {
  int row, column;
};
template <int kRows>
__device__ __forceinline__ PieceElement piece_element(bool along_pixels, int i) {
  return along_pixels ? PieceElement{i % kRows, i / kRows} : PieceElement{i / kPiece, i % kPiece};
}

// Pixels [first, first + kRows) x channels [channel, channel + kPiece) of a sample into `piece`, zeros where
// there are none. For one warp.
template <class IO, int kRows>
__device__ __forceinline__ void load_piece(const MlpFusedParams& p, int64_t sample, int64_t first,
                                           int channel, float* piece) {
  const Rows& x = p.a.x;
  const IO* from = static_cast<const IO*>(x.data) + sample * x.stride_n + first * x.stride_p;
#pragma unroll 4
  for (int i = thread_of_block() % kWarpSize; i < kRows * kPiece; i += kWarpSize) {
    const PieceElement e = piece_element<kRows>(x.stride_p == 1, i);
    const int c = channel + e.column;
    const bool inside = first + e.row < p.a.pixels && c < p.a.c;
    piece[e.row * kPiecePitch + e.column] = inside ? widen(from[e.row * x.stride_p + c * x.stride_c]) : 0.0f;
  }
}

// The way back, the residual added.
template <class IO, int kRows>
__device__ __forceinline__ void store_piece(const MlpFusedParams& p, int64_t sample, int64_t first,
                                            int channel, const float* piece) {
  const Rows &out = p.a.out, &residual = p.a.residual;
  IO* to = static_cast<IO*>(out.data) + sample * out.stride_n + first * out.stride_p;
  const IO* added =
      static_cast<const IO*>(residual.data) + sample * residual.stride_n + first * residual.stride_p;
#pragma unroll 4
  for (int i = thread_of_block() % kWarpSize; i < kRows * kPiece; i += kWarpSize) {
    const PieceElement e = piece_element<kRows>(out.stride_p == 1, i);
    const int c = channel + e.column;
    if (first + e.row >= p.a.pixels || c >= p.a.c) continue;
    float value = piece[e.row * kPiecePitch + e.column];
    if (residual.data) value += widen(added[e.row * residual.stride_p + c * residual.stride_c]);
    narrow(value, to[e.row * out.stride_p + c * out.stride_c]);
  }
}

// 8 channels of every 32, of pixels first, first + 8...; zeros outside.
template <class IO, int kSlots, int kPieces>
__device__ __forceinline__ void load_vectors(const MlpFusedParams& p, int64_t sample, int64_t first,
                                             float (&value)[kSlots][kPieces][8]) {
  const Rows& x = p.a.x;
  const int t8 = thread_of_block() % 4 * 8;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t pixel = first + 8 * slot;
    const IO* from = static_cast<const IO*>(x.data) + sample * x.stride_n + pixel * x.stride_p + t8;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (pixel < p.a.pixels && j * kPiece + t8 < p.a.c) {
        load(from + j * kPiece, value[slot][j]);
      } else {
#pragma unroll
        for (float& v : value[slot][j]) v = 0.0f;
      }
    }
  }
}

// LayerNorm of the lane's part of a row, quads of lanes together: two passes over registers, the mean
// corrected by what its rounding left.
template <int kPieces>
__device__ __forceinline__ void normalise(int channels, float eps, float (&value)[kPieces][8]) {
  const int t8 = thread_of_block() % 4 * 8;
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
#pragma unroll
    for (const float v : value[j]) sum += v;
  }
  const float count = float(channels);
  const float mean = quad_sum(sum) / count;
  float first = 0.0f, second = 0.0f;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float d = j * kPiece + t8 + i < channels ? value[j][i] - mean : 0.0f;
      first += d;
      second = fmaf(d, d, second);
      value[j][i] = d;
    }
  }
  const float correction = quad_sum(first) / count;
  const float variance = quad_sum(second) / count - correction * correction;
  const float rstd = rsqrtf((variance < 0.0f ? 0.0f : variance) + eps);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
#pragma unroll
    for (float& v : value[j]) v = (v - correction) * rstd;
  }
}

// z = LN(x) of the warp's pixels, as operands of the first product.
template <class T, int kC, int kM>
__device__ __forceinline__ void load_normalised(const MlpFusedParams& p, const MlpTile& tile,
                                                const MlpVectors<kC>& vectors, float* piece,
                                                uint32_t (&z)[kM][kC / 16][4]) {
  using Other = std::conditional_t<std::is_same_v<T, BFloat16>, Float16, BFloat16>;
  constexpr int kPieces = kC / kPiece;
  const int lane = thread_of_block() % kWarpSize, g = lane / 4, t8 = lane % 4 * 8;
  float value[2 * kM][kPieces][8];
  by_dtype(p.a.x.dtype, [&](auto element) {
    using IO = typename decltype(element)::Type;
    if (p.vector_x) return load_vectors<IO>(p, tile.sample, tile.first + g, value);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      load_piece<IO, 16 * kM>(p, tile.sample, tile.first, j * kPiece, piece);
      __syncwarp();
#pragma unroll
      for (int slot = 0; slot < 2 * kM; ++slot) {
#pragma unroll
        for (int i = 0; i < 8; ++i) value[slot][j][i] = piece[(8 * slot + g) * kPiecePitch + t8 + i];
      }
      __syncwarp();
    }
  });
  const bool rounds_twice = p.a.x.dtype != DType::kFloat32 && p.a.x.dtype != p.a.dtype;
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    normalise(p.a.c, p.a.eps, value[slot]);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      float weight[8], bias[8];
      load(vectors.norm_weight + j * kPiece + t8, weight);
      load(vectors.norm_bias + j * kPiece + t8, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float v = value[slot][j][i] * weight[i] + bias[i];
        weight[i] = rounds_twice ? rounded<Other>(v) : v;
      }
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        z[slot / 2][2 * j + i / 4][slot % 2 + i % 4] = narrow_pair(weight[i], weight[i + 1], T{});
      }
    }
  }
}

// (acc + b2) * gamma * drop factor of the lane's 8 channels from 32 j on, of one pixel.
template <int kC>
__device__ __forceinline__ void scaled_output(const MlpVectors<kC>& vectors, int j, float factor,
                                              const float (&acc)[kC / 8][4], int half, float (&value)[8]) {
  const int c = j * kPiece + thread_of_block() % 4 * 8;
  float bias[8], gamma[8];
  load(vectors.b2 + c, bias);
  load(vectors.gamma + c, gamma);
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = (acc[4 * j + i / 2][half * 2 + i % 2] + bias[i]) * gamma[i] * factor;
}

template <class IO, int kC, int kM>
__device__ __forceinline__ void store_vectors(const MlpFusedParams& p, const MlpTile& tile,
                                              const MlpVectors<kC>& vectors,
                                              const float (&acc)[kM][kC / 8][4]) {
  const int lane = thread_of_block() % kWarpSize, t8 = lane % 4 * 8;
  const Rows &out = p.a.out, &residual = p.a.residual;
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    const int64_t pixel = tile.first + lane / 4 + 8 * slot;
    if (pixel >= p.a.pixels) continue;
    const float factor = drop_factor(p, tile.sample, pixel);
    IO* to = static_cast<IO*>(out.data) + tile.sample * out.stride_n + pixel * out.stride_p + t8;
    const IO* added = static_cast<const IO*>(residual.data) + tile.sample * residual.stride_n +
                      pixel * residual.stride_p + t8;
#pragma unroll
    for (int j = 0; j < kC / kPiece; ++j) {
      if (j * kPiece + t8 >= p.a.c) break;
      float value[8], r[8] = {};
      if (residual.data) load(added + j * kPiece, r);
      scaled_output<kC>(vectors, j, factor, acc[slot / 2], slot % 2, value);
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] += r[i];
      store(value, to + j * kPiece);
    }
  }
}

template <class IO, int kC, int kM>
__device__ __forceinline__ void store_pieces(const MlpFusedParams& p, const MlpTile& tile,
                                             const MlpVectors<kC>& vectors, float* piece,
                                             const float (&acc)[kM][kC / 8][4]) {
  const int lane = thread_of_block() % kWarpSize, g = lane / 4, t8 = lane % 4 * 8;
  float factor[2 * kM];
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    const int64_t pixel = tile.first + 8 * slot + g;
    factor[slot] = pixel < p.a.pixels ? drop_factor(p, tile.sample, pixel) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kC / kPiece; ++j) {
    if (j * kPiece >= p.a.c) break;
#pragma unroll
    for (int slot = 0; slot < 2 * kM; ++slot) {
      float value[8];
      scaled_output<kC>(vectors, j, factor[slot], acc[slot / 2], slot % 2, value);
#pragma unroll
      for (int i = 0; i < 8; ++i) piece[(8 * slot + g) * kPiecePitch + t8 + i] = value[i];
    }
    __syncwarp();
    store_piece<IO, 16 * kM>(p, tile.sample, tile.first, j * kPiece, piece);
    __syncwarp();
  }
}

// Whether rows of `channels`, a multiple of 8, can be loaded 16 bytes at once.
inline bool has_vectors(const Rows& r, int64_t channels) {
  const int64_t elements = 16 / element_size(r.dtype);
  return !r.data || (r.stride_c == 1 && channels % 8 == 0 && r.stride_n % elements == 0 &&
                     r.stride_p % elements == 0 && reinterpret_cast<uintptr_t>(r.data) % 16 == 0);
}

}  // namespace cnk::cuda
