// bf16 matrix product with fp32 sums and a fused epilogue: on AMX tiles, or by VDPBF16PS without AMX.
//
// Both read the same operands. A is stored as contiguous 1 KB tiles of 16 rows x 32 k; B as tiles of 32 k x
// 16 columns, with pairs of k interleaved, so that a 32-bit word of either is a pair of k. A step is 2x2
// tiles: 32 rows x 32 columns.
//
// AMX: the epilogue of an earlier 32x32 result (bias, GELU, rounding: vector work) is distributed between the tile
// products of the present one, because the tile unit and the vector units run at the same time. A load from where a
// tile was stored waits until the tile has left the store buffer. So short products (kShort), whose GELU takes longer
// than they do, finish the result before the previous one, and a part of it after each product. Longer ones finish
// the previous one, some rows after each step: a third result would take 4 KB of the L1 that their operands fill.
// Cycles: docs/cpu_kernels.md, "AMX tiles". VDPBF16PS: 8 rows x 2 registers of sums; pairs of A
// are broadcast from memory.
#pragma once

#include <immintrin.h>

#include "cpu/gemm/epilogue.h"
#include "cpu/layernorm.h"
#include "cpu/platform/prefetch.h"
#include "cpu/platform/tiles.h"
#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

struct GemmBf16 {
  using Element = BFloat16;
  static constexpr int64_t kTile = 1024, kPanel = 32, kRowGrain = 16;

#if defined(CNK_HAS_TILES)
  using Scope = TileScope;
  static constexpr int64_t kBlock = 32;  // rows of A that are multiplied with a panel at a time
  static constexpr int64_t kShort = 8;   // steps of products that are shorter than their epilogues
#else
  struct Scope {};
  static constexpr int64_t kBlock = 8;
#endif

  static int64_t k_tiles(int64_t k) { return (k + 31) / 32; }
  // Whole tiles of 16 rows; rows may only be split between tiles (kRowGrain).
  static int64_t a_bytes(int64_t rows, int64_t k) { return (rows + 15) / 16 * k_tiles(k) * kTile; }
  static int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
  static int64_t packed_bytes(int64_t n, int64_t k, DType = DType::kBFloat16) {
    return panels(n) * 2 * k_tiles(k) * kTile;
  }

  // --- Operand B. Panel p holds, for each k tile, the tiles of columns 32p..32p+15 and 32p+16..32p+31. ---

  static BFloat16* b_tile(void* packed, int64_t k, int64_t panel, int64_t k_tile, int half) {
    return static_cast<BFloat16*>(packed) + ((panel * k_tiles(k) + k_tile) * 2 + half) * (kTile / 2);
  }

  // From w (n, k), row-major: rows of w become columns of B.
  template <class T>
  static void pack(const T* w, int64_t n, int64_t k, void* packed, Team& team) {
    int64_t begin, end;
    team.split(panels(n) * 2, 1, &begin, &end);
    for (int64_t half = begin; half < end; ++half) {
      for (int64_t tile = 0; tile < k_tiles(k); ++tile) {
        Vec rows[16];
        unroll<16>([&](auto r) {
          const int64_t j = half * 16 + r.value;
          const T* row = w + j * k;
          rows[r.value] =
              j < n ? pairs_bf16(load_channels(row, tile * 32, k), load_channels(row, tile * 32 + 16, k))
                    : Vec{};
        });
        transpose(rows);
        float* out = reinterpret_cast<float*>(b_tile(packed, k, half / 2, tile, half % 2));
        unroll<16>([&](auto r) { store(out + r.value * 16, rows[r.value]); });
      }
    }
  }

