// A block has in shared memory the weights of up to 64 channels and, tile by tile,
// the pixels (dwconv_tile.h). A thread convolves 4 channels x 2 rows x 7 columns
// in 56 accumulators; a row of the tile is read into registers once and used for
// both rows. Every load in the loop has a constant offset and needs no mask.
#include <cmath>

#include "cuda/dwconv/dwconv.h"
#include "cuda/dwconv/dwconv_tile.h"
#include "cuda/launch.h"

namespace cnk::cuda {

constexpr int kDwconvThreads = 256;  // at most

struct DwconvParams {
  TileShape s;
  Image x, y, residual;
  const void* weight;  // of x's dtype
  Vector bias;
  Access access, store;
  Walk walk;
  int64_t y_step, residual_step;  // elements from one column of the lattice to the next
  bool flip;
  int result_plane;    // of the results that store_elements reads
  int64_t tile_bytes;  // of the pixels, or the results
  int64_t blocks, tiles_per_block;
};

// Where tap (kh, kw) of the kernel is in shared memory: the taps of a part follow each other.
__device__ __forceinline__ int place_of(const TileShape& s, int tap) {
  const int step_h = s.h.tap_step, step_w = s.w.tap_step;
  const int kh = tap / s.w.side, kw = tap - kh * s.w.side;
  const int second_h = kh % step_h, second_w = kw % step_w;
  const int rows = second_h ? s.h.side / 2 : s.h.taps, columns = second_w ? s.w.side / 2 : s.w.taps;
  return (second_h ? s.h.taps * s.w.side : 0) + (second_w ? s.w.taps * rows : 0) + kh / step_h * columns +
         kw / step_w;
}

// The weights of the block's channels, fp32: a plane of taps
// for every four channels, zeros after the last one. in_order: all taps are one part.
template <class T>
__device__ __forceinline__ void stage_weights(const DwconvParams& p, int taps, bool in_order, int channel,
                                              Pixel<float>* to) {
  for (int i = int(threadIdx.x); i < taps * p.s.lanes; i += int(blockDim.x)) {
    const int lane = i / taps, tap = i - lane * taps;
    const int c = channel + lane * kChannels;
    const T* from = static_cast<const T*>(p.weight) + int64_t(c) * taps + (p.flip ? taps - 1 - tap : tap);
    Pixel<float> weight{};
    if (c + kChannels <= p.s.c) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) weight.element[k] = widen(from[k * taps]);
    } else {
      for (int k = 0; k < kChannels && c + k < p.s.c; ++k) weight.element[k] = widen(from[k * taps]);
    }
    to[in_order ? i : lane * taps + place_of(p.s, tap)] = weight;
  }
}

using Accumulators = float[kRows][kColumns][kChannels];

// acc[q] += x[q + tap] * weight[tap] for the taps of one chunk of one kernel row.
template <int kChunk>
__device__ __forceinline__ void add_taps(const float (&x)[kColumns + kChunk - 1][kChannels],
                                         const Pixel<float>* weights, float (&acc)[kColumns][kChannels]) {
#pragma unroll
  for (int tap = 0; tap < kChunk; ++tap) {
    const Pixel<float> weight = weights[tap];
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) acc[q][i] = fmaf(x[q + tap][i], weight.element[i], acc[q][i]);
    }
  }
}

// kChunk taps from `weights` on of every kernel row, for both rows of the thread. `tile` points to the first
// column that the first tap reads, `row` is the row of x that it reads for the upper row.
template <class T, int kChunk>
__device__ __forceinline__ void add_chunk(const TileShape& s, const Window& v, int row, int side_h,
                                          int side_w, const Pixel<T>* tile, const Pixel<float>* weights,
                                          Accumulators& acc) {
  const int begin = max(row, v.row);
  const int end = min(row + side_h + 1, v.row + v.rows);
  int kh = begin - row;  // of the upper row; one less for the lower
  const Pixel<T>* x_row = tile + (begin - v.row) * s.columns;
  const int last_kh = kh + end - begin;
  const Pixel<float>*upper = weights + kh * side_w, *lower = upper - side_w;
#pragma unroll 1
  for (; kh < last_kh; ++kh, x_row += s.columns, lower = upper, upper += side_w) {
    constexpr int kWindow = kColumns + kChunk - 1;
    float x[kWindow][kChannels];
#pragma unroll
    for (int j = 0; j < kWindow; ++j) load(x_row[j].element, x[j]);
    if (kh < side_h) add_taps<kChunk>(x, upper, acc[0]);
    if (kh > 0) add_taps<kChunk>(x, lower, acc[1]);
  }
}

