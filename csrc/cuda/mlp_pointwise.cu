#include "cuda/element.h"
#include "cuda/gelu.h"
#include "cuda/launch.h"
#include "cuda/mlp_pointwise.h"

namespace cnk::cuda {
namespace {
constexpr int kThreads = 256;
constexpr int kPackBytes = 16;
}  // namespace

struct GeluParams {
  const void* u;
  void* h;
  int64_t count, blocks;
};

// A thread: 16 bytes; the last one what is left.
template <class T>
__global__ void __launch_bounds__(kThreads) gelu_kernel(const GeluParams p) {
  constexpr int kPack = kPackBytes / int(sizeof(T));
  const T* u = static_cast<const T*>(p.u);
  T* h = static_cast<T*>(p.h);
  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t first = (block * kThreads + threadIdx.x) * kPack;
    if (first + kPack <= p.count) {
      float value[kPack];
      load(u + first, value);
#pragma unroll
      for (float& v : value) v = gelu(v);
      store(value, h + first);
    } else {
      for (int64_t i = first; i < p.count; ++i) narrow(gelu(widen(u[i])), h[i]);
    }
  }
}

void gelu(const Context& context, const GeluArgs& args) {
  with_element(args.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    const int64_t per_block = kThreads * kPackBytes / int64_t(sizeof(T));
    const int64_t blocks = (args.count + per_block - 1) / per_block;
    launch(context, {"gelu_kernel", blocks, kThreads, 0, {"n", {args.count}}}, gelu_kernel<T>,
           GeluParams{args.u, args.h, args.count, blocks});
  });
}

}  // namespace cnk::cuda