  // From w (k, n), row-major, row i times scale[i] if scale is not null.
  template <class T>
  static void pack_transposed(const T* w, int64_t n, int64_t k, const float* scale, void* packed,
                              Team& team) {
    int64_t begin, end;
    team.split(panels(n), 1, &begin, &end);
    for (int64_t tile = 0; tile < k_tiles(k); ++tile) {  // rows of w are read along, not across
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t pair = 0; pair < 16; ++pair) {
          Vec rows[2];
          unroll<2>([&](auto r) {
            const int64_t i = tile * 32 + pair * 2 + r.value;
            const auto read = [&](int64_t j) {
              const Vec v = load_channels(w + i * n, j, n);
              return scale ? v * scale[i] : v;
            };
            rows[r.value] = i < k ? pairs_bf16(read(panel * kPanel), read(panel * kPanel + 16)) : Vec{};
          });
          store_pair(packed, k, panel, tile, pair, rows[0], rows[1]);
        }
      }
    }
  }

  // --- Operand A. ---

  static BFloat16* a_row(void* a, int64_t k, int64_t row, int64_t c) {
    return static_cast<BFloat16*>(a) + ((row / 16) * k_tiles(k) + c / 32) * (kTile / 2) + row % 16 * 32;
  }

  static CNK_INLINE void store_row(BFloat16* row, Vec low, Vec high) {
    _mm512_store_si512(row, (__m512i)pairs_bf16(low, high));
  }

  static Block load_block(const void* a, int64_t k, int64_t row, int64_t c) {
    const BFloat16* p = a_row(const_cast<void*>(a), k, row, c);
    return {{load(p), load(p + 16)}};
  }
  static void store_block(void* a, int64_t k, int64_t row, int64_t c, const Block& b) {
    store_row(a_row(a, k, row, c), b.v[0], b.v[1]);
  }

  // --- Products whose k are the rows of an operand A: gradients of weights. ---

  // Rows [begin, end) of a (rows x columns) become rows `to`... of B (all_rows x columns). begin and to are
  // multiples of 32, and rows up to the next multiple of 32 must be zero.
  static void rows_to_b(const void* a, int64_t columns, int64_t begin, int64_t end, void* packed,
                        int64_t all_rows, int64_t to) {
    for (int64_t r = begin; r < end; r += 32) {
      for (int64_t panel = 0; panel < panels(columns); ++panel) {
        for (int64_t pair = 0; pair < 16; ++pair) {
          const float* first = reinterpret_cast<const float*>(
              a_row(const_cast<void*>(a), columns, r + 2 * pair, panel * kPanel));
          store_pair(packed, all_rows, panel, (to + r - begin) / 32, pair, load(first), load(first + 16));
        }
      }
    }
  }

  // The same rows become columns of A (columns x all_rows).
  static void rows_to_transposed_a(const void* a, int64_t columns, int64_t begin, int64_t end, void* out,
                                   int64_t all_rows, int64_t to) {
    for (int64_t r = begin; r < end; r += 32) {
      for (int64_t c = 0; c < columns; c += 32) {
        Vec low[16], high[16];
        for (int pair = 0; pair < 16; ++pair) {
          const float* first =
              reinterpret_cast<const float*>(a_row(const_cast<void*>(a), columns, r + 2 * pair, c));
          interleave(load(first), load(first + 16), &low[pair], &high[pair]);
        }
        transpose(low);
        transpose(high);
        float* below = reinterpret_cast<float*>(a_row(out, all_rows, c, to + r - begin));
        float* above = reinterpret_cast<float*>(a_row(out, all_rows, c + 16, to + r - begin));
        unroll<16>([&](auto i) {
          store(below + i.value * 16, low[i.value]);
          store(above + i.value * 16, high[i.value]);
        });
      }
    }
  }

  // --- The product of rows [begin, end) (begin a multiple of 16) and the panels. ---

  template <class Epilogue>
  static void product(const void* a, int64_t begin, int64_t end, const PackedMatrix& b, int64_t first_panel,
                      int64_t last_panel, const Epilogue& epilogue) {
    const int64_t steps = k_tiles(b.k), rows = end - begin;
    if (rows <= 0) return;
    const char* first = static_cast<const char*>(a) + begin / 16 * steps * kTile;
    const int64_t blocks = (rows + kBlock - 1) / kBlock, lines = 2 * kTile / 64 / blocks + 1;
    // The sums pass through memory to the epilogue, which
    // would take the registers that they need (gemm_f32.h).
#if defined(CNK_HAS_TILES)
    alignas(64) float sums[3][kBlock * 32];
    Result results[3] = {{sums[0], 0, 0, 0}, {sums[1], 0, 0, 0}, {sums[2], 0, 0, 0}};
    const int delay = steps <= kShort ? 2 : 1;
    int now = 0, before = 1;  // results are a ring of delay + 1
#else
    alignas(64) float out[kBlock * 32];
#endif
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const char* tiles_b = static_cast<const char*>(b.data) + panel * 2 * steps * kTile;
      const char* next = tiles_b + 2 * steps * kTile;
      for (int64_t block = 0; block < blocks; ++block) {
        const Ahead ahead = {next + block * lines * steps * 64, lines};
#if defined(CNK_HAS_TILES)
        const int64_t row = block * kBlock, height = rows - row < kBlock ? rows - row : kBlock;
        const char* tiles_a = first + row / 16 * steps * kTile;
        (height > 16 ? by_two<true, Epilogue> : by_two<false, Epilogue>)(tiles_a, tiles_b, steps, ahead,
                                                                         sums[now], results[before],
                                                                         epilogue);
        results[now].row = begin + row;
        results[now].column = panel * kPanel;
        results[now].rows = height;
        now = before;
        before = before == delay ? 0 : before + 1;
#else
        // Blocks of nearly equal height, not full blocks and a remainder: 49 rows are 7 x 7, not 6 x 8 + 1.
        const int64_t row = rows * block / blocks, height = rows * (block + 1) / blocks - row;
        const char* rows_a = first + row / 16 * steps * kTile + row % 16 * 64;
        const int64_t in_tile = 16 - row % 16;
        unroll<kBlock>([&](auto r) {
          if (height != r.value + 1) return;
          if (height <= in_tile) {
            rows_by_two<r.value + 1, false>(rows_a, height, tiles_b, steps, ahead, out);
          } else {
            rows_by_two<r.value + 1, true>(rows_a, in_tile, tiles_b, steps, ahead, out);
          }
        });
        finish({out, begin + row, panel * kPanel, height}, epilogue);
#endif
      }
    }
