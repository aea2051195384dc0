// A block keeps the sums of up to 64 channels in registers while it loops over its share of the tiles, whose
// pixels of x and dy are in shared memory (dwconv_tile.h). A thread owns 4 channels and up to 7 taps of one
// kernel row: 28 accumulators. If a block has more threads than taps, several threads share a tap: they
// divide the tile's rows, and their sums are added at the end.
#include <cmath>

#include "cuda/dwconv/dwconv_tile.h"
#include "cuda/dwconv/dwconv_wgrad.h"
#include "cuda/launch.h"

namespace cnk::cuda {

constexpr int kWeightThreads = 256;  // at most
constexpr int kFinishThreads = 128;
constexpr int kFewerTaps = 6;  // of a thread, at most, if not 7

struct DwconvWeightParams {
  TileShape s;
  Image dy, x;
  Access dy_access, x_access;
  Walk dy_walk, x_walk;
  int chunk;       // taps of a thread
  int taps_w;      // chunks of taps of a kernel row
  int block_rows;  // kernel rows of a block
  int row_blocks;  // blocks that share the kernel rows
  int tap_parts;   // parts of the taps, with blocks of their own
  int splits;      // threads that share a tap
  int dy_plane;
  int64_t dy_bytes;  // of dy in shared memory
  int64_t parts, tiles_per_part, blocks;
  float* partials;
};

// Adds columns of one row: acc[tap] += dy[q] * x[q + tap]. Fourteen columns at once need a fifth fewer reads
// and conversions than seven twice.
template <class T, int kChunk, int kGroups, int kHeld>
__device__ __forceinline__ void add_columns(const Pixel<T>* dy, const Pixel<T>* x,
                                            float (&acc)[kHeld][kChannels]) {
  constexpr int kCount = kGroups * kColumns;
  float d[kCount][kChannels];
#pragma unroll
  for (int q = 0; q < kCount; ++q) load(dy[q].element, d[q]);
#pragma unroll
  for (int j = 0; j < kCount + kChunk - 1; ++j) {
    float value[kChannels];
    load(x[j].element, value);
#pragma unroll
    for (int tap = 0; tap < kChunk; ++tap) {
      if (j - tap < 0 || j - tap >= kCount) continue;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) acc[tap][i] = fmaf(d[j - tap][i], value[i], acc[tap][i]);
    }
  }
}

template <class T>
__device__ __forceinline__ void add(const T* from, float (&sum)[kChannels]) {
  float value[kChannels];
  load(from, value);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum[i] += value[i];
}

// Adds one row of the tile, whose first tap reads column `column` of the image.
template <class T, int kChunk, int kHeld>
__device__ __forceinline__ void add_row(const DwconvWeightParams& p, const Pixel<T>* dy, const Pixel<T>* x,
                                        int column, int columns, float (&acc)[kHeld][kChannels]) {
  int left = p.s.groups;
#pragma unroll 1
  for (; left > 1 && p.taps_w == 1; left -= 2, dy += 2 * kColumns, x += 2 * kColumns) {
    add_columns<T, kChunk, 2>(dy, x, acc);
  }
#pragma unroll 1
  for (; left > 0; --left, dy += kColumns, x += kColumns, column += kColumns) {
    // Taps without a column in the image: most taps of a large kernel on a small image.
    if (p.taps_w > 1 && (column + kColumns + kChunk - 1 <= 0 || column >= columns)) continue;
    add_columns<T, kChunk, 1>(dy, x, acc);
  }
}

