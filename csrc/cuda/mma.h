// Matrix products of a warp on the tensor cores, and asynchronous copies from global to shared memory. Each
// is an instruction on the GPU, and code with the same result on the host.
//
// Lane 4g + t of a warp holds, of the operands of D += A B with A 16 x 16, B 16 x 8, D 16 x 8:
//   A   a[0] (g, 2t..)   a[1] (g + 8, 2t..)   a[2] (g, 2t + 8..)   a[3] (g + 8, 2t + 8..)
//   B   b0 (2t.., g)     b1 (2t + 8.., g)
//   D   d[0], d[1] (g, 2t..)    d[2], d[3] (g + 8, 2t..)
// A register of A or B has two elements, those of columns (rows) 2t and 2t + 1.
#pragma once

#include <type_traits>

#include "cuda/element.h"

namespace cnk::cuda {

#ifdef CNK_CUDA_HOST
// One lane's operands of a product, and then its results.
struct MmaOperands {
  uint32_t a[4], b[2];
  float d[4];
};

// The product of a warp from the operands of its lanes, in place.
template <class T>
void mma_on_host(unsigned char* all) {
  float a[16][16], b[16][8], d[16][8];
  MmaOperands held;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    std::memcpy(&held, all + host::kExchangeBytes * lane, sizeof held);
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      widen_pair(held.a[i], to[0], to[1], T{});
      d[g + i / 2 * 8][2 * t + i % 2] = held.d[i];
    }
    for (int i = 0; i < 2; ++i) widen_pair(held.b[i], b[2 * t + i * 8][g], b[2 * t + i * 8 + 1][g], T{});
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const float results[4] = {d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
    std::memcpy(all + host::kExchangeBytes * lane + offsetof(MmaOperands, d), results, sizeof results);
  }
}
#endif

// d += a b for operands of type T and fp32 sums. Turing multiplies 8 columns of A at a time and has no bf16:
// its launchers must not choose this kernel for bf16.
template <class T>
__device__ __forceinline__ void mma(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&d)[4]) {
#ifdef CNK_CUDA_HOST
  const MmaOperands own{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const auto all = host::exchange(&own, sizeof own, mma_on_host<T>);
  const auto result = host::from_lane<MmaOperands>(all, int(threadIdx.x % 32));
  std::copy(result.d, result.d + 4, d);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
  }
#endif
}

// Copies 16 bytes from global to shared memory, or zeros; both addresses are multiples of 16. The thread may
// read them after copies_wait(), other threads after a barrier that follows it. Without cp.async (Turing)
// they pass through registers.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool inside) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global), "r"(inside ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = inside ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}

__device__ __forceinline__ void copies_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

}  // namespace cnk::cuda
