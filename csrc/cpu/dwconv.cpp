// Depthwise convolution, NHWC, stride 1, zero padding:
//
//   y[n,h,w,c] = b[c] + sum_ij x[n,h+(i-P)d,w+(j-P)d,c] w[i,j,c]
//
// One register holds kLanes channels. The sums of a tile of up to kColumns output columns are in registers,
// and up to kTaps weights of one kernel row. Each input column is loaded once for these taps and feeds one
// multiply-add of each. Taps outside the image are skipped, not padded: a 31x31 kernel on a 7x7 image does
// the work of 13x13. A sum adds its taps row by row, from left to right, whatever the tile, so that its bits
// do not depend on how the work is divided.
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

constexpr int kColumns = kRegisters == 32 ? 14 : 7;  // divides the widths 56, 28, 14, 7 of a 224 image
constexpr int kTaps = 7;                             // kColumns + kTaps + 1 registers

template <class T>
struct Tile {
  const T* plane;       // image n, first of this register's channels
  const float* weight;  // this register's channels of tap 0; taps are kChannelAlign floats apart
  Vec bias;
  int64_t h, w, height, width, c;  // first output pixel; image size; channels
  int64_t valid;                   // channels in this register; kLanes or fewer
  int64_t kernel_size, dilation;
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
  bool wide;  // fp32, else x's dtype
};