#if defined(CNK_HAS_TILES)
    for (int left = 0; left < delay; ++left, before = before == delay ? 0 : before + 1)
      finish(results[before], epilogue);
#endif
  }

 private:
  // Two rows of 32 bf16 to pairs, first of columns 0-15, then of 16-31.
  static CNK_INLINE void interleave(Vec first, Vec second, Vec* low, Vec* high) {
    const __m512i step =
        _mm512_set1_epi32(0x00200000);  // the even half-words from `first`, the odd from `second`
    const __m512i base =
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32(0x00010001));
    const __m512i index = _mm512_add_epi16(base, step);
    const __m512i next = _mm512_add_epi16(index, _mm512_set1_epi16(16));
    *low = (Vec)_mm512_permutex2var_epi16((__m512i)first, index, (__m512i)second);
    *high = (Vec)_mm512_permutex2var_epi16((__m512i)first, next, (__m512i)second);
  }

  static CNK_INLINE void store_pair(void* packed, int64_t k, int64_t panel, int64_t k_tile, int64_t pair,
                                    Vec first, Vec second) {
    Vec low, high;
    interleave(first, second, &low, &high);
    store(reinterpret_cast<float*>(b_tile(packed, k, panel, k_tile, 0)) + pair * 16, low);
    store(reinterpret_cast<float*>(b_tile(packed, k, panel, k_tile, 1)) + pair * 16, high);
  }

  // Sums of `rows` rows and 32 columns. Always passed by address: a copy would load vectors from where scalars were
  // just stored, and wait until the store buffer is empty, tiles included (a twentieth of a block's time).
  struct Result {
    const float* sums;
    int64_t row, column, rows;
  };

  // Rows [done, until) of a result; f: of the epilogue, at the result. Returns the rows that are done.
  template <class F>
  static CNK_INLINE int64_t finish(const Result& result, int64_t done, int64_t until, const F& f) {
    const float* sums = result.sums;
    if (until > result.rows) until = result.rows;
    for (; done < until; ++done) f(done, load(sums + done * 32), load(sums + done * 32 + 16));
    return done;
  }
  template <class Epilogue>
  static CNK_INLINE void finish(const Result& result, const Epilogue& epilogue) {
    finish(result, 0, result.rows, pair_at(epilogue, result.row, result.column));
  }

