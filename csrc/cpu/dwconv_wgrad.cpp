// Gradients of a depthwise convolution's weight and bias, NHWC:
//
//   dw[i, j, c] = sum of dy[n, h, w, c] x[n, h + (i - P) d, w + (j - P) d, c],    db[c] = sum of dy[n, h, w, c]
//
// One register holds kLanes channels. A band of rows of x (with zeros at its left and right) and of dy is gathered
// into a dense fp32 scratch; then each column of dy meets the taps of two kernel rows, whose sums stay in registers
// along a block of rows that fits L1. bf16 where there is VDPBF16PS at full rate: the scratch holds pairs of
// neighbouring columns, and one instruction adds two products.
//
// Bands are grouped into slabs by the shape alone; each slab has sums of its own, which are added up in order at the
// end: the bits of the result do not depend on the number of threads.

#include "cpu/vec.h"

namespace cnk::cpu::CNK_ISA {

namespace {

constexpr int kMaxTaps = kRegisters == 32 ? 13 : 7;  // of a kernel row at a time; two rows of sums in registers
constexpr int64_t kBand = int64_t{256} << 10, kBlock = int64_t{28} << 10;  // bytes: fit L2, L1
constexpr int64_t kItems = 128;  // pieces of work to share, at least, where the batch has as many

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Words of the scratch as fp32 numbers, or as pairs of bf16: a word at column w holds columns w and w + 1.
struct Floats {
  static constexpr int64_t kColumns = 1;  // of dy in a word
  static CNK_INLINE Vec add(Vec dy, const float* x, Vec sum) { return multiply_add(dy, load(x), sum); }
};
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // at half rate where there are tiles (211 of 419 GFLOP/s)
struct Pairs {
  static constexpr int64_t kColumns = 2;
  static CNK_INLINE Vec add(Vec dy, const float* x, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)dy, (__m512bh)load(x));
  }
};
#endif

// The word of two columns of bf16.
CNK_INLINE Vec join(Vec first, Vec second) { return (Vec)((((VecI)first >> 16) & 0xffff) | (VecI)second); }

struct Plan {
  int64_t band;      // rows of dy gathered at a time
  int64_t bands;     // of an image
  int64_t block;     // rows of a band whose taps are added in one go
  int64_t slabs;     // with sums of their own
  int64_t groups;    // of kLanes channels
  int64_t reach;     // of the kernel to each side
  int64_t x_row;     // words (of kLanes numbers) of a row of x in the scratch
  int64_t dy_row;    // and of dy
  int64_t sums;      // floats of a slab: (K * K + 1, padded C)
  int64_t scratch;   // bytes of a thread

  explicit Plan(const DwconvWeightGradientArgs& a) {
    constexpr int64_t word = kLanes * 4;
    reach = int64_t{a.kernel_size / 2} * a.dilation;
    // Beyond the row: the right neighbour of its last column, and the single last column of an odd width.
    x_row = a.w + 2 * reach + 1 + a.kernel_size;
    dy_row = a.w;
    const int64_t x_bytes = x_row * word, dy_bytes = dy_row * word;
    band = (kBand - 2 * reach * x_bytes) / (x_bytes + dy_bytes);
    bands = ceil_div(a.h, min64(max64(band, 1), a.h));
    band = ceil_div(a.h, bands);
    bands = ceil_div(a.h, band);
    block = min64(max64((kBlock - 2 * reach * x_bytes) / (x_bytes + dy_bytes), 1), band);
    groups = ceil_div(a.c, kLanes);
    slabs = min64(a.n * bands, ceil_div(kItems, groups));
    sums = (int64_t{a.kernel_size} * a.kernel_size + 1) * pad_channels(a.c);
    scratch = ((band + 2 * reach) * x_row + band * dy_row) * word + (int64_t{a.kernel_size} * a.kernel_size + 1) * word;
  }
};

// sums[r][j] += dy[w] * x_r[w + j * d] for `count` words of dy.
template <class Word, int ROWS, int TAPS, bool DILATED>
void add_taps(const float* dy, const float* const* x, int64_t count, int64_t dilation, float* const* sums) {
  const int64_t d = DILATED ? dilation : 1;
  const float* x0 = x[0];
  const float* x1 = x[ROWS - 1];
  Vec acc[ROWS][TAPS];
  unroll<ROWS>([&](auto r) { unroll<TAPS>([&](auto j) { acc[r.value][j.value] = load(sums[r.value] + j.value * kLanes); }); });
  for (int64_t w = 0; w < count; ++w) {
    const Vec v = load(dy + w * kLanes);
    unroll<TAPS>([&](auto j) { acc[0][j.value] = Word::add(v, x0 + j.value * d * kLanes, acc[0][j.value]); });
    if constexpr (ROWS == 2) {
      unroll<TAPS>([&](auto j) { acc[1][j.value] = Word::add(v, x1 + j.value * d * kLanes, acc[1][j.value]); });
    }
    x0 += Word::kColumns * kLanes;
    x1 += Word::kColumns * kLanes;
  }
  unroll<ROWS>([&](auto r) { unroll<TAPS>([&](auto j) { store(sums[r.value] + j.value * kLanes, acc[r.value][j.value]); }); });
}

