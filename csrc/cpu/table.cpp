// The table of the kernels of one instruction set. Compiled once per instruction set, like the kernels.

#include "cpu/gemm/gemm.h"
#include "cpu/rows.h"

namespace cnk::cpu {

namespace CNK_CONVERTS {
void dwconv(const DwconvArgs&, Team&);
void layernorm(const LayernormArgs&, Team&);
void layernorm_backward(const LayernormBackwardArgs&, Team&);
void grn(const GrnArgs&, Team&);
void grn_backward(const GrnBackwardArgs&, Team&);
}  // namespace CNK_CONVERTS

namespace CNK_SHARED {
int64_t dwconv_weight_gradient_workspace(const DwconvWeightGradientArgs&, int threads);
int64_t layernorm_backward_workspace(const LayernormBackwardArgs&);
}  // namespace CNK_SHARED

namespace CNK_DOTS {
void dwconv_weight_gradient(const DwconvWeightGradientArgs&, Team&);
}  // namespace CNK_DOTS

namespace CNK_ISA {

void mlp(const MlpArgs&, Team&);
int64_t mlp_workspace(const MlpArgs&, int threads);
void mlp_backward(const MlpBackwardArgs&, Team&);
int64_t mlp_backward_workspace(const MlpBackwardArgs&, int threads);
void downsample(const DownsampleArgs&, Team&);
int64_t downsample_workspace(const DownsampleArgs&, int threads);
void downsample_backward(const DownsampleBackwardArgs&, Team&);
int64_t downsample_backward_workspace(const DownsampleBackwardArgs&, int threads);

namespace {

int64_t packed_bytes([[maybe_unused]] Products products, DType dtype, int64_t n, int64_t k) {
  CNK_SHARED_UNLESS(products == Products::kBFloat16, packed_bytes, products, dtype, n, k);
  return Gemm::packed_bytes(n, k, dtype);
}

void pack_matrix([[maybe_unused]] Products products, DType dtype, const void* w, int64_t n, int64_t k,
                 void* packed, Team& team) {
  CNK_SHARED_UNLESS(products == Products::kBFloat16, pack_matrix, products, dtype, w, n, k, packed, team);
  with_type(dtype, [&](auto type) { Gemm::pack(static_cast<const decltype(type)*>(w), n, k, packed, team); });
}

void pack_transposed([[maybe_unused]] Products products, DType dtype, const void* w, int64_t n, int64_t k,
                     const float* scale, void* packed, Team& team) {
  CNK_SHARED_UNLESS(products == Products::kBFloat16, pack_transposed, products, dtype, w, n, k, scale, packed,
                    team);
  with_type(dtype, [&](auto type) {
    Gemm::pack_transposed(static_cast<const decltype(type)*>(w), n, k, scale, packed, team);
  });
}

}  // namespace

extern const IsaOps kOps = {.dwconv = CNK_CONVERTS::dwconv,
                            .dwconv_weight_gradient = CNK_DOTS::dwconv_weight_gradient,
                            .dwconv_weight_gradient_workspace = CNK_SHARED::dwconv_weight_gradient_workspace,
                            .layernorm = CNK_CONVERTS::layernorm,
                            .layernorm_backward = CNK_CONVERTS::layernorm_backward,
                            .layernorm_backward_workspace = CNK_SHARED::layernorm_backward_workspace,
                            .grn = CNK_CONVERTS::grn,
                            .grn_backward = CNK_CONVERTS::grn_backward,
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

}  // namespace CNK_ISA
}  // namespace cnk::cpu
