// What the depthwise kernels share: tiles of the image in shared memory. An element is four channels.
//
// Dilations D and E split the image into D * E independent lattices. A tile lies in one of them, so its halo
// is KH - 1 high and KW - 1 wide for any dilation. In shared memory a tile is one plane of rows x columns for
// every four channels, in the tensor's own dtype. Everything outside the image is zero, so the loops over the
// taps need no masks; rows outside the image are not stored at all.
//
// Bank conflicts: the columns of neighbouring threads are kColumns = 7 elements apart. Planes are 16 / lanes
// elements apart (8 / lanes for fp32), modulo the 16 (8) elements that all banks deliver at once. So the
// threads that are served together (lanes of channels first, then groups of columns) read different banks.
#pragma once

#include <cstdint>

#include "cuda/dwconv.h"
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

struct TileShape {
  int64_t n;
  int c, h, w;
  int side_h, side_w, dilation_h, dilation_w;
  int lanes;          // groups of four channels of a block
  int groups, pairs;  // of kColumns columns and of kRows rows in a tile
  int lattices_h, lattices_w;
  int tiles_h, tiles_w;  // of one lattice
  int rows, columns;     // in shared memory, halo included
  int plane;             // elements from one group of channels to the next
  int chunks;            // of channels
  int64_t tiles;         // of all samples
};

__host__ __device__ inline int tile_height(const TileShape& s) { return s.pairs * kRows; }
__host__ __device__ inline int tile_width(const TileShape& s) { return s.groups * kColumns; }

// Where a tile lies. `row` and `column` count in its lattice;
// lattice row r is image row residue_h + r * dilation_h.
struct Tile {
  int64_t sample;
  int row, column;  // of its first output
  int residue_h, residue_w;
  int first_row, row_count;  // of the lattice that are in shared memory
};

__device__ __forceinline__ Tile tile_at(const TileShape& s, int64_t index) {
  Tile t;
  Divided d = divide(index, int64_t(s.tiles_h) * s.tiles_w * s.lattices_h * s.lattices_w);
  t.sample = d.quotient;
  unsigned rest = unsigned(d.remainder);
  t.column = int(rest % unsigned(s.tiles_w)) * tile_width(s);
  rest /= unsigned(s.tiles_w);
  t.row = int(rest % unsigned(s.tiles_h)) * tile_height(s);
  rest /= unsigned(s.tiles_h);
  t.residue_w = int(rest % unsigned(s.lattices_w));
  t.residue_h = int(rest / unsigned(s.lattices_w));
  const int lattice_rows = (s.h - t.residue_h + s.dilation_h - 1) / s.dilation_h;
  t.first_row = t.row - s.side_h / 2;
  int last = t.row + tile_height(s) + s.side_h / 2;
  if (t.first_row < 0) t.first_row = 0;
  if (last > lattice_rows) last = lattice_rows;
  t.row_count = last > t.first_row ? last - t.first_row : 0;
  return t;
}

// How the threads of a block copy a window, 16 bytes at once: numbers that are the same for every tile.
struct Walk {
  int vectors;                 // 16-byte elements of a pixel's channels in the block
  int step, step_columns;      // pixels from one element of a thread to its next, and those beyond whole rows
  int step_bytes;              // the same in shared memory
  int64_t stride_h, stride_w;  // elements, of the lattice
  int64_t ahead, wrap;  // bytes of global memory of a step, and of going from one row's end to the next
};

// A window of the tile's lattice: rows [row, row + rows), columns [column, column + columns).
struct Window {
  int row, rows, column, columns;
};

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
  const unsigned end = c < s.c ? unsigned((s.w - t.residue_w + s.dilation_w - 1) / s.dilation_w) : 0u;
  const int begin_row = begin / v.columns;
  int w = v.column + begin - begin_row * v.columns;
  const T* first = static_cast<const T*>(image.data) + t.sample * image.stride_n +
                   t.residue_h * image.stride_h + t.residue_w * image.stride_w +
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
    const int h = (v.row + row) * s.dilation_h + t.residue_h;
    const int w = (v.column + pixel - row * v.columns) * s.dilation_w + t.residue_w;
    const int c = channel + lane;
    T value{};
    if (w >= 0 && w < s.w && c < s.c)
      value = base[c * image.stride_c + h * image.stride_h + w * image.stride_w];
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

// What a convolution is, apart from its tensors: sizes, kernel and dilation.
inline Shape shape_of(const Convolution& a) {
  return {"NCHWKLDE", {a.n, a.c, a.h, a.w, a.side_h, a.side_w, a.dilation_h, a.dilation_w}};
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

// For windows of `columns` columns and blocks of `threads` threads; the lanes fill whole 16-byte elements.
inline Walk walk_of(const Image& image, const TileShape& s, int columns, int threads) {
  Walk walk{};
  const int64_t size = element_size(image.dtype);
  walk.vectors = int(s.lanes * kChannels * size / 16);
  if (walk.vectors == 0) return walk;  // such tiles do not use Access::kVector
  walk.step = threads / walk.vectors;
  walk.step_columns = walk.step % columns;
  walk.step_bytes = int(walk.step * kChannels * size);
  walk.stride_h = s.dilation_h * image.stride_h;
  walk.stride_w = s.dilation_w * image.stride_w;
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

inline TileShape tile_shape(const Convolution& a, int lanes, int groups, int pairs, int64_t element_bytes) {
  TileShape s{};
  s.n = a.n;
  s.c = int(a.c);
  s.h = int(a.h);
  s.w = int(a.w);
  s.side_h = a.side_h;
  s.side_w = a.side_w;
  s.dilation_h = a.dilation_h;
  s.dilation_w = a.dilation_w;
  s.lanes = lanes;
  s.groups = groups;
  s.pairs = pairs;
  const int64_t lattice_h = ceil_div(a.h, a.dilation_h), lattice_w = ceil_div(a.w, a.dilation_w);
  s.lattices_h = int(a.h < a.dilation_h ? a.h : a.dilation_h);
  s.lattices_w = int(a.w < a.dilation_w ? a.w : a.dilation_w);
  s.tiles_h = int(ceil_div(lattice_h, pairs * kRows));
  s.tiles_w = int(ceil_div(lattice_w, groups * kColumns));
  s.rows = int(pairs * kRows + a.side_h - 1 < lattice_h ? pairs * kRows + a.side_h - 1 : lattice_h);
  s.columns = groups * kColumns + a.side_w - 1;
  s.plane = plane_of(s.rows * s.columns, lanes, element_bytes);
  s.chunks = int(ceil_div(a.c, int64_t(lanes) * kChannels));
  s.tiles = a.n * s.lattices_h * s.lattices_w * s.tiles_h * s.tiles_w;
  return s;
}

}  // namespace cnk::cuda