using AddTaps = void (*)(const float* dy, const float* const* x, int64_t count, int64_t dilation, float* const* sums);

template <class Word, int ROWS, bool DILATED, int TAPS = kMaxTaps>
AddTaps pick(int taps) {
  if constexpr (TAPS == 0) {
    return nullptr;
  } else {
    return taps == TAPS ? add_taps<Word, ROWS, TAPS, DILATED> : pick<Word, ROWS, DILATED, TAPS - 1>(taps);
  }
}

// Gather `width` pixels of a register of channels as words; zeros for `reach` columns on both sides.
template <class Word, class T>
void gather_x(const T* row, int64_t stride, int64_t width, int64_t valid, int64_t reach, int64_t kernel_size,
              int64_t dilation, float* words) {
  const auto read = [&](int64_t w) { return valid >= kLanes ? load(row + w * stride) : load_partial(row + w * stride, valid); };
  if constexpr (Word::kColumns == 1) {
    for (int64_t w = 0; w < reach; ++w) store(words + w * kLanes, Vec{});
    for (int64_t w = 0; w < width; ++w) store(words + (reach + w) * kLanes, read(w));
    for (int64_t w = 0; w < reach; ++w) store(words + (reach + width + w) * kLanes, Vec{});
  } else {
    const int64_t columns = width + 2 * reach;
    Vec here = reach ? Vec{} : read(0);
    for (int64_t p = 0; p < columns; ++p) {
      const int64_t next = p + 1 - reach;
      const Vec there = next >= 0 && next < width ? read(next) : Vec{};
      store(words + p * kLanes, join(here, there));
      here = there;
    }
    // The last column of an odd width has no right neighbour in dy, and what is right of it in x may be Inf.
    if (width % 2) {
      for (int64_t j = 0; j < kernel_size; ++j) {
        const Vec word = load(words + (width - 1 + j * dilation) * kLanes);
        store(words + (columns + 1 + j) * kLanes, (Vec)((VecI)word & 0xffff));
      }
    }
  }
}

// The same of dy, and its sum.
template <class Word, class T>
void gather_dy(const T* row, int64_t stride, int64_t width, int64_t valid, float* words, float* sum) {
  const auto read = [&](int64_t w) { return valid >= kLanes ? load(row + w * stride) : load_partial(row + w * stride, valid); };
  Vec total = load(sum);
  if constexpr (Word::kColumns == 1) {
    for (int64_t w = 0; w < width; ++w) {
      const Vec v = read(w);
      total += v;
      store(words + w * kLanes, v);
    }
  } else {
    for (int64_t w = 0; w < width; w += 2) {
      const Vec first = read(w), second = w + 1 < width ? read(w + 1) : Vec{};
      total += first;
      total += second;
      store(words + w / 2 * kLanes, join(first, second));
    }
  }
  store(sum, total);
}

template <class Word, class T>
struct WeightGradient {
  const DwconvWeightGradientArgs& a;
  const Plan& p;
  float *x, *dy, *sums;  // the scratch; sums (K * K + 1, kLanes)

  // Rows [begin, end) of dy of image n, into `sums`.
  void add_band(int64_t n, int64_t begin, int64_t end, int64_t channel) const {
    const int64_t first = max64(begin - p.reach, 0), last = min64(end + p.reach, a.h);  // rows of x
    const int64_t valid = a.c - channel, row = a.w * a.c;
    const T* image_x = static_cast<const T*>(a.x) + n * a.h * row + channel;
    const T* image_dy = static_cast<const T*>(a.dy) + n * a.h * row + channel;
    for (int64_t h = first; h < last; ++h) {
      gather_x<Word>(image_x + h * row, a.c, a.w, valid, p.reach, a.kernel_size, a.dilation,
                     x + (h - first) * p.x_row * kLanes);
    }
    float* bias = sums + int64_t{a.kernel_size} * a.kernel_size * kLanes;
    for (int64_t h = begin; h < end; ++h) {
      gather_dy<Word>(image_dy + h * row, a.c, a.w, valid, dy + (h - begin) * p.dy_row * kLanes, bias);
    }
    const int blocks = (a.kernel_size + kMaxTaps - 1) / kMaxTaps;
    for (int64_t top = begin; top < end; top += p.block) {
      const int64_t bottom = min64(top + p.block, end);
      for (int b = 0; b < blocks; ++b) {
        const int tap = a.kernel_size * b / blocks, taps = a.kernel_size * (b + 1) / blocks - tap;
        for (int i = 0; i < a.kernel_size; i += 2) add_rows(top, bottom, begin, first, i, tap, taps);
      }
    }
  }

