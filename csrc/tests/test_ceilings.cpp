// The copies whose rate cpu/platform/ceilings.cpp measures. (Rates, caches and affinity: tests/backends/test_ceilings.py.)

#include <doctest/doctest.h>

#include <cstring>

#include "cpu/platform/ceilings.h"
#include "support.h"

using namespace cnk;
using namespace cnk::test;

TEST_CASE("copies are exact, around lines and registers, at every alignment") {
  for (int method = 0; method < kCopyMethodCount; ++method) {
    for (int64_t bytes : {0, 1, 15, 63, 64, 65, 127, 128, 255, 256, 257, 300, 1000, 4099, 70001}) {
      for (int64_t alignment : {1, 64}) {
        for (int threads : {1, 2, 3, 5}) {
          INFO("method ", method, ", bytes ", bytes, ", alignment ", alignment, ", threads ", threads);
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
