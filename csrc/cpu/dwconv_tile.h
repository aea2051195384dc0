// The sums of one tile of a depthwise convolution, in registers: for dwconv.cpp.
//
// One register holds kLanes channels. The sums of a tile of up to kColumns pixels of a row are in registers,
// and up to kTaps weights of one kernel row. Each pixel of x is loaded once for these taps and feeds one
// multiply-add of each. Taps outside the image are skipped, not padded: a 31x31 kernel on a 7x7 image does
// the work of 13x13. A sum adds its taps row by row (of a narrow image column by column), in order, whatever the
// tile, so that its bits do not depend on how the work is divided.
#pragma once

#include "cpu/dwconv_taps.h"

namespace cnk::cpu::CNK_ISA {

namespace {

constexpr int kColumns = kRegisters == 32 ? 14 : 7;      // divides the widths 56, 28, 14, 7 of a 224 image
constexpr int kWide = kRegisters == 32 ? 16 : kColumns;  // divides those of most volumes: 128, 64, 32, 16
constexpr int kTaps = 7;                                 // kColumns + kTaps + 1 registers

template <class T>
struct Tile {
  const T* image;       // image n, first of this register's channels
  const float* weight;  // this register's channels of tap 0; taps are kChannelAlign floats apart
  Vec bias;
  int64_t valid;                       // channels in this register; kLanes or fewer
  int64_t step, row_step, weight_row;  // from tap to tap of x, from kernel row to kernel row of x and weights
  const Windows* windows;
  bool pairs;  // weights are words of two taps (pack_tap_pairs)
};

template <bool PARTIAL, class T>
CNK_INLINE Vec load_tap(const T* p, int64_t valid) {
  if constexpr (PARTIAL) return load_partial(p, valid);
  return load(p);
}

// Where a tile's sums are stored. Decided at run time: that happens
// once a tile, and a template parameter would double the code.
struct Sink {
  void* y;  // first output pixel
  int64_t ldy;
  bool wide;               // fp32, else x's dtype
  bool streaming = false;  // a register is a cache line that is stored past the caches
};

template <class T, int COLUMNS>
CNK_INLINE void store_tile(const Vec (&acc)[COLUMNS], int64_t columns, const Sink& to) {
  if (sizeof(Vec) == 64 && to.streaming) {
    CNK_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      if (j < columns) stream_line(static_cast<float*>(to.y) + j * to.ldy, acc[j]);
    }
  } else if (to.wide) {
    CNK_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      if (j < columns) store(static_cast<float*>(to.y) + j * to.ldy, acc[j]);
    }
  } else {
    CNK_UNROLL
    for (int j = 0; j < COLUMNS; ++j) {
      if (j < columns) store(static_cast<T*>(to.y) + j * to.ldy, acc[j]);
    }
  }
}

// acc[j] += the TAPS taps at `weight` times columns j, j + 1, ... of x. CHECKED: only columns whose bit in
// `inside` is set; the others are outside the image.
template <int TAPS, bool CHECKED, bool PARTIAL, int COLUMNS, class T>
CNK_INLINE void add_taps(Vec (&acc)[COLUMNS], const float* weight, const T* x, int64_t stride, int64_t valid,
                         uint64_t inside) {
  Vec taps[TAPS];
  CNK_UNROLL
  for (int k = 0; k < TAPS; ++k) taps[k] = load(weight + k * kChannelAlign);
  CNK_UNROLL
  for (int j = 0; j < COLUMNS + TAPS - 1; ++j) {
    if (!CHECKED || (inside >> j & 1)) [[likely]] {
      Vec v = load_tap<PARTIAL>(x, valid);
      if (TAPS > 1) v = in_register(v);
      CNK_UNROLL
      for (int k = 0; k < TAPS; ++k) {
        if (j >= k && j - k < COLUMNS) acc[j - k] = multiply_add(v, taps[k], acc[j - k]);
      }
    }
    x += stride;
    // Without this the compiler keeps a dozen multiples of the stride, more than there are registers for.
    asm("" : "+r"(x));
  }
}

