// How pointwise kernels divide samples x pixels x channels: a block takes several times 32 pixels of one
// sample, and as many channels as 8 threads have with 16 bytes each.
//
// If channels are neighbours in memory, a thread has 16 bytes of neighbours and 8 threads have a line of 128
// bytes. If pixels are neighbours, a warp has 32 pixels of one channel.
#pragma once

#include "cuda/channels.h"
#include "cuda/launch.h"

namespace cnk::cuda {

constexpr int kTileThreads = 256;
constexpr int kTilePixels = 32;
constexpr int kTilePacks = kTileThreads / kTilePixels;
constexpr int kTileWarps = kTileThreads / kWarpSize;
template <class T>
constexpr int kTileChannels = kTilePacks * Channels<T>::kCount;

struct Tiling {
  int64_t pixels;  // of one sample
  int64_t tiles;   // of one sample
  int64_t columns, blocks;
  int c;
  int turns;  // of a tile: loop iterations of 32 pixels
};

inline Tiling tiling(int64_t n, int64_t pixels, int64_t c, int channels, int turns) {
  const int64_t tiles = (pixels + turns * kTilePixels - 1) / (turns * kTilePixels);
  const int64_t columns = (c + channels - 1) / channels;
  return {pixels, tiles, columns, n * tiles * columns, int(c), turns};
}

// With more turns, a tile's parameters are loaded less often; with fewer turns there are more blocks.
template <class T>
Tiling pointwise_tiling(const Context& context, int64_t n, int64_t pixels, int64_t c) {
  const Tiling one = tiling(n, pixels, c, kTileChannels<T>, 1);
  const int64_t enough = 16 * int64_t(device_info(context.device).multiprocessors);
  return one.blocks >= enough ? tiling(n, pixels, c, kTileChannels<T>, 4) : one;
}

struct TilePlace {
  int64_t sample, tile, pixel;  // number of the tile among all tiles; its first pixel in the sample
  int channel;
};
template <class T>
__device__ __forceinline__ TilePlace tile_place(const Tiling& t, int64_t block) {
  const Divided column = divide(block, t.columns);  // the columns of a tile run at the same time
  const Divided tile = divide(column.quotient, t.tiles);
  return {tile.quotient, column.quotient, tile.remainder * t.turns * kTilePixels,
          int(column.remainder) * kTileChannels<T>};
}

// V channels of a parameter as fp32; `missing` if there is no parameter.
template <int V>
__device__ __forceinline__ void load_parameter(const Vector& vector, int first, int left, bool packed,
                                               float missing, float (&to)[V]) {
  if (vector.data) return load_values(vector.data, vector.dtype, first, 1, left, packed, to);
#pragma unroll
  for (float& v : to) v = missing;
}
inline bool is_packed(const Vector& v, int64_t channels, int64_t count) {
  return channels % count == 0 && is_packed(v.data, v.dtype, count);
}

}  // namespace cnk::cuda
