// From an instruction set to its table of kernels. CNK_HAS_* say what the build compiled.

#include "cpu/ops.h"

namespace cnk::cpu {

#if defined(CNK_HAS_PORTABLE)
namespace portable {
extern const IsaOps kOps;
}
#endif
#if defined(CNK_HAS_AVX2)
namespace avx2 {
extern const IsaOps kOps;
}
#endif
#if defined(CNK_HAS_AVX512)
namespace avx512 {
extern const IsaOps kOps;
}
#endif
#if defined(CNK_HAS_AVX512BF16)
namespace avx512bf16 {
extern const IsaOps kOps;
}
#endif
#if defined(CNK_HAS_AMX)
namespace amx {
extern const IsaOps kOps;
}
#endif
#if defined(CNK_HAS_NEON_BF16)
namespace neon_bf16 {
extern const IsaOps kOps;
}
#endif

const IsaOps* isa_ops(Isa isa) {
  switch (isa) {
#if defined(CNK_HAS_PORTABLE)
    case Isa::kPortable:
      return &portable::kOps;
#endif
#if defined(CNK_HAS_AVX2)
    case Isa::kAvx2:
      return &avx2::kOps;
#endif
#if defined(CNK_HAS_AVX512)
    case Isa::kAvx512:
      return &avx512::kOps;
#endif
#if defined(CNK_HAS_AVX512BF16)
    case Isa::kAvx512Bf16:
      return &avx512bf16::kOps;
#endif
#if defined(CNK_HAS_AMX)
    case Isa::kAmx:
      return &amx::kOps;
#endif
#if defined(CNK_HAS_NEON_BF16)
    case Isa::kNeonBf16:
      return &neon_bf16::kOps;
#endif
    default:
      return nullptr;
  }
}

}  // namespace cnk::cpu
