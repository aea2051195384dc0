// bf16 matrix product on AMX tiles with fp32 sums and a fused epilogue.
//
// Operand A is stored as contiguous 1 KB tiles of 16 rows x 32 k; B as tiles of 32 k x 16 columns, pairs of k
// interleaved. A step is 2x2 tiles: 32 rows x 32 columns. The epilogue of the previous 32x32 result (bias,
// GELU, rounding: vector work) is dealt out between the tile products of the present one, since the tile unit
// and the vector units run side by side: for C = 96 the GELU alone takes as long as both products.
#pragma once

#include <immintrin.h>

#include "cpu/layernorm.h"
#include "cpu/tile_scope.h"
#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

struct GemmAmx {
  using Element = BFloat16;
  static constexpr int64_t kTile = 1024, kPanel = 32, kRowGrain = 32;

  static int64_t k_tiles(int64_t k) { return (k + 31) / 32; }
  static int64_t a_bytes(int64_t rows, int64_t k) { return (rows + 31) / 32 * 2 * k_tiles(k) * kTile; }
  static int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
  static int64_t packed_bytes(int64_t n, int64_t k) { return panels(n) * 2 * k_tiles(k) * kTile; }

  // Panel p holds, for each k tile, the tiles of columns 32p..32p+15 and 32p+16..32p+31.
  static void pack(const float* w, int64_t n, int64_t k, void* packed, Team& team) {
    int64_t begin, end;
    team.split(panels(n), 1, &begin, &end);
    for (int64_t panel = begin; panel < end; ++panel) {
      BFloat16* out = static_cast<BFloat16*>(packed) + panel * 2 * k_tiles(k) * (kTile / 2);
      for (int64_t column = 0; column < kPanel; ++column) {
        const int64_t j = panel * kPanel + column;
        BFloat16* tile = out + column / 16 * (kTile / 2) + column % 16 * 2;
        for (int64_t i = 0; i < k_tiles(k) * 32; ++i) {
          from_float(j < n && i < k ? w[j * k + i] : 0.0f, tile[i / 32 * kTile + i % 32 / 2 * 32 + i % 2]);
        }
      }
    }
  }

  static BFloat16* a_row(void* a, int64_t k, int64_t row, int64_t c) {
    return static_cast<BFloat16*>(a) + ((row / 16) * k_tiles(k) + c / 32) * (kTile / 2) + row % 16 * 32;
  }

  static void write_normalized(void* a, int64_t k, int64_t row, int64_t offset, const Norm& norm,
                               const float* x) {
    const Statistics s = statistics(norm, x);
    for (int64_t c = 0; c < pad_channels(norm.c); c += 32) {
      store_row(a_row(a, k, row, offset + c), normalize(norm, s, load(x + c), c),
                normalize(norm, s, load(x + c + 16), c + 16));
    }
  }

  static CNK_INLINE void store_row(BFloat16* row, Vec low, Vec high) {
    _mm512_store_si512(row, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }

  struct Block {
    Vec v[2];
  };
  static Block load_block(const void* a, int64_t k, int64_t row, int64_t c) {
    const BFloat16* p = a_row(const_cast<void*>(a), k, row, c);
    return {{load(p), load(p + 16)}};
  }
  static void store_block(void* a, int64_t k, int64_t row, int64_t c, const Block& b) {
    store_row(a_row(a, k, row, c), b.v[0], b.v[1]);
  }

  // epilogue(row, column, Vec low, Vec high) for rows [begin, end), begin a multiple of 32, and columns of
  // the panels.
  template <class Epilogue>
  static void product(const void* a, int64_t begin, int64_t end, const PackedMatrix& b, int64_t first_panel,
                      int64_t last_panel, const Epilogue& epilogue) {
    alignas(64) float result[2][32 * 32];
    const int64_t steps = k_tiles(b.k);
    Pending pending = {result[1], 0, 0, 0, 0};
    int parity = 0;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const char* tiles_b = static_cast<const char*>(b.data) + panel * 2 * steps * kTile;
      for (int64_t row = begin; row < end; row += 32) {
        const char* tiles_a = static_cast<const char*>(a) + row / 16 * steps * kTile;
        const int64_t rows = end - row < 32 ? end - row : 32;
        float* out = result[parity];
        if (rows > 16) {
          two_by_two(tiles_a, tiles_b, steps, out, pending, epilogue);
        } else {
          one_by_two(tiles_a, tiles_b, steps, out, pending, epilogue);
        }
        pending = {out, row, panel * kPanel, 0, rows};
        parity ^= 1;
      }
    }
    finish(pending, pending.rows, epilogue);
  }

 private:
  // A 32x32 result whose epilogue is under way: rows [done, rows) are left.
  struct Pending {
    const float* result;
    int64_t row, column, done, rows;
  };

  template <class Epilogue>
  static CNK_INLINE void finish(Pending& p, int64_t until, const Epilogue& epilogue) {
    if (until > p.rows) until = p.rows;
    for (; p.done < until; ++p.done) {
      const float* r = p.result + p.done * 32;
      epilogue(p.row + p.done, p.column, load(r), load(r + 16));
    }
  }

  template <class Epilogue>
  static __attribute__((noinline)) void two_by_two(const char* a, const char* b, int64_t steps, float* out,
                                                   Pending& pending, const Epilogue& epilogue) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const char* a_below = a + steps * kTile;
    const int64_t per_step = (32 + steps - 1) / steps;
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(6, b + 2 * s * kTile, 64);
      _tile_loadd(4, a + s * kTile, 64);
      _tile_loadd(7, b + (2 * s + 1) * kTile, 64);
      _tile_loadd(5, a_below + s * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      finish(pending, pending.done + per_step, epilogue);
    }
    finish(pending, 32, epilogue);
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
    _tile_stored(2, out + 16 * 32, 128);
    _tile_stored(3, out + 16 * 32 + 16, 128);
  }

  template <class Epilogue>
  static __attribute__((noinline)) void one_by_two(const char* a, const char* b, int64_t steps, float* out,
                                                   Pending& pending, const Epilogue& epilogue) {
    _tile_zero(0);
    _tile_zero(1);
    const int64_t per_step = (32 + steps - 1) / steps;
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(4, a + s * kTile, 64);
      _tile_loadd(6, b + 2 * s * kTile, 64);
      _tile_loadd(7, b + (2 * s + 1) * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      finish(pending, pending.done + per_step, epilogue);
    }
    finish(pending, 32, epilogue);
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
  }
};

}  // namespace cnk::cpu::CNK_ISA
