// A block holds the weights of up to 64 channels and, tile by tile, the pixels they convolve, in shared memory
// (dwconv_tile.h). A thread convolves 4 channels x 2 rows x 7 columns in 56 accumulators: a row of the tile, read once
// into registers, feeds both of its rows. Every load of the loop stands at a constant offset and needs no mask.
#include "cuda/dwconv.h"

#include <algorithm>
#include <limits>

#include "cuda/dwconv_tile.h"
#include "cuda/launch.h"

namespace cnk::cuda {

constexpr int kDwconvThreads = 256;  // at most

struct DwconvParams {
  TileShape s;
  Image x, y, residual, weight;
  Vector bias;
  Access access, store;
  bool flip;
  int64_t blocks, tiles_per_block;
};

// The weights of the block's channels: plane of taps for every four of them, zeros beyond the last channel.
__device__ __forceinline__ void stage_weights(const DwconvParams& p, int side, int channel, Element4* to) {
  const int taps = side * side;
  for (int i = int(threadIdx.x); i < taps * p.s.lanes * kChannels; i += int(blockDim.x)) {
    const int lane = i / taps, tap = i - lane * taps;
    const int source = p.flip ? taps - 1 - tap : tap;
    const int kh = source / side, kw = source - kh * side;
    const int c = channel + lane;
    float value = 0.0f;
    if (c < p.s.c) {
      value = load(p.weight.data, p.weight.dtype,
                   c * p.weight.stride_c + kh * p.weight.stride_h + kw * p.weight.stride_w);
    }
    to[lane / kChannels * taps + tap].element[lane % kChannels] = value;
  }
}

using Accumulators = float[kRows][kColumns][kChannels];

// acc[q] += x[q + tap] * weight[tap] for the taps of one chunk of one kernel row. Chunk 0: as many as are left.
template <int kChunk>
__device__ __forceinline__ void add_taps(const float (&x)[kColumns + (kChunk ? kChunk : kTaps) - 1][kChannels],
                                         const Element4* weights, int left, float (&acc)[kColumns][kChannels]) {
#pragma unroll
  for (int tap = 0; tap < (kChunk ? kChunk : kTaps); ++tap) {
    if (kChunk == 0 && tap >= left) break;
    const Element4 weight = weights[tap];
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) acc[q][i] = fmaf(x[q + tap][i], weight.element[i], acc[q][i]);
    }
  }
}

// Taps [first, first + kChunk) of every kernel row, for both rows of the thread.
template <int kChunk>
__device__ __forceinline__ void add_chunk(const Element4* x_row, const Element4* weight_row, int side, int left,
                                          bool upper, bool lower, Accumulators& acc) {
  constexpr int kWindow = kColumns + (kChunk ? kChunk : kTaps) - 1;
  float x[kWindow][kChannels];
#pragma unroll
  for (int j = 0; j < kWindow; ++j) load(reinterpret_cast<const float*>(x_row + j), x[j]);
  if (upper) add_taps<kChunk>(x, weight_row, left, acc[0]);
  if (lower) add_taps<kChunk>(x, weight_row - side, left, acc[1]);
}

template <int kSide>
__device__ __forceinline__ void convolve(const TileShape& s, const Tile& t, const Element4* tile,
                                         const Element4* weights, int group, int pair, Accumulators& acc) {
  const int side = kSide ? kSide : s.side;
  const int row = t.row + pair * kRows;  // of the lattice: the thread's upper row
  const int begin = max(row - side / 2, t.first_row);
  const int end = min(row + 1 + side / 2 + 1, t.first_row + t.row_count);
#pragma unroll 1
  for (int r = begin; r < end; ++r) {
    const int kh = r - (row - side / 2);  // of the upper row; one less for the lower
    const Element4* x_row = tile + (r - t.first_row) * s.columns + group * kColumns;
    const Element4* weight_row = weights + kh * side;
    const bool upper = kh < side, lower = kh > 0;
    if constexpr (kSide == 0) {
#pragma unroll 1
      for (int first = 0; first < side; first += kTaps) {
        // Chunks whose columns all lie outside the image add zeros only: most of a large kernel's on a small image.
        const int column = t.column + group * kColumns - side / 2 + first;
        if (column + kColumns + kTaps - 1 <= 0 || column * s.dilation + t.residue_w >= s.w) continue;
        add_chunk<0>(x_row + first, weight_row + first, side, side - first, upper, lower, acc);
      }
    } else if constexpr (kSide <= kTaps) {
      add_chunk<kSide>(x_row, weight_row, side, 0, upper, lower, acc);
    } else {
      constexpr int kFirst = (kSide + 1) / 2;
      add_chunk<kFirst>(x_row, weight_row, side, 0, upper, lower, acc);
      add_chunk<kSide - kFirst>(x_row + kFirst, weight_row + kFirst, side, 0, upper, lower, acc);
    }
  }
}

