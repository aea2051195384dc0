// What the depthwise kernels share: tiles of the image in shared memory. An element is four channels.
//
// Dilations D and E split the image into D * E independent lattices. A tile lies in one of them, so its halo
// is KH - 1 high and KW - 1 wide for any dilation. With a stride the taps are divided as well: those that are
// two apart read pixels of x that lie on one lattice. A part of the taps (Part) is a convolution with stride 1
// on that lattice, and a tile is computed part by part.
//
// In shared memory a tile is one plane of rows x columns for every four channels, in the tensor's own dtype.
// Everything outside the image is zero, so the loops over the taps need no masks; rows outside the image are
// not stored at all.
//
// Bank conflicts: the columns of neighbouring threads are kColumns = 7 elements apart. Planes are 16 / lanes
// elements apart (8 / lanes for fp32), modulo the 16 (8) elements that all banks deliver at once. So the
// threads that are served together (lanes of channels first, then groups of columns) read different banks.
#pragma once

#include <cstdint>

#include "cuda/dwconv/dwconv.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

constexpr int kChannels = 4;  // of a thread: one element of shared memory
constexpr int kColumns = 7;   // of a thread: odd, against bank conflicts; divides ConvNeXt's widths at 224
constexpr int kRows = 2;      // of a thread of the forward pass
constexpr int kTaps = 7;      // of a kernel row at a time: longer rows are divided into chunks

template <class T>
using Pixel = Pack<T, kChannels>;

// How global memory is read and written.
enum class Access : int {
  kVector,        // channels_last, 16 bytes at once
  kChannelFirst,  // neighbouring threads take neighbouring channels, one element each
  kColumnFirst,   // ... neighbouring columns
};

// One axis (common/axis.h). Pixels of the result that are y_step apart need from taps that are tap_step apart
// pixels of x that are x_step apart.
struct TileAxis {
  int in, out, side, dilation, down;
  int half;  // log2(up)
  int tap_step, x_step, y_step;
  int taps;      // of a part, at most
  int lattices;  // of the result
  int tiles;     // of one lattice
};

struct TileShape {
  int64_t n;
  int c;
  TileAxis h, w;
  int lanes;          // groups of four channels of a block
  int groups, pairs;  // of kColumns columns and of kRows rows in a tile
  int rows, columns;  // in shared memory, halo included
  int plane;          // elements from one group of channels to the next
  int chunks;         // of channels
  int64_t tiles;      // of all samples
};

__host__ __device__ inline int tile_height(const TileShape& s) { return s.pairs * kRows; }
__host__ __device__ inline int tile_width(const TileShape& s) { return s.groups * kColumns; }

// Where a tile lies. `row` and `column` count in its lattice;
// lattice row r is row residue_h + r * y_step of the result.
struct Tile {
  int64_t sample;
  int row, column;  // of its first output
  int residue_h, residue_w;
};

__device__ __forceinline__ Tile tile_at(const TileShape& s, int64_t index) {
  Tile t;
  Divided d = divide(index, int64_t(s.h.tiles) * s.w.tiles * s.h.lattices * s.w.lattices);
  t.sample = d.quotient;
  unsigned rest = unsigned(d.remainder);
  t.column = int(rest % unsigned(s.w.tiles)) * tile_width(s);
  rest /= unsigned(s.w.tiles);
  t.row = int(rest % unsigned(s.h.tiles)) * tile_height(s);
  rest /= unsigned(s.h.tiles);
  t.residue_w = int(rest % unsigned(s.w.lattices));
  t.residue_h = int(rest / unsigned(s.w.lattices));
  return t;
}

// Pixels `residue`, residue + step... of one axis of an image; `count` of them.
struct Lattice {
  int residue, step, count;
};
__host__ __device__ inline Lattice lattice_of(int size, int residue, int step) {
  return {residue, step, (size - residue + step - 1) / step};
}

// The taps first, first + tap_step... of one axis: `taps` of them. Tap 0 of the result's pixel 0 in its lattice
// reads pixel `shift` of x's lattice, which may be outside.
struct Part {
  int first, taps, shift;
  Lattice x;
};

// False if these taps read between the pixels of x: then only `first` and `taps` are set.
__device__ __forceinline__ bool part_at(const TileAxis& a, int residue, int first, Part* part) {
  part->first = first;
  part->taps = (a.side - first + a.tap_step - 1) / a.tap_step;
  const int scaled = residue * a.down + (first - a.side / 2) * a.dilation;
  if (scaled & a.half) return false;
  const int at = scaled >> a.half;
  part->shift = at >= 0 ? at / a.x_step : -((a.x_step - 1 - at) / a.x_step);
  part->x = lattice_of(a.in, at - part->shift * a.x_step, a.x_step);
  return true;
}

