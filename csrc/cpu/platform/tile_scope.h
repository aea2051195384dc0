// The configuration of a thread's AMX tiles. Compiles for any x86: the instructions are inline assembly.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace cnk::cpu {

// Configures all eight tiles with 16 rows of 64 bytes. The tile configuration is state of the thread, which
// oneDNN uses too, so the previous one is restored.
class TileScope {
 public:
  CNK_INLINE TileScope() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = 16;
    }
    // Inline assembly, because g++ 12's _tile_loadconfig does
    // not tell the optimiser that it reads the structure.
    asm volatile("sttilecfg %0" : "=m"(saved_));
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  CNK_INLINE ~TileScope() { asm volatile("ldtilecfg %0" ::"m"(saved_)); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) {
    uint8_t bytes[64];
  } saved_;
};

}  // namespace cnk::cpu
