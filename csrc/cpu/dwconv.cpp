// Depthwise convolution, NHWC, zero padding, any stride, dilation and gradient of these (Axis in ops.h):
//
//   y[n,h,w,c] = b[c] + sum_ij x[n,h+(i-P)d,w+(j-Q)d,c] w[i,j,c]
//
// In 3-D, NDHWC, a tile of one plane of the result has taps in several planes of x: its list of windows is longer
// (Windows), nothing else.
//
// One register holds kLanes channels. The sums of a tile of up to kColumns pixels of a row are in registers,
// and up to kTaps weights of one kernel row. Each pixel of x is loaded once for these taps and feeds one
// multiply-add of each. Taps outside the image are skipped, not padded: a 31x31 kernel on a 7x7 image does
// the work of 13x13. A sum adds its taps row by row, from left to right, whatever the tile, so that its bits
// do not depend on how the work is divided.
//
// A kernel of one column is a kernel of one row on the transposed image: only the distances between pixels
// differ. So the code says "along" for the axis of a tile's pixels and "across" for the other.
// With dilation or stride the pixels of a tile are apart, such that their taps have pixels of x in common:
// with dilation 2 every other column, with stride 2 neighbouring columns, for which first the even taps are
// added, then the odd ones (Lattice).
//
// The order of the tiles decides what stays in the caches. A cache line is one register's channels of one
// pixel, and lines of neighbouring pixels are C floats apart. At C 96 to 768 they share so few sets of L1
// that the lines of seven image rows (images of 224 x 224) just do not fit (C 384: 98 lines, room for 96). So
// tiles go down a strip of columns before they go right, and a strip's rows stay in L1 (with packed taps: 5
// to 10 % less time at C 96 and 192).

#include "cpu/dwconv.h"

#include "cpu/rows.h"

namespace cnk::cpu::CNK_ISA {

namespace {

constexpr int kColumns = kRegisters == 32 ? 14 : 7;      // divides the widths 56, 28, 14, 7 of a 224 image
constexpr int kWide = kRegisters == 32 ? 16 : kColumns;  // divides those of most volumes: 128, 64, 32, 16
constexpr int kTaps = 7;                                 // kColumns + kTaps + 1 registers
constexpr int64_t kFewTaps = 9;                          // of a kernel that is limited by memory

// One axis as the tiles go along it. The pixels o, o + out_step, o + 2 out_step... of the result need from
// taps k, k + tap_step... the pixels of x that are in_step apart.
struct Lattice {
  int64_t in, out, taps, reach, dilation, down;
  int half;  // log2(up)
  int64_t in_step, out_step, tap_step;

  // single: for one pixel of the result, whose taps need not be shared.
  Lattice(const Axis& axis, bool single)
      : in(axis.in),
        out(axis.out),
        taps(axis.taps),
        reach(axis.taps / 2),
        dilation(axis.dilation),
        down(axis.down),
        half(axis.up > 1),
        tap_step(single && !half ? 1 : cnk::tap_step(axis)) {
    in_step = (dilation * tap_step) >> half;
    out_step = dilation * tap_step / down;
  }
};

// The taps of one residue modulo tap_step that meet the image: [first, last), counted in steps. The tap
// `first` is at `at` in x for the tile's first pixel. Bit i: the pixel of x that is i steps after it is in the
// image; there are at most 14 - 1 + 51.
struct Reach {
  int64_t first = 0, last = 0, at = 0;
  uint64_t in_image = 0;
};

CNK_INLINE int64_t steps(int64_t distance, int64_t step) {
  return step == 1 ? distance : ceil_div(distance, step);
}
CNK_INLINE constexpr uint64_t all_columns(int64_t columns) { return (uint64_t{1} << columns) - 1; }

// For `pixels` pixels of the result from o on.
CNK_INLINE Reach reach_of(const Lattice& l, int64_t o, int64_t residue, int64_t pixels) {
  const int64_t scaled = o * l.down + (residue - l.reach) * l.dilation;
  if (l.half & scaled) return {};  // between the pixels of x
  const int64_t at = scaled >> l.half;
  const int64_t inside = at < 0 ? steps(-at, l.in_step) : 0;
  const int64_t outside = at < l.in ? steps(l.in - at, l.in_step) : 0;
  const int64_t first = max64(0, inside - pixels + 1), most = outside - first;
  const int64_t last = min64(steps(l.taps - residue, l.tap_step), outside);
  if (first >= last) return {};
  const uint64_t before_end = most > 63 ? ~uint64_t{0} : all_columns(most);
  return {first, last, at + first * l.in_step, before_end & ~all_columns(max64(inside - first, 0))};
}

// Elements from pixel to pixel.
CNK_INLINE int64_t x_pixel(const DwconvArgs& a) { return a.x_pixel ? a.x_pixel : a.c; }
CNK_INLINE int64_t y_pixel(const DwconvArgs& a) { return a.y_pixel ? a.y_pixel : a.c; }

// What all tiles have in common.
struct Geometry {
  Lattice depth, along, across;  // the depth without dilation
  int64_t x_along, x_across;     // elements between pixels of x
  int64_t x_plane;               // elements of a plane of x
  int64_t y_along, y_across;     // pixels of the result, in the order of its memory
  int64_t plane_taps, taps;      // of a plane of the kernel; of all

