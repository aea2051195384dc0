// Gradients of a depthwise convolution's weight and bias, NHWC:
//
//   dw[i, j, c] = sum of dy[n, h, w, c] x[n, h S + (i - P) D, w S + (j - Q) D, c]
//   db[c] = sum of dy[n, h, w, c]
//
// A kernel of one column is a kernel of one row on the transposed image (along_columns in ops.h). "Along" is the
// axis that the loops go along; what is said here about rows and columns is then said about columns and rows.
//
// One register holds kLanes channels. A band of rows of x (with zeros at its left and right) and of dy is
// copied into a dense fp32 scratch buffer. Then each column of dy is multiplied with two kernel rows' columns
// of x; their sums stay in registers along a block of rows that fits L1. bf16 where VDPBF16PS runs at full
// rate: the scratch holds pairs of neighbouring columns, and one instruction adds two products. Fetching x
// and dy from L3 costs more than the sums, so a whole cache line of each pixel is copied at once.
//
// In 3-D the bands of one place are taken plane by plane, and the planes of x that have a tap for the next plane of dy
// stay in the scratch: each is copied once for all kernel planes.
//
// The shape alone decides how bands are grouped into slabs. Each slab has its own sums, which are added in
// order at the end, so the bits of the result do not depend on the number of threads.

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

namespace {

constexpr int kMaxTaps =
    kRegisters == 32 ? 13 : 7;  // of a kernel row at a time; two rows of sums in registers
constexpr int64_t kBand = int64_t{256} << 10, kBlock = int64_t{28} << 10;  // bytes: fit L2, L1
constexpr int64_t kItems = 128;  // at least so many pieces of work to share, if the batch has as many

// Words of the scratch as fp32 numbers, or as pairs of bf16: a word at column w holds columns w and w + 1.
struct Floats {
  [[maybe_unused]] static constexpr int64_t kColumns = 1;  // of dy in a word
  static CNK_INLINE Vec add(Vec dy, const float* x, Vec sum) { return multiply_add(dy, load(x), sum); }
};
#if defined(CNK_HAS_BF16)  // compiled only for instruction sets without tiles: table.cpp
struct Pairs {
  [[maybe_unused]] static constexpr int64_t kColumns = 2;
  static CNK_INLINE Vec add(Vec dy, const float* x, Vec sum) { return dot_bf16(sum, dy, load(x)); }
};
#endif

// The word of two columns of bf16.
[[maybe_unused]] CNK_INLINE Vec join(Vec first, Vec second) {
  return (Vec)((((VecI)first >> 16) & 0xffff) | (VecI)second);
}

struct Plan {
  Axis depth, along, across;
  int64_t x_pixel, dy_pixel;  // elements from pixel to pixel
  int64_t x_along, x_across, dy_along, dy_across;
  int64_t together;    // registers of channels copied at once: a cache line of each pixel
  int64_t pieces;      // of that many registers
  int64_t held;        // kernel planes at a time; so many planes of x are in the scratch
  int64_t band;        // rows of dy copied at a time
  int64_t bands;       // of a plane
  int64_t planes;      // of dy that are taken one after the other
  int64_t chunks;      // of so many planes, of an image
  int64_t block;       // rows of a band that one call of add_taps sums
  int64_t slabs;       // each with its own sums
  int64_t reach;       // of the kernel to each side, along
  int64_t reach_rows;  // and across
  int64_t columns;     // of x that dy's columns need, with those outside of the image
  int64_t x_row;       // words (of kLanes numbers) of a row of x in the scratch
  int64_t dy_row;      // and of dy
  int64_t x_rows;      // of a band
  int64_t plane_taps;  // KH * KW
  int64_t taps;        // KD * KH * KW
  int64_t sums;        // floats of a slab: (taps + 1, padded C)
  // Floats of one group of channels in the scratch: a plane of x, a band of dy, the sums. Where these begin.
  int64_t x_size, dy_size, sums_size, dy_begin, sums_begin;
  int64_t scratch;  // bytes of a thread

