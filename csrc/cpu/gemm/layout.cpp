// PyTorch's own copy is not used: it runs on OpenMP threads,
// which a forked child does not have, and hangs there.

#include "cpu/gemm/layout.h"

namespace cnk::cpu {

namespace {

template <class T>
void transpose_rows(const T* from, T* to, int64_t rows, int64_t columns, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 16;  // a tile is read and written in runs of a cache line or half of one
  for (int64_t r = begin; r < end; r += kTile) {
    const int64_t height = end - r < kTile ? end - r : kTile;
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t width = columns - c < kTile ? columns - c : kTile;
      const T* source = from + r * columns + c;
      T* target = to + c * rows + r;
      if (height == kTile && width == kTile) {
        T tile[kTile][kTile];
        for (int64_t i = 0; i < kTile; ++i) {
          for (int64_t j = 0; j < kTile; ++j) tile[i][j] = source[i * columns + j];
        }
        for (int64_t j = 0; j < kTile; ++j) {
          for (int64_t i = 0; i < kTile; ++i) target[j * rows + i] = tile[i][j];
        }
      } else {
        for (int64_t j = 0; j < width; ++j) {
          for (int64_t i = 0; i < height; ++i) target[j * rows + i] = source[i * columns + j];
        }
      }
    }
  }
}

template <class T>
void transpose_batch(const T* from, T* to, int64_t batch, int64_t rows, int64_t columns, Team& team) {
  constexpr int64_t kStrip = 32;
  const int64_t strips = (rows + kStrip - 1) / kStrip;
  int64_t begin, end;
  team.split(batch * strips, 1, &begin, &end);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t offset = item / strips * rows * columns, row = item % strips * kStrip;
    const int64_t last = row + kStrip < rows ? row + kStrip : rows;
    transpose_rows(from + offset, to + offset, rows, columns, row, last);
  }
}

}  // namespace

void transpose(const void* from, void* to, int64_t batch, int64_t rows, int64_t columns, int64_t element_size,
               Team& team) {
  if (element_size == 4) {
    transpose_batch(static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), batch, rows, columns,
                    team);
  } else {
    transpose_batch(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), batch, rows, columns,
                    team);
  }
}

}  // namespace cnk::cpu