// Read where it is used: g++ would keep it in a vector register, and moving it from there takes the place of
// multiply-adds.
template <class T>
CNK_INLINE T in_memory(const T& value) {
  return *static_cast<const volatile T*>(&value);
}

// f(Int<taps>) for 1 to kTaps - 1 taps, the rest of a kernel row.
template <class F>
CNK_INLINE void with_few(int64_t taps, const F& f) {
  unroll<kTaps - 1>([&](auto k) CNK_INLINE_LAMBDA {
    if (taps == k.value + 1) f(Int<k.value + 1>{});
  });
}

// Of the COLUMNS accumulators, `columns` are stored.
template <int COLUMNS, bool PARTIAL, class T>
__attribute__((noinline)) void convolve(const Tile<T>& t, int64_t columns, const Sink& to) {
  Vec acc[COLUMNS];
  CNK_UNROLL
  for (Vec& sum : acc) sum = t.bias;
  const int64_t stride = t.step, valid = t.valid;
  for (int i = 0; i < t.windows->count; ++i) {
    const Window& window = t.windows->list[i];
    const float* weights = t.weight + window.weight;
    const T* row = t.image + window.x;
    for (int64_t rows = window.rows; rows > 0; --rows) {
      const float* weight = weights;
      const T* x = row;
      uint64_t inside = in_memory(window.in_image);
      int64_t taps = in_memory(window.taps);
      for (; taps >= kTaps; taps -= kTaps) {
        if ((~inside & all_columns(COLUMNS + kTaps - 1)) == 0) {
          add_taps<kTaps, false, PARTIAL>(acc, weight, x, stride, valid, inside);
        } else {
          add_taps<kTaps, true, PARTIAL>(acc, weight, x, stride, valid, inside);
        }
        weight += kTaps * kChannelAlign;
        x += kTaps * stride;
        inside >>= kTaps;
      }
      if (taps == 3 && (~inside & all_columns(COLUMNS + 2)) == 0) {  // most of K 3
        add_taps<3, false, PARTIAL>(acc, weight, x, stride, valid, inside);
        taps = 0;
      }
      with_few(taps, [&](auto count) CNK_INLINE_LAMBDA {
        add_taps<count.value, true, PARTIAL>(acc, weight, x, stride, valid, inside);
      });
      weights += in_memory(t.weight_row);
      row += in_memory(t.row_step);
    }
  }
  store_tile<T>(acc, columns, to);
}

// Two rows of kPairColumns pixels of a 3x3 kernel (of each plane of a volume): a pixel of x is loaded once for both.
// K 3 is limited by what it loads: 2.6 lines of x for each result, 3.4 with one row of 14 pixels, which takes 1.1 to 1.3
// times as long (fp32, C 96 to 768, one and two threads of a Xeon).
constexpr int kPairColumns = 7;
struct RowPair {
  int64_t x;         // of the first pixel of the first of four rows, also if it is outside the image
  uint64_t columns;  // those inside the image: bits of kPairColumns + 2
  unsigned rows;     // bits of 4
};

// Row ROW of x: kernel row ROW for the first row's sums, ROW - 1 for the second's.
template <int ROW, bool CHECKED, bool PARTIAL, class T>
CNK_INLINE void add_to_pair(Vec (&acc)[2][kPairColumns], const Vec (&taps)[3][3], const T* x, int64_t stride,
                            int64_t valid, uint64_t inside) {
  CNK_UNROLL
  for (int j = 0; j < kPairColumns + 2; ++j) {
    if (!CHECKED || (inside >> j & 1)) [[likely]] {
      const Vec v = in_register(load_tap<PARTIAL>(x, valid));
      CNK_UNROLL
      for (int k = 0; k < 3; ++k) {
        if (j < k || j - k >= kPairColumns) continue;
        if (ROW < 3) acc[0][j - k] = multiply_add(v, taps[ROW][k], acc[0][j - k]);
        if (ROW > 0) acc[1][j - k] = multiply_add(v, taps[ROW - 1][k], acc[1][j - k]);
      }
    }
    x += stride;
    asm("" : "+r"(x));  // as in add_taps
  }
}

