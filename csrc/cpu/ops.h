// The interface between the bindings and the kernels: plain
// structs, and one table of functions per instruction set.
//
// Images are dense NHWC; pixel p of all N*H*W starts at x + p * C. "Padded" vectors are filled with zeros up
// to pad_channels() elements, so that kernels may read whole SIMD registers.
#pragma once

#include <cstdint>

#include "common/axis.h"
#include "common/dtype.h"
#include "common/variants.h"
#include "cpu/platform/isa.h"
#include "cpu/platform/parallel.h"

// Products of bf16 pairs. Tests emulate them, to run on any
// machine with AVX-512 what AVX512_BF16 machines run.
#if defined(__AVX512BF16__) || defined(CNK_EMULATE_BF16) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define CNK_HAS_BF16
#endif

// AMX. clang 15 writes __AMXBF16__.
#if defined(__AMX_BF16__) || defined(__AMXBF16__) || defined(CNK_EMULATE_TILES)
#define CNK_HAS_TILES
#endif

// Instruction sets with products of bf16 pairs compile only what uses these products or converts to bf16. The
// rest is compiled once for all of them, in CNK_SHARED. Code that only converts is compiled once for
// AVX512_BF16 and AMX, in CNK_CONVERTS; on Arm both are the portable set, which is NEON.
#if !defined(CNK_HAS_BF16)
#define CNK_SHARED CNK_ISA
#define CNK_CONVERTS CNK_ISA
#elif defined(__aarch64__)
#define CNK_SHARED portable
#define CNK_CONVERTS portable
#else
#define CNK_SHARED avx512
#if defined(CNK_EMULATE_BF16)
#define CNK_CONVERTS avx512bf16_emulated
#else
#define CNK_CONVERTS avx512bf16
#endif
#endif

// Where kernels are that multiply bf16 pairs with VDPBF16PS. With tiles it runs at half the rate of fp32 (211 of 419
// GFLOP/s), so these sets take the fp32 kernels, and so do those of 64-bit Arm: BFDOT has not been tried.
#if defined(CNK_HAS_TILES) || defined(__aarch64__)
#define CNK_DOTS CNK_SHARED
#else
#define CNK_DOTS CNK_ISA
#endif

// First in a function of the table: unless the condition holds, the function of CNK_SHARED does the work.
#if defined(CNK_HAS_BF16)
#define CNK_SHARED_UNLESS(condition, name, ...) \
  if (!(condition)) return CNK_SHARED::kOps.name(__VA_ARGS__)
#else
#define CNK_SHARED_UNLESS(condition, name, ...) static_cast<void>(0)
#endif

namespace cnk::cpu {

// Every padded dimension is a multiple of this, for every
// instruction set: two AVX-512 registers, one AMX row.
constexpr int64_t kChannelAlign = 32;
CNK_INLINE constexpr int64_t pad_channels(int64_t c) {
  return (c + kChannelAlign - 1) / kChannelAlign * kChannelAlign;
}

// How the matrix products are computed: in fp32, or in bf16 with fp32 sums if the instruction set can.
enum class Products : int { kFloat32 = 0, kBFloat16 = 1 };
CNK_INLINE bool has_bf16_products(Isa isa) {
  return isa == Isa::kAvx512Bf16 || isa == Isa::kAmx || isa == Isa::kNeonBf16;
}

// The weights of a depthwise convolution: (padded C / kChannelAlign, taps, kChannelAlign), so that the taps
// of a register's channels are next to each other. Taps that are a whole row of channels apart would share
// few sets of L1 (C 768: four of 64). Of a row (or column) of taps, those that are `tap_step` apart are next
// to each other: first 0, 2, 4..., then 1, 3, 5... `depth`: planes of taps, of a 3-D convolution.
CNK_INLINE int64_t packed_taps_bytes(const Axis& h, const Axis& w, int64_t c, int depth = 1) {
  return int64_t{depth} * h.taps * w.taps * pad_channels(c) * 4;
}
// From (KD * KH * KW, C).
CNK_INLINE void pack_taps(const float* weight, const Axis& h, const Axis& w, int64_t c, float* packed,
                          int depth = 1) {
  const Axis& along = along_columns(h, w) ? h : w;
  const int64_t taps = int64_t{depth} * h.taps * w.taps, step = tap_step(along);
  for (int64_t i = 0; i < pad_channels(c); ++i) {
    float* to = packed + i / kChannelAlign * kChannelAlign * taps + i % kChannelAlign;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t k = tap % along.taps, at = k / step + (k % step ? (along.taps + 1) / 2 : 0);
      to[(tap - k + at) * kChannelAlign] = i < c ? weight[tap * c + i] : 0.0f;
    }
  }
}