  explicit Plan(const DwconvWeightGradientArgs& a) {
    constexpr int64_t word = kLanes * 4;
    const bool upright = along_columns(a.h, a.w);
    depth = a.d;
    along = upright ? a.h : a.w;
    across = upright ? a.w : a.h;
    x_pixel = a.x_pixel ? a.x_pixel : a.c;
    dy_pixel = a.dy_pixel ? a.dy_pixel : a.c;
    x_along = (upright ? a.w.in : 1) * x_pixel;
    x_across = (upright ? 1 : a.w.in) * x_pixel;
    dy_along = (upright ? a.w.out : 1) * dy_pixel;
    dy_across = (upright ? 1 : a.w.out) * dy_pixel;
    together = max64(64 / (element_size(a.dtype) * kLanes), 1);
    pieces = ceil_div(a.c, together * kLanes);
    reach = int64_t{along.taps / 2} * along.dilation;
    reach_rows = int64_t{across.taps / 2} * across.dilation;
    columns = (along.out - 1) * along.down + 1 + 2 * reach;
    // After the row: the right neighbour of its last column, and the single last column of an odd width.
    x_row = columns + 1 + along.taps;
    dy_row = along.out;
    const int64_t x_bytes = x_row * word, dy_bytes = dy_row * word;
    const int64_t row_bytes = across.down * x_bytes + dy_bytes;
    // All kernel planes at a time if there is room for as many rows as their halo has, else one: planes of x and dy
    // are then copied again for each.
    const auto rows_for = [&](int64_t planes) {
      return (kBand / together - 2 * reach_rows * planes * x_bytes) /
             (planes * across.down * x_bytes + dy_bytes);
    };
    held = rows_for(depth.taps) >= min64(2 * reach_rows, across.out) ? depth.taps : 1;
    band = rows_for(held);
    bands = ceil_div(across.out, min64(max64(band, 1), across.out));
    band = ceil_div(across.out, bands);
    bands = ceil_div(across.out, band);
    block = min64(max64((kBlock - 2 * reach_rows * x_bytes) / row_bytes, 1), band);
    // A chunk's first planes need `depth.taps` planes of x, the others one each.
    chunks = max64(min64(ceil_div(kItems, a.n * bands * pieces), depth.out / (2 * depth.taps)), 1);
    planes = ceil_div(depth.out, chunks);
    chunks = ceil_div(depth.out, planes);
    slabs = min64(a.n * chunks * bands, ceil_div(kItems, pieces));
    x_rows = (band - 1) * across.down + 1 + 2 * reach_rows;
    plane_taps = int64_t{along.taps} * across.taps;
    taps = plane_taps * depth.taps;
    sums = (taps + 1) * pad_channels(a.c);
    x_size = x_rows * x_row * kLanes;
    dy_size = band * dy_row * kLanes;
    sums_size = (taps + 1) * kLanes;
    dy_begin = together * held * x_size;
    sums_begin = dy_begin + together * dy_size;
    scratch = (sums_begin + together * sums_size) * 4;
  }
};

// The input of add_taps: `rows` rows of dy, each with kernel rows whose rows of x are `kernel_row` apart.
struct Walk {
  const float *dy, *x;    // first word of dy, and of x at the first tap
  int64_t dy_row, x_row;  // floats from row to row of the image
  int64_t kernel_row;     // floats from kernel row to kernel row in x
  int64_t rows, words;    // of dy
  int64_t step;           // floats in x from one word of dy to the next
  int64_t single;         // from x to its words for one more word of dy, a single column; 0: none
  int64_t dilation;
  float* sums;       // of the first kernel row and tap
  int64_t sums_row;  // floats from kernel row to kernel row
};

// sums[r][j] += dy[h, w] * x[h + r, w + j * d]. What is added stays in registers; it starts at zero, because one
// chain of additions over all pixels is too long (a volume of 4x28x29: six times eager's error).
template <class Word, int ROWS, int TAPS, bool DILATED>
void add_taps(const Walk& walk) {
  const int64_t d = (DILATED ? walk.dilation : 1) * kLanes, kernel_row = walk.kernel_row;
  Vec acc[ROWS][TAPS] = {};
  for (int64_t h = 0; h < walk.rows; ++h) {
    const float *dy = walk.dy + h * walk.dy_row, *x = walk.x + h * walk.x_row;
    const auto add = [&](const float* words, int64_t tap) CNK_INLINE_LAMBDA {
      const Vec v = load(dy);
      unroll<ROWS>([&](auto r) CNK_INLINE_LAMBDA {
        unroll<TAPS>([&](auto j) CNK_INLINE_LAMBDA {
          Vec& sum = acc[r.value][j.value];
          sum = Word::add(v, words + r.value * kernel_row + j.value * tap, sum);
        });
      });
    };
    for (int64_t w = 0; w < walk.words; ++w, dy += kLanes, x += walk.step) add(x, d);
    if (walk.single) add(walk.x + h * walk.x_row + walk.single, kLanes);
  }
  unroll<ROWS>([&](auto r) {
    unroll<TAPS>([&](auto j) {
      float* sum = walk.sums + r.value * walk.sums_row + j.value * kLanes;
      store(sum, load(sum) + acc[r.value][j.value]);
    });
  });
}

// Kernel rows at a time for `taps` taps: at most three, so that registers are left for dy and one of x.
constexpr int kernel_rows(int taps) {
  const int most = (kRegisters - 3) / taps;
  return most > 3 ? 3 : most < 1 ? 1 : most;
}

using AddTaps = void (*)(const Walk&);

template <class Word, bool DILATED, int TAPS = kMaxTaps>
AddTaps pick(int rows, int taps) {
  if constexpr (TAPS == 0) {
    return nullptr;
  } else {
    if (taps != TAPS) return pick<Word, DILATED, TAPS - 1>(rows, taps);
    if constexpr (kernel_rows(TAPS) >= 3) {
      if (rows == 3) return add_taps<Word, 3, TAPS, DILATED>;
    }
    if constexpr (kernel_rows(TAPS) >= 2) {
      if (rows == 2) return add_taps<Word, 2, TAPS, DILATED>;
    }
    return add_taps<Word, 1, TAPS, DILATED>;
  }
}

template <class Word, class T>
struct WeightGradient {
  static constexpr int kTogether = int(64 / sizeof(T)) / kLanes > 1 ? int(64 / sizeof(T)) / kLanes : 1;

