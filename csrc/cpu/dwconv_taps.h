// Which taps of a depthwise convolution meet the image, and where their weights and pixels are: for dwconv.cpp.
//
// A kernel of one column is a kernel of one row on the transposed image: only the distances between pixels
// differ. So the code says "along" for the axis of a tile's pixels and "across" for the other.
// With dilation or stride the pixels of a tile are apart, such that their taps have pixels of x in common:
// with dilation 2 every other column, with stride 2 neighbouring columns, for which first the even taps are
// added, then the odd ones (Lattice).
//
// In 3-D, NDHWC, a tile of one plane of the result has taps in several planes of x: its list of windows is longer
// (Windows), nothing else.
#pragma once

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

namespace {

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
  bool transposed;               // along columns, but weights are packed along rows

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
        taps(plane_taps * a.d.taps),
        transposed(columns && !along_columns(a.h, a.w)) {}
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
  void enter(int64_t result) {
    const Lattice& depth = g_.depth;
    planes = 0;
    for (int64_t k = 0; k < depth.taps; ++k) {
      const int64_t scaled = result * depth.down + k - depth.reach, at = scaled >> depth.half;
      if (scaled < 0 || (depth.half & scaled) || at >= depth.in) continue;
      this->plane[planes++] = {k * g_.plane_taps * kChannelAlign, at * g_.x_plane};
    }
  }

  CNK_INLINE void move(int64_t across, int64_t along, int64_t pixels) {
    if (along != at_ || pixels != pixels_) {
      at_ = along, pixels_ = pixels;
      for (int64_t k = 0; k < g_.along.tap_step; ++k) along_[k] = reach_of(g_.along, along, k, pixels);
    }
    count = 0;
    for (int k = 0; k < planes; ++k) add_plane(across, plane[k]);
  }

  Window list[4 * kMaxDepthTaps];
  int count = 0;

  // Planes of taps that meet a plane of x: in elements, where both begin.
  struct Plane {
    int64_t weight, x;
  };
  Plane plane[kMaxDepthTaps];
  int planes = 0;

 private:
  CNK_INLINE void add_plane(int64_t across, const Plane& at) {
    for (int64_t i = 0; i < g_.across.tap_step; ++i) {
      const Reach rows = reach_of(g_.across, across, i, 1);
      const int64_t kernel_row = i + rows.first * g_.across.tap_step;
      for (int64_t k = 0; k < g_.along.tap_step; ++k) {
        const Reach& taps = along_[k];
        if (rows.first == rows.last || taps.first == taps.last) continue;
        const int64_t tap = taps.first + (k ? (g_.along.taps + 1) / 2 : 0);  // as pack_taps orders them
        list[count++] = {.weight = at.weight + (kernel_row * g_.along.taps + tap) * kChannelAlign,
                         .x = at.x + rows.at * g_.x_across + taps.at * g_.x_along,
                         .rows = rows.last - rows.first,
                         .taps = taps.last - taps.first,
                         .in_image = taps.in_image};
      }
    }
  }

  const Geometry& g_;
  int64_t at_ = -1, pixels_ = -1;
  Reach along_[2];
};

}  // namespace

}  // namespace cnk::cpu::CNK_ISA