// How the threads of a block copy a window, 16 bytes at once: numbers that are the same for every tile.
struct Walk {
  int vectors;                 // 16-byte elements of a pixel's channels in the block
  int step, step_columns;      // pixels from one element of a thread to its next, and those beyond whole rows
  int step_bytes;              // the same in shared memory
  int64_t stride_h, stride_w;  // elements, of the lattice
  int64_t ahead, wrap;  // bytes of global memory of a step, and of going from one row's end to the next
};

// A window of a lattice: rows [row, row + rows), columns [column, column + columns).
struct Window {
  Lattice h, w;
  int row, rows, column, columns;
};

// Those of rows [begin, end) that are in the image.
__device__ __forceinline__ Window window_of(const Lattice& h, const Lattice& w, int begin, int end,
                                            int column, int columns) {
  const int first = begin > 0 ? begin : 0, last = end < h.count ? end : h.count;
  return {h, w, first, last > first ? last - first : 0, column, columns};
}

// Copy a window into planes, 16 bytes at once; zeros outside the image and after the last channel.
template <class T>
__device__ __forceinline__ void stage_vectors(const Image& image, const Walk& walk, const TileShape& s,
                                              const Tile& t, const Window& v, int channel, int plane,
                                              Pixel<T>* to) {
  constexpr int kLoad = 16 / int(sizeof(T));  // channels
  constexpr int kWritten = kLoad / kChannels;
  constexpr int kWords = int(sizeof(Pixel<T>)) / 4;
  const int begin = int(threadIdx.x) / walk.vectors;
  const int vector = int(threadIdx.x) - begin * walk.vectors;
  if (begin >= walk.step) return;
  const int c = channel + vector * kLoad;
  // Columns [0, end) of the lattice are in the image; none for channels after the last.
  const unsigned end = c < s.c ? unsigned(v.w.count) : 0u;
  const int begin_row = begin / v.columns;
  int w = v.column + begin - begin_row * v.columns;
  const T* first = static_cast<const T*>(image.data) + t.sample * image.stride_n +
                   v.h.residue * image.stride_h + v.w.residue * image.stride_w +
                   (v.row + begin_row) * walk.stride_h + w * walk.stride_w + c;
  const char* from = reinterpret_cast<const char*>(first);
  Pixel<T>* target[kWritten];
#pragma unroll
  for (int k = 0; k < kWritten; ++k) target[k] = to + (vector * kWritten + k) * plane + begin;
  const int row_end = v.column + v.columns;
#pragma unroll 4
  for (int left = v.rows * v.columns - begin; left > 0; left -= walk.step) {
    Words<4> value{};
    if (unsigned(w) < end) value = *reinterpret_cast<const Words<4>*>(from);
#pragma unroll
    for (int k = 0; k < kWritten; ++k) {
      Words<kWords> pixel;
#pragma unroll
      for (int j = 0; j < kWords; ++j) pixel.word[j] = value.word[k * kWords + j];
      *reinterpret_cast<Words<kWords>*>(target[k]) = pixel;
      target[k] = reinterpret_cast<Pixel<T>*>(reinterpret_cast<char*>(target[k]) + walk.step_bytes);
    }
    from += walk.ahead;
    w += walk.step_columns;
    if (w >= row_end) {
      w -= v.columns;
      from += walk.wrap;
    }
  }
}

// The same, one element at a time; neighbouring threads take neighbouring columns or channels.
template <class T>
__device__ __forceinline__ void stage_elements(const Image& image, const TileShape& s, const Tile& t,
                                               const Window& v, bool column_first, int channel, int plane,
                                               Pixel<T>* to) {
  const int channels = s.lanes * kChannels;
  const int pixels = v.rows * v.columns;
  const T* base = static_cast<const T*>(image.data) + t.sample * image.stride_n;
  for (int i = int(threadIdx.x); i < pixels * channels; i += int(blockDim.x)) {
    const int pixel = column_first ? i % pixels : i / channels;
    const int lane = column_first ? i / pixels : i % channels;
    const int row = pixel / v.columns;
    const int h = (v.row + row) * v.h.step + v.h.residue;
    const int w = v.column + pixel - row * v.columns;  // of the lattice
    const int c = channel + lane;
    T value{};
    if (w >= 0 && w < v.w.count && c < s.c)
      value = base[c * image.stride_c + h * image.stride_h + (w * v.w.step + v.w.residue) * image.stride_w];
    to[lane / kChannels * plane + pixel].element[lane % kChannels] = value;
  }
}

