// bf16 matrix product with fp32 sums and a fused epilogue, by BFMMLA (64-bit Arm).
//
// BFMMLA multiplies 2 rows x 4 k with 4 k x 2 columns and adds to 2 x 2 sums. Both operands are stored in its
// order: A in blocks of 8 rows, B in panels of 12 columns, each (k / 4, rows or columns, 4 k). Micro-kernel: 8
// rows x 12 columns, 24 registers of sums and 4 of A.
//
// BFMMLA takes subnormal numbers as zero and rounds each addition to odd, where AVX512_BF16 rounds to nearest.
#pragma once

#include "cpu/gemm/epilogue.h"
#include "cpu/layernorm.h"
#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

struct GemmBf16 {
  using Element = BFloat16;
  static constexpr int kVecs = 3;
  static constexpr int64_t kPanel = kVecs * kLanes, kStep = 4;  // kStep: k of one BFMMLA
  static constexpr int64_t kRowGrain = 8;                       // rows may only be split between blocks
  struct Scope {};

  // A has the padding of the channels, of which the products read no more than B has.
  static int64_t a_steps(int64_t k) { return pad_channels(k) / kStep; }
  static int64_t b_steps(int64_t k) { return (k + kStep - 1) / kStep; }
  static int64_t a_bytes(int64_t rows, int64_t k) {
    return (rows + kRowGrain - 1) / kRowGrain * kRowGrain * pad_channels(k) * 2;
  }
  static int64_t vecs(int64_t n) { return (n + kLanes - 1) / kLanes; }
  static int64_t panels(int64_t n) { return (vecs(n) + kVecs - 1) / kVecs; }
  static int64_t packed_bytes(int64_t n, int64_t k, DType = DType::kBFloat16) {
    return vecs(n) * kLanes * b_steps(k) * kStep * 2;
  }

  // --- Operand B. ---

  static int64_t panel_columns(int64_t n, int64_t panel) {
    const int64_t left = vecs(n) * kLanes - panel * kPanel;
    return left < kPanel ? left : kPanel;
  }
  static BFloat16* b_panel(void* packed, int64_t k, int64_t panel) {
    return static_cast<BFloat16*>(packed) + panel * kPanel * b_steps(k) * kStep;
  }