// For products of bf16 pairs: words in the same places, each with the tap and the one that stands in the next
// kernel row that meets a row of x (of an input gradient with stride 2 the one after), counted through all
// planes. False, and nothing is written, if a weight is not a bf16 number.
CNK_INLINE bool pack_tap_pairs(const float* packed, const Axis& h, const Axis& w, int64_t c, uint32_t* pairs,
                               int depth = 1) {
  const Axis &along = along_columns(h, w) ? h : w, &across = along_columns(h, w) ? w : h;
  const int64_t taps = int64_t{depth} * h.taps * w.taps,
                next = (across.up > 1 ? tap_step(across) : 1) * int64_t{along.taps};
  const auto* words = reinterpret_cast<const uint32_t*>(packed);
  for (int64_t i = 0; i < taps * pad_channels(c); ++i) {
    if (words[i] & 0xffff) return false;
  }
  for (int64_t block = 0; block < pad_channels(c) / kChannelAlign; ++block) {
    for (int64_t i = 0; i < taps * kChannelAlign; ++i) {
      const uint32_t* word = words + block * taps * kChannelAlign + i;
      const bool last = i + next * kChannelAlign >= taps * kChannelAlign;
      pairs[word - words] = *word >> 16 | (last ? 0 : word[next * kChannelAlign]);
    }
  }
  return true;
}

constexpr int kMaxDepthTaps = 7;

struct DwconvArgs {
  DType dtype;
  const void* x;  // (N, D in, H in, W in, C)
  void* y;        // (N, D out, H out, W out, C)
  int64_t n, c;
  Axis h, w;
  const float* weight;   // packed by pack_taps
  const float* bias;     // padded C
  const void* residual;  // like y, added to the result, or null
  Axis d = {1, 1};       // depth, of a 3-D convolution; at most kMaxDepthTaps taps
  // Packed by pack_tap_pairs: bf16 x is multiplied with these, by sets with CNK_HAS_BF16. Or null.
  const float* pairs = nullptr;
  bool streaming = false;  // y is too large for the caches: it is stored past them
  // Elements from pixel to pixel of x and y, if these are some channels of wider pixels; 0: C.
  int64_t x_pixel = 0, y_pixel = 0;
};

// dw[i, j, c] = sum of dy[n, h, w, c] x[n, h S + (i - P) D, w S + (j - Q) D, c], P = KH / 2, Q = KW / 2, S the
// stride; db[c] = sum of dy. The axes are those of the convolution: x is its input, and `up` is 1. The depth of a
// 3-D convolution is one more axis of this kind.
struct DwconvWeightGradientArgs {
  DType dtype;
  const void *x, *dy;  // (N, D in, H in, W in, C), (N, D out, H out, W out, C)
  int64_t n, c;
  Axis h, w;
  float *dw, *db;   // (KD * KH * KW, padded C), padded C
  char* workspace;  // IsaOps::dwconv_weight_gradient_workspace bytes, 64-byte aligned
  Axis d = {1, 1};  // as in DwconvArgs
  int64_t x_pixel = 0, dy_pixel = 0;
};

struct LayernormArgs {
  DType dtype;
  const void* x;  // (rows, C)
  void* y;        // (rows, C)
  int64_t rows, c;
  float eps;
  Norm norm;
  const float *weight, *bias;  // padded C
};

