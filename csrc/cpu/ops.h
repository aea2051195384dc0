// The contract between the bindings and the kernels: plain structs, and one table of functions per
// instruction set.
//
// Images are dense NHWC; pixel p of all N*H*W starts at x + p * C. "Padded" vectors are zero-filled up to
// pad_channels() elements, so that kernels may read whole SIMD registers.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace cnk::cpu {

// Every padded dimension is a multiple of this on every instruction set: two AVX-512 registers, one AMX row.
constexpr int64_t kChannelAlign = 32;
CNK_INLINE constexpr int64_t pad_channels(int64_t c) {
  return (c + kChannelAlign - 1) / kChannelAlign * kChannelAlign;
}

// How the matrix products are computed: fp32 everywhere, or bf16 on AMX tiles (fp32 sums).
enum class Products : int { kFloat32 = 0, kAmxBFloat16 = 1 };

struct DwconvArgs {
  DType dtype;
  const void* x;  // (N, H, W, C)
  void* y;        // (N, H, W, C)
  int64_t n, h, w, c;
  int kernel_size, dilation;
  const float* weight;  // (K * K, padded C)
  const float* bias;    // padded C
};

struct LayernormArgs {
  DType dtype;
  const void* x;  // (rows, C)
  void* y;        // (rows, C)
  int64_t rows, c;
  float eps;
  const float *weight, *bias;  // padded C
};

struct GrnArgs {
  DType dtype;
  const void* x;  // (N, pixels, C)
  void* y;
  int64_t n, pixels, c;
  float eps;
  const float *weight, *bias;  // padded C
  float* scale;                // workspace, N * padded C
};

// A matrix packed for the products by IsaOps::pack_matrix.
struct PackedMatrix {
  const void* data;
  int64_t n, k;  // out = in (rows, k) times matrix (k, n)
};

// block: dwconv -> LN -> W1 -> GELU -> [GRN] -> W2 -> gamma -> drop scale -> + residual; mlp: the same
// without dwconv.
struct MlpArgs {
  DType dtype;  // of x, residual and out
  Products products;
  const void* x;         // (N, H, W, C): what dwconv reads, or LN where kernel_size is 0
  const void* residual;  // (N, H, W, C) or null
  void* out;             // (N, H, W, C); may not alias x
  int64_t n, h, w, c, hidden;
  int kernel_size, dilation;         // kernel_size 0: no convolution
  const float *dw_weight, *dw_bias;  // (K * K, padded C), padded C
  float eps, grn_eps;
  const float *norm_weight, *norm_bias;  // padded C
  PackedMatrix w1, w2;                   // (C -> hidden), (hidden -> C)
  const float* b1;                       // padded hidden
  const float* grn_weight;  // padded hidden, or null: no GRN; its bias is added to b2 as W2 * bias
  const float* b2;          // padded C
  const float* gamma;       // padded C
  const float* drop_scale;  // N or null
  char* workspace;          // IsaOps::mlp_workspace bytes, 64-byte aligned
};

// LayerNorm, then a KxK convolution with stride K: the patch of K*K pixels is one row of the product.
struct DownsampleArgs {
  DType dtype, out_dtype;
  Products products;
  const void* x;  // (N, H, W, C)
  void* out;      // (N, H / K, W / K, D)
  int64_t n, h, w, c;
  int patch;
  float eps;
  const float *norm_weight, *norm_bias;  // padded C
  PackedMatrix weight;                   // (K * K * padded C -> D)
  const float* bias;                     // padded D
  char* workspace;                       // IsaOps::downsample_workspace bytes, 64-byte aligned
};

struct IsaOps {
  void (*dwconv)(const DwconvArgs&, Team&, char* workspace);
  int64_t (*dwconv_workspace)(const DwconvArgs&, int threads);
  void (*layernorm)(const LayernormArgs&, Team&);
  void (*grn)(const GrnArgs&, Team&);
  void (*mlp)(const MlpArgs&, Team&);
  int64_t (*mlp_workspace)(const MlpArgs&, int threads);
  void (*downsample)(const DownsampleArgs&, Team&);
  int64_t (*downsample_workspace)(const DownsampleArgs&, int threads);
  // Bytes of a packed (k, n) matrix, and the packing of w, row-major (n, k) fp32, i.e. a Linear's weight.
  int64_t (*packed_bytes)(Products, int64_t n, int64_t k);
  void (*pack_matrix)(Products, const float* w, int64_t n, int64_t k, void* packed, Team&);
};

// Null where the instruction set is not part of this build.
const IsaOps* isa_ops(Isa isa);

}  // namespace cnk::cpu