#if defined(CNK_HAS_TILES)
  // 16 rows, or with BELOW 32, times a panel.
  template <bool BELOW, class Epilogue>
  static __attribute__((noinline)) void by_two(const char* a, const char* b, int64_t steps, Ahead ahead,
                                               float* out, const Result& before, const Epilogue& epilogue) {
    const auto f = pair_at(epilogue, before.row, before.column);
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (BELOW) _tile_zero(2);
    if constexpr (BELOW) _tile_zero(3);
    // Rows of the epilogue after each product or step, in sixteenths.
    const bool fine = steps <= kShort;
    const int64_t share = ceil_div(32 * 16, (fine ? (BELOW ? 4 : 2) : 1) * steps);
    int64_t due = 0, done = 0;
    const auto some = [&]() CNK_INLINE_LAMBDA { done = finish(before, done, (due += share) / 16, f); };
    for (int64_t s = 0; s < steps; ++s) {
      ahead.fetch();
      _tile_loadd(6, b + 2 * s * kTile, 64);
      _tile_loadd(4, a + s * kTile, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (fine) some();
      _tile_loadd(7, b + (2 * s + 1) * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (fine) some();
      if constexpr (BELOW) {
        _tile_loadd(5, a + (steps + s) * kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (fine) some();
        _tile_dpbf16ps(3, 5, 7);
        if (fine) some();
      }
      if (!fine) some();
    }
    finish(before, done, 32, f);
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
    if constexpr (BELOW) _tile_stored(2, out + 16 * 32, 128);
    if constexpr (BELOW) _tile_stored(3, out + 16 * 32 + 16, 128);
  }
#else
  // out (ROWS, 32) = rows of A tiles times a panel. The first row is at a; with `two_tiles`, rows from
  // in_tile on are the first ones of the next tile. (Without a separate case for one tile, the eight pointers
  // would cost a tenth of the time at C 96.)
  template <int ROWS, bool two_tiles>
  static __attribute__((noinline)) void rows_by_two(const char* a, int64_t in_tile, const char* b,
                                                    int64_t steps, Ahead ahead, float* out) {
    Vec sums[ROWS][2] = {};
    const char* rows[ROWS];
    unroll<ROWS>([&](auto r) {
      rows[r.value] = a + r.value * 64 + (two_tiles && r.value >= in_tile ? (steps - 1) * kTile : 0);
    });
    for (int64_t offset = 0; offset < steps * kTile; offset += kTile) {
      ahead.fetch();
      for (int64_t pair = 0; pair < 16; ++pair) {
        const Vec low = load(reinterpret_cast<const float*>(b + pair * 64));
        const Vec high = load(reinterpret_cast<const float*>(b + kTile + pair * 64));
        unroll<ROWS>([&](auto r) {
          int32_t word;
          std::memcpy(&word, rows[r.value] + offset + pair * 4, 4);
          const Vec both = (Vec)_mm512_set1_epi32(word);
          sums[r.value][0] = dot_bf16(sums[r.value][0], both, low);
          sums[r.value][1] = dot_bf16(sums[r.value][1], both, high);
        });
      }
      b += 2 * kTile;
    }
    unroll<ROWS>([&](auto r) {
      unroll<2>([&](auto half) { store(out + r.value * 32 + half.value * 16, sums[r.value][half.value]); });
    });
  }
#endif
};

}  // namespace cnk::cpu::CNK_ISA
