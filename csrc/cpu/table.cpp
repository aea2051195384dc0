// The kernels of one instruction set, as a table; compiled once per instruction set like the kernels
// themselves.

#include "cpu/gemm_f32.h"
#if defined(CNK_HAS_BF16)
#include "cpu/gemm_bf16.h"
#endif

namespace cnk::cpu::CNK_ISA {

void dwconv(const DwconvArgs&, Team&);
void dwconv_weight_gradient(const DwconvWeightGradientArgs&, Team&);
int64_t dwconv_weight_gradient_workspace(const DwconvWeightGradientArgs&, int threads);
void layernorm(const LayernormArgs&, Team&);
void layernorm_backward(const LayernormBackwardArgs&, Team&);
int64_t layernorm_backward_workspace(const LayernormBackwardArgs&);
void grn(const GrnArgs&, Team&);
void grn_backward(const GrnBackwardArgs&, Team&);
void mlp(const MlpArgs&, Team&);
int64_t mlp_workspace(const MlpArgs&, int threads);
void mlp_backward(const MlpBackwardArgs&, Team&);
int64_t mlp_backward_workspace(const MlpBackwardArgs&, int threads);
void downsample(const DownsampleArgs&, Team&);
int64_t downsample_workspace(const DownsampleArgs&, int threads);
void downsample_backward(const DownsampleBackwardArgs&, Team&);
int64_t downsample_backward_workspace(const DownsampleBackwardArgs&, int threads);

namespace {

int64_t packed_bytes(Products products, int64_t n, int64_t k) {
#if defined(CNK_HAS_BF16)
  if (products == Products::kBFloat16) return GemmBf16::packed_bytes(n, k);
#endif
  (void)products;
  return GemmF32::packed_bytes(n, k);
}

void pack_matrix(Products products, DType dtype, const void* w, int64_t n, int64_t k, void* packed,
                 Team& team) {
#if defined(CNK_HAS_BF16)
  if (products == Products::kBFloat16) {
    return with_type(
        dtype, [&](auto type) { GemmBf16::pack(static_cast<const decltype(type)*>(w), n, k, packed, team); });
  }
#endif
  (void)products;
  with_type(dtype,
            [&](auto type) { GemmF32::pack(static_cast<const decltype(type)*>(w), n, k, packed, team); });
}

void pack_transposed(Products products, DType dtype, const void* w, int64_t n, int64_t k, const float* scale,
                     void* packed, Team& team) {
#if defined(CNK_HAS_BF16)
  if (products == Products::kBFloat16) {
    return with_type(dtype, [&](auto type) {
      GemmBf16::pack_transposed(static_cast<const decltype(type)*>(w), n, k, scale, packed, team);
    });
  }
#endif
  (void)products;
  with_type(dtype, [&](auto type) {
    GemmF32::pack_transposed(static_cast<const decltype(type)*>(w), n, k, scale, packed, team);
  });
}

}  // namespace

extern const IsaOps kOps = {.dwconv = dwconv,
                            .dwconv_weight_gradient = dwconv_weight_gradient,
                            .dwconv_weight_gradient_workspace = dwconv_weight_gradient_workspace,
                            .layernorm = layernorm,
                            .layernorm_backward = layernorm_backward,
                            .layernorm_backward_workspace = layernorm_backward_workspace,
                            .grn = grn,
                            .grn_backward = grn_backward,
                            .mlp = mlp,
                            .mlp_workspace = mlp_workspace,
                            .mlp_backward = mlp_backward,
                            .mlp_backward_workspace = mlp_backward_workspace,
                            .downsample = downsample,
                            .downsample_workspace = downsample_workspace,
                            .downsample_backward = downsample_backward,
                            .downsample_backward_workspace = downsample_backward_workspace,
                            .packed_bytes = packed_bytes,
                            .pack_matrix = pack_matrix,
                            .pack_transposed = pack_transposed};

}  // namespace cnk::cpu::CNK_ISA