  const DwconvWeightGradientArgs& a;
  const Plan& p;
  float* scratch;

  // slot: of a plane of x, its number modulo `held`.
  float* x(int group, int64_t slot) const { return scratch + (group * p.held + slot) * p.x_size; }
  float* dy(int group) const { return scratch + p.dy_begin + group * p.dy_size; }
  float* sums(int group) const { return scratch + p.sums_begin + group * p.sums_size; }  // (taps + 1, kLanes)

  // Registers of a pixel, of channels `channel`...
  template <bool FULL>
  CNK_INLINE void read(const T* pixel, int64_t channel, Vec (&v)[kTogether]) const {
    unroll<kTogether>([&](auto g) {
      const int64_t c = channel + g.value * kLanes;
      v[g.value] = FULL ? load(pixel + c) : load_channels(pixel, c, a.c);
    });
  }

  // A row of x as words, with zeros for `reach` columns on both sides.
  template <bool FULL>
  void gather_x(const T* row, int64_t channel, int64_t slot, int64_t to) const {
    float* words[kTogether];
    unroll<kTogether>([&](auto g) { words[g.value] = x(g.value, slot) + to * p.x_row * kLanes; });
    const int64_t end = min64(p.reach + p.along.in, p.columns);  // of the columns in the image
    Vec v[kTogether] = {};
    if constexpr (Word::kColumns == 1) {
      const auto put = [&](int64_t w) {
        unroll<kTogether>([&](auto g) { store(words[g.value] + w * kLanes, v[g.value]); });
      };
      for (int64_t w = 0; w < p.reach; ++w) put(w);
      for (int64_t w = end; w < p.columns; ++w) put(w);
      for (int64_t w = p.reach; w < end; ++w) {
        read<FULL>(row + (w - p.reach) * p.x_along, channel, v);
        put(w);
      }
    } else {
      // Word w holds the columns w and w + S, which neighbouring columns of dy need.
      const int64_t stride = p.along.down;
      for (int64_t first = 0; first < stride; ++first) {
        Vec here[kTogether] = {};  // column w
        const auto put = [&](int64_t w) {
          unroll<kTogether>([&](auto g) {
            store(words[g.value] + w * kLanes, join(here[g.value], v[g.value]));
            here[g.value] = v[g.value];
          });
        };
        if (first >= p.reach && first < end) read<FULL>(row + (first - p.reach) * p.x_along, channel, here);
        unroll<kTogether>([&](auto g) { v[g.value] = Vec{}; });
        int64_t w = first;
        for (; w + stride < p.reach; w += stride) put(w);
        for (; w + stride < end; w += stride) {
          read<FULL>(row + (w + stride - p.reach) * p.x_along, channel, v);
          put(w);
        }
        unroll<kTogether>([&](auto g) { v[g.value] = Vec{}; });
        for (; w < p.columns; w += stride) put(w);
      }
      // The last column of an odd width has no right neighbour
      // in dy, and its right neighbour in x may be Inf.
      for (int64_t j = 0; p.along.out % 2 && j < p.along.taps; ++j) {
        unroll<kTogether>([&](auto g) {
          const int64_t last = (p.along.out - 1) * stride + j * p.along.dilation;
          const Vec word = load(words[g.value] + last * kLanes);
          store(words[g.value] + (p.columns + 1 + j) * kLanes, (Vec)((VecI)word & 0xffff));
        });
      }
    }
  }

