// Transposes between NCHW and NHWC.

#include <doctest/doctest.h>

#include "cpu/layout.h"
#include "support.h"

using namespace cnk;
using namespace cnk::test;

TEST_CASE("every element reaches its place, around the tile of 16 and the strip of 32") {
  for (int64_t size : {2, 4}) {
    for (int64_t batch : {1, 3}) {
      for (int64_t rows : {1, 3, 15, 16, 17, 31, 32, 33, 48, 100}) {
        for (int64_t columns : {1, 5, 15, 16, 17, 33, 57 * 3}) {
          for (int threads : kTeams) {
            CAPTURE(size);
            CAPTURE(batch);
            CAPTURE(rows);
            CAPTURE(columns);
            CAPTURE(threads);
            const int64_t count = batch * rows * columns;
            Buffer from(count * size), to(count * size);
            Random random{uint32_t(count)};
            for (int64_t i = 0; i < count * size; ++i) from.as<uint8_t>()[i] = uint8_t(random.bits());
            in_team(threads, [&](Team& team) {
              transpose(from.as<void>(), to.as<void>(), batch, rows, columns, size, team);
            });
            int64_t wrong = 0;
            for (int64_t i = 0; i < count; ++i) {
              const int64_t b = i / (rows * columns), r = i / columns % rows, c = i % columns;
              const int64_t target = b * rows * columns + c * rows + r;
              wrong += std::memcmp(from.as<char>() + i * size, to.as<char>() + target * size, size) != 0;
            }
            CHECK(wrong == 0);
          }
        }
      }
    }
  }
}
