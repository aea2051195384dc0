// What the depthwise kernels share: tiles of the image in shared memory, fp32, four channels to a 16-byte element.
//
// A dilation D splits the image into D * D lattices that do not touch; a tile lies in one of them, so that its halo is
// K - 1 wide whatever D is. In shared memory a tile is one plane of rows x columns for every four channels. Planes are
// an odd number of elements apart: eight neighbouring lanes, which hold eight groups of channels or columns seven
// apart, then read eight different groups of banks. Everything outside the image is zero, so that the loops over the
// taps need no masks; rows outside are left out altogether.
#pragma once

#include <cstdint>

#include "cuda/element.h"
#include "cuda/runtime.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

constexpr int kChannels = 4;  // of a thread: one 16-byte element of shared memory
constexpr int kColumns = 7;   // of a thread: odd, against bank conflicts; divides the widths of ConvNeXt at 224
constexpr int kRows = 2;      // of a thread of the forward pass
constexpr int kTaps = 7;      // of a kernel row that are in flight at once: longer rows go in chunks

using Element4 = Pack<float, kChannels>;

// How global memory is read and written.
enum class Access : int {
  kVector,        // channels_last, 16 bytes at once
  kChannelFirst,  // neighbouring threads take neighbouring channels, one element each
  kColumnFirst,   // ... neighbouring columns
};

struct TileShape {
  int64_t n;
  int c, h, w, side, dilation;
  int lanes;             // groups of four channels of a block
  int groups, pairs;     // of kColumns columns and of kRows rows in a tile
  int lattices_h, lattices_w;
  int tiles_h, tiles_w;  // of one lattice
  int rows, columns;     // in shared memory, halo included
  int plane;             // elements from one group of channels to the next, odd
  int chunks;            // of channels
  int64_t tiles;         // of all samples
};

__device__ __forceinline__ int tile_height(const TileShape& s) { return s.pairs * kRows; }
__device__ __forceinline__ int tile_width(const TileShape& s) { return s.groups * kColumns; }

// Where a tile lies. `row` and `column` count in its lattice; image row of lattice row r is residue_h + r * dilation.
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
  const int lattice_rows = (s.h - t.residue_h + s.dilation - 1) / s.dilation;
  t.first_row = t.row - s.side / 2;
  int last = t.row + tile_height(s) + s.side / 2;
  if (t.first_row < 0) t.first_row = 0;
  if (last > lattice_rows) last = lattice_rows;
  t.row_count = last > t.first_row ? last - t.first_row : 0;
  return t;
}

// Copy rows [first_row, first_row + row_count) and columns [first_column, first_column + columns) of the tile's lattice
// into planes, zeros where there is no image and beyond the last channel.
template <class T>
__device__ __forceinline__ void stage_vector(const Image& image, const TileShape& s, const Tile& t, int first_row,
                                             int row_count, int first_column, int columns, int channel, int plane,
                                             Element4* to) {
  constexpr int kLoad = 16 / int(sizeof(T));  // channels of a load
  constexpr int kWritten = kLoad / kChannels;
  const int vectors = s.lanes / kWritten;  // the launcher makes lanes a multiple
  const int step = int(blockDim.x) / vectors;
  const int vector = int(threadIdx.x) % vectors;
  const int begin = int(threadIdx.x) / vectors;
  if (begin >= step) return;
  const int c = channel + vector * kLoad;
  const T* base = static_cast<const T*>(image.data) + t.sample * image.stride_n + c;
  const int step_rows = step / columns, step_columns = step % columns;
  int row = begin / columns, column = begin % columns;
  to += vector * kWritten * plane;
#pragma unroll 4
  while (row < row_count) {
    const int h = (first_row + row) * s.dilation + t.residue_h;
    const int w = (first_column + column) * s.dilation + t.residue_w;
    float value[kLoad] = {};
    if (unsigned(h) < unsigned(s.h) && unsigned(w) < unsigned(s.w) && c < s.c) {
      load(base + h * image.stride_h + w * image.stride_w, value);
    }
#pragma unroll
    for (int k = 0; k < kWritten; ++k) {
      Element4 element;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) element.element[i] = value[k * kChannels + i];
      to[k * plane + row * columns + column] = element;
    }
    row += step_rows;
    column += step_columns;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
}

