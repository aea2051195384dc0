// What this machine does at best, measured: arithmetic from registers, and copies of memory. The benchmarks
// say which share of it a kernel reaches.
//
// These are the machine's ceilings, in the widest vectors that it has, whatever instruction set our kernels
// are forced to.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace cnk::cpu {

// Multiply-adds of floats (a multiplication and an addition where there is no fused one), of pairs of bf16
// (VDPBF16PS), and of tiles of bf16 on AMX (TDPBF16PS); the last two with fp32 sums.
enum class Arithmetic : int { kFmaFloat32 = 0, kDotBFloat16 = 1, kTileBFloat16 = 2 };
constexpr int kArithmeticCount = 3;

const char* arithmetic_name(Arithmetic kind);
bool arithmetic_supported(Arithmetic kind);
// Runs a supported kind on this thread; returns the floating-point operations done, two for each
// multiply-add.
int64_t run_arithmetic(Arithmetic kind, int64_t iterations);

// How to copy: with the widest vectors; with stores that go round the caches; with the string instruction,
// whose microcode need not read a line that it is about to overwrite. The last two are x86's, vectors
// elsewhere.
enum class CopyMethod : int { kVectors = 0, kStreaming = 1, kString = 2 };
constexpr int kCopyMethodCount = 3;

// Each thread of the team copies its part.
void copy(CopyMethod method, const void* from, void* to, int64_t bytes, Team& team);

// Operations per second of a team of up to `threads` threads (parallel() decides) that start together and all
// do the same amount: the best of bursts of 1 to 2 ms, run for `seconds` in all.
double arithmetic_rate(Arithmetic kind, int threads, double seconds);
// The same for bytes read plus bytes written, each thread copying one half of `bytes_per_thread` (at least
// 128) of its own to the other half, again and again: the best method's. A burst is one copy where that takes
// longer.
double copy_rate(int64_t bytes_per_thread, int threads, double seconds);

}  // namespace cnk::cpu