template <class T, int COLUMNS>
CNK_INLINE void store_tile(const Vec (&acc)[COLUMNS], int64_t columns, const Sink& to) {
  if (to.wide) {
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

constexpr uint64_t all_columns(int columns) { return (uint64_t{1} << columns) - 1; }

// Dilation 1. Of the COLUMNS accumulators, `columns` are stored.
template <int COLUMNS, bool PARTIAL, class T>
__attribute__((noinline)) void convolve(const Tile<T>& t, int64_t columns, const Sink& to) {
  Vec acc[COLUMNS];
  CNK_UNROLL
  for (Vec& sum : acc) sum = t.bias;
  const int64_t reach = t.kernel_size / 2, stride = t.c, valid = t.valid;
  const int64_t first_row = max64(0, reach - t.h), last_row = min64(t.kernel_size, t.height + reach - t.h);
  const int64_t first_tap = max64(0, reach - t.w - columns + 1);
  const int64_t last_tap = min64(t.kernel_size, t.width + reach - t.w);
  const float* weights = t.weight + (first_row * t.kernel_size + first_tap) * kChannelAlign;
  const int64_t column = t.w + first_tap - reach;  // of x: that of the first tap for accumulator 0
  const T* row = t.plane + ((t.h + first_row - reach) * t.width + column) * stride;
  // Bit i: column + i is in the image. There are fewer than 14 + 31 columns.
  const uint64_t in_image = (uint64_t{1} << min64(t.width - column, 63)) - (uint64_t{1} << max64(-column, 0));
  for (int64_t rows = last_row - first_row; rows > 0; --rows) {
    const float* weight = weights;
    const T* x = row;
    uint64_t inside = in_image;
    int64_t taps = last_tap - first_tap;
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
    static_assert(kTaps == 7);
    if (taps == 3 && (~inside & all_columns(COLUMNS + 2)) == 0) {  // most of K 3
      add_taps<3, false, PARTIAL>(acc, weight, x, stride, valid, inside);
      taps = 0;
    }
    switch (taps) {
      case 1:
        add_taps<1, true, PARTIAL>(acc, weight, x, stride, valid, inside);
        break;
      case 2:
        add_taps<2, true, PARTIAL>(acc, weight, x, stride, valid, inside);
        break;
      case 3:
        add_taps<3, true, PARTIAL>(acc, weight, x, stride, valid, inside);
        break;
      case 4:
        add_taps<4, true, PARTIAL>(acc, weight, x, stride, valid, inside);
        break;
      case 5:
        add_taps<5, true, PARTIAL>(acc, weight, x, stride, valid, inside);
        break;
      case 6:
        add_taps<6, true, PARTIAL>(acc, weight, x, stride, valid, inside);
    }
    weights += t.kernel_size * kChannelAlign;
    row += t.width * stride;
  }
  store_tile<T>(acc, columns, to);
}

// Any dilation: one tap at a time, its weight times all columns; inputs are memory operands from L1.
template <bool PARTIAL, class T>
__attribute__((noinline)) void convolve_dilated(const Tile<T>& t, int64_t columns, const Sink& to) {
  const int64_t d = t.dilation, reach = (t.kernel_size / 2) * d;
  Vec acc[kColumns];
  CNK_UNROLL
  for (Vec& sum : acc) sum = t.bias;
  for (int64_t i = 0; i < t.kernel_size; ++i) {
    const int64_t h = t.h + i * d - reach;
    if (h < 0 || h >= t.height) continue;
    const T* x = t.plane + h * t.width * t.c;
    for (int64_t k = 0; k < t.kernel_size; ++k) {
      const int64_t w = t.w + k * d - reach;  // column of the first accumulator's tap
      if (w + columns <= 0 || w >= t.width) continue;
      const Vec weight = load(t.weight + (i * t.kernel_size + k) * kChannelAlign);
      if (w >= 0 && w + kColumns <= t.width) {
        CNK_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          acc[j] = multiply_add(load_tap<PARTIAL>(x + (w + j) * t.c, t.valid), weight, acc[j]);
        }
      } else {
        CNK_UNROLL
        for (int j = 0; j < kColumns; ++j) {
          if (w + j < 0 || w + j >= t.width) continue;
          acc[j] = multiply_add(load_tap<PARTIAL>(x + (w + j) * t.c, t.valid), weight, acc[j]);
        }
      }
    }
  }
  store_tile<T>(acc, columns, to);
}

// With the number of accumulators that leaves the fewest unused: 14, 10, 7 or 4 (16 registers: 7, 5, 3 or 2).
template <bool PARTIAL, class T>
CNK_INLINE void convolve_tile(const Tile<T>& t, int64_t columns, const Sink& to) {
  constexpr int kSome = kColumns * 5 / 7, kHalf = kColumns / 2, kFew = kColumns * 2 / 7;
  if (t.dilation != 1) return convolve_dilated<PARTIAL>(t, columns, to);
  if (columns <= kFew) return convolve<kFew, PARTIAL>(t, columns, to);
  if (columns <= kHalf) return convolve<kHalf, PARTIAL>(t, columns, to);
  if (columns <= kSome) return convolve<kSome, PARTIAL>(t, columns, to);
  convolve<kColumns, PARTIAL>(t, columns, to);
}

// Prefetches a range of memory into L2, a part of it at every tile, so that the arithmetic hides it.
class Prefetch {
 public:
  Prefetch(const void* begin, const void* end, int64_t tiles)
      : at_(static_cast<const char*>(begin)),
        end_(static_cast<const char*>(end)),
        share_((end_ - at_) / max64(tiles, 1) + 64) {}
  CNK_INLINE void some() {
    for (const char* stop = at_ + share_; at_ < stop && at_ < end_; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t share_;
};

// Where sums are stored: fp32 rows of whole registers, or the op's result, in x's dtype, with a residual.
struct Rows {
  float* y;  // pixel `begin`, channel 0
  int64_t ldy;
};
template <class T>
struct Result {
  T* y;  // pixel `begin`, channel 0
  const T* residual;
  int64_t ldy;
};

template <bool PARTIAL, class T>
CNK_INLINE void convolve_to(const Rows& out, const Tile<T>& t, int64_t channel, int64_t pixel,
                            int64_t columns) {
  convolve_tile<PARTIAL>(t, columns, Sink{out.y + pixel * out.ldy + channel, out.ldy, true});
}

template <bool PARTIAL, class T>
CNK_INLINE void convolve_to(const Result<T>& out, const Tile<T>& t, int64_t channel, int64_t pixel,
                            int64_t columns) {
  T* y = out.y + pixel * out.ldy + channel;
  if (!PARTIAL && !out.residual) {
    return convolve_tile<PARTIAL>(t, columns, Sink{y, out.ldy, false});
  }
  alignas(64) float sums[kColumns * kLanes];
  convolve_tile<PARTIAL>(t, columns, Sink{sums, kLanes, true});
  const T* residual = out.residual ? out.residual + pixel * out.ldy + channel : nullptr;
  for (int64_t j = 0; j < columns; ++j, y += out.ldy) {
    Vec v = load(sums + j * kLanes);
    if (residual) v += load_tap<PARTIAL>(residual + j * out.ldy, t.valid);
    if constexpr (PARTIAL) {
      store_partial(y, v, t.valid);
    } else {
      store(y, v);
    }
  }
}

// Pixels [begin, end) of all images, channels [channel, last): multiples of kLanes, except for the last C.
template <class T, class Out>
void convolve_pixels(const DwconvArgs& a, int64_t channel, int64_t last, int64_t begin, int64_t end,
                     const Out& out) {
  const int64_t plane = a.h * a.w, pixels = a.n * plane, taps = int64_t{a.kernel_size} * a.kernel_size;
  const T* x = static_cast<const T*>(a.x);
  // What the next call reads and this one does not: as many pixels, after the last tap. For the fused block,
  // which does other work in between. The op on its own needs no prefetches: the processor finds the lines
  // itself, and they slow it down (8x664x7x86, K 3: 0.65 ms without, 0.87 with).
  constexpr bool kFused = __is_same(Out, Rows);
  const int64_t ahead = kFused ? min64(end + a.kernel_size / 2 * a.w, pixels) : pixels;
  Prefetch prefetch(x + ahead * a.c, x + min64(ahead + end - begin, pixels) * a.c,
                    (last - channel + kLanes - 1) / kLanes * ((end - begin) / min64(a.w, kColumns)));
  Tile<T> t;
  t.height = a.h;
  t.width = a.w;
  t.c = a.c;
  t.kernel_size = a.kernel_size;
  t.dilation = a.dilation;
  // Two cache lines of a pixel while it is in L1. With K 3 all channels of it: there are only nine
  // multiply-adds for each number, so memory is the limit, and it is faster when read in order (1x984x23x84:
  // 0.56 -> 0.40 ms); the taps fit into L1.
  const int64_t group = a.kernel_size <= 3 ? last - channel : kChannelAlign;
  for (int64_t group_begin = channel; group_begin < last; group_begin += group) {
    const int64_t group_end = min64(group_begin + group, last);
    for (int64_t p = begin, next; p < end; p = next) {
      const int64_t origin = p / plane * plane;  // pixel 0 of the image
      next = min64(origin + plane, end);
      const int64_t top = (p - origin) / a.w, bottom = (next - 1 - origin) / a.w;
      for (int64_t left = 0; left < a.w; left += kColumns) {
        for (t.h = top; t.h <= bottom; ++t.h) {
          const int64_t row = origin + t.h * a.w;  // its first pixel
          t.w = max64(left, p - row);
          const int64_t columns = min64(min64(left + kColumns, a.w), next - row) - t.w;
          if (columns <= 0) continue;
          for (int64_t c = group_begin; c < group_end; c += kLanes) {
            t.plane = x + origin * a.c + c;
            t.weight = a.weight + c / kChannelAlign * kChannelAlign * taps + c % kChannelAlign;
            t.bias = load(a.bias + c);
            t.valid = a.c - c;
            if constexpr (kFused) prefetch.some();
            if (t.valid >= kLanes) {
              convolve_to<false>(out, t, c, row + t.w - begin, columns);
            } else {
              convolve_to<true>(out, t, c, row + t.w - begin, columns);
            }
          }
        }
      }
    }
  }
}

}  // namespace

#if !defined(CNK_HAS_BF16)  // its sums are fp32

template <class T>
void dwconv_pixels(const DwconvArgs& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  const int64_t registers = (a.c + kLanes - 1) / kLanes * kLanes;
  convolve_pixels<T>(a, 0, a.c, begin, end, Rows{y, ldy});
  for (int64_t p = 0; p < end - begin; ++p) {
    for (int64_t c = registers; c < pad_channels(a.c); c += kLanes) store(y + p * ldy + c, Vec{});
  }
}

template void dwconv_pixels<float>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);
template void dwconv_pixels<BFloat16>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);
template void dwconv_pixels<Float16>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);

