// Depthwise convolution, NHWC, stride 1, zero padding: y[n,h,w,c] = b[c] + sum_ij x[n,h+(i-P)d,w+(j-P)d,c]
// w[i,j,c].
//
// One register holds kLanes channels. A tile of up to kColumns output columns lives in accumulators; one row
// of K weights in registers; each input column is loaded once per kernel row and feeds up to K multiply-adds.
// Taps outside the image are skipped, one test per input column. The channel loop is outermost, so that the
// rows of x a run of pixels needs are read from L1 K times.

#include "cpu/dwconv.h"

#include "cpu/rows.h"

namespace cnk::cpu::CNK_ISA {

namespace {

constexpr int kColumns = kRegisters == 32 ? 14 : 7;  // divides the widths 56, 28, 14, 7 of a 224 image

template <class T>
struct Tile {
  const T* plane;  // image n, first of this register's channels
  const float* weight;
  int64_t ldw;
  Vec bias;
  int64_t h, w, height, width, c;  // first output pixel; image size; channels
  int64_t valid;                   // channels in this register; kLanes or fewer
  int dilation, kernel_size;
  float* y;  // first output pixel
  int64_t ldy;
};

template <bool partial, class T>
CNK_INLINE Vec load_tap(const T* p, int64_t valid) {
  if constexpr (partial) return load_partial(p, valid);
  return load(p);
}

// Dilation 1, K known: `columns` of the COLUMNS accumulators are stored.
template <int K, int COLUMNS, bool PARTIAL, class T>
void convolve_unrolled(const Tile<T>& t, int64_t columns) {
  constexpr int P = K / 2;
  Vec acc[COLUMNS];
  unroll<COLUMNS>([&](auto j) { acc[j.value] = t.bias; });
  const int64_t row = t.width * t.c;
  for (int i = 0; i < K; ++i) {
    const int64_t h = t.h + i - P;
    if (h < 0 || h >= t.height) continue;
    Vec weight[K];
    const float* w = t.weight + i * K * t.ldw;
    unroll<K>([&](auto j) { weight[j.value] = load(w + j.value * t.ldw); });
    const T* x = t.plane + h * row + (t.w - P) * t.c;
    const int64_t first = P - t.w, last = t.width + P - t.w;  // input columns inside the image
    unroll<COLUMNS + K - 1>([&](auto j) {
      if (j.value < first || j.value >= last) return;
      const Vec v = load_tap<PARTIAL>(x + j.value * t.c, t.valid);
      unroll<K>([&](auto k) {
        constexpr int column = decltype(j)::value - decltype(k)::value;
        if constexpr (column >= 0 && column < COLUMNS)
          acc[column] = multiply_add(v, weight[k.value], acc[column]);
      });
    });
  }
  unroll<COLUMNS>([&](auto j) {
    if (j.value < columns) store(t.y + j.value * t.ldy, acc[j.value]);
  });
}

// Any K and dilation: taps one by one, each weight feeding all columns, inputs as memory operands from L1.
template <bool PARTIAL, class T>
void convolve_any(const Tile<T>& t, int64_t columns) {
  const int64_t d = t.dilation, reach = (t.kernel_size / 2) * d;
  Vec acc[kColumns];
  unroll<kColumns>([&](auto j) { acc[j.value] = t.bias; });
  for (int i = 0; i < t.kernel_size; ++i) {
    const int64_t h = t.h + i * d - reach;
    if (h < 0 || h >= t.height) continue;
    const T* x = t.plane + h * t.width * t.c;
    for (int k = 0; k < t.kernel_size; ++k) {
      const int64_t w = t.w + k * d - reach;  // column of the first accumulator's tap
      if (w + columns <= 0 || w >= t.width) continue;
      const Vec weight = load(t.weight + (i * t.kernel_size + k) * t.ldw);
      if (w >= 0 && w + kColumns <= t.width) {
        unroll<kColumns>([&](auto j) {
          acc[j.value] =
              multiply_add(load_tap<PARTIAL>(x + (w + j.value) * t.c, t.valid), weight, acc[j.value]);
        });
      } else {
        unroll<kColumns>([&](auto j) {
          if (w + j.value < 0 || w + j.value >= t.width) return;
          acc[j.value] =
              multiply_add(load_tap<PARTIAL>(x + (w + j.value) * t.c, t.valid), weight, acc[j.value]);
        });
      }
    }
  }
  unroll<kColumns>([&](auto j) {
    if (j.value < columns) store(t.y + j.value * t.ldy, acc[j.value]);
  });
}

template <bool PARTIAL, class T>
using Convolve = void (*)(const Tile<T>&, int64_t columns);

// The kernel for a tile that is `columns` wide: narrow ones waste fewer accumulators.
template <bool PARTIAL, class T>
Convolve<PARTIAL, T> pick(int kernel_size, int dilation, bool narrow) {
  if (dilation != 1) return convolve_any<PARTIAL, T>;
#define CNK_CASE(K)                                                \
  case K:                                                          \
    return narrow ? convolve_unrolled<K, kColumns / 2, PARTIAL, T> \
                  : convolve_unrolled<K, kColumns, PARTIAL, T>;
  switch (kernel_size) {
    CNK_CASE(3)
    CNK_CASE(5)
    CNK_CASE(7)
    CNK_CASE(9)
    CNK_CASE(11)
    CNK_CASE(13)
    default:
      return convolve_any<PARTIAL, T>;
  }
#undef CNK_CASE
}

template <bool PARTIAL, class T>
void dwconv_register(const DwconvArgs& a, int64_t channel, int64_t begin, int64_t end, float* y,
                     int64_t ldy) {
  const Convolve<PARTIAL, T> wide = pick<PARTIAL, T>(a.kernel_size, a.dilation, false);
  const Convolve<PARTIAL, T> narrow = pick<PARTIAL, T>(a.kernel_size, a.dilation, true);
  const int64_t padded = pad_channels(a.c), plane = a.h * a.w;
  Tile<T> t;
  t.weight = a.weight + channel;
  t.ldw = padded;
  t.bias = load(a.bias + channel);
  t.height = a.h;
  t.width = a.w;
  t.c = a.c;
  t.valid = a.c - channel;
  t.dilation = a.dilation;
  t.kernel_size = a.kernel_size;
  t.ldy = ldy;
  for (int64_t p = begin; p < end;) {
    const int64_t image = p / plane, in_plane = p - image * plane;
    t.h = in_plane / a.w;
    t.w = in_plane - t.h * a.w;
    t.plane = static_cast<const T*>(a.x) + image * plane * a.c + channel;
    t.y = y + (p - begin) * ldy + channel;
    const int64_t rest = a.w - t.w < end - p ? a.w - t.w : end - p;
    const int64_t columns = rest < kColumns ? rest : kColumns;
    (columns <= kColumns / 2 ? narrow : wide)(t, columns);
    p += columns;
  }
}

}  // namespace

template <class T>
void dwconv_pixels(const DwconvArgs& a, int64_t begin, int64_t end, float* y, int64_t ldy) {
  for (int64_t channel = 0; channel < pad_channels(a.c); channel += kLanes) {
    if (channel + kLanes <= a.c) {
      dwconv_register<false, T>(a, channel, begin, end, y, ldy);
    } else if (channel < a.c) {
      dwconv_register<true, T>(a, channel, begin, end, y, ldy);
    } else {
      for (int64_t p = 0; p < end - begin; ++p) store(y + p * ldy + channel, Vec{});
    }
  }
}

template void dwconv_pixels<float>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);
template void dwconv_pixels<BFloat16>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);
template void dwconv_pixels<Float16>(const DwconvArgs&, int64_t, int64_t, float*, int64_t);

int64_t dwconv_workspace(const DwconvArgs& a, int threads) { return threads * step_bytes(a.c); }

void dwconv(const DwconvArgs& a, Team& team, char* workspace) {
  const int64_t pixels = a.n * a.h * a.w, step = step_rows(a.c), padded = pad_channels(a.c);
  float* rows = reinterpret_cast<float*>(workspace) + team.rank() * step * padded;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t begin; (begin = team.next() * step) < pixels;) {
      const int64_t end = begin + step < pixels ? begin + step : pixels;
      dwconv_pixels<T>(a, begin, end, rows, padded);
      for (int64_t p = begin; p < end; ++p) {
        T* y = static_cast<T*>(a.y) + p * a.c;
        const T* residual = static_cast<const T*>(a.residual) + p * a.c;
        for (int64_t c = 0; c < a.c; c += kLanes) {
          const Vec v = load(rows + (p - begin) * padded + c);
          store_channels(y, c, a.c, a.residual ? v + load_channels(residual, c, a.c) : v);
        }
      }
    }
  });
}

}  // namespace cnk::cpu::CNK_ISA