  explicit Geometry(const DwconvArgs& a) : Geometry(a, along_columns(a.h, a.w)) {}

  // columns: whether pixels are in the order of columns, not of rows.
  Geometry(const DwconvArgs& a, bool columns)
      : depth(a.d, true),
        along(columns ? a.h : a.w, false),
        across(columns ? a.w : a.h, true),
        x_along((columns ? a.w.in : 1) * x_pixel(a)),
        x_across((columns ? 1 : a.w.in) * x_pixel(a)),
        x_plane(a.h.in * a.w.in * x_pixel(a)),
        y_along(columns ? a.w.out : 1),
        y_across(columns ? 1 : a.w.out),
        plane_taps(int64_t{a.h.taps} * a.w.taps),
        taps(plane_taps * a.d.taps) {}
};

// Taps of one plane, one residue along and one across: where their weights and pixels of x are, from the first ones
// of a tile on.
struct Window {
  int64_t weight, x;  // in elements
  int64_t rows, taps;
  uint64_t in_image;  // as in Reach
};

// The windows of the tiles at one place, for all channels. What is needed along is kept while tiles go down.
class Windows {
 public:
  explicit Windows(const Geometry& g) : g_(g) {}

  // To a plane of the result.
  void enter(int64_t plane) {
    const Lattice& depth = g_.depth;
    planes_ = 0;
    for (int64_t k = 0; k < depth.taps; ++k) {
      const int64_t scaled = plane * depth.down + k - depth.reach, at = scaled >> depth.half;
      if (scaled < 0 || (depth.half & scaled) || at >= depth.in) continue;
      plane_[planes_++] = {k * g_.plane_taps * kChannelAlign, at * g_.x_plane};
    }
  }

  CNK_INLINE void move(int64_t across, int64_t along, int64_t pixels) {
    if (along != at_ || pixels != pixels_) {
      at_ = along, pixels_ = pixels;
      for (int64_t k = 0; k < g_.along.tap_step; ++k) along_[k] = reach_of(g_.along, along, k, pixels);
    }
    count = 0;
    for (int k = 0; k < planes_; ++k) add_plane(across, plane_[k]);
  }

  Window list[4 * kMaxDepthTaps];
  int count = 0;

 private:
  // A plane of taps that meets a plane of x: in elements, where both begin.
  struct Plane {
    int64_t weight, x;
  };

  CNK_INLINE void add_plane(int64_t across, const Plane& plane) {
    for (int64_t i = 0; i < g_.across.tap_step; ++i) {
      const Reach rows = reach_of(g_.across, across, i, 1);
      const int64_t kernel_row = i + rows.first * g_.across.tap_step;
      for (int64_t k = 0; k < g_.along.tap_step; ++k) {
        const Reach& taps = along_[k];
        if (rows.first == rows.last || taps.first == taps.last) continue;
        const int64_t tap = taps.first + (k ? (g_.along.taps + 1) / 2 : 0);  // as pack_taps orders them
        list[count++] = {.weight = plane.weight + (kernel_row * g_.along.taps + tap) * kChannelAlign,
                         .x = plane.x + rows.at * g_.x_across + taps.at * g_.x_along,
                         .rows = rows.last - rows.first,
                         .taps = taps.last - taps.first,
                         .in_image = taps.in_image};
      }
    }
  }

