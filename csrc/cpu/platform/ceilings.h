// The highest rates of this machine, measured: arithmetic in registers and copies of memory. The benchmarks
// show which share of them a kernel reaches.
//
// The widest vectors of the machine are used, also when our kernels are forced to another instruction set.
#pragma once

#include <cstdint>

#include "cpu/platform/parallel.h"

namespace cnk::cpu {

// Multiply-adds of floats (a multiplication and an addition where there is no fused instruction), of pairs of
// bf16 (VDPBF16PS), and of tiles of bf16 on AMX (TDPBF16PS). The last two have fp32 sums.
enum class Arithmetic : int { kFmaFloat32 = 0, kDotBFloat16 = 1, kTileBFloat16 = 2 };
constexpr int kArithmeticCount = 3;

const char* arithmetic_name(Arithmetic kind);
bool arithmetic_supported(Arithmetic kind);
// Runs a supported kind on this thread. Returns the number
// of floating-point operations, two per multiply-add.
int64_t run_arithmetic(Arithmetic kind, int64_t iterations);

// How to copy: with the widest vectors; with stores that bypass the caches;
// with the string instruction, whose microcode need not read a line before it
// overwrites it. On other processors than x86 the last two copy with vectors.
enum class CopyMethod : int { kVectors = 0, kStreaming = 1, kString = 2 };
constexpr int kCopyMethodCount = 3;

// Each thread of the team copies its part.
void copy(CopyMethod method, const void* from, void* to, int64_t bytes, Team& team);

// Operations per second of a team of up to `threads` threads (parallel() decides). All threads start together
// and do the same amount of work, in bursts of 1 to 2 ms for `seconds` in all; the best burst counts.
double arithmetic_rate(Arithmetic kind, int threads, double seconds);
// The same for bytes read plus bytes written, with the best copy method. Each thread repeatedly copies one
// half of its own `bytes_per_thread` (at least 128) to the other half. A burst is at least one copy.
double copy_rate(int64_t bytes_per_thread, int threads, double seconds);

}  // namespace cnk::cpu
