// The kernels of one instruction set, as a table; compiled once per instruction set like the kernels
// themselves.

#include "cpu/gemm_f32.h"
#if defined(__AMX_BF16__)
#include "cpu/gemm_amx.h"
#endif

namespace cnk::cpu::CNK_ISA {

void dwconv(const DwconvArgs&, Team&, char* workspace);
int64_t dwconv_workspace(const DwconvArgs&, int threads);
void layernorm(const LayernormArgs&, Team&);
void grn(const GrnArgs&, Team&);
void mlp(const MlpArgs&, Team&);
int64_t mlp_workspace(const MlpArgs&, int threads);
void downsample(const DownsampleArgs&, Team&);
int64_t downsample_workspace(const DownsampleArgs&, int threads);

namespace {

int64_t packed_bytes(Products products, int64_t n, int64_t k) {
#if defined(__AMX_BF16__)
  if (products == Products::kAmxBFloat16) return GemmAmx::packed_bytes(n, k);
#endif
  (void)products;
  return GemmF32::packed_bytes(n, k);
}

void pack_matrix(Products products, const float* w, int64_t n, int64_t k, void* packed, Team& team) {
#if defined(__AMX_BF16__)
  if (products == Products::kAmxBFloat16) return GemmAmx::pack(w, n, k, packed, team);
#endif
  (void)products;
  GemmF32::pack(w, n, k, packed, team);
}

}  // namespace

extern const IsaOps kOps = {dwconv,     dwconv_workspace,     layernorm,    grn,        mlp, mlp_workspace,
                            downsample, downsample_workspace, packed_bytes, pack_matrix};

}  // namespace cnk::cpu::CNK_ISA