struct LayernormBackwardArgs {
  DType dtype;
  const void *x, *dy;  // (rows, C)
  void* dx;            // (rows, C)
  int64_t rows, c;
  float eps;
  Norm norm;
  const float* weight;     // padded C
  float *dweight, *dbias;  // padded C
  char* workspace;         // IsaOps::layernorm_backward_workspace bytes, 64-byte aligned
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

struct GrnBackwardArgs {
  DType dtype;
  const void *x, *dy;  // (N, pixels, C)
  void* dx;
  int64_t n, pixels, c;
  float eps;
  const float* weight;     // padded C
  float *dweight, *dbias;  // padded C
  float* sums;             // workspace, 3 N * padded C
};

// A matrix packed for the products by IsaOps::pack_matrix.
struct PackedMatrix {
  const void* data;
  int64_t n, k;                   // out = in (rows, k) times matrix (k, n)
  DType dtype = DType::kFloat32;  // of the elements, for fp32 products; the others have bf16 elements
};

// The phases of `mlp`, for MlpArgs::phases: the convolution (or reading x), LN, W1 with GELU, GRN, W2 with
// all later steps, waiting for other threads.
enum MlpPhase : int { kConvolve, kNormalize, kFirstProduct, kGrn, kSecondProduct, kWait, kMlpPhases };

// The schedules that a caller of `mlp` may choose (mlp_plan.h). "Short" and "long": the rows that go through both
// products at a time. Columns are taken where their buffers fit and the image is not divided, otherwise what
// kByShape takes. The bits of the result are always the same.
enum MlpSchedule { kByShape = -1, kShort, kLong, kHalfTiles, kDoubleTiles, kSplitColumns, kMlpSchedules };

// block: dwconv -> norm -> W1 -> activation -> [GRN] -> W2 -> gamma
// -> drop scale -> + residual; mlp: the same without dwconv.
struct MlpArgs {
  DType dtype;  // of x, residual and out
  Products products;
  const void* x;         // (N, H, W, C): input of dwconv, or of LN if kernel_h is 0
  const void* residual;  // (N, H, W, C) or null
  void* out;             // (N, H, W, C); may not alias x
  int64_t n, h, w, c, hidden;
  int kernel_h, kernel_w;  // of dwconv; 0: no convolution
  int64_t dilation_h, dilation_w;
  const float *dw_weight, *dw_bias;  // packed by pack_taps; padded C
  const float* dw_pairs;             // as in DwconvArgs
  float eps, grn_eps;
  Norm norm;
  Activation activation;
  const float *norm_weight, *norm_bias;  // padded C, or (N, padded C)
  int64_t norm_step;                     // elements from those of a sample to the next: 0, or padded C
  PackedMatrix w1, w2;                   // (C -> hidden), (hidden -> C)
  const float* b1;                       // padded hidden
  const float* grn_weight;  // padded hidden, or null: no GRN; its bias is added to b2 as W2 * bias
  const float* b2;          // padded C
  const float* gamma;       // padded C
  const float* drop_scale;  // N or null
  // What is kept for the gradient, or null.
  void* kept_y;       // (N, H, W, C) in dtype: the convolution
  void* kept_hidden;  // (N, H, W, hidden) in kept_dtype: W1's product with its bias
  DType kept_dtype;
  int schedule = kByShape;  // an MlpSchedule
  // Time of the phases, or null: each thread adds its seconds to its own row of kMlpPhases.
  double* phases;
  char* workspace;  // IsaOps::mlp_workspace bytes, 64-byte aligned
};

// Gradients of out = residual + s * gamma * (W2 * GRN(gelu(u)) + b2), u = W1 * norm(x) + b1; gelu stands for any activation.
struct MlpBackwardArgs {
  DType dtype;  // of x, dout and dx
  Products products;
  const void *x, *dout;  // (N, pixels, C); x is the input of LN
  const void* hidden;    // (N, pixels, hidden) in hidden_dtype: u if the forward pass kept it, else null
  DType hidden_dtype;
  int64_t n, pixels, c, hidden_size;
  float eps, grn_eps;
  Norm norm;
  Activation activation;
  const float *norm_weight, *norm_bias;  // padded C
  PackedMatrix w1;                       // (C -> hidden); not needed if the hidden was kept
  PackedMatrix w2_back;                  // (C -> hidden): transposed, with gamma
  PackedMatrix w1_back;                  // (hidden -> C): transposed
  const float* b1;                       // padded hidden
  const float *grn_weight, *grn_bias;    // padded hidden, or null: no GRN
  const void* w2;                        // (C, hidden) in w2_dtype
  DType w2_dtype;
  const float *b2, *gamma;  // padded C
  const float* drop_scale;  // N or null
  bool weights;             // whether to compute dw1, dw2, db1, db2, dgamma
  void* dx;                 // (N, pixels, C) or null; then dnorm_* are not computed either
  void *dw1, *dw2;          // (hidden, C), (C, hidden), dense, in w2_dtype
  // fp32.
  float *db1, *db2, *dgamma;         // hidden, C, C
  float *dnorm_weight, *dnorm_bias;  // C
  float *dgrn_weight, *dgrn_bias;    // hidden
  char* workspace;                   // IsaOps::mlp_backward_workspace bytes, 64-byte aligned
};

// A norm, then a KxK convolution with stride K: the patch of K*K pixels is one row of the product.
struct DownsampleArgs {
  DType dtype, out_dtype;
  Products products;
  const void* x;  // (N, H, W, C)
  void* out;      // (N, H / K, W / K, D)
  int64_t n, h, w, c;
  int patch;
  float eps;
  Norm norm;
  const float *norm_weight, *norm_bias;  // padded C
  PackedMatrix weight;                   // (K * K * padded C -> D)
  const float* bias;                     // padded D
  char* workspace;                       // IsaOps::downsample_workspace bytes, 64-byte aligned
};

struct DownsampleBackwardArgs {
  DType dtype, out_dtype;  // of x and dx; of dout
  Products products;
  const void *x, *dout;  // (N, H, W, C), (N, H / K, W / K, D)
  int64_t n, h, w, c;
  int patch;
  float eps;
  Norm norm;
  const float *norm_weight, *norm_bias;  // padded C
  PackedMatrix weight_back;              // (D -> K * K * padded C)
  bool weights;                          // whether to compute dweight and dbias
  void* dx;                              // (N, H, W, C) or null; then dnorm_* are not computed either
  float *dweight, *dbias;                // (D, K * K * padded C), D
  float *dnorm_weight, *dnorm_bias;      // padded C
  char* workspace;                       // IsaOps::downsample_backward_workspace bytes, 64-byte aligned
};

struct IsaOps {
  void (*dwconv)(const DwconvArgs&, Team&);
  void (*dwconv_weight_gradient)(const DwconvWeightGradientArgs&, Team&);
  int64_t (*dwconv_weight_gradient_workspace)(const DwconvWeightGradientArgs&, int threads);
  void (*layernorm)(const LayernormArgs&, Team&);
  void (*layernorm_backward)(const LayernormBackwardArgs&, Team&);
  int64_t (*layernorm_backward_workspace)(const LayernormBackwardArgs&);
  void (*grn)(const GrnArgs&, Team&);
  void (*grn_backward)(const GrnBackwardArgs&, Team&);
  void (*mlp)(const MlpArgs&, Team&);
  int64_t (*mlp_workspace)(const MlpArgs&, int threads);
  void (*mlp_backward)(const MlpBackwardArgs&, Team&);
  int64_t (*mlp_backward_workspace)(const MlpBackwardArgs&, int threads);
  void (*downsample)(const DownsampleArgs&, Team&);
  int64_t (*downsample_workspace)(const DownsampleArgs&, int threads);
  void (*downsample_backward)(const DownsampleBackwardArgs&, Team&);
  int64_t (*downsample_backward_workspace)(const DownsampleBackwardArgs&, int threads);
  // Bytes of a packed (k, n) matrix, and the packing of w, row-major (n, k), as the weight of a Linear. Both
  // for w's dtype: for fp32 products the packed elements have it too.
  int64_t (*packed_bytes)(Products, DType, int64_t n, int64_t k);
  void (*pack_matrix)(Products, DType, const void* w, int64_t n, int64_t k, void* packed, Team&);
  // The same for w, row-major (k, n); row i is multiplied by scale[i] unless scale is null. The packed
  // elements are fp32 for fp32 products.
  void (*pack_transposed)(Products, DType, const void* w, int64_t n, int64_t k, const float* scale,
                          void* packed, Team&);
};

// Null if the instruction set is not part of this build.
const IsaOps* isa_ops(Isa isa);

#if defined(CNK_HAS_BF16)
namespace CNK_SHARED {
extern const IsaOps kOps;  // sets with products of bf16 pairs call these for all that they do not compile
}
#endif

}  // namespace cnk::cpu