// A part of any sides. Its columns are divided into chunks
// of 3 to 7 taps (1 or 2 taps if there are no more) that differ by at most one.
template <class T>
__device__ __forceinline__ void add_chunks(const TileShape& s, const Window& v, int row, int column,
                                           int side_h, int side_w, const Pixel<T>* tile,
                                           const Pixel<float>* weights, Accumulators& acc) {
  int first = 0;
#pragma unroll 1
  for (int chunks = (side_w + kTaps - 1) / kTaps; chunks > 0; --chunks) {
    const int taps = (side_w - first + chunks - 1) / chunks;
    // Chunks whose columns are all outside the image only add
    // zeros: most chunks of a large kernel on a small image.
    const int reached = column + first;
    if (reached + kColumns + taps - 1 > 0 && reached < v.w.count) {
      if (taps == 7) add_chunk<T, 7>(s, v, row, side_h, side_w, tile + first, weights + first, acc);
      if (taps == 6) add_chunk<T, 6>(s, v, row, side_h, side_w, tile + first, weights + first, acc);
      if (taps == 5) add_chunk<T, 5>(s, v, row, side_h, side_w, tile + first, weights + first, acc);
      if (taps == 4) add_chunk<T, 4>(s, v, row, side_h, side_w, tile + first, weights + first, acc);
      if (taps == 3) add_chunk<T, 3>(s, v, row, side_h, side_w, tile + first, weights + first, acc);
      if (taps == 2) add_chunk<T, 2>(s, v, row, side_h, side_w, tile + first, weights + first, acc);
      if (taps == 1) add_chunk<T, 1>(s, v, row, side_h, side_w, tile + first, weights + first, acc);
    }
    first += taps;
  }
}

// Stores the thread's results, with the residual, four channels at once.
template <class T, class Y>
__device__ __forceinline__ void store_vectors(const DwconvParams& p, const Tile& t, int row, int column,
                                              int channel, Accumulators& acc) {
  const Image &y = p.y, &residual = p.residual;
  const int d = p.s.w.y_step;
  const int first_w = column * d + t.residue_w;
  const int columns = (p.s.w.out - first_w + d - 1) / d;  // from here to the end of the image
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int h = (row + r) * p.s.h.y_step + t.residue_h;
    if (h >= p.s.h.out) break;
    if (residual.data) {
      const T* from = static_cast<const T*>(residual.data) + t.sample * residual.stride_n +
                      h * residual.stride_h + first_w * residual.stride_w + channel;
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        if (q >= columns) break;
        float added[kChannels];
        load(from, added);
        from += p.residual_step;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) acc[r][q][i] += added[i];
      }
    }
    Y* to = static_cast<Y*>(y.data) + t.sample * y.stride_n + h * y.stride_h + first_w * y.stride_w + channel;
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
      if (q >= columns) break;
      store(acc[r][q], to);
      to += p.y_step;
    }
  }
}

