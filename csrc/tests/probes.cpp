// From an instruction set to its probe, as cpu/dispatch.cpp does it for the kernels.

#include "probe.h"

namespace cnk::cpu {

#if defined(CNK_HAS_PORTABLE)
namespace portable {
extern const test::Probe kProbe;
}
#endif
#if defined(CNK_HAS_AVX2)
namespace avx2 {
extern const test::Probe kProbe;
}
#endif
#if defined(CNK_HAS_AVX512)
namespace avx512 {
extern const test::Probe kProbe;
}
#endif
#if defined(CNK_HAS_AVX512BF16)
namespace avx512bf16 {
extern const test::Probe kProbe;
}
#endif
#if defined(CNK_HAS_AMX)
namespace amx {
extern const test::Probe kProbe;
}
#endif
#if defined(CNK_HAS_NEON_BF16)
namespace neon_bf16 {
extern const test::Probe kProbe;
}
#endif
#if defined(CNK_HAS_AVX512BF16_EMULATED)
namespace avx512bf16_emulated {
extern const IsaOps kOps;
extern const test::Probe kProbe;
}  // namespace avx512bf16_emulated
#endif
#if defined(CNK_HAS_AMX_EMULATED)
namespace amx_emulated {
extern const IsaOps kOps;
extern const test::Probe kProbe;
}  // namespace amx_emulated
#endif

}  // namespace cnk::cpu

namespace cnk::test {

const Probe* isa_probe(cpu::Isa isa) {
  switch (isa) {
#if defined(CNK_HAS_PORTABLE)
    case cpu::Isa::kPortable:
      return &cpu::portable::kProbe;
#endif
#if defined(CNK_HAS_AVX2)
    case cpu::Isa::kAvx2:
      return &cpu::avx2::kProbe;
#endif
#if defined(CNK_HAS_AVX512)
    case cpu::Isa::kAvx512:
      return &cpu::avx512::kProbe;
#endif
#if defined(CNK_HAS_AVX512BF16)
    case cpu::Isa::kAvx512Bf16:
      return &cpu::avx512bf16::kProbe;
#endif
#if defined(CNK_HAS_AMX)
    case cpu::Isa::kAmx:
      return &cpu::amx::kProbe;
#endif
#if defined(CNK_HAS_NEON_BF16)
    case cpu::Isa::kNeonBf16:
      return &cpu::neon_bf16::kProbe;
#endif
    default:
      return nullptr;
  }
}

Emulated isa_emulated(cpu::Isa isa) {
#if defined(CNK_HAS_AVX512BF16_EMULATED)
  if (isa == cpu::Isa::kAvx512Bf16)
    return {&cpu::avx512bf16_emulated::kOps, &cpu::avx512bf16_emulated::kProbe};
#endif
#if defined(CNK_HAS_AMX_EMULATED)
  if (isa == cpu::Isa::kAmx) return {&cpu::amx_emulated::kOps, &cpu::amx_emulated::kProbe};
#endif
  (void)isa;
  return {nullptr, nullptr};
}

}  // namespace cnk::test