  // From w (n, k), row-major: rows of w become columns of B.
  template <class T>
  static void pack(const T* w, int64_t n, int64_t k, void* packed, Team& team) {
    int64_t begin, end;
    team.split(panels(n), 1, &begin, &end);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t columns = panel_columns(n, panel);
      BFloat16* out = b_panel(packed, k, panel);
      for (int64_t i = 0; i < k; i += kStep) {
        for (int64_t j = panel * kPanel; j < panel * kPanel + columns; ++j, out += kStep)
          store(out, j < n ? load_channels(w + j * k, i, k) : Vec{});
      }
    }
  }

  // From w (k, n), row-major, row i times scale[i] if scale is not null.
  template <class T>
  static void pack_transposed(const T* w, int64_t n, int64_t k, const float* scale, void* packed,
                              Team& team) {
    int64_t begin, end;
    team.split(panels(n), 1, &begin, &end);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t columns = panel_columns(n, panel);
      BFloat16* out = b_panel(packed, k, panel);
      for (int64_t i = 0; i < k; i += kStep) {
        for (int64_t j = 0; j < columns; j += kLanes, out += kLanes * kStep) {
          store_columns(out, [&](int64_t r) {
            if (i + r >= k) return Vec{};
            const Vec v = load_channels(w + (i + r) * n, panel * kPanel + j, n);
            return scale ? v * scale[i + r] : v;
          });
        }
      }
    }
  }

  // --- Operand A. ---

  // The kStep k from c on of a row.
  static CNK_INLINE BFloat16* a_row(void* a, int64_t k, int64_t row, int64_t c) {
    return static_cast<BFloat16*>(a) +
           ((row / kRowGrain * a_steps(k) + c / kStep) * kRowGrain + row % kRowGrain) * kStep;
  }
  static CNK_INLINE Vec load_register(const void* a, int64_t k, int64_t row, int64_t c) {
    return load(a_row(const_cast<void*>(a), k, row, c));
  }
  static CNK_INLINE void store_register(void* a, int64_t k, int64_t row, int64_t c, Vec v) {
    store(a_row(a, k, row, c), v);
  }

  static Block load_block(const void* a, int64_t k, int64_t row, int64_t c) {
    return block_of([&](int i) { return load_register(a, k, row, c + i); });
  }
  static void store_block(void* a, int64_t k, int64_t row, int64_t c, const Block& b) {
    unroll<Block::kVecs>([&](auto i) { store_register(a, k, row, c + i.value * kLanes, b.v[i.value]); });
  }

  // --- Products whose k are the rows of an operand A: gradients of weights. ---

  // Rows [begin, end) of a (rows x columns) become rows `to`... of B (all_rows x columns). begin and to are
  // multiples of kStep, and rows up to the next multiple of it must be zero.
  static void rows_to_b(const void* a, int64_t columns, int64_t begin, int64_t end, void* packed,
                        int64_t all_rows, int64_t to) {
    for (int64_t panel = 0; panel < panels(columns); ++panel) {
      const int64_t width = panel_columns(columns, panel);
      BFloat16* out = b_panel(packed, all_rows, panel) + to * width;
      for (int64_t r = begin; r < end; r += kStep) {
        for (int64_t j = 0; j < width; j += kLanes, out += kLanes * kStep)
          store_columns(out, [&](int64_t i) { return load_register(a, columns, r + i, panel * kPanel + j); });
      }
    }
  }

  // The same rows become columns of A (columns x all_rows), which has rows up to the padding of `columns`.
  static void rows_to_transposed_a(const void* a, int64_t columns, int64_t begin, int64_t end, void* out,
                                   int64_t all_rows, int64_t to) {
    for (int64_t r = begin; r < end; r += kStep) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        store_columns(a_row(out, all_rows, c, to + r - begin),
                      [&](int64_t i) { return load_register(a, columns, r + i, c); });
      }
    }
  }

  // --- The product of rows [begin, end) (begin a multiple of kRowGrain) and the panels. ---

  template <class Epilogue>
  static void product(const void* a, int64_t begin, int64_t end, const PackedMatrix& b, int64_t first_panel,
                      int64_t last_panel, const Epilogue& epilogue) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const BFloat16* packed = b_panel(const_cast<void*>(b.data), b.k, panel);
      const int64_t width = panel_columns(b.n, panel) / kLanes;
      unroll<kVecs>([&](auto v) {
        if (width == v.value + 1)
          rows_by_panel<v.value + 1>(a, begin, end, packed, b.k, panel * kPanel, epilogue);
      });
    }
  }

 private:
  static_assert(kLanes == kStep);

  // The columns of kStep registers, one after the other.
  template <class Read>
  static CNK_INLINE void store_columns(BFloat16* out, const Read& read) {
    Vec rows[kLanes] = {read(0), read(1), read(2), read(3)};
    transpose(rows);
    unroll<kLanes>([&](auto i) { store(out + i.value * kStep, rows[i.value]); });
  }

  template <int VECS, class Epilogue>
  static void rows_by_panel(const void* a, int64_t begin, int64_t end, const BFloat16* b, int64_t k,
                            int64_t column, const Epilogue& epilogue) {
    alignas(64) float sums[kRowGrain * kPanel];
    for (int64_t row = begin; row < end; row += kRowGrain) {
      const BFloat16* first = a_row(const_cast<void*>(a), k, row, 0);
      const int64_t rows = min64(kRowGrain, end - row);
      unroll<kRowGrain / 2>([&](auto pair) {
        if ((rows + 1) / 2 == pair.value + 1) micro<pair.value + 1, VECS>(first, b, b_steps(k), sums);
      });
      unroll<VECS>([&](auto v) {
        const auto finish = epilogue.at(row, column + v.value * kLanes);
        for (int64_t r = 0; r < rows; ++r) finish(r, load(sums + r * kPanel + v.value * kLanes));
      });
    }
  }

  static CNK_INLINE bfloat16x8_t load_pair(const BFloat16* p) {
    return vreinterpretq_bf16_u16(vld1q_u16(&p->bits));
  }

  // sums (kPanel floats a row) = 2 PAIRS rows of a block times a panel of VECS registers. With an odd number of
  // rows the last one is not used: nobody wrote it, and no other row's sums depend on it.
  //
  // The sums pass through memory to the epilogue, which would take the registers that they need (gemm_f32.h).
  template <int PAIRS, int VECS>
  static __attribute__((noinline)) void micro(const BFloat16* a, const BFloat16* b, int64_t steps,
                                              float* sums) {
    float32x4_t acc[PAIRS][2 * VECS] = {};
    for (int64_t step = 0; step < steps; ++step) {
      bfloat16x8_t rows[PAIRS];
      unroll<PAIRS>([&](auto p) { rows[p.value] = load_pair(a + p.value * 2 * kStep); });
      const BFloat16* next = b;
      unroll<2 * VECS>([&](auto j) {
        const bfloat16x8_t columns = load_pair(next + j.value * 2 * kStep);
        unroll<PAIRS>([&](auto p) {
          float32x4_t sum = vbfmmlaq_f32(acc[p.value][j.value], rows[p.value], columns);
          // The next load waits: g++ 12 would load all of B first, and keep three sums in memory.
          asm("" : "+w"(sum), "+r"(next));
          acc[p.value][j.value] = sum;
        });
      });
      a += kRowGrain * kStep;
      b += VECS * kLanes * kStep;
    }
    unroll<PAIRS>([&](auto p) {
      unroll<VECS>([&](auto v) {
        const float64x2_t low = vreinterpretq_f64_f32(acc[p.value][2 * v.value]),
                          high = vreinterpretq_f64_f32(acc[p.value][2 * v.value + 1]);
        float* out = sums + 2 * p.value * kPanel + v.value * kLanes;
        store(out, (Vec)vtrn1q_f64(low, high));
        store(out + kPanel, (Vec)vtrn2q_f64(low, high));
      });
    });
  }
};

}  // namespace cnk::cpu::CNK_ISA