// Stores the tile's results from planes of tile_height x tile_width;
// neighbouring threads store neighbouring columns or channels.
__device__ __forceinline__ void store_elements(const DwconvParams& p, const Tile& t, int channel,
                                               const Pixel<float>* from, int plane) {
  const int width = tile_width(p.s), pixels = tile_height(p.s) * width, channels = p.s.lanes * kChannels;
  const bool column_first = p.store == Access::kColumnFirst;
  const Image &y = p.y, &residual = p.residual;
  for (int i = int(threadIdx.x); i < pixels * channels; i += int(blockDim.x)) {
    const int pixel = column_first ? i % pixels : i / channels;
    const int lane = column_first ? i / pixels : i % channels;
    const int row = pixel / width;
    const int h = (t.row + row) * p.s.h.y_step + t.residue_h;
    const int w = (t.column + pixel - row * width) * p.s.w.y_step + t.residue_w;
    const int c = channel + lane;
    if (h >= p.s.h.out || w >= p.s.w.out || c >= p.s.c) continue;
    float value = from[lane / kChannels * plane + pixel].element[lane % kChannels];
    if (residual.data) {
      value += load(residual.data, residual.dtype,
                    t.sample * residual.stride_n + c * residual.stride_c + h * residual.stride_h +
                        w * residual.stride_w);
    }
    store(value, y.data, y.dtype, t.sample * y.stride_n + c * y.stride_c + h * y.stride_h + w * y.stride_w);
  }
}

// kSide: 7 for 7x7 with stride 1, or 0 for all others. Separate instances for the sides 3 to 13 execute 3 to 5 % fewer instructions, but
// each adds half a second to the compile time of every architecture.
template <class T, int kSide>
__global__ void __launch_bounds__(kDwconvThreads) dwconv_kernel(const DwconvParams p) {
  CNK_SHARED(char, shared);
  const TileShape& s = p.s;
  const int all_taps = kSide ? kSide * kSide : s.h.side * s.w.side;
  const int parts = kSide ? 1 : s.h.tap_step * s.w.tap_step;
  Pixel<T>* tile = reinterpret_cast<Pixel<T>*>(shared);
  Pixel<float>* weights = reinterpret_cast<Pixel<float>*>(shared + p.tile_bytes);
  const int lane = int(threadIdx.x) % s.lanes, rest = int(threadIdx.x) / s.lanes;
  const int group = rest % s.groups, pair = rest / s.groups;
  const bool active = pair < s.pairs;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Divided share = divide(block, s.chunks);
    const int channel = int(share.remainder) * s.lanes * kChannels;
    const int c = channel + lane * kChannels;
    __syncthreads();  // the tiles before no longer read these weights
    stage_weights<T>(p, all_taps, parts == 1, channel, weights);
    float bias[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) bias[i] = c + i < s.c ? load(p.bias, c + i, 0.0f) : 0.0f;
    const int64_t first = share.quotient * p.tiles_per_block;
    const int64_t last = min(first + p.tiles_per_block, s.tiles);
    for (int64_t index = first; index < last; ++index) {
      const Tile t = tile_at(s, index);
      const int row = t.row + pair * kRows, column = t.column + group * kColumns;
      Accumulators acc;
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) acc[0][q][i] = acc[1][q][i] = bias[i];
      }
      const Pixel<float>* own_weights = weights + lane * all_taps;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        Part h, w;
        bool meets = true;
        if constexpr (kSide) {
          h = {0, kSide, -kSide / 2, lattice_of(s.h.in, t.residue_h, s.h.dilation)};
          w = {0, kSide, -kSide / 2, lattice_of(s.w.in, t.residue_w, s.w.dilation)};
        } else {
          const int second_h = part / s.w.tap_step, second_w = part - second_h * s.w.tap_step;
          meets = part_at(s.h, t.residue_h, second_h, &h);
          meets = part_at(s.w, t.residue_w, second_w, &w) && meets;
        }
        if (meets) {
          const int top = t.row + h.shift, left = t.column + w.shift;
          const Window v = window_of(h.x, w.x, top, top + tile_height(s) + h.taps - 1, left, s.columns);
          __syncthreads();  // the tile before no longer uses this memory
          stage(p.x, p.access, p.walk, s, t, v, channel, s.plane, tile);
          __syncthreads();
          // Threads without rows of their own compute as well: a branch here would copy all sums.
          const Pixel<T>* own = tile + lane * s.plane + group * kColumns;
          const int x_row = top + pair * kRows;
          if constexpr (kSide) {
            add_chunk<T, kSide>(s, v, x_row, kSide, kSide, own, own_weights, acc);
          } else {
            add_chunks<T>(s, v, x_row, left + group * kColumns, h.taps, w.taps, own, own_weights, acc);
          }
        }
        own_weights += h.taps * w.taps;
      }
      if (p.store == Access::kVector) {
        if (!active || c >= s.c) continue;
        if (p.y.dtype == DType::kFloat32) {
          store_vectors<T, float>(p, t, row, column, c, acc);
        } else {
          store_vectors<T, T>(p, t, row, column, c, acc);
        }
        continue;
      }
      Pixel<float>* results = reinterpret_cast<Pixel<float>*>(shared);
      __syncthreads();  // the results overwrite the pixels
      if (active) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int q = 0; q < kColumns; ++q) {
            const int pixel = (pair * kRows + r) * tile_width(s) + group * kColumns + q;
            store(acc[r][q], results[lane * p.result_plane + pixel].element);
          }
        }
      }
      __syncthreads();
      store_elements(p, t, channel, results, p.result_plane);
    }
  }
}