__device__ __forceinline__ void stage_scalar(const Image& image, const TileShape& s, const Tile& t, bool column_first,
                                             int first_row, int row_count, int first_column, int columns, int channel,
                                             int plane, Element4* to) {
  const int channels = s.lanes * kChannels;
  const int pixels = row_count * columns;
  const int64_t base = t.sample * image.stride_n;
  for (int i = int(threadIdx.x); i < pixels * channels; i += int(blockDim.x)) {
    const int pixel = column_first ? i % pixels : i / channels;
    const int lane = column_first ? i / pixels : i % channels;
    const int row = pixel / columns;
    const int h = (first_row + row) * s.dilation + t.residue_h;
    const int w = (first_column + pixel - row * columns) * s.dilation + t.residue_w;
    const int c = channel + lane;
    float value = 0.0f;
    if (unsigned(h) < unsigned(s.h) && unsigned(w) < unsigned(s.w) && c < s.c) {
      value = load(image.data, image.dtype, base + c * image.stride_c + h * image.stride_h + w * image.stride_w);
    }
    to[lane / kChannels * plane + pixel].element[lane % kChannels] = value;
  }
}

__device__ __forceinline__ void stage(const Image& image, Access access, const TileShape& s, const Tile& t,
                                      int first_row, int row_count, int first_column, int columns, int channel,
                                      int plane, Element4* to) {
  if (access != Access::kVector) {
    stage_scalar(image, s, t, access == Access::kColumnFirst, first_row, row_count, first_column, columns, channel,
                 plane, to);
  } else if (image.dtype == DType::kFloat32) {
    stage_vector<float>(image, s, t, first_row, row_count, first_column, columns, channel, plane, to);
  } else if (image.dtype == DType::kBFloat16) {
    stage_vector<BFloat16>(image, s, t, first_row, row_count, first_column, columns, channel, plane, to);
  } else {
    stage_vector<Float16>(image, s, t, first_row, row_count, first_column, columns, channel, plane, to);
  }
}

// --- launchers ---

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

// Side of the kernel as the loops over its columns see it: kernels without an instance of their own go in chunks.
inline int padded_side(int side) { return side <= 13 ? side : int(ceil_div(side, kTaps)) * kTaps; }

inline TileShape tile_shape(int64_t n, int64_t c, int64_t h, int64_t w, int side, int dilation, int lanes, int groups,
                            int pairs) {
  TileShape s{};
  s.n = n;
  s.c = int(c);
  s.h = int(h);
  s.w = int(w);
  s.side = side;
  s.dilation = dilation;
  s.lanes = lanes;
  s.groups = groups;
  s.pairs = pairs;
  const int64_t lattice_h = ceil_div(h, dilation), lattice_w = ceil_div(w, dilation);
  s.lattices_h = int(h < dilation ? h : dilation);
  s.lattices_w = int(w < dilation ? w : dilation);
  s.tiles_h = int(ceil_div(lattice_h, pairs * kRows));
  s.tiles_w = int(ceil_div(lattice_w, groups * kColumns));
  s.rows = int(pairs * kRows + side - 1 < lattice_h ? pairs * kRows + side - 1 : lattice_h);
  s.columns = groups * kColumns + padded_side(side) - 1;
  s.plane = s.rows * s.columns | 1;
  s.chunks = int(ceil_div(c, int64_t(lanes) * kChannels));
  s.tiles = n * s.lattices_h * s.lattices_w * s.tiles_h * s.tiles_w;
  return s;
}

}  // namespace cnk::cuda