template <class T>
__device__ __forceinline__ void stage(const Image& image, Access access, const Walk& walk, const TileShape& s,
                                      const Tile& t, const Window& v, int channel, int plane, Pixel<T>* to) {
  if (access == Access::kVector) {
    stage_vectors(image, walk, s, t, v, channel, plane, to);
  } else {
    stage_elements(image, s, t, v, access == Access::kColumnFirst, channel, plane, to);
  }
}

// --- launchers ---

// Sizes of x, kernel and dilation.
inline Shape shape_of(const Convolution& a) {
  return {"NCHWKLDE", {a.n, a.c, a.h.in, a.w.in, a.h.taps, a.w.taps, a.h.dilation, a.w.dilation}};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool vectors_fit(const Image& image, int64_t c) {
  const int64_t wide = 16 / element_size(image.dtype);
  const auto aligned = [&](int64_t stride) { return stride % wide == 0; };
  return image.stride_c == 1 && c % wide == 0 && reinterpret_cast<uintptr_t>(image.data) % 16 == 0 &&
         aligned(image.stride_n) && aligned(image.stride_h) && aligned(image.stride_w);
}

inline Access access_of(const Image& image, int64_t c) {
  if (vectors_fit(image, c)) return Access::kVector;
  return image.stride_c == 1 || image.stride_w != 1 ? Access::kChannelFirst : Access::kColumnFirst;
}

// For windows of `columns` columns of lattices with these steps, and blocks of `threads` threads; the lanes
// fill whole 16-byte elements.
inline Walk walk_of(const Image& image, const TileShape& s, int step_h, int step_w, int columns,
                    int threads) {
  Walk walk{};
  const int64_t size = element_size(image.dtype);
  walk.vectors = int(s.lanes * kChannels * size / 16);
  if (walk.vectors == 0) return walk;  // such tiles do not use Access::kVector
  walk.step = threads / walk.vectors;
  walk.step_columns = walk.step % columns;
  walk.step_bytes = int(walk.step * kChannels * size);
  walk.stride_h = step_h * image.stride_h;
  walk.stride_w = step_w * image.stride_w;
  walk.ahead = (walk.step / columns * walk.stride_h + walk.step_columns * walk.stride_w) * size;
  walk.wrap = (walk.stride_h - columns * walk.stride_w) * size;
  return walk;
}

// The smallest plane of at least `elements` that has no bank conflicts (see the top of this file).
inline int plane_of(int elements, int lanes, int64_t element_bytes) {
  const int pass = int(128 / (kChannels * element_bytes));
  const int wanted = lanes < pass ? pass / lanes : 1;
  return elements + (wanted - elements % pass + pass) % pass;
}

inline TileAxis tile_axis(const Axis& a, int tile) {
  TileAxis t{};
  t.in = int(a.in);
  t.out = int(a.out);
  t.side = a.taps;
  t.dilation = int(a.dilation);
  t.down = a.down;
  t.half = a.up > 1;
  t.tap_step = tap_step(a);
  t.x_step = t.dilation * t.tap_step / a.up;
  t.y_step = t.dilation * t.tap_step / a.down;
  t.taps = int(ceil_div(a.taps, t.tap_step));
  t.lattices = t.out < t.y_step ? t.out : t.y_step;
  t.tiles = int(ceil_div(lattice_of(t.out, 0, t.y_step).count, tile));
  return t;
}

inline TileShape tile_shape(const Convolution& a, int lanes, int groups, int pairs, int64_t element_bytes) {
  TileShape s{};
  s.n = a.n;
  s.c = int(a.c);
  s.h = tile_axis(a.h, pairs * kRows);
  s.w = tile_axis(a.w, groups * kColumns);
  s.lanes = lanes;
  s.groups = groups;
  s.pairs = pairs;
  const int held = lattice_of(s.h.in, 0, s.h.x_step).count, rows = pairs * kRows + s.h.taps - 1;
  s.rows = rows < held ? rows : held;
  s.columns = groups * kColumns + s.w.taps - 1;
  s.plane = plane_of(s.rows * s.columns, lanes, element_bytes);
  s.chunks = int(ceil_div(a.c, int64_t(lanes) * kChannels));
  s.tiles = a.n * s.h.lattices * s.w.lattices * s.h.tiles * s.w.tiles;
  return s;
}

}  // namespace cnk::cuda
