// fp32 matrix product rows x packed panels, with a fused epilogue.
//
// Micro-kernel: kRows x 3 registers of accumulators (8x3 on 32 registers: 24
// sums, 3 loads and 8 broadcasts for 24 multiply-adds per k). A is row-major;
// B is packed in panels as wide as 3 registers, each (k, columns). Weights of
// 16 bits stay so and are converted a chunk of a panel at a time: half the
// memory to read and to keep.
#pragma once

#include "cpu/layernorm.h"
#include "cpu/prefetch.h"
#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

struct GemmF32 {
  using Element = float;
  static constexpr int kRows = kRegisters == 32 ? 8 : 4;
  static constexpr int kVecs = 3;
  static constexpr int64_t kPanel = kVecs * kLanes;
  static constexpr int64_t kRowGrain = 1;  // rows may be split between threads anywhere
  struct Scope {};

  // One register more than the padding: rows a power of two apart would share cache sets.
  static int64_t stride(int64_t k) { return pad_channels(k) + kLanes; }
  static int64_t a_bytes(int64_t rows, int64_t k) { return rows * stride(k) * 4; }
  static int64_t vecs(int64_t n) { return (n + kLanes - 1) / kLanes; }
  static int64_t panels(int64_t n) { return (vecs(n) + kVecs - 1) / kVecs; }
  static int64_t packed_bytes(int64_t n, int64_t k, DType dtype = DType::kFloat32) {
    return vecs(n) * kLanes * k * element_size(dtype);
  }

  // --- Operand B: panels (k, columns). ---

  static int64_t panel_columns(int64_t n, int64_t panel) {
    const int64_t left = vecs(n) * kLanes - panel * kPanel;
    return left < kPanel ? left : kPanel;
  }

