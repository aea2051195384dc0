// Pixels of the fused bottleneck on tensor cores: normalised from global memory to operands of the first
// product, and from sums of the second product to global memory. A lane has the same elements as in
// mlp_fused.cu: 8 neighbours of every 32 channels of every eighth pixel. If the tensor's layout allows it, a
// lane loads the 8 at once. Otherwise pieces of 32 channels pass through shared memory, so that neighbouring
// lanes access neighbours in global memory.
#pragma once

#include "cuda/mlp/mlp_tile.h"

namespace cnk::cuda {

constexpr int kPiece = 32;       // channels
constexpr int kPiecePitch = 33;  // floats from one pixel to the next: a column's lanes use different banks

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

// Element i of kRows pixels x kPiece channels, of lane `i % 32`: neighbours are neighbouring pixels if these
// are next to each other in memory, else neighbouring channels.
struct PieceElement {
  int row, column;
};
template <int kRows>
__device__ __forceinline__ PieceElement piece_element(bool along_pixels, int i) {
  return along_pixels ? PieceElement{i % kRows, i / kRows} : PieceElement{i / kPiece, i % kPiece};
}

// An element of the pixels: fp32, or of the type of the products.
template <class T>
__device__ __forceinline__ float load_pixel(const Rows& rows, int64_t at) {
  if (rows.dtype == DType::kFloat32) return static_cast<const float*>(rows.data)[at];
  return widen(static_cast<const T*>(rows.data)[at]);
}

// Copies pixels [first, first + kRows) x channels [channel, channel + kPiece) of a sample into `piece`; zeros
// for those that do not exist. For one warp.
template <class T, int kRows>
__device__ __forceinline__ void load_piece(const MlpFusedParams& p, const MlpTile& tile, int channel,
                                           float* piece) {
  const Rows& x = p.a.x;
  const int64_t from = tile.sample * x.stride_n + tile.first * x.stride_p;
#pragma unroll 4
  for (int i = thread_of_block() % kWarpSize; i < kRows * kPiece; i += kWarpSize) {
    const PieceElement e = piece_element<kRows>(x.stride_p == 1, i);
    const int c = channel + e.column;
    const bool inside = tile.first + e.row < p.a.pixels && c < p.a.c;
    piece[e.row * kPiecePitch + e.column] =
        inside ? load_pixel<T>(x, from + e.row * x.stride_p + c * x.stride_c) : 0.0f;
  }
}

// The same for sums, to global memory: out = residual + s * gamma * (sum + b2).
template <class T, int kRows, int kC>
__device__ __forceinline__ void store_piece(const MlpFusedParams& p, const MlpTile& tile, int channel,
                                            const MlpVectors<kC>& vectors, const float* factors,
                                            const float* piece) {
  const Rows &out = p.a.out, &residual = p.a.residual;
  const int64_t to = tile.sample * out.stride_n + tile.first * out.stride_p;
  const int64_t added = tile.sample * residual.stride_n + tile.first * residual.stride_p;
#pragma unroll 4
  for (int i = thread_of_block() % kWarpSize; i < kRows * kPiece; i += kWarpSize) {
    const PieceElement e = piece_element<kRows>(out.stride_p == 1, i);
    const int c = channel + e.column;
    if (tile.first + e.row >= p.a.pixels || c >= p.a.c) continue;
    float value = (piece[e.row * kPiecePitch + e.column] + vectors.b2[c]) * vectors.gamma[c] * factors[e.row];
    if (residual.data)
      value += load_pixel<T>(residual, added + e.row * residual.stride_p + c * residual.stride_c);
    const int64_t at = to + e.row * out.stride_p + c * out.stride_c;
    if (out.dtype == DType::kFloat32) {
      static_cast<float*>(out.data)[at] = value;
    } else {
      narrow(value, static_cast<T*>(out.data)[at]);
    }
  }
}

// Loads 8 channels of every 32 of pixels first, first + 8...; zeros outside.
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

// LayerNorm of the lane's part of a row, four lanes together. Two passes over registers; the mean of the
// deviations corrects the rounding of the mean.
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

// Between a piece in shared memory and the registers of the j-th piece. j is unknown to the compiler;
// otherwise it would repeat the code of load_piece() and store_piece() for every piece. Registers need known
// numbers, so there is a branch for each piece, and all but one are skipped.
template <int kSlots, int kPieces>
__device__ __forceinline__ void take_piece(int j, const float* piece, float (&value)[kSlots][kPieces][8]) {
  const int lane = thread_of_block() % kWarpSize;
  const float* from = piece + lane / 4 * kPiecePitch + lane % 4 * 8;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (k != j) continue;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < 8; ++i) value[slot][k][i] = from[8 * slot * kPiecePitch + i];
    }
  }
}
template <int kM, int kProducts>
__device__ __forceinline__ void put_piece(int j, const float (&acc)[kM][kProducts][4], float* piece) {
  const int lane = thread_of_block() % kWarpSize;
  float* to = piece + lane / 4 * kPiecePitch + lane % 4 * 8;
#pragma unroll
  for (int k = 0; k < kProducts / 4; ++k) {
    if (k != j) continue;
#pragma unroll
    for (int slot = 0; slot < 2 * kM; ++slot) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        to[8 * slot * kPiecePitch + i] = acc[slot / 2][4 * k + i / 2][slot % 2 * 2 + i % 2];
      }
    }
  }
}