  const Geometry& g_;
  int64_t at_ = -1, pixels_ = -1;
  Reach along_[2];
  int planes_ = 0;
  Plane plane_[kMaxDepthTaps];
};

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

// What a later call reads and this one does not.
struct Ahead {
  const void *begin = nullptr, *end = nullptr;
};

// Pixels of a tile of a row of `width`: those with which fewer are computed that are not in the row. With up to 13 taps,
// so that a Reach has bits for all.
int64_t tile_columns(int64_t width, const Lattice& along) {
  const auto computed = [&](int64_t tile) {
    int64_t all = width / tile * tile;
    if (width % tile) with_accumulators(width % tile, [&](auto last) { all += last.value; });
    return all;
  };
  return along.taps <= 13 && computed(kWide) < computed(kColumns) ? kWide : kColumns;
}

// Prefetches a range of memory into L2, a part of it at every tile, so that the arithmetic hides it.
class Prefetch {
 public:
  Prefetch(const Ahead& ahead, int64_t tiles)
      : at_(static_cast<const char*>(ahead.begin)),
        end_(static_cast<const char*>(ahead.end)),
        share_((end_ - at_) / max64(tiles, 1) + 64) {}
  CNK_INLINE void some() {
    for (int64_t left = share_; left > 0 && at_ < end_; left -= 64, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t share_;
};

// Where sums are stored: fp32 rows of whole registers, or the op's result, in x's dtype, with a residual.
struct Rows {
  float* y;  // pixel `begin`, channel 0
  int64_t ldy, begin;
};
template <class T>
struct Result {
  T* y;  // pixel 0, channel 0
  const T* residual;
  int64_t ldy;
  T* lines;  // space for a tile of whole cache lines, which are stored past the caches; null: not so
};

// `pixel`: the first one; `apart`: pixels from one to the next.
template <bool PARTIAL, class T>
CNK_INLINE void convolve_to(const Rows& out, const Tile<T>& t, int64_t channel, int64_t pixel,
                            int64_t columns, int64_t apart) {
  float* y = out.y + (pixel - out.begin) * out.ldy + channel;
  convolve_tile<PARTIAL>(t, columns, Sink{y, apart * out.ldy, true});
}

template <bool PARTIAL, class T>
CNK_INLINE void convolve_to(const Result<T>& out, const Tile<T>& t, int64_t channel, int64_t pixel,
                            int64_t columns, int64_t apart) {
  T* y = out.y + pixel * out.ldy + channel;
  const int64_t step = apart * out.ldy;
  constexpr int64_t kLine = 64 / sizeof(T);
  const bool whole = !out.lines || kLine == kLanes;  // a register: it need not wait for its neighbour
  if (!PARTIAL && !out.residual && whole) {
    return convolve_tile<PARTIAL>(t, columns, Sink{y, step, false, out.lines != nullptr});
  }
  alignas(64) float sums[kWide * kLanes];
  convolve_tile<PARTIAL>(t, columns, Sink{sums, kLanes, true});
  const T* residual = out.residual ? out.residual + pixel * out.ldy + channel : nullptr;
  const int64_t in_line = channel % kLine;
  for (int64_t j = 0; j < columns; ++j) {
    Vec v = load(sums + j * kLanes);
    if (residual) v += load_tap<PARTIAL>(residual + j * step, t.valid);
    if constexpr (PARTIAL) {
      store_partial(y + j * step, v, t.valid);
    } else {
      store(out.lines ? out.lines + j * kLine + in_line : y + j * step, v);
    }
  }
  if (!out.lines || in_line + kLanes < kLine) return;
  for (int64_t j = 0; j < columns; ++j) stream_line(y + j * step - in_line, out.lines + j * kLine);
}

// Pixels [begin, end) of all results, counted along first; channels [channel, last): multiples of kLanes,
// except for the last C.
template <class T, class Out>
void convolve_pixels(const DwconvArgs& a, const Geometry& g, int64_t channel, int64_t last, int64_t begin,
                     int64_t end, const Out& out, const Ahead& ahead = {}) {
  const int64_t width = g.along.out, plane = width * g.across.out;
  const T* x = static_cast<const T*>(a.x);
  Prefetch prefetch(ahead, ceil_div(last - channel, kLanes) * ceil_div(end - begin, min64(width, kWide)));
  const int64_t tile = tile_columns(ceil_div(width, g.along.out_step), g.along);
  Windows windows(g);
  Tile<T> t;
  t.step = g.along.in_step * g.x_along;
  t.row_step = g.across.in_step * g.x_across;
  t.weight_row = g.across.tap_step * g.along.taps * kChannelAlign;
  t.windows = &windows;
#if defined(CNK_HAS_BF16)
  t.pairs = a.pairs && __is_same(T, BFloat16);
#else  // a set with pairs calls these kernels for products in fp32
  t.pairs = false;
#endif
  const float* const weight = t.pairs ? a.pairs : a.weight;
  // Two cache lines of a pixel while it is in L1. With few taps all channels of it: there are only nine
  // multiply-adds for each number, so memory is the limit, and it is faster when read in order (1x984x23x84,
  // K 3: 0.56 -> 0.40 ms); the taps fit into L1. With a single row of taps as well: no line is needed again.
  const int64_t group = g.taps <= kFewTaps || g.across.taps == 1 ? last - channel : kChannelAlign;
  for (int64_t group_begin = channel; group_begin < last; group_begin += group) {
    const int64_t group_end = min64(group_begin + group, last);
    for (int64_t p = begin, next; p < end; p = next) {
      const int64_t planes = p / plane, origin = planes * plane;  // before this one; its first pixel
      const int64_t image = planes / g.depth.out;
      const T* const of_image = x + image * g.depth.in * g.x_plane;
      windows.enter(planes - image * g.depth.out);
      next = min64(origin + plane, end);
      const int64_t top = (p - origin) / width, bottom = (next - 1 - origin) / width;
      for (int64_t left = 0, right; left < width; left = right) {
        right = min64(left + tile * g.along.out_step, width);
        for (int64_t residue = 0; residue < min64(g.along.out_step, right - left); ++residue) {
          for (int64_t across = top; across <= bottom; ++across) {
            const int64_t row = origin + across * width;  // its first pixel, if counted along first
            const int64_t along = max64(left, p - row) + residue;
            const int64_t columns = steps(min64(right, next - row) - along, g.along.out_step);
            if (columns <= 0) continue;
            windows.move(across, along, columns);
            const int64_t pixel = origin + across * g.y_across + along * g.y_along;
            for (int64_t c = group_begin; c < group_end; c += kLanes) {
              t.image = of_image + c;
              t.weight = weight + c / kChannelAlign * kChannelAlign * g.taps + c % kChannelAlign;
              t.bias = load(a.bias + c);
              t.valid = a.c - c;
              prefetch.some();
              if (t.valid >= kLanes) {
                convolve_to<false>(out, t, c, pixel, columns, g.along.out_step * g.y_along);
              } else {
                convolve_to<true>(out, t, c, pixel, columns, g.along.out_step * g.y_along);
              }
            }
          }
        }
      }
    }
  }
}

// Rows of the plane of x that the plane of results after `plane` needs and this one does not.
template <class T>
Ahead next_plane(const DwconvArgs& a, const Geometry& g, int64_t plane, int64_t top, int64_t bottom) {
  const Lattice &depth = g.depth, &across = g.across;
  const int64_t image = plane / depth.out, z = plane - image * depth.out;
  const int64_t at = ((z + 1) * depth.down + depth.reach) >> depth.half;
  if (g.x_along != x_pixel(a) || at >= depth.in) return {};
  const int64_t reach = across.reach * across.dilation;
  const int64_t first = max64((top * across.down - reach) >> across.half, 0);
  const int64_t last = min64(((bottom * across.down + reach) >> across.half) + 1, across.in);
  const T* x = static_cast<const T*>(a.x) + (image * depth.in + at) * g.x_plane;
  return {x + first * g.x_across, x + last * g.x_across};
}

// Of images that do not stay in the caches between two layers: pixels of x that the block of results after `next` needs
// and the one before it does not. (8x192x56x56 in bf16, one thread of a Zen 4: K 3 3.39 -> 3.00 ms, K 5 3.99 -> 3.38, K 7
// 5.31 -> 4.37; no gain where x and y are 5 MB.)
template <class T>
Ahead next_block(const DwconvArgs& a, const Geometry& g, int64_t next, int64_t block) {
  const int64_t pixels = a.n * a.h.in * a.w.in;
  const bool rows = g.x_along == a.c && g.across.in == g.across.out && g.along.in == g.along.out;
  if (!rows || 2 * pixels * a.c * int64_t(sizeof(T)) <= last_cache_bytes() / 4) return {};
  const int64_t from = min64(next + g.across.reach * g.across.dilation * a.w.in, pixels);
  const T* x = static_cast<const T*>(a.x);
  return {x + from * a.c, x + min64(from + block, pixels) * a.c};
}

}  // namespace

template <class T>
void dwconv_pixels(const DwconvArgs& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  const int64_t registers = (a.c + kLanes - 1) / kLanes * kLanes;
  // Along rows, whatever the kernel: the caller's pixels are in this order. (With stride 1 the taps are packed in
  // the same order either way.)
  const Geometry g(a, false);
  // The caller does other work between calls: as many pixels as these, after the last tap, for the next call.
  const int64_t pixels = a.n * a.h.out * a.w.out, ahead = min64(end + g.across.reach * a.w.out, pixels);
  const T* x = static_cast<const T*>(a.x);
  convolve_pixels<T>(a, g, 0, a.c, begin, end, Rows{y, ldy, begin},
                     {x + ahead * a.c, x + min64(ahead + end - begin, pixels) * a.c});
  for (int64_t p = 0; p < end - begin; ++p) {
    for (int64_t c = registers; c < pad_channels(a.c); c += kLanes) store(y + p * ldy + c, Vec{});
  }
}

template void dwconv_pixels<BFloat16>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);
#if !defined(CNK_HAS_BF16)  // its sums are fp32
template void dwconv_pixels<float>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);
template void dwconv_pixels<Float16>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);
#endif

