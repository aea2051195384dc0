// fp32 matrix product rows x packed panels, with a fused epilogue.
//
// Micro-kernel: kRows x 3 registers of accumulators (8x3 on 32 registers: 24
// sums, 3 loads and 8 broadcasts for 24 multiply-adds per k). A is row-major;
// B is packed in panels as wide as 3 registers, each (k, columns). Weights of
// 16 bits stay so, half the memory to read and to keep, and are converted a
// chunk of a panel at a time; for few rows, with AVX2, in the micro-kernel.
#pragma once

#include "cpu/gemm/epilogue.h"
#include "cpu/layernorm.h"
#include "cpu/platform/prefetch.h"
#include "cpu/platform/vec.h"

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
    return vecs(n) * kLanes * packed_rows(k, dtype) * element_size(dtype);
  }

  // Whether weights are packed in pairs of rows, so that micro() can convert them itself, for few rows. There it
  // costs 1.5 to 5 % of the product, for any number of rows, because it takes ports of the multiply-adds. A chunk
  // that is converted before costs a store for each register of weights: 4.5 % of 49 rows, 1.5 % of 150. With
  // AVX-512 on Intel it would take more of the multiply-adds' ports.
#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr bool paired(DType dtype) { return dtype == DType::kBFloat16; }
  alignas(32) static constexpr uint32_t kHigh[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                    0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
  alignas(32) static constexpr uint32_t kLow[8] = {0x01008080, 0x05048080, 0x09088080, 0x0d0c8080,
                                                   0x01008080, 0x05048080, 0x09088080, 0x0d0c8080};
#else
  static constexpr bool paired(DType) { return false; }
#endif

  static int64_t packed_rows(int64_t k, DType dtype) { return paired(dtype) ? round_up(k, 2) : k; }

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
        constexpr bool pairs = __is_same(T, BFloat16) && paired(DType::kBFloat16);
        T* out =
            static_cast<T*>(packed) + panel * kPanel * (pairs ? round_up(k, 2) : k) + (pairs ? 2 : 1) * j;
        for (int64_t i = 0; i < k; i += kLanes) {
          Vec rows[kLanes];
          unroll<kLanes>([&](auto r) {
            rows[r.value] = first + r.value < n ? load_channels(w + (first + r.value) * k, i, k) : Vec{};
          });
          transpose(rows);
          if constexpr (pairs) {
            unroll<kLanes / 2>([&](auto r) {
              if (i + 2 * r.value < k)
                store_pair(out + (i + 2 * r.value) * columns, rows[2 * r.value], rows[2 * r.value + 1]);
            });
          } else {
            unroll<kLanes>([&](auto r) {
              if (i + r.value < k) store(out + (i + r.value) * columns, rows[r.value]);
            });
          }
        }
      }
    }
  }

  // Registers of two rows, word by word; `unpack` gets them back.
  static CNK_INLINE void store_pair(BFloat16* to, Vec first, Vec second) {
    BFloat16 words[2][kLanes];
    store(words[0], first), store(words[1], second);
    for (int i = 0; i < kLanes; ++i) to[2 * i] = words[0][i], to[2 * i + 1] = words[1][i];
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

  static Block load_block(const void* a, int64_t k, int64_t row, int64_t c) {
    return cpu::CNK_ISA::load_block(static_cast<const float*>(a) + row * stride(k) + c);
  }
  static void store_block(void* a, int64_t k, int64_t row, int64_t c, const Block& b) {
    store(static_cast<float*>(a) + row * stride(k) + c, b);
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

  // --- The product of rows [begin, end) and the panels. ---

  // Products per chain of additions. kChunk rows of a panel are 24 KB and stay in L1 while they are
  // multiplied with the rows of a group (C 768, batch 8, one core: 137 -> 165 GFLOP/s), and one chain over k
  // = 3072 would have two to five times eager's rounding error.
  static constexpr int64_t kChunk = (24 << 10) / (kPanel * 4);
  static constexpr int64_t kStretch = 16;  // products between two fetches of what comes next
  static constexpr int64_t kGroup = 192;   // rows; their partial sums are 36 KB on AVX-512
  static constexpr int64_t kFewRows = 56;  // for which weights are converted in micro(), if they can

  template <class Epilogue>
  static void product(const void* a, int64_t begin, int64_t end, const PackedMatrix& b, int64_t first_panel,
                      int64_t last_panel, const Epilogue& epilogue) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const char* packed = static_cast<const char*>(b.data) +
                           panel * kPanel * packed_rows(b.k, b.dtype) * element_size(b.dtype);
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
  // One of the two rows of store_pair: its words before 16 zeros each. Masks are in memory, because sums, weights and
  // a's element take all registers (g++ put sums in memory instead: twice the time).
  template <int ROW>
  static CNK_INLINE Vec unpack([[maybe_unused]] const BFloat16* pair) {
    Vec v{};
#if defined(__AVX2__) && !defined(__AVX512F__)
    v = load(reinterpret_cast<const float*>(pair));
    if constexpr (ROW) {
      asm("vpand %1, %0, %0" : "+x"(v) : "m"(kHigh));
    } else {
      asm("vpshufb %1, %0, %0" : "+x"(v) : "m"(kLow));
    }
#endif
    return v;
  }

  // `rows` rows of a panel.
  template <int VECS>
  static __attribute__((noinline)) void convert(DType dtype, const char* from, int64_t rows, float* to) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      const auto* elements = reinterpret_cast<const T*>(from);
      if constexpr (__is_same(T, BFloat16) && paired(DType::kBFloat16)) {
        for (int64_t i = 0; i < rows; i += 2, elements += 2 * VECS * kLanes, to += 2 * VECS * kLanes) {
          unroll<VECS>([&](auto v) {
            const VecI words = (VecI)load(reinterpret_cast<const float*>(elements + 2 * v.value * kLanes));
            store(to + v.value * kLanes, (Vec)(words << 16));
            if (i + 1 < rows) store(to + (VECS + v.value) * kLanes, (Vec)(words & int32_t(0xffff0000)));
          });
        }
      } else {
        for (int64_t i = 0; i < rows * VECS * kLanes; i += kLanes) store(to + i, load(elements + i));
      }
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
    const bool convert_first = dtype != DType::kFloat32 && !(paired(dtype) && rows <= kFewRows);
    for (int64_t i = 0; i < k; i += kChunk) {
      const int64_t next_i = i + kChunk < k ? i + kChunk : k;
      // Blocks of nearly equal height, not full blocks and a remainder: 49 rows are 7 x 7, not 6 x 8 + 1.
      const char* next = b + next_i * VECS * kLanes * size;
      const int64_t stretches = ceil_div(next_i - i, kStretch);
      const int64_t lines = ceil_div((next_i - i) * VECS * kLanes * size, 64 * blocks * stretches);
      const char* source = b + i * VECS * kLanes * size;
      const float* chunk = reinterpret_cast<const float*>(source);
      if (convert_first) {
        convert<VECS>(dtype, source, next_i - i, converted);
        chunk = converted;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = rows * block / blocks, height = rows * (block + 1) / blocks - row;
        const float* first = static_cast<const float*>(a) + (begin + row) * lda + i;
        // One chunk needs only the sums of this block, which then stay in L1.
        float* sum = sums + (k <= kChunk ? 0 : row * kPanel);
        const Ahead ahead = {next + block * stretches * lines * 64, lines};
        unroll<kRows>([&](auto r) {
          if (height != r.value + 1) return;
          if constexpr (paired(DType::kBFloat16)) {
            if (dtype == DType::kBFloat16 && !convert_first) {
              const auto* pairs = reinterpret_cast<const BFloat16*>(source);
              return micro<r.value + 1, VECS>(first, lda, pairs, next_i - i, ahead, i == 0, sum);
            }
          }
          micro<r.value + 1, VECS>(first, lda, chunk, next_i - i, ahead, i == 0, sum);
        });
        if (next_i < k) continue;
        unroll<VECS>([&](auto v) {
          const auto finish = epilogue.at(begin + row, column + v.value * kLanes);
          for (int64_t r = 0; r < height; ++r) finish(r, load(sum + r * kPanel + v.value * kLanes));
        });
      }
    }
  }

  // sums (kPanel floats a row) = or += ROWS rows of a times k rows of the panel.
  //
  // The sums pass through memory to the epilogue, which is not part of this function.
  // When it was inlined here, it took registers that the sums need; and when one of
  // its lambdas was not inlined (that of bf16 stores), the sums stayed in memory (C
  // 192, batch 8, bf16 images: 26.0 ms; with a separate epilogue 15.2 ms).
  template <int ROWS, int VECS, class T>
  static __attribute__((noinline)) void micro(const float* a, int64_t lda, const T* b, int64_t k, Ahead ahead,
                                              bool first, float* sums) {
    Vec acc[ROWS][VECS] = {};
    const auto add = [&](int64_t i, const Vec(&bv)[VECS]) CNK_INLINE_LAMBDA {
      unroll<ROWS>([&](auto r) CNK_INLINE_LAMBDA {
        const Vec av = splat(a[r.value * lda + i]);
        unroll<VECS>([&](auto v) CNK_INLINE_LAMBDA {
          acc[r.value][v.value] = multiply_add(av, bv[v.value], acc[r.value][v.value]);
        });
      });
    };
    for (int64_t i = 0; i < k;) {
      ahead.fetch();
      const int64_t end = min64(i + kStretch, k);
      if constexpr (__is_same(T, float)) {
        for (; i < end; ++i, b += VECS * kLanes) {
          Vec bv[VECS];
          unroll<VECS>([&](auto v) CNK_INLINE_LAMBDA { bv[v.value] = load(b + v.value * kLanes); });
          add(i, bv);
        }
      } else {
        for (; i < end; i += 2, b += 2 * VECS * kLanes) {
          Vec bv[VECS];
          unroll<VECS>([&](auto v) CNK_INLINE_LAMBDA { bv[v.value] = unpack<0>(b + 2 * v.value * kLanes); });
          add(i, bv);
          if (i + 1 == end) break;
          asm("" : "+r"(b));  // so that the pair is loaded again, not kept in registers
          unroll<VECS>([&](auto v) CNK_INLINE_LAMBDA { bv[v.value] = unpack<1>(b + 2 * v.value * kLanes); });
          add(i + 1, bv);
        }
        i = end;
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
