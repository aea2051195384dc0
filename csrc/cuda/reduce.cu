// A block sums the parts of one group for some columns. Its threads are divided among the columns, four
// columns each, if there are enough columns; the other threads share the parts.
#include "cuda/channels.h"
#include "cuda/launch.h"
#include "cuda/reduce.h"

namespace cnk::cuda {

constexpr int kSumThreads = 256;
constexpr int kSumColumns = 4;  // of a thread
constexpr int kSumMostWalkers = 32;

struct SumPartialsParams {
  SumPartialsArgs a;
  int64_t rows;    // of a group
  int64_t slices;  // of columns
  int64_t blocks;
  int walkers;  // number of threads that share the parts of the same columns
  bool packed;
};

__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const SumPartialsParams p) {
  CNK_SHARED(float, shared);  // (walkers, width)
  const int threads_across = kSumThreads / p.walkers, width = threads_across * kSumColumns;
  const int across = int(threadIdx.x) % threads_across, walker = int(threadIdx.x) / threads_across;
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const Divided at = divide(block, p.slices);
    const int64_t group = at.quotient, column = at.remainder * width + across * kSumColumns;
    const int left = int(min(int64_t(kSumColumns), p.a.length - column));
    const int64_t end = min((group + 1) * p.rows, p.a.parts);
    float sums[kSumColumns] = {};
#pragma unroll 4
    for (int64_t row = group * p.rows + walker; row < end; row += p.walkers) {
      float values[kSumColumns];
      load_values(p.a.partials + row * p.a.length + column, 1, left, p.packed, values);
#pragma unroll
      for (int i = 0; i < kSumColumns; ++i) sums[i] += left > 0 ? values[i] : 0.0f;
    }
    if (p.walkers == 1) {
      store_values(sums, p.a.out, p.a.dtype, group * p.a.length + column, 1, left, p.packed);
      continue;
    }
    store(sums, shared + walker * width + across * kSumColumns);
    __syncthreads();
    for (int i = int(threadIdx.x); i < width; i += kSumThreads) {
      const int64_t c = at.remainder * width + i;
      if (c >= p.a.length) break;
      float sum = 0.0f;
      for (int w = 0; w < p.walkers; ++w) sum += shared[w * width + i];
      store(sum, p.a.out, p.a.dtype, group * p.a.length + c);
    }
    __syncthreads();
  }
}

const void* any_kernel() { return reinterpret_cast<const void*>(sum_partials_kernel); }

void sum_partials(const Context& context, const SumPartialsArgs& args) {
  const int64_t rows = (args.parts + args.groups - 1) / args.groups;
  // Enough threads to fill the GPU: first divided among the
  // columns, then among the parts; at least 8 parts each.
  const int64_t wanted = int64_t(device_info(context.device).multiprocessors) * 4 * kSumThreads;
  const int64_t across = (args.length + kSumColumns - 1) / kSumColumns * args.groups;
  int walkers = 1;
  while (walkers < kSumMostWalkers && across * walkers < wanted && rows >= 8 * 2 * walkers) walkers *= 2;
  const int64_t width = kSumThreads / walkers * kSumColumns;
  const int64_t slices = (args.length + width - 1) / width;
  const bool packed = args.length % kSumColumns == 0 &&
                      is_packed(args.partials, DType::kFloat32, kSumColumns) &&
                      is_packed(args.out, args.dtype, kSumColumns);
  const int64_t shared = walkers > 1 ? walkers * width * int64_t(sizeof(float)) : 0;
  launch(
      context,
      {"sum_partials_kernel", slices * args.groups, kSumThreads, shared, {"PL", {args.parts, args.length}}},
      sum_partials_kernel, SumPartialsParams{args, rows, slices, slices * args.groups, walkers, packed});
}

}  // namespace cnk::cuda