void dwconv(const DwconvArgs& a, Team& team) {
  CNK_SHARED_UNLESS(a.dtype == DType::kBFloat16, dwconv, a, team);
  // Every thread takes one piece, so that what its blocks share is in its own L2.
  // (When blocks were given out in turn, each line of x was in the L2 of all
  // threads.) Pieces are rows of images, channels or pixels, whatever divides best.
  constexpr int64_t kBlockBytes = 256 << 10, kBandBytes = 512 << 10;
  const Geometry g(a);
  const int64_t width = g.along.out, rows = a.n * g.depth.out * g.across.out, pixels = rows * width;
  const int64_t registers = ceil_div(a.c, kLanes);
  const auto divides = [&](int64_t items) {
    return double(round_up(items, team.size())) <= 1.07 * double(items);
  };
  const bool by_rows = divides(rows), by_channels = !by_rows && divides(registers);
  int64_t begin = 0, end = pixels, first = 0, last = registers;
  if (by_channels) {
    team.split(registers, 1, &first, &last);
  } else {
    team.split(pixels, by_rows ? width : kColumns, &begin, &end);
  }
  const int64_t channel = first * kLanes, last_channel = min64(last * kLanes, a.c);
  if (channel >= last_channel) return;
  const int64_t row_bytes = (last_channel - channel) * width * 4, plane = g.across.out * width;
  const int64_t block = max64(kBlockBytes / row_bytes, 1) * width;
  // Of volumes a band of rows of all planes, then the next band: the rows that the next plane needs too stay in L2.
  const int64_t above = a.d.taps > 1 ? g.across.taps - 1 : 0;
  const int64_t fit = kBandBytes / (row_bytes * a.d.taps) - above;
  const int64_t band = (a.d.out > 1 ? max64(fit, 2 * above) : rows) * width;
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    alignas(64) T lines[kWide * 64 / sizeof(T)];
    constexpr int64_t kLine = 64 / sizeof(T);
    const bool whole =
        a.c % kLine == 0 && y_pixel(a) % kLine == 0 && channel % kLine == 0 && last_channel % kLine == 0;
    const bool streaming = a.streaming && whole && reinterpret_cast<uintptr_t>(a.y) % 64 == 0;
    const Result<T> out = {static_cast<T*>(a.y), static_cast<const T*>(a.residual), y_pixel(a),
                           streaming ? lines : nullptr};
    if (a.d.out == 1) {
      for (int64_t p = begin, next; p < end; p = next) {
        next = min64(p + block, end);
        const Ahead ahead = by_channels ? Ahead{} : next_block<T>(a, g, next, block);
        convolve_pixels<T>(a, g, channel, last_channel, p, next, out, ahead);
      }
      return streamed();
    }
    for (int64_t top = 0; top < plane; top += band) {
      for (int64_t z = begin / plane * plane; z < end; z += plane) {
        const int64_t from = max64(z + top, begin), to = min64(z + min64(top + band, plane), end);
        if (from >= to) continue;
        convolve_pixels<T>(a, g, channel, last_channel, from, to, out,
                           next_plane<T>(a, g, z / plane, (from - z) / width, (to - z - 1) / width));
      }
    }
    streamed();
  });
}

}  // namespace cnk::cpu::CNK_ISA