namespace {

struct Plan {
  TileShape shape;
  int threads;
  int result_plane;
  int64_t tile_bytes, shared_bytes, tiles_per_block;
};

Plan plan_of(const DwconvArgs& a, const TileShape& s, bool stores_elements) {
  Plan plan{};
  plan.shape = s;
  plan.threads = int(ceil_div(s.lanes * s.groups * s.pairs, kWarpSize)) * kWarpSize;
  plan.result_plane = plane_of(s.pairs * kRows * s.groups * kColumns, s.lanes, sizeof(float));
  plan.tile_bytes = s.lanes * s.plane * kChannels * element_size(a.x.dtype);
  if (stores_elements) {
    plan.tile_bytes =
        max(plan.tile_bytes, int64_t(s.lanes) * plan.result_plane * int64_t(sizeof(Pixel<float>)));
  }
  plan.tile_bytes = ceil_div(plan.tile_bytes, 16) * 16;
  plan.shared_bytes =
      plan.tile_bytes + int64_t(s.lanes) * s.h.side * s.w.side * int64_t(sizeof(Pixel<float>));
  return plan;
}

// Chooses the tile with the lowest predicted time. A multiprocessor issues instructions of four warps at once
// if it has enough warps; a single warp uses its issue slot a little over half of the time. The work of all
// blocks is added once more, as a penalty for wasted work: the cost of rounding up to whole blocks depends on
// the other kernels in the stream, wasted work does not. Instructions are counted in the PTX
// (proofs/cuda_executed.py); the shares are guesses: no GPU has timed this.
constexpr double kIssued = 3.2, kIssuedAlone = 0.6;  // instructions a cycle
constexpr double kRegisters = 180;                   // of a thread, at most

double predicted_cycles(const DwconvArgs& a, const Plan& plan, const DeviceInfo& device) {
  const TileShape& s = plan.shape;
  const double outputs = kRows * kColumns * kChannels;  // of a thread
  const double loads =
      double(s.rows) * s.columns * s.lanes * kChannels * double(element_size(a.x.dtype)) / 16;
  const double weights = double(s.lanes) * s.h.side * s.w.side;
  // With a stride all parts together, or one of those of an input gradient.
  const double parts = s.h.half ? 1 : s.h.tap_step * s.w.tap_step;
  const double taps = parts * s.h.taps * s.w.taps;
  const double convolve = outputs * (taps * 1.22 + 3) + 150 + parts * loads * 28 / plan.threads;
  const double blocks = double(s.tiles) * s.chunks / double(plan.tiles_per_block);
  const double work = convolve * double(plan.tiles_per_block) + weights * 25 / plan.threads;
  const double warps = plan.threads / kWarpSize;
  const double each = std::ceil(blocks / device.multiprocessors) * warps;
  const double total = blocks / device.multiprocessors * warps;
  return work * (max(1 / kIssuedAlone, each / kIssued) + total / kIssued);
}

Plan choose(const DwconvArgs& a, const DeviceInfo& device, int least_lanes, bool stores_elements) {
  Plan best{};
  double least = 0;
  const auto lattice = [](const Axis& axis) {
    return lattice_of(int(axis.out), 0, tile_axis(axis, 1).y_step).count;
  };
  const int64_t lattice_h = lattice(a.of.h), lattice_w = lattice(a.of.w);
  // At most a third of a multiprocessor's shared memory, so that one block copies while others compute; all
  // of it if nothing fits. With 32 channels or more, neighbouring threads use whole lines of global memory;
  // fewer channels only if more do not fit.
  for (const int64_t limit : {device.shared_bytes / 3, device.shared_bytes}) {
    for (int lanes = 16; lanes >= least_lanes; lanes /= 2) {
      if (lanes < 8 && best.threads) break;
      if (lanes > least_lanes && lanes / 2 * kChannels >= a.of.c) continue;
      for (int groups = 1; groups <= 8 && (groups - 1) * kColumns < lattice_w; ++groups) {
        for (int pairs = 1; pairs <= 16 && (pairs - 1) * kRows < lattice_h; ++pairs) {
          const TileShape s = tile_shape(a.of, lanes, groups, pairs, element_size(a.x.dtype));
          Plan plan = plan_of(a, s, stores_elements);
          if (plan.threads > kDwconvThreads || plan.shared_bytes > limit) break;
          // Weights are copied once for several tiles: so many that one wave of blocks computes all tiles.
          const double resident =
              min(65536 / kRegisters / plan.threads, 3.0 * double(limit) / double(plan.shared_bytes + 1024));
          const double wanted = device.multiprocessors * max(1.0, std::floor(resident));
          plan.tiles_per_block =
              max(int64_t{1}, min(int64_t{16}, int64_t(std::ceil(double(s.tiles) * s.chunks / wanted))));
          const double cycles = predicted_cycles(a, plan, device);
          if (!best.threads || cycles < least) {
            least = cycles;
            best = plan;
          }
        }
      }
    }
    if (best.threads) break;
  }
  if (!best.threads) {
    refuse("dwconv_kernel", shape_of(a.of), "no tile fits into the GPU's shared memory");
  }
  return best;
}

template <class T>
void run(const Context& context, const Launch& what, const DwconvParams& params) {
  const TileShape& s = params.s;
  const bool seven =
      s.h.side == 7 && s.w.side == 7 && s.h.in == s.h.out && s.w.in == s.w.out && s.h.down == 1;
  if (seven && !s.h.half) return launch(context, what, dwconv_kernel<T, 7>, params);
  launch(context, what, dwconv_kernel<T, 0>, params);
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
  p.access = access_of(a.x, a.of.c);
  p.store = access_of(a.y, a.of.c);
  if (p.store == Access::kVector) {
    const bool residual_fits =
        !a.residual.data || (vectors_fit(a.residual, a.of.c) && a.residual.dtype == a.x.dtype);
    const bool dtype_fits = a.y.dtype == a.x.dtype || a.y.dtype == DType::kFloat32;
    if (!residual_fits || !dtype_fits) p.store = Access::kChannelFirst;
  }
  const DeviceInfo& device = device_info(context.device);
  // A 16-byte load of a 16-bit type fills two lanes.
  const int least_lanes = p.access == Access::kVector && a.x.dtype != DType::kFloat32 ? 2 : 1;
  const Plan plan = choose(a, device, least_lanes, p.store != Access::kVector);
  p.s = plan.shape;
  p.walk = walk_of(a.x, p.s, p.s.h.x_step, p.s.w.x_step, p.s.columns, plan.threads);
  p.y_step = p.s.w.y_step * a.y.stride_w;
  p.residual_step = p.s.w.y_step * a.residual.stride_w;
  p.tile_bytes = plan.tile_bytes;
  p.result_plane = plan.result_plane;
  p.tiles_per_block = plan.tiles_per_block;
  p.blocks = ceil_div(p.s.tiles, p.tiles_per_block) * p.s.chunks;
  const Launch what{a.flip ? "dwconv_kernel, input gradient" : "dwconv_kernel", p.blocks, plan.threads,
                    plan.shared_bytes, shape_of(a.of)};
  with_element(a.x.dtype, [&](auto element) { run<typename decltype(element)::Type>(context, what, p); });
}

}  // namespace cnk::cuda