// kHeld: 7 taps of a thread, or up to 6.
template <class T, int kHeld>
__global__ void __launch_bounds__(kWeightThreads, 2) dwconv_weight_kernel(const DwconvWeightParams p) {
  CNK_SHARED(char, shared);
  const TileShape& s = p.s;
  Pixel<T>* dy_tile = reinterpret_cast<Pixel<T>*>(shared);
  Pixel<T>* x_tile = reinterpret_cast<Pixel<T>*>(shared + p.dy_bytes);
  const int tasks = s.lanes * p.block_rows * p.taps_w;
  const int split = int(threadIdx.x) / tasks, task = int(threadIdx.x) - split * tasks;
  const int lane = task % s.lanes, rest = task / s.lanes;
  const int first_tap = rest % p.taps_w * p.chunk, row_in_block = rest / p.taps_w;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    Divided d = divide(block, s.chunks);
    const int channel = int(d.remainder) * s.lanes * kChannels;
    d = divide(d.quotient, p.row_blocks);
    const int first_kh = int(d.remainder) * p.block_rows;
    const int kh = first_kh + row_in_block;  // of the part
    d = divide(d.quotient, p.tap_parts);
    const int tap_part = int(d.remainder), second_h = tap_part / s.w.tap_step;
    const int second_w = tap_part - second_h * s.w.tap_step;
    const int64_t part = d.quotient;
    const bool active = split < p.splits && kh * s.h.tap_step + second_h < s.h.side;
    // The first block of kernel rows sums the bias.
    const bool sums_dy = first_kh == 0 && first_tap == 0 && tap_part == 0;
    float acc[kHeld][kChannels] = {}, bias[kChannels] = {};
    const int64_t first = part * p.tiles_per_part, last = min(first + p.tiles_per_part, s.tiles);
    for (int64_t index = first; index < last; ++index) {
      const Tile t = tile_at(s, index);
      const Lattice dy_h = lattice_of(s.h.out, t.residue_h, s.h.y_step);
      const Lattice dy_w = lattice_of(s.w.out, t.residue_w, s.w.y_step);
      Part h, w;  // there is one for every pixel: only an input gradient's may be between those of x
      part_at(s.h, t.residue_h, second_h, &h);
      part_at(s.w, t.residue_w, second_w, &w);
      const Window dy_window = window_of(dy_h, dy_w, t.row, t.row + tile_height(s), t.column, tile_width(s));
      const int x_top = t.row + first_kh + h.shift;
      const Window x_window = window_of(h.x, w.x, x_top, x_top + tile_height(s) + p.block_rows - 1,
                                        t.column + w.shift, s.columns);
      __syncthreads();  // the tile before no longer uses this memory
      stage(p.dy, p.dy_access, p.dy_walk, s, t, dy_window, channel, p.dy_plane, dy_tile);
      stage(p.x, p.x_access, p.x_walk, s, t, x_window, channel, s.plane, x_tile);
      __syncthreads();
      if (!active) continue;
#pragma unroll 1
      for (int row = split; row < dy_window.rows; row += p.splits) {
        const Pixel<T>* dy_row = dy_tile + lane * p.dy_plane + row * tile_width(s);
        if (sums_dy) {  // each kernel row sums its share of the columns, so that no thread waits for another
          for (int q = row_in_block; q < tile_width(s); q += p.block_rows) add(dy_row[q].element, bias);
        }
        const int x_row = t.row + row + kh + h.shift - x_window.row;
        if (x_row < 0 || x_row >= x_window.rows) continue;
        const Pixel<T>* x_at = x_tile + lane * s.plane + x_row * s.columns + first_tap;
        const int column = x_window.column + first_tap, lattice_columns = w.x.count;
        if constexpr (kHeld == kTaps) {
          add_row<T, kTaps>(p, dy_row, x_at, column, lattice_columns, acc);
        } else {
          if (p.chunk == 3) add_row<T, 3>(p, dy_row, x_at, column, lattice_columns, acc);
          if (p.chunk == 5) add_row<T, 5>(p, dy_row, x_at, column, lattice_columns, acc);
          if (p.chunk == 6) add_row<T, 6>(p, dy_row, x_at, column, lattice_columns, acc);
        }
      }
    }
    // One thread of every tap adds the sums of the tap's other threads, in their order; one thread of every
    // lane adds all sums for the bias.
    constexpr int kValues = (kHeld + 1) * kChannels;
    float* sums = reinterpret_cast<float*>(shared);
    __syncthreads();  // the last tile no longer uses this memory
    if (active) {
      float* own = sums + threadIdx.x * kValues;
#pragma unroll
      for (int tap = 0; tap < kHeld; ++tap) store(acc[tap], own + tap * kChannels);
      store(bias, own + kHeld * kChannels);
    }
    __syncthreads();
    if (!active || split > 0) continue;
#pragma unroll 1
    for (int other = 1; other < p.splits; ++other) {
      const float* theirs = sums + (other * tasks + task) * kValues;
#pragma unroll
      for (int tap = 0; tap < kHeld; ++tap) add(theirs + tap * kChannels, acc[tap]);
    }
    const bool writes_bias = sums_dy && row_in_block == 0;
    if (writes_bias) {
#pragma unroll 1
      for (int other = 1; other < p.splits * p.block_rows; ++other) {
        const int theirs = other / p.block_rows * tasks + (other % p.block_rows * p.taps_w) * s.lanes + lane;
        add(sums + theirs * kValues + kHeld * kChannels, bias);
      }
    }
    float* out = p.partials + part * (s.h.side * s.w.side + 1) * int64_t(s.c);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int c = channel + lane * kChannels + i;
      if (c >= s.c) break;
#pragma unroll
      for (int tap = 0; tap < kHeld; ++tap) {
        const int kw = (first_tap + tap) * s.w.tap_step + second_w;
        const int row = kh * s.h.tap_step + second_h;
        if (kw < s.w.side && tap < p.chunk) out[int64_t(row * s.w.side + kw) * s.c + c] = acc[tap][i];
      }
      if (writes_bias) out[int64_t(s.h.side * s.w.side) * s.c + c] = bias[i];
    }
  }
}