// z = LN(x) of the warp's pixels, as operands of the first product.
template <class T, int kC, int kM>
__device__ __forceinline__ void load_normalised(const MlpFusedParams& p, const MlpTile& tile,
                                                const MlpVectors<kC>& vectors, float* piece,
                                                uint32_t (&z)[kM][kC / 16][4]) {
  constexpr int kPieces = kC / kPiece;
  const int lane = thread_of_block() % kWarpSize, g = lane / 4, t8 = lane % 4 * 8;
  float value[2 * kM][kPieces][8] = {};
  if (!p.vector_x) {
#pragma unroll 1
    for (int j = 0; j * kPiece < p.a.c; ++j) {
      load_piece<T, 16 * kM>(p, tile, j * kPiece, piece);
      __syncwarp();
      take_piece(j, piece, value);
      __syncwarp();
    }
  } else if (p.a.x.dtype == DType::kFloat32) {
    load_vectors<float>(p, tile.sample, tile.first + g, value);
  } else {
    load_vectors<T>(p, tile.sample, tile.first + g, value);
  }
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    normalise(p.a.c, p.a.eps, value[slot]);
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      float weight[8], bias[8];
      load(vectors.norm_weight + j * kPiece + t8, weight);
      load(vectors.norm_bias + j * kPiece + t8, bias);
#pragma unroll
      for (int i = 0; i < 8; ++i) weight[i] = value[slot][j][i] * weight[i] + bias[i];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        z[slot / 2][2 * j + i / 4][slot % 2 + i % 4] = narrow_pair(weight[i], weight[i + 1], T{});
      }
    }
  }
}

// out = residual + s * gamma * (acc + b2), 8 channels of every 32 at once.
template <class IO, int kC, int kM>
__device__ __forceinline__ void store_vectors(const MlpFusedParams& p, const MlpTile& tile,
                                              const MlpVectors<kC>& vectors, const float* factors,
                                              const float (&acc)[kM][kC / 8][4]) {
  const int lane = thread_of_block() % kWarpSize, t8 = lane % 4 * 8;
  const Rows &out = p.a.out, &residual = p.a.residual;
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    const int64_t pixel = tile.first + lane / 4 + 8 * slot;
    if (pixel >= p.a.pixels) continue;
    const float factor = factors[lane / 4 + 8 * slot];
    IO* to = static_cast<IO*>(out.data) + tile.sample * out.stride_n + pixel * out.stride_p + t8;
    const IO* added = static_cast<const IO*>(residual.data) + tile.sample * residual.stride_n +
                      pixel * residual.stride_p + t8;
#pragma unroll
    for (int j = 0; j < kC / kPiece; ++j) {
      if (j * kPiece + t8 >= p.a.c) break;
      float value[8] = {}, bias[8], gamma[8];
      if (residual.data) load(added + j * kPiece, value);
      load(vectors.b2 + j * kPiece + t8, bias);
      load(vectors.gamma + j * kPiece + t8, gamma);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float sum = acc[slot / 2][4 * j + i / 2][slot % 2 * 2 + i % 2];
        value[i] += (sum + bias[i]) * gamma[i] * factor;
      }
      store(value, to + j * kPiece);
    }
  }
}

template <class T, int kC, int kM>
__device__ __forceinline__ void store_output(const MlpFusedParams& p, const MlpTile& tile,
                                             const MlpVectors<kC>& vectors, float* factors, float* piece,
                                             const float (&acc)[kM][kC / 8][4]) {
  share_drop_factors<16 * kM>(p, tile, factors);
  if (!p.vector_out) {
#pragma unroll 1
    for (int j = 0; j * kPiece < p.a.c; ++j) {
      put_piece(j, acc, piece);
      __syncwarp();
      store_piece<T, 16 * kM>(p, tile, j * kPiece, vectors, factors, piece);
      __syncwarp();
    }
  } else if (p.a.out.dtype == DType::kFloat32) {
    store_vectors<float, kC, kM>(p, tile, vectors, factors, acc);
  } else {
    store_vectors<T, kC, kM>(p, tile, vectors, factors, acc);
  }
}

// Whether rows of `channels`, a multiple of 8, can be loaded 16 bytes at once.
inline bool has_vectors(const Rows& r, const MlpFusedArgs& a) {
  const int64_t elements = 16 / element_size(r.dtype);
  return !r.data || (r.stride_c == 1 && a.c % 8 == 0 && r.stride_n % elements == 0 &&
                     r.stride_p % elements == 0 && is_aligned(r.data));
}

}  // namespace cnk::cuda
