#include "cpu/isa.h"

#include <unistd.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#endif

namespace cnk::cpu {

namespace {

#if defined(__x86_64__)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Linux hands out the 8 KB of tile state only to processes that ask for it
// (Documentation/arch/x86/xstate.rst).
bool tile_permission() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  if (!has_avx512() || !__builtin_cpu_supports("avx512bf16")) return false;
  unsigned eax = 7, ebx, ecx = 0, edx;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool tile = edx >> 24 & 1, bf16 = edx >> 22 & 1;
  return tile && bf16 && tile_permission();
}

#endif

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "amx"};
  return kNames[int(isa)];
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  static const bool supported[kIsaCount] = {true, has_avx2(), has_avx512(), has_amx()};
  return supported[int(isa)];
#else
  return isa == Isa::kPortable;
#endif
}

int64_t l2_cache_bytes() {
  static const int64_t bytes = [] {
    long found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return found > 0 ? int64_t{found} : int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace cnk::cpu