struct DwconvFinishParams {
  const float* partials;
  Image dw;
  void* db;
  DType db_dtype;
  int64_t parts, blocks;
  int c, side_h, side_w;
};

// dw and db as sums over the parts; one thread for every tap of every channel.
__global__ void __launch_bounds__(kFinishThreads) dwconv_weight_finish_kernel(const DwconvFinishParams p) {
  const int64_t length = int64_t(p.side_h * p.side_w + 1) * p.c;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t index = block * kFinishThreads + threadIdx.x;
    if (index >= length) continue;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t part = 0; part < p.parts; ++part) sum += p.partials[part * length + index];
    const int tap = int(index / p.c), c = int(index % p.c);
    const int kh = tap / p.side_w, kw = tap % p.side_w;
    if (kh == p.side_h) {
      if (p.db) store(sum, p.db, p.db_dtype, c);
    } else if (p.dw.data) {
      store(sum, p.dw.data, p.dw.dtype, c * p.dw.stride_n + kh * p.dw.stride_h + kw * p.dw.stride_w);
    }
  }
}

namespace {

constexpr int64_t kMostParts = 352;  // with more, adding them costs more than more blocks gain

struct Plan {
  DwconvWeightParams params;
  int threads = 0;
  int64_t shared_bytes = 0;
};

// Taps of a thread: a kernel row of up to 7; longer rows in equal chunks of up to 7.
int chunk_of(int side) {
  if (side <= 3) return 3;
  const int chunks = int(ceil_div(side, kTaps));
  return max(5, int(ceil_div(side, chunks)));
}

Plan plan_of(const DeviceInfo& device, DType dtype, const Convolution& of) {
  Plan best;
  const int64_t size = element_size(dtype);
  const TileAxis one_h = tile_axis(of.h, 1), one_w = tile_axis(of.w, 1);
  const int lattice_h = lattice_of(one_h.out, 0, one_h.y_step).count;
  const int lattice_w = lattice_of(one_w.out, 0, one_w.y_step).count;
  const int chunk = chunk_of(one_w.taps);
  double least = 0;
  for (const int64_t limit : {device.shared_bytes / 3, device.shared_bytes}) {
    for (int lanes = 8; lanes >= 2; lanes /= 2) {
      if (lanes < 8 && best.threads && lanes * kChannels < of.c) break;
      for (int groups = 1; groups <= 4 && (groups - 1) * kColumns < lattice_w; ++groups) {
        for (int pairs = 1; pairs <= 8 && (pairs - 1) * kRows < lattice_h; ++pairs) {
          Plan plan;
          DwconvWeightParams& p = plan.params;
          p = {};
          p.s = tile_shape(of, lanes, groups, pairs, size);
          p.chunk = chunk;
          p.tap_parts = p.s.h.tap_step * p.s.w.tap_step;
          p.taps_w = int(ceil_div(p.s.w.taps, chunk));
          p.block_rows = min(p.s.h.taps, max(1, kWeightThreads / (lanes * p.taps_w)));
          p.row_blocks = int(ceil_div(p.s.h.taps, p.block_rows));
          p.block_rows = int(ceil_div(p.s.h.taps, p.row_blocks));
          const int tasks = lanes * p.block_rows * p.taps_w;
          p.splits = min(kWeightThreads / tasks, tile_height(p.s));
          plan.threads = int(ceil_div(tasks * p.splits, kWarpSize)) * kWarpSize;
          // Only the rows that these kernel rows need, and columns for whole chunks.
          p.s.rows = min(tile_height(p.s) + p.block_rows - 1, lattice_of(p.s.h.in, 0, p.s.h.x_step).count);
          // Odd, so that neighbouring kernel rows read different banks.
          p.s.columns = (tile_width(p.s) + p.taps_w * chunk - 1) | 1;
          p.s.plane = plane_of(p.s.rows * p.s.columns, lanes, size);
          p.dy_plane = plane_of(tile_height(p.s) * tile_width(p.s), lanes, size);
          p.dy_bytes = ceil_div(lanes * p.dy_plane * kChannels * size, 16) * 16;
          const int64_t values = ((chunk == kTaps ? kTaps : kFewerTaps) + 1) * kChannels;
          const int64_t sums = int64_t(p.splits) * tasks * values * int64_t(sizeof(float));
          plan.shared_bytes = max(p.dy_bytes + lanes * p.s.plane * kChannels * size, sums);
          if (plan.threads > kWeightThreads || plan.shared_bytes > limit) break;
          // Enough blocks to fill the GPU twice, if there are
          // as many tiles and the sum over parts stays short.
          const int64_t wanted =
              ceil_div(2 * device.multiprocessors, int64_t(p.s.chunks) * p.row_blocks * p.tap_parts);
          p.parts = min(min(p.s.tiles, max(wanted, int64_t{1})), int64_t{kMostParts});
          p.tiles_per_part = ceil_div(p.s.tiles, p.parts);
          p.parts = ceil_div(p.s.tiles, p.tiles_per_part);
          p.blocks = p.parts * p.s.chunks * p.row_blocks * p.tap_parts;
          const double loads = double(p.s.rows * p.s.columns + tile_height(p.s) * tile_width(p.s)) * lanes *
                               kChannels * double(size) / 16;
          const double rows = std::ceil(double(tile_height(p.s)) / p.splits);
          const double work =
              rows * groups * (kColumns * chunk * kChannels + 100) + loads * 28 / plan.threads + 150;
          const double waves = max(1.0, double(p.blocks) / (2.0 * device.multiprocessors));
          const double cycles = double(p.tiles_per_part) * work * waves * plan.threads;
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
    refuse("dwconv_weight_kernel", shape_of(of), "no tile fits into the GPU's shared memory");
  }
  return best;
}

template <class T>
void run(const Context& context, const Launch& what, const DwconvWeightParams& params) {
  if (params.chunk == kTaps) return launch(context, what, dwconv_weight_kernel<T, kTaps>, params);
  launch(context, what, dwconv_weight_kernel<T, kFewerTaps>, params);
}

}  // namespace

int64_t dwconv_weight_parts(int device, DType dtype, const Convolution& of) {
  return plan_of(device_info(device), dtype, of).params.parts;
}

void dwconv_weight_gradient(const Context& context, const DwconvWeightArgs& a) {
  Plan plan = plan_of(device_info(context.device), a.x.dtype, a.of);
  DwconvWeightParams& p = plan.params;
  p.dy = a.dy;
  p.x = a.x;
  p.dy_access = access_of(a.dy, a.of.c);
  p.x_access = access_of(a.x, a.of.c);
  const TileShape& s = p.s;
  p.dy_walk = walk_of(a.dy, s, s.h.y_step, s.w.y_step, tile_width(s), plan.threads);
  p.x_walk = walk_of(a.x, s, s.h.x_step, s.w.x_step, s.columns, plan.threads);
  p.partials = a.partials;
  const Shape shape = shape_of(a.of);
  const Launch what{"dwconv_weight_kernel", p.blocks, plan.threads, plan.shared_bytes, shape};
  with_element(a.x.dtype, [&](auto element) { run<typename decltype(element)::Type>(context, what, p); });
  const int64_t length = (int64_t(a.of.h.taps) * a.of.w.taps + 1) * a.of.c;
  const DwconvFinishParams finish{a.partials,  a.dw,        a.db,
                                  a.db_dtype,  p.parts,     ceil_div(length, kFinishThreads),
                                  int(a.of.c), a.of.h.taps, a.of.w.taps};
  launch(context, {"dwconv_weight_finish_kernel", finish.blocks, kFinishThreads, 0, shape},
         dwconv_weight_finish_kernel, finish);
}

}  // namespace cnk::cuda