  // The same for dy; its sum is added to that of the bias, unless it was before.
  template <bool FULL>
  void gather_dy(const T* row, int64_t channel, int64_t to, bool again) const {
    float* words[kTogether];
    Vec v[kTogether], next[kTogether], total[kTogether];
    // A volume has too many pixels for one chain of additions (2x5x300: 8 times eager's error): one for each row.
    const bool volume = p.depth.out > 1;
    unroll<kTogether>([&](auto g) {
      words[g.value] = dy(g.value) + to * p.dy_row * kLanes;
      total[g.value] = volume ? Vec{} : load(sums(g.value) + p.taps * kLanes);
    });
    for (int64_t w = 0; w < p.along.out; w += Word::kColumns) {
      read<FULL>(row + w * p.dy_along, channel, v);
      unroll<kTogether>([&](auto g) { total[g.value] += v[g.value]; });
      if constexpr (Word::kColumns == 2) {
        unroll<kTogether>([&](auto g) { next[g.value] = Vec{}; });
        if (w + 1 < p.along.out) read<FULL>(row + (w + 1) * p.dy_along, channel, next);
        unroll<kTogether>([&](auto g) {
          total[g.value] += next[g.value];
          v[g.value] = join(v[g.value], next[g.value]);
        });
      }
      unroll<kTogether>([&](auto g) { store(words[g.value] + w / Word::kColumns * kLanes, v[g.value]); });
    }
    if (again) return;
    unroll<kTogether>([&](auto g) {
      float* sum = sums(g.value) + p.taps * kLanes;
      store(sum, volume ? load(sum) + total[g.value] : total[g.value]);
    });
  }

  // Rows [begin, end) of dy of a chunk of image n.
  template <bool FULL>
  void add_bands(int64_t n, int64_t chunk, int64_t begin, int64_t end, int64_t channel) const {
    const int64_t first = chunk * p.planes, last = min64(first + p.planes, p.depth.out);
    for (int64_t k = 0; k < p.depth.taps; k += p.held) {
      int64_t copied = 0;  // planes of x before this one are not needed, or in the scratch
      for (int64_t z = first; z < last; ++z) {
        const int64_t at = z * p.depth.down + k - p.depth.taps / 2;  // plane of x of kernel plane k
        add_band<FULL>(n, z, at, k, &copied, begin, end, channel);
      }
    }
  }