// Four channels of a pixel, with the residual; as many of them as there are.
__device__ __forceinline__ void store_pixel(const DwconvParams& p, const Tile& t, int row, int column, int channel,
                                            float (&value)[kChannels]) {
  const int h = row * p.s.dilation + t.residue_h, w = column * p.s.dilation + t.residue_w;
  if (h >= p.s.h || w >= p.s.w) return;
  const Image &y = p.y, &residual = p.residual;
  const int64_t at = t.sample * y.stride_n + h * y.stride_h + w * y.stride_w + channel * y.stride_c;
  int64_t at_residual = 0;
  if (residual.data) {
    at_residual = t.sample * residual.stride_n + h * residual.stride_h + w * residual.stride_w +
                  channel * residual.stride_c;
  }
  if (p.store == Access::kVector) {
    const auto both = [&](auto element) {
      using T = typename decltype(element)::Type;
      if (residual.data) {
        float added[kChannels];
        load(static_cast<const T*>(residual.data) + at_residual, added);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) value[i] += added[i];
      }
      store(value, static_cast<T*>(y.data) + at);
    };
    if (y.dtype == DType::kFloat32) {
      both(Element<float>{});
    } else if (y.dtype == DType::kBFloat16) {
      both(Element<BFloat16>{});
    } else {
      both(Element<Float16>{});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (channel + i >= p.s.c) break;
    if (residual.data) value[i] += load(residual.data, residual.dtype, at_residual + i * residual.stride_c);
    store(value[i], y.data, y.dtype, at + i * y.stride_c);
  }
}

// The tile's results, which lie in planes of tile_height x tile_width, neighbouring threads storing neighbouring
// columns.
__device__ __forceinline__ void store_columns(const DwconvParams& p, const Tile& t, int channel, const Element4* from,
                                              int plane) {
  const int width = tile_width(p.s), pixels = tile_height(p.s) * width;
  for (int i = int(threadIdx.x); i < pixels * p.s.lanes * kChannels; i += int(blockDim.x)) {
    const int lane = i / pixels, pixel = i - lane * pixels;
    const int row = pixel / width;
    const int h = (t.row + row) * p.s.dilation + t.residue_h;
    const int w = (t.column + pixel - row * width) * p.s.dilation + t.residue_w;
    const int c = channel + lane;
    if (h >= p.s.h || w >= p.s.w || c >= p.s.c) continue;
    float value = from[lane / kChannels * plane + pixel].element[lane % kChannels];
    const Image &y = p.y, &residual = p.residual;
    if (residual.data) {
      value += load(residual.data, residual.dtype,
                    t.sample * residual.stride_n + c * residual.stride_c + h * residual.stride_h + w * residual.stride_w);
    }
    store(value, y.data, y.dtype, t.sample * y.stride_n + c * y.stride_c + h * y.stride_h + w * y.stride_w);
  }
}

template <int kSide>
__global__ void __launch_bounds__(kDwconvThreads) dwconv_kernel(const DwconvParams p) {
  CNK_SHARED(Element4, shared);
  const TileShape& s = p.s;
  const int side = kSide ? kSide : s.side;
  Element4* weights = shared;
  Element4* tile = shared + s.lanes * side * side;
  const int lane = int(threadIdx.x) % s.lanes, rest = int(threadIdx.x) / s.lanes;
  const int group = rest % s.groups, pair = rest / s.groups;
  const bool active = pair < s.pairs;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Divided part = divide(block, s.chunks);
    const int channel = int(part.remainder) * s.lanes * kChannels;
    __syncthreads();  // the tiles before are done with these weights
    stage_weights(p, side, channel, weights);
    const int64_t first = part.quotient * p.tiles_per_block;
    const int64_t last = min(first + p.tiles_per_block, s.tiles);
    for (int64_t index = first; index < last; ++index) {
      const Tile t = tile_at(s, index);
      __syncthreads();  // the tile before is done with this memory
      stage(p.x, p.access, s, t, t.first_row, t.row_count, t.column - side / 2, s.columns, channel, s.plane, tile);
      __syncthreads();
      const int c = channel + lane * kChannels;
      Accumulators acc;
      if (active) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          const float bias = c + i < s.c ? load(p.bias, c + i, 0.0f) : 0.0f;
#pragma unroll
          for (int q = 0; q < kColumns; ++q) acc[0][q][i] = acc[1][q][i] = bias;
        }
        convolve<kSide>(s, t, tile + lane * s.plane, weights + lane * side * side, group, pair, acc);
      }
      if (p.store == Access::kColumnFirst) {
        const int plane = tile_height(s) * tile_width(s) | 1;
        __syncthreads();  // the results take the place of the pixels
        if (active) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int q = 0; q < kColumns; ++q) {
              const int pixel = (pair * kRows + r) * tile_width(s) + group * kColumns + q;
              store(acc[r][q], reinterpret_cast<float*>(tile + lane * plane + pixel));
            }
          }
        }
        __syncthreads();
        store_columns(p, t, channel, tile, plane);
      } else if (active && c < s.c) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int q = 0; q < kColumns; ++q) {
            store_pixel(p, t, t.row + pair * kRows + r, t.column + group * kColumns + q, c, acc[r][q]);
          }
        }
      }
    }
  }
}