 private:
  // Kernel rows i and i + 1, taps [tap, tap + taps).
  void add_rows(int64_t top, int64_t bottom, int64_t begin, int64_t first, int i, int tap, int taps) const {
    const bool dilated = a.dilation != 1;
    const AddTaps two = dilated ? pick<Word, 2, true>(taps) : pick<Word, 2, false>(taps);
    const AddTaps one = dilated ? pick<Word, 1, true>(taps) : pick<Word, 1, false>(taps);
    float* const target[2] = {sums + (int64_t{i} * a.kernel_size + tap) * kLanes,
                              sums + (int64_t{i + 1} * a.kernel_size + tap) * kLanes};
    const int64_t words = a.w / Word::kColumns;
    for (int64_t h = top; h < bottom; ++h) {
      const int64_t above = h + int64_t{i} * a.dilation - p.reach, below = above + a.dilation;  // rows of x
      const bool has_above = above >= 0 && above < a.h;
      const bool has_below = i + 1 < a.kernel_size && below >= 0 && below < a.h;
      if (!has_above && !has_below) continue;
      const float* dy_row = dy + (h - begin) * p.dy_row * kLanes;
      const float* rows[2] = {x + (above - first) * p.x_row * kLanes, x + (below - first) * p.x_row * kLanes};
      // The words of the taps, then those of the single last column of an odd width.
      const int64_t offset = int64_t{tap} * a.dilation * kLanes;
      const int64_t single = (a.w + 2 * p.reach + 1 + tap) * kLanes;
      const bool both = has_above && has_below;
      const int from = has_above ? 0 : 1;
      const float* starts[2] = {rows[from] + offset, rows[1] + offset};
      (both ? two : one)(dy_row, starts, words, a.dilation, target + from);
      if (Word::kColumns == 2 && a.w % 2) {
        const float* lasts[2] = {rows[from] + single, rows[1] + single};
        const AddTaps last = both ? pick<Word, 2, false>(taps) : pick<Word, 1, false>(taps);
        last(dy_row + words * kLanes, lasts, 1, 1, target + from);
      }
    }
  }
};

template <class Word, class T>
void run(const DwconvWeightGradientArgs& a, Team& team, const Plan& p) {
  const int64_t padded = pad_channels(a.c), taps = int64_t{a.kernel_size} * a.kernel_size;
  float* all = reinterpret_cast<float*>(a.workspace);
  float* own = reinterpret_cast<float*>(a.workspace + (p.slabs * p.sums * 4 + 63) / 64 * 64 + team.rank() * p.scratch);
  const int64_t x_words = (p.band + 2 * p.reach) * p.x_row * kLanes, dy_words = p.band * p.dy_row * kLanes;
  const WeightGradient<Word, T> gradient = {a, p, own, own + x_words, own + x_words + dy_words};
  const int64_t bands = a.n * p.bands;
  for (int64_t item; (item = team.next()) < p.slabs * p.groups;) {
    const int64_t slab = item / p.groups, channel = item % p.groups * kLanes;
    for (int64_t k = 0; k <= taps; ++k) store(gradient.sums + k * kLanes, Vec{});
    for (int64_t b = bands * slab / p.slabs; b < bands * (slab + 1) / p.slabs; ++b) {
      const int64_t begin = b % p.bands * p.band;
      gradient.add_band(b / p.bands, begin, min64(begin + p.band, a.h), channel);
    }
    for (int64_t k = 0; k <= taps; ++k) {
      store(all + slab * p.sums + k * padded + channel, load(gradient.sums + k * kLanes));
    }
  }
  team.barrier();
  int64_t begin, end;
  team.split(taps + 1, 1, &begin, &end);
  for (int64_t k = begin; k < end; ++k) {
    float* out = k < taps ? a.dw + k * padded : a.db;
    for (int64_t c = 0; c < p.groups * kLanes; c += kLanes) {
      Vec total = {};
      for (int64_t slab = 0; slab < p.slabs; ++slab) total += load(all + slab * p.sums + k * padded + c);
      store(out + c, total);
    }
  }
}

}  // namespace

int64_t dwconv_weight_gradient_workspace(const DwconvWeightGradientArgs& a, int threads) {
  const Plan p(a);
  return (p.slabs * p.sums * 4 + 63) / 64 * 64 + threads * p.scratch;
}

void dwconv_weight_gradient(const DwconvWeightGradientArgs& a, Team& team) {
  const Plan p(a);
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  if (a.dtype == DType::kBFloat16) return run<Pairs, BFloat16>(a, team, p);
#endif
  with_type(a.dtype, [&](auto type) { run<Floats, decltype(type)>(a, team, p); });
}

}  // namespace cnk::cpu::CNK_ISA
