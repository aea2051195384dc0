#include "cpu/platform/isa.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace cnk::cpu {

namespace {

#if defined(__x86_64__)

bool has_f16c() {  // clang 15's __builtin_cpu_supports does not know "f16c"
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives the 8 KB of tile state only to processes that request it (Documentation/arch/x86/xstate.rst).
bool tile_permission() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  if (!has_avx512_bf16()) return false;
  unsigned eax = 7, ebx, ecx = 0, edx;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool tile = edx >> 24 & 1, bf16 = edx >> 22 & 1;
  return tile && bf16 && tile_permission();
}

#elif defined(__aarch64__)

bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which old headers lack
  return getauxval(AT_HWCAP2) & kBf16;
#else
  return false;
#endif
}

#endif

// The size that Linux reports for CPU 0's cache; 0 if there is no such cache, or no Linux.
int64_t cache_bytes_of_linux(int level) {
#if defined(__linux__)
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const auto read = [&folder](const char* name, const char* format, auto* value) {
      std::FILE* file = std::fopen((folder + name).c_str(), "r");
      if (!file) return false;
      const bool found = std::fscanf(file, format, value) == 1;
      std::fclose(file);
      return found;
    };
    int of_level = 0;
    char type = 0;  // of Data, Instruction, Unified
    long long kilobytes = 0;
    if (read("level", "%d", &of_level) && of_level == level && read("type", "%c", &type) && type != 'I' &&
        read("size", "%lldK", &kilobytes)) {
      return int64_t{kilobytes} * 1024;
    }
  }
#endif
  (void)level;
  return 0;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512bf16", "amx", "neon_bf16"};
  return kNames[int(isa)];
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  static const bool supported[kIsaCount] = {true, has_avx2(), has_avx512(), has_avx512_bf16(), has_amx()};
#elif defined(__aarch64__)
  static const bool supported[kIsaCount] = {true, false, false, false, false, has_neon_bf16()};
#else
  static const bool supported[kIsaCount] = {true};
#endif
  return supported[int(isa)];
}

int64_t cache_bytes(int level) {
  // Before sysconf, which reports 384 MB for the 32 MB of L3 of an AMD Zen 5 (glibc 2.36, in a virtual
  // machine) and nothing on Arm.
  if (const int64_t bytes = cache_bytes_of_linux(level)) return bytes;
  long found = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  constexpr int kNames[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  if (level >= 1 && level <= 3) found = sysconf(kNames[level - 1]);
#endif
  return found > 0 ? int64_t{found} : 0;
}

int64_t l2_cache_bytes() {
  static const int64_t bytes = [] {
    const int64_t found = cache_bytes(2);
    return found > 0 ? found : int64_t{1} << 20;
  }();
  return bytes;
}

int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    for (int level : {3, 2}) {
      if (const int64_t found = cache_bytes(level)) return found;
    }
    return int64_t{32} << 20;
  }();
  return bytes;
}

int64_t last_cache_bytes(int threads) { return std::min(last_cache_bytes(), int64_t{threads} << 24); }

}  // namespace cnk::cpu