template <bool PARTIAL, class T>
__attribute__((noinline)) void convolve_row_pair(const Tile<T>& t, const RowPair& at, int64_t columns,
                                                 const Sink& first, const Sink& second) {
  Vec acc[2][kPairColumns];
  CNK_UNROLL
  for (int j = 0; j < kPairColumns; ++j) acc[0][j] = acc[1][j] = t.bias;
  const bool checked = at.columns != all_columns(kPairColumns + 2);
  for (int i = 0; i < t.windows->planes; ++i) {
    const float* weight = t.weight + t.windows->plane[i].weight;
    const T* x = t.image + t.windows->plane[i].x + at.x;
    Vec taps[3][3];
    CNK_UNROLL
    for (int k = 0; k < 9; ++k) taps[k / 3][k % 3] = load(weight + k * kChannelAlign);
    unroll<4>([&](auto row) CNK_INLINE_LAMBDA {
      if (!(at.rows >> row.value & 1)) {
      } else if (checked) {
        add_to_pair<row.value, true, PARTIAL>(acc, taps, x, t.step, t.valid, at.columns);
      } else {
        add_to_pair<row.value, false, PARTIAL>(acc, taps, x, t.step, t.valid, at.columns);
      }
      x += t.row_step;
    });
  }
  store_tile<T>(acc[0], columns, first);
  store_tile<T>(acc[1], columns, second);
}

#if defined(CNK_HAS_BF16)

// A word of each channel: a bf16 of `first` and one of `second`.
template <bool PARTIAL>
CNK_INLINE Vec interleave(const BFloat16* first, const BFloat16* second, int64_t valid) {
  __m256i a, b;
  if constexpr (PARTIAL) {
    const __mmask16 mask = __mmask16((1u << valid) - 1);
    a = _mm256_maskz_loadu_epi16(mask, first), b = _mm256_maskz_loadu_epi16(mask, second);
  } else {
    a = _mm256_loadu_si256((const __m256i*)first), b = _mm256_loadu_si256((const __m256i*)second);
  }
  alignas(64) static const int16_t kOrder[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                 37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return (Vec)_mm512_permutex2var_epi16(_mm512_castsi256_si512(a), _mm512_load_si512(kOrder),
                                        _mm512_castsi256_si512(b));
}

// The word of `first` alone: zeros for the second.
template <bool PARTIAL>
CNK_INLINE Vec single(const BFloat16* first, int64_t valid) {
  if constexpr (PARTIAL) {
    return (Vec)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << valid) - 1), first));
  } else {
    return (Vec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
  }
}

// As add_taps, for two kernel rows at once: their rows of x are at x and x + second. SINGLE: for one.
template <int TAPS, bool SINGLE, bool CHECKED, bool PARTIAL, int COLUMNS>
CNK_INLINE void add_pairs(Vec (&acc)[COLUMNS], const float* weight, const BFloat16* x, int64_t second,
                          int64_t stride, int64_t valid, uint64_t inside) {
  Vec taps[TAPS];
  CNK_UNROLL
  for (int k = 0; k < TAPS; ++k) {
    taps[k] = load(weight + k * kChannelAlign);
    if (SINGLE) taps[k] = (Vec)((VecI)taps[k] & 0xffff);  // the other tap may be Inf
  }
  CNK_UNROLL
  for (int j = 0; j < COLUMNS + TAPS - 1; ++j) {
    if (!CHECKED || (inside >> j & 1)) [[likely]] {
      Vec v = SINGLE ? single<PARTIAL>(x, valid) : interleave<PARTIAL>(x, x + second, valid);
      v = in_register(v);
      CNK_UNROLL
      for (int k = 0; k < TAPS; ++k) {
        if (j >= k && j - k < COLUMNS) acc[j - k] = dot_bf16(acc[j - k], v, taps[k]);
      }
    }
    x += stride;
    asm("" : "+r"(x));  // as in add_taps
  }
}