#endif

void dwconv(const DwconvArgs& a, Team& team) {
#if defined(CNK_HAS_BF16)
  if (a.dtype != DType::kBFloat16) return CNK_SHARED::kOps.dwconv(a, team);
#endif
  // Every thread takes one piece, so that what its blocks share is in its own L2.
  // (When blocks were given out in turn, each line of x was in the L2 of all
  // threads.) Pieces are rows of images, channels or pixels, whatever divides best.
  constexpr int64_t kBlockBytes = 256 << 10;
  const int64_t pixels = a.n * a.h * a.w, registers = ceil_div(a.c, kLanes);
  const auto divides = [&](int64_t items) {
    return double(round_up(items, team.size())) <= 1.07 * double(items);
  };
  const bool by_rows = divides(a.n * a.h), by_channels = !by_rows && divides(registers);
  int64_t begin = 0, end = pixels, first = 0, last = registers;
  if (by_channels) {
    team.split(registers, 1, &first, &last);
  } else {
    team.split(pixels, by_rows ? a.w : kColumns, &begin, &end);
  }
  const int64_t channel = first * kLanes, last_channel = min64(last * kLanes, a.c);
  if (channel >= last_channel) return;
  const int64_t block = max64(kBlockBytes / ((last_channel - channel) * a.w * 4), 1) * a.w;
  with_own_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* residual = static_cast<const T*>(a.residual);
    for (int64_t p = begin, next; p < end; p = next) {
      next = min64(p + block, end);
      const Result<T> out = {static_cast<T*>(a.y) + p * a.c, residual ? residual + p * a.c : nullptr, a.c};
      convolve_pixels<T>(a, channel, last_channel, p, next, out);
    }
  });
}

}  // namespace cnk::cpu::CNK_ISA
