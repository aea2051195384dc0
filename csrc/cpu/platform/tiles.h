// The instructions on AMX tiles. With CNK_EMULATE_TILES tiles are arrays in memory, so that the tests run
// what AMX machines run on any machine with AVX-512 (csrc/tests/probe.h).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/ops.h"
#include "cpu/platform/tile_scope.h"
#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

#if defined(CNK_EMULATE_TILES)

struct TileScope {
  TileScope() {}  // not trivial, so that the compiler does not warn of unused objects
};

namespace detail {
inline thread_local float tiles[8][16][16];
}

template <int TILE>
void tile_zero() {
  std::memset(detail::tiles[TILE], 0, sizeof detail::tiles[TILE]);
}

template <int TILE>
void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(detail::tiles[TILE][r], static_cast<const char*>(from) + r * stride, 64);
}

template <int TILE>
void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, detail::tiles[TILE][r], 64);
}

// TDPBF16PS adds the pairs of a row one after the other, as 16 VDPBF16PS do.
template <int SUM, int A, int B>
void tile_multiply() {
  for (int r = 0; r < 16; ++r) {
    Vec sum = load(detail::tiles[SUM][r]);
    for (int pair = 0; pair < 16; ++pair) {
      int32_t word;
      std::memcpy(&word, &detail::tiles[A][r][pair], 4);
      sum = dot_bf16(sum, (Vec)_mm512_set1_epi32(word), load(detail::tiles[B][pair]));
    }
    store(detail::tiles[SUM][r], sum);
  }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(tile) tile_zero<tile>()
#define _tile_loadd(tile, from, stride) tile_load<tile>(from, stride)
#define _tile_stored(tile, to, stride) tile_store<tile>(to, stride)
#define _tile_dpbf16ps(sum, a, b) tile_multiply<sum, a, b>()

#endif

}  // namespace cnk::cpu::CNK_ISA