template <bool SINGLE, bool PARTIAL, int COLUMNS>
CNK_INLINE void add_row_pair(Vec (&acc)[COLUMNS], const float* weight, const BFloat16* x, int64_t second,
                             int64_t stride, int64_t valid, uint64_t inside, int64_t taps) {
  const auto checked = [&](auto count) {
    add_pairs<count.value, SINGLE, true, PARTIAL>(acc, weight, x, second, stride, valid, inside);
  };
  for (; taps >= kTaps; taps -= kTaps) {
    if ((~inside & all_columns(COLUMNS + kTaps - 1)) == 0) {
      add_pairs<kTaps, SINGLE, false, PARTIAL>(acc, weight, x, second, stride, valid, inside);
    } else {
      checked(Int<kTaps>{});
    }
    weight += kTaps * kChannelAlign;
    x += kTaps * stride;
    inside >>= kTaps;
  }
  if (taps == 3 && (~inside & all_columns(COLUMNS + 2)) == 0) {
    return add_pairs<3, SINGLE, false, PARTIAL>(acc, weight, x, second, stride, valid, inside);
  }
  with_few(taps, checked);
}

// As convolve, two kernel rows at a time, also the last of a kernel plane and the first of the next one. Which
// rows are taken together depends on the result's row and plane alone.
template <int COLUMNS, bool PARTIAL>
__attribute__((noinline)) void convolve_pairs(const Tile<BFloat16>& t, int64_t columns, const Sink& to) {
  Vec acc[COLUMNS];
  CNK_UNROLL
  for (Vec& sum : acc) sum = t.bias;
  const Window *window = t.windows->list, *const end = window + t.windows->count;
  int64_t row = 0;  // of the window
  while (window != end) {
    const int64_t weight = window->weight + row * t.weight_row, x = window->x + row * t.row_step;
    const uint64_t inside = window->in_image;
    const int64_t taps = window->taps;
    if (++row == window->rows) ++window, row = 0;
    int64_t second = 0;
    if (window != end && window->weight + row * t.weight_row == weight + t.weight_row) {
      second = window->x + row * t.row_step - x;
      if (++row == window->rows) ++window, row = 0;
    }
    if (second) {
      add_row_pair<false, PARTIAL>(acc, t.weight + weight, t.image + x, second, t.step, t.valid, inside,
                                   taps);
    } else {
      add_row_pair<true, PARTIAL>(acc, t.weight + weight, t.image + x, 0, t.step, t.valid, inside, taps);
    }
  }
  store_tile<BFloat16>(acc, columns, to);
}

#endif

// f(Int<the number of accumulators that leaves the fewest unused>): 4, 7, 10, 14 or 16 (16 registers: 2, 3, 5 or 7).
template <class F>
CNK_INLINE void with_accumulators(int64_t columns, const F& f) {
  if (columns <= kColumns * 2 / 7) return f(Int<kColumns * 2 / 7>{});
  if (columns <= kColumns / 2) return f(Int<kColumns / 2>{});
  if (columns <= kColumns * 5 / 7) return f(Int<kColumns * 5 / 7>{});
  if (columns <= kColumns) return f(Int<kColumns>{});
  f(Int<kWide>{});
}

template <bool PARTIAL, class T>
CNK_INLINE void convolve_tile(const Tile<T>& t, int64_t columns, const Sink& to) {
  with_accumulators(columns, [&](auto count) {
#if defined(CNK_HAS_BF16)
    if (t.pairs) return convolve_pairs<count.value, PARTIAL>(t, columns, to);
#endif
    convolve<count.value, PARTIAL>(t, columns, to);
  });
}

}  // namespace

}  // namespace cnk::cpu::CNK_ISA
