// The measurements of cpu/ceilings.cpp: the amounts of work, the copies, the rates. And affinity.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/affinity.h"
#include "cpu/ceilings.h"
#include "support.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
// Keeps the OpenMP runtime loaded if the linker drops libraries that nothing calls.
const int kOpenMpThreads = omp_get_max_threads();
#endif

using namespace cnk;
using namespace cnk::test;

namespace {

std::vector<Arithmetic> kinds() {
  std::vector<Arithmetic> found;
  for (int i = 0; i < kArithmeticCount; ++i) {
    if (arithmetic_supported(Arithmetic(i))) found.push_back(Arithmetic(i));
  }
  return found;
}

// Of one multiply-add instruction.
int64_t operations(Arithmetic kind) {
  const int64_t lanes = isa_supported(Isa::kAvx512) ? 16 : isa_supported(Isa::kAvx2) ? 8 : 4;
  if (kind == Arithmetic::kTileBFloat16) return 16 * 16 * 32 * 2;
  return kind == Arithmetic::kDotBFloat16 ? 16 * 2 * 2 : lanes * 2;
}

}  // namespace

TEST_CASE("every machine has fp32 arithmetic, and what the kernels use") {
  CHECK(arithmetic_supported(Arithmetic::kFmaFloat32));
  CHECK(arithmetic_supported(Arithmetic::kTileBFloat16) == isa_supported(Isa::kAmx));
  if (isa_supported(Isa::kAmx)) CHECK(arithmetic_supported(Arithmetic::kDotBFloat16));
  if (arithmetic_supported(Arithmetic::kDotBFloat16)) CHECK(isa_supported(Isa::kAvx512));
}

TEST_CASE("names of the kinds") {
  CHECK(std::string(arithmetic_name(Arithmetic::kFmaFloat32)) == "fma_fp32");
  CHECK(std::string(arithmetic_name(Arithmetic::kDotBFloat16)) == "dot_bf16");
  CHECK(std::string(arithmetic_name(Arithmetic::kTileBFloat16)) == "tile_bf16");
}

TEST_CASE("operations are counted") {
  for (Arithmetic kind : kinds()) {
    CAPTURE(arithmetic_name(kind));
    const int64_t once = run_arithmetic(kind, 1);
    const int64_t sums = once / operations(kind);
    CHECK(sums * operations(kind) == once);
    // Two instructions start in each cycle, and a sum is ready after 4; tiles: 16 cycles and 52.
    CHECK(sums >= (kind == Arithmetic::kTileBFloat16 ? 4 : 8));
    CHECK(sums <= 32);
    CHECK(run_arithmetic(kind, 0) == 0);
    for (int64_t iterations : {2, 3, 1000}) CHECK(run_arithmetic(kind, iterations) == iterations * once);
  }
}

TEST_CASE("copies are exact, around lines and registers, at every alignment") {
  for (int method = 0; method < kCopyMethodCount; ++method) {
    for (int64_t bytes : {0, 1, 15, 63, 64, 65, 127, 128, 255, 256, 257, 300, 1000, 4099, 70001}) {
      for (int64_t alignment : {1, 64}) {
        for (int threads : kTeams) {
          CAPTURE(method);
          CAPTURE(bytes);
          CAPTURE(alignment);
          CAPTURE(threads);
          Buffer from(bytes, 1), to(bytes, alignment);
          Random random{uint32_t(bytes)};
          for (int64_t i = 0; i < bytes; ++i) from.as<uint8_t>()[i] = uint8_t(random.bits());
          in_team(threads,
                  [&](Team& team) { copy(CopyMethod(method), from.as<void>(), to.as<void>(), bytes, team); });
          CHECK(std::memcmp(from.as<char>(), to.as<char>(), bytes) == 0);
        }
      }
    }
  }
}

TEST_CASE("a copy leaves what lies around") {
  for (int method = 0; method < kCopyMethodCount; ++method) {
    for (int64_t offset : {1, 13, 64, 100}) {
      for (int64_t bytes : {1, 100, 640, 1001}) {
        CAPTURE(method);
        CAPTURE(offset);
        CAPTURE(bytes);
        std::vector<char> from(bytes, 7), to(bytes + 2 * offset, 3);
        Team alone(0, 1, nullptr);
        copy(CopyMethod(method), from.data(), to.data() + offset, bytes, alone);
        CHECK(std::count(to.begin(), to.end(), 7) == bytes);
        CHECK(std::count(to.begin() + offset, to.begin() + offset + bytes, 7) == bytes);
      }
    }
  }
}

TEST_CASE("rates are finite numbers above zero, however short the time") {
  for (int threads : kTeams) {
    CAPTURE(threads);
    for (double seconds : {0.0, 0.01}) {
      CAPTURE(seconds);
      for (Arithmetic kind : kinds()) {
        CAPTURE(arithmetic_name(kind));
        const double rate = arithmetic_rate(kind, threads, seconds);
        CHECK(std::isfinite(rate));
        CHECK(rate > 0);
      }
      for (int64_t bytes : {128, 1000, 100'000, 5'000'000}) {
        CAPTURE(bytes);
        const double rate = copy_rate(bytes, threads, seconds);
        CHECK(std::isfinite(rate));
        CHECK(rate > 0);
      }
    }
  }
}

TEST_CASE("sizes of the caches") {
  int64_t last = 0;
  for (int level : {1, 2, 3}) {
    CAPTURE(level);
    const int64_t bytes = cache_bytes(level);
    CHECK(bytes >= 0);
    if (bytes > 0) CHECK(bytes >= last);
    last = std::max(last, bytes);
  }
  CHECK(cache_bytes(0) == 0);
  CHECK(cache_bytes(7) == 0);
  CHECK(l2_cache_bytes() == (cache_bytes(2) > 0 ? cache_bytes(2) : 1 << 20));
}

#if defined(__linux__)

namespace {

// Of the threads of a team, with fewer than 1024 CPUs.
std::vector<CpuMask> masks_of_team(int threads) {
  std::vector<CpuMask> masks(threads);
  in_team(threads, [&](Team& team) {
    cpu_set_t set;
    CPU_ZERO(&set);
    sched_getaffinity(0, sizeof set, &set);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) masks[team.rank()].push_back(cpu);
    }
  });
  return masks;
}

}  // namespace

TEST_CASE("affinity is set for each thread, and comes back") {
  const CpuMask all = masks_of_team(1)[0];
  REQUIRE(!all.empty());
  for (int threads : {1, 2, 5}) {
    CAPTURE(threads);
    const std::vector<CpuMask> before = masks_of_team(threads);
    std::vector<CpuMask> pinned;
    for (int r = 0; r < threads; ++r) pinned.push_back({all[r % all.size()]});
    CHECK(set_affinity(pinned) == before);
    CHECK(masks_of_team(threads) == pinned);
    CHECK(set_affinity(before) == pinned);
    CHECK(masks_of_team(threads) == before);
  }
}

TEST_CASE("a mask that the system refuses changes nothing") {
  const std::vector<CpuMask> before = masks_of_team(3);
  const int cpu = before[0][0];
  for (const CpuMask& refused : {CpuMask{}, CpuMask{100'000}}) {
    CHECK_THROWS_WITH_AS(set_affinity({{cpu}, {cpu}, refused}),
                         "set_affinity: the system refuses the mask of thread 2: Invalid argument",
                         std::runtime_error);
    CHECK(masks_of_team(3) == before);
  }
}

#endif