  // From w (n, k), row-major: rows of w become columns of B.
  template <class T>
  static void pack(const T* w, int64_t n, int64_t k, void* packed, Team& team) {
    int64_t begin, end;
    team.split(panels(n), 1, &begin, &end);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t columns = panel_columns(n, panel);
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t first = panel * kPanel + j;
        T* out = static_cast<T*>(packed) + panel * kPanel * k + j;
        for (int64_t i = 0; i < k; i += kLanes) {
          Vec rows[kLanes];
          unroll<kLanes>([&](auto r) {
            rows[r.value] = first + r.value < n ? load_channels(w + (first + r.value) * k, i, k) : Vec{};
          });
          transpose(rows);
          unroll<kLanes>([&](auto r) {
            if (i + r.value < k) store(out + (i + r.value) * columns, rows[r.value]);
          });
        }
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
      for (int64_t i = 0; i < k; ++i) {
        float* out = static_cast<float*>(packed) + panel * kPanel * k + i * columns;
        for (int64_t j = 0; j < columns; j += kLanes) {
          const Vec v = load_channels(w + i * n, panel * kPanel + j, n);
          store(out + j, scale ? v * scale[i] : v);
        }
      }
    }
  }

  // --- Operand A: rows of floats. ---

  static CNK_INLINE Vec load_register(const void* a, int64_t k, int64_t row, int64_t c) {
    return load(static_cast<const float*>(a) + row * stride(k) + c);
  }
  static CNK_INLINE void store_register(void* a, int64_t k, int64_t row, int64_t c, Vec v) {
    store(static_cast<float*>(a) + row * stride(k) + c, v);
  }

  static void write_normalized(void* a, int64_t k, int64_t row, int64_t offset, const RowNorm& norm,
                               const float* x) {
    const Statistics s = statistics(norm, x);
    float* out = static_cast<float*>(a) + row * stride(k) + offset;
    for (int64_t c = 0; c < pad_channels(norm.c); c += kLanes)
      store(out + c, normalize(norm, s, load(x + c), c));
  }

  struct Block {
    Vec v[kChannelAlign / kLanes];
  };
  static Block load_block(const void* a, int64_t k, int64_t row, int64_t c) {
    Block b;
    unroll<kChannelAlign / kLanes>(
        [&](auto i) { b.v[i.value] = load_register(a, k, row, c + i.value * kLanes); });
    return b;
  }
  static void store_block(void* a, int64_t k, int64_t row, int64_t c, const Block& b) {
    unroll<kChannelAlign / kLanes>(
        [&](auto i) { store_register(a, k, row, c + i.value * kLanes, b.v[i.value]); });
  }

  // --- Products whose k are the rows of an operand A: gradients of weights. ---

  // Rows [begin, end) of a (rows x columns) become rows `to`... of B (all_rows x columns).
  static void rows_to_b(const void* a, int64_t columns, int64_t begin, int64_t end, void* packed,
                        int64_t all_rows, int64_t to) {
    for (int64_t panel = 0; panel < panels(columns); ++panel) {
      const int64_t width = panel_columns(columns, panel);
      float* out = static_cast<float*>(packed) + panel * kPanel * all_rows + to * width;
      for (int64_t r = begin; r < end; ++r, out += width) {
        const float* row = static_cast<const float*>(a) + r * stride(columns) + panel * kPanel;
        for (int64_t j = 0; j < width; j += kLanes) store(out + j, load(row + j));
      }
    }
  }

  // The same rows become columns of A (columns x all_rows), which has rows up to the padding of `columns`.
  // begin and to are multiples of kLanes.
  static void rows_to_transposed_a(const void* a, int64_t columns, int64_t begin, int64_t end, void* out,
                                   int64_t all_rows, int64_t to) {
    for (int64_t r = begin; r < end; r += kLanes) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        Vec rows[kLanes];
        unroll<kLanes>([&](auto i) {
          const float* row = static_cast<const float*>(a) + (r + i.value) * stride(columns);
          rows[i.value] = r + i.value < end ? load(row + c) : Vec{};
        });
        transpose(rows);
        unroll<kLanes>([&](auto i) {
          store(static_cast<float*>(out) + (c + i.value) * stride(all_rows) + to + r - begin, rows[i.value]);
        });
      }
    }
  }

  // --- The product: epilogue(row, column, Vec) for every row of [begin, end) and register of the panels. ---

  // Products per chain of additions. kChunk rows of a panel are 24 KB and stay in L1 while they are
  // multiplied with the rows of a group (C 768, batch 8, one core: 137 -> 165 GFLOP/s), and one chain over k
  // = 3072 would have two to five times eager's rounding error.
  static constexpr int64_t kChunk = (24 << 10) / (kPanel * 4);
  static constexpr int64_t kStretch = 16;  // products between two fetches of what comes next
  static constexpr int64_t kGroup = 192;   // rows; their partial sums are 36 KB on AVX-512

  template <class Epilogue>
  static void product(const void* a, int64_t begin, int64_t end, const PackedMatrix& b, int64_t first_panel,
                      int64_t last_panel, const Epilogue& epilogue) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const char* packed = static_cast<const char*>(b.data) + panel * kPanel * b.k * element_size(b.dtype);
      const int64_t width = vecs(b.n) - panel * kVecs;
      // Groups of nearly equal size: for a remainder of a few rows, reading the panel would cost too much.
      const int64_t groups = (end - begin + kGroup - 1) / kGroup;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t row = begin + (end - begin) * g / groups;
        const int64_t next = begin + (end - begin) * (g + 1) / groups;
        if (width >= 3) {
          group<3>(a, row, next, packed, b.dtype, b.k, panel * kPanel, epilogue);
        } else if (width == 2) {
          group<2>(a, row, next, packed, b.dtype, b.k, panel * kPanel, epilogue);
        } else {
          group<1>(a, row, next, packed, b.dtype, b.k, panel * kPanel, epilogue);
        }
      }
    }
  }

 private:
  static __attribute__((noinline)) void convert(DType dtype, const char* from, int64_t count, float* to) {
    with_type(dtype, [&](auto type) {
      const auto* elements = reinterpret_cast<const decltype(type)*>(from);
      for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(elements + i));
    });
  }

  // Rows [begin, end) of a times one panel.
  template <int VECS, class Epilogue>
  static void group(const void* a, int64_t begin, int64_t end, const char* b, DType dtype, int64_t k,
                    int64_t column, const Epilogue& epilogue) {
    alignas(64) float sums[kGroup * kPanel];
    alignas(64) float converted[kChunk * kPanel];
    const int64_t size = element_size(dtype);
    const int64_t lda = stride(k), rows = end - begin, blocks = (rows + kRows - 1) / kRows;
    for (int64_t i = 0; i < k; i += kChunk) {
      const int64_t next_i = i + kChunk < k ? i + kChunk : k;
      // Blocks of nearly equal height, not full blocks and a remainder: 49 rows are 7 x 7, not 6 x 8 + 1.
      const char* next = b + next_i * VECS * kLanes * size;
      const int64_t stretches = ceil_div(next_i - i, kStretch);
      const int64_t lines = ceil_div((next_i - i) * VECS * kLanes * size, 64 * blocks * stretches);
      const char* source = b + i * VECS * kLanes * size;
      const float* chunk = reinterpret_cast<const float*>(source);
      if (dtype != DType::kFloat32) {
        convert(dtype, source, (next_i - i) * VECS * kLanes, converted);
        chunk = converted;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = rows * block / blocks, height = rows * (block + 1) / blocks - row;
        const float* first = static_cast<const float*>(a) + (begin + row) * lda + i;
        // One chunk needs only the sums of this block, which then stay in L1.
        float* sum = sums + (k <= kChunk ? 0 : row * kPanel);
        const Ahead ahead = {next + block * stretches * lines * 64, lines};
        unroll<kRows>([&](auto r) {
          if (height == r.value + 1) {
            micro<r.value + 1, VECS>(first, lda, chunk, next_i - i, ahead, i == 0, sum);
          }
        });
        if (next_i < k) continue;
        for (int64_t r = 0; r < height; ++r) {
          unroll<VECS>([&](auto v) {
            epilogue(begin + row + r, column + v.value * kLanes, load(sum + r * kPanel + v.value * kLanes));
          });
        }
      }
    }
  }

  // sums (kPanel floats a row) = or += ROWS rows of a times k rows of the panel.
  //
  // The sums pass through memory to the epilogue, which is not part of this function.
  // When it was inlined here, it took registers that the sums need; and when one of
  // its lambdas was not inlined (that of bf16 stores), the sums stayed in memory (C
  // 192, batch 8, bf16 images: 26.0 ms; with a separate epilogue 15.2 ms).
  template <int ROWS, int VECS>
  static __attribute__((noinline)) void micro(const float* a, int64_t lda, const float* b, int64_t k,
                                              Ahead ahead, bool first, float* sums) {
    Vec acc[ROWS][VECS] = {};
    for (int64_t i = 0; i < k;) {
      ahead.fetch();
      for (const int64_t end = min64(i + kStretch, k); i < end; ++i) {
        Vec bv[VECS];
        unroll<VECS>([&](auto v) { bv[v.value] = load(b + v.value * kLanes); });
        unroll<ROWS>([&](auto r) {
          const Vec av = splat(a[r.value * lda + i]);
          unroll<VECS>(
              [&](auto v) { acc[r.value][v.value] = multiply_add(av, bv[v.value], acc[r.value][v.value]); });
        });
        b += VECS * kLanes;
      }
    }
    unroll<ROWS>([&](auto r) {
      unroll<VECS>([&](auto v) {
        float* sum = sums + r.value * kPanel + v.value * kLanes;
        store(sum, first ? acc[r.value][v.value] : acc[r.value][v.value] + load(sum));
      });
    });
  }
};

}  // namespace cnk::cpu::CNK_ISA