 private:
  // Of plane z of dy, with the kernel planes from `plane` on, the first with plane `at` of x.
  template <bool FULL>
  void add_band(int64_t n, int64_t z, int64_t at, int64_t plane, int64_t* copied, int64_t begin, int64_t end,
                int64_t channel) const {
    const int64_t first = max64(begin * p.across.down - p.reach_rows, 0);  // row of x
    const int64_t last = min64((end - 1) * p.across.down + 1 + p.reach_rows, p.across.in);
    const int64_t x_plane = p.along.in * p.across.in * p.x_pixel,
                  dy_plane = p.along.out * p.across.out * p.dy_pixel;
    const T* x = static_cast<const T*>(a.x) + n * p.depth.in * x_plane;
    const T* dy = static_cast<const T*>(a.dy) + (n * p.depth.out + z) * dy_plane;
    const int64_t from = max64(at, 0), to = min64(at + p.held, p.depth.in);
    if (from >= to && plane > 0) return;
    for (int64_t i = max64(from, *copied); i < to; ++i) {
      const int64_t slot = i % p.held;
      for (int64_t h = first; h < last; ++h) {
        gather_x<FULL>(x + i * x_plane + h * p.x_across, channel, slot, h - first);
      }
    }
    *copied = max64(*copied, to);
    for (int64_t h = begin; h < end; ++h)
      gather_dy<FULL>(dy + h * p.dy_across, channel, h - begin, plane > 0);
    for (int64_t i = from; i < to; ++i) add_plane(begin, end, channel, first, i % p.held, plane + i - at);
  }

  // Of the plane of x in a slot, with kernel plane `plane`.
  void add_plane(int64_t begin, int64_t end, int64_t channel, int64_t first, int64_t slot,
                 int64_t plane) const {
    const int k = p.along.taps, parts = (k + kMaxTaps - 1) / kMaxTaps, rows = p.across.taps;
    for (int group = 0; group < kTogether && channel + group * kLanes < a.c; ++group) {
      for (int64_t top = begin; top < end; top += p.block) {
        const int64_t bottom = min64(top + p.block, end);
        for (int part = 0; part < parts; ++part) {
          const int tap = k * part / parts, taps = k * (part + 1) / parts - tap;
          const int groups = (rows + kernel_rows(taps) - 1) / kernel_rows(taps);
          for (int r = 0; r < groups; ++r) {
            add_rows(group, top, bottom, begin, first, rows * r / groups, rows * (r + 1) / groups, tap, taps,
                     slot, plane);
          }
        }
      }
    }
  }

  // Kernel rows [i, end_i), taps [tap, tap + taps): consecutive
  // rows of dy for which the same kernel rows are in the image.
  void add_rows(int group, int64_t top, int64_t bottom, int64_t begin, int64_t first, int i, int end_i,
                int tap, int taps, int64_t slot, int64_t plane) const {
    const int64_t d = p.along.dilation;
    int64_t h = top;
    while (h < bottom) {
      int64_t from, to;
      kernel_rows_at(h, i, end_i, &from, &to);
      int64_t next = h + 1;
      for (; next < bottom; ++next) {
        int64_t next_from, next_to;
        kernel_rows_at(next, i, end_i, &next_from, &next_to);
        if (next_from != from || next_to != to) break;
      }
      if (from < to) {
        const int64_t x_row = h * p.across.down + from * p.across.dilation - p.reach_rows - first;
        const int64_t start = tap * d * kLanes;
        Walk walk = {.dy = dy(group) + (h - begin) * p.dy_row * kLanes,
                     .x = x(group, slot) + x_row * p.x_row * kLanes + start,
                     .dy_row = p.dy_row * kLanes,
                     .x_row = p.across.down * p.x_row * kLanes,
                     .kernel_row = p.across.dilation * p.x_row * kLanes,
                     .rows = next - h,
                     .words = p.along.out / Word::kColumns,
                     .step = p.along.down * Word::kColumns * kLanes,
                     .single = 0,
                     .dilation = d,
                     .sums = sums(group) + (plane * p.plane_taps + from * p.along.taps + tap) * kLanes,
                     .sums_row = int64_t{p.along.taps} * kLanes};
        if (p.along.out % Word::kColumns) walk.single = (p.columns + 1 + tap) * kLanes - start;
        (d == 1 ? pick<Word, false> : pick<Word, true>)(int(to - from), taps)(walk);
      }
      h = next;
    }
  }

