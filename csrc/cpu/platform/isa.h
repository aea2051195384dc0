// The instruction sets that the kernels are compiled for, slowest first, and those of this machine.
#pragma once

#include <cstdint>

namespace cnk::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kNeonBf16 = 5 };
constexpr int kIsaCount = 6;

const char* isa_name(Isa isa);
// Compiled into this build, present in this CPU, and enabled by the operating system.
bool isa_supported(Isa isa);

// Bytes of the L1 data, L2 or L3 cache (level 1, 2, 3) that a core uses; 0 if unknown.
int64_t cache_bytes(int level);
// Bytes of a core's L2 cache; 1 MB if unknown.
int64_t l2_cache_bytes();
// Bytes of the L3 that the core uses, or of its L2 if there is none; 32 MB if unknown.
int64_t last_cache_bytes();
// What `threads` cores can count on of it: 16 MB each. A Xeon reports 300 MB, which 60 cores share.
int64_t last_cache_bytes(int threads);

}  // namespace cnk::cpu