namespace {

struct Plan {
  TileShape shape;
  int threads;
  int64_t shared_bytes;
};

int64_t shared_bytes_of(const TileShape& s) {
  const int64_t results = s.pairs * kRows * s.groups * kColumns | 1;  // what store_columns reads
  return s.lanes * (s.side * s.side + std::max<int64_t>(s.plane, results)) * int64_t(sizeof(Element4));
}

// The tile by counted work: instructions for each output that is wanted, idle threads and a GPU that is not full
// counted in.
Plan plan(const DwconvArgs& a, const DeviceInfo& device, int least_lanes) {
  Plan best{};
  double best_cost = std::numeric_limits<double>::infinity();
  const int64_t lattice_h = ceil_div(a.h, a.dilation), lattice_w = ceil_div(a.w, a.dilation);
  // Half of what a block may have, so that one block stages while another computes; all of it if nothing else fits.
  for (const int64_t limit : {std::min<int64_t>(device.shared_bytes / 2, 56 << 10), device.shared_bytes}) {
    for (int lanes = 16; lanes >= least_lanes; lanes /= 2) {
      if (lanes > least_lanes && (lanes - least_lanes) * kChannels >= a.c) continue;
      for (int groups = 1; groups <= 8 && (groups - 1) * kColumns < lattice_w; ++groups) {
        for (int pairs = 1; pairs <= 16 && (pairs - 1) * kRows < lattice_h; ++pairs) {
          const int threads = int(ceil_div(lanes * groups * pairs, kWarpSize)) * kWarpSize;
          if (threads > kDwconvThreads) break;
          const TileShape s = tile_shape(a.n, a.c, a.h, a.w, a.side, a.dilation, lanes, groups, pairs);
          const int64_t bytes = shared_bytes_of(s);
          if (bytes > limit) break;
          const double outputs = double(pairs * kRows * groups * kColumns) * lanes * kChannels;
          const double staged = double(s.rows) * s.columns * lanes * kChannels;
          const double work = outputs * a.side * a.side * 1.1 + staged * 3 + outputs * 4;
          const double computed = double(s.tiles) * s.chunks * (work * threads / (lanes * groups * pairs));
          const double warps = double(s.tiles) * s.chunks * threads / kWarpSize;
          const double full = double(device.multiprocessors) * 8;  // warps
          const double cost = computed * std::max(1.0, full / warps);
          if (cost < best_cost) {
            best_cost = cost;
            best = {s, threads, bytes};
          }
        }
      }
    }
    if (best.threads) break;
  }
  return best;
}

template <int kSide>
void run(const Context& context, const Launch& what, const DwconvParams& params) {
  launch(context, what, dwconv_kernel<kSide>, params);
}

}  // namespace

void dwconv(const Context& context, const DwconvArgs& a) {
  DwconvParams p{};
  p.x = a.x;
  p.y = a.y;
  p.residual = a.residual;
  p.weight = a.weight;
  p.bias = a.bias;
  p.flip = a.flip;
  p.access = access_of(a.x, a.c);
  p.store = access_of(a.y, a.c);
  if (p.store == Access::kVector && a.residual.data) {
    const bool same = vectors_fit(a.residual, a.c) && a.residual.dtype == a.y.dtype;
    if (!same) p.store = Access::kChannelFirst;
  }
  const DeviceInfo& device = device_info(context.device);
  // A 16-byte load of a 16-bit type fills two lanes.
  const Plan chosen = plan(a, device, p.access == Access::kVector && a.x.dtype != DType::kFloat32 ? 2 : 1);
  p.s = chosen.shape;
  // Weights are staged once for so many tiles, as long as every multiprocessor has several blocks.
  const int64_t wanted = int64_t{8} * device.multiprocessors;
  p.tiles_per_block = std::clamp<int64_t>(p.s.tiles * p.s.chunks / wanted, 1, 8);
  p.blocks = ceil_div(p.s.tiles, p.tiles_per_block) * p.s.chunks;
  const Launch what{a.flip ? "dwconv_kernel (input gradient)" : "dwconv_kernel",
                    p.blocks,
                    chosen.threads,
                    chosen.shared_bytes,
                    {"NCHWKD", {a.n, a.c, a.h, a.w, a.side, a.dilation}}};
  if (!chosen.threads) throw LaunchError("dwconv_kernel: no tile fits into shared memory");
  switch (a.side) {
    case 3: return run<3>(context, what, p);
    case 5: return run<5>(context, what, p);
    case 7: return run<7>(context, what, p);
    case 9: return run<9>(context, what, p);
    case 11: return run<11>(context, what, p);
    case 13: return run<13>(context, what, p);
    default: return run<0>(context, what, p);
  }
}

}  // namespace cnk::cuda