  // Which of kernel rows [i, end_i) have their row of x in the image.
  void kernel_rows_at(int64_t h, int i, int end_i, int64_t* from, int64_t* to) const {
    const int64_t d = p.across.dilation, row = h * p.across.down;
    *from = max64(i, row >= p.reach_rows ? 0 : ceil_div(p.reach_rows - row, d));
    *to = max64(min64(end_i, (p.across.in - 1 + p.reach_rows - row) / d + 1), *from);
  }
};

template <class Word, class T>
void run(const DwconvWeightGradientArgs& a, Team& team, const Plan& p) {
  using Gradient = WeightGradient<Word, T>;
  const int64_t padded = pad_channels(a.c), piece = Gradient::kTogether * kLanes;
  float* all = reinterpret_cast<float*>(a.workspace);
  const int64_t shared = (p.slabs * p.sums * 4 + 63) / 64 * 64;
  const Gradient gradient = {a, p, reinterpret_cast<float*>(a.workspace + shared + team.rank() * p.scratch)};
  const int64_t bands = a.n * p.chunks * p.bands;
  for (int64_t item; (item = team.next()) < p.slabs * p.pieces;) {
    const int64_t slab = item / p.pieces, channel = item % p.pieces * piece;
    for (int64_t k = 0; k < Gradient::kTogether * (p.taps + 1); ++k)
      store(gradient.sums(0) + k * kLanes, Vec{});
    for (int64_t b = bands * slab / p.slabs; b < bands * (slab + 1) / p.slabs; ++b) {
      const int64_t begin = b % p.bands * p.band, end = min64(begin + p.band, p.across.out);
      const int64_t n = b / p.bands / p.chunks, chunk = b / p.bands % p.chunks;
      if (channel + piece <= a.c) {
        gradient.template add_bands<true>(n, chunk, begin, end, channel);
      } else {
        gradient.template add_bands<false>(n, chunk, begin, end, channel);
      }
    }
    for (int group = 0; group < Gradient::kTogether && channel + group * kLanes < a.c; ++group) {
      float* out = all + slab * p.sums + channel + group * kLanes;
      for (int64_t k = 0; k <= p.taps; ++k) store(out + k * padded, load(gradient.sums(group) + k * kLanes));
    }
  }
  team.barrier();
  int64_t begin, end;
  team.split(p.taps + 1, 1, &begin, &end);
  for (int64_t k = begin; k < end; ++k) {
    float* out = k < p.taps ? a.dw + k * padded : a.db;
    for (int64_t c = 0; c < a.c; c += kLanes) {
      Vec total = {};
      for (int64_t slab = 0; slab < p.slabs; ++slab) total += load(all + slab * p.sums + k * padded + c);
      store(out + c, total);
    }
  }
}

}  // namespace

#if defined(CNK_HAS_BF16)

void dwconv_weight_gradient(const DwconvWeightGradientArgs& a, Team& team) {
  if (a.dtype != DType::kBFloat16) return CNK_SHARED::kOps.dwconv_weight_gradient(a, team);
  run<Pairs, BFloat16>(a, team, Plan(a));
}

#else

int64_t dwconv_weight_gradient_workspace(const DwconvWeightGradientArgs& a, int threads) {
  const Plan p(a);
  return (p.slabs * p.sums * 4 + 63) / 64 * 64 + threads * p.scratch;
}

void dwconv_weight_gradient(const DwconvWeightGradientArgs& a, Team& team) {
  const Plan p(a);
  with_type(a.dtype, [&](auto type) { run<Floats, decltype(type)>(a, team, p); });
}

#endif

}  // namespace cnk::cpu::CNK_ISA
