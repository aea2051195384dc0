// Elements of tensors in kernels: loads that widen to fp32, stores that round to nearest even, both in one
// instruction where the GPU has it.
#pragma once

#include "common/dtype.h"
#include "cuda/runtime.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) { return to_float(value); }
__device__ __forceinline__ float widen(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return to_float(value);
#endif
}

__device__ __forceinline__ void narrow(float value, float& out) { out = value; }
__device__ __forceinline__ void narrow(float value, BFloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  from_float(value, out);
#endif
}
__device__ __forceinline__ void narrow(float value, Float16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  from_float(value, out);
#endif
}

// Rounded to T and back: what eager's intermediate tensors do to a value.
template <class T>
__device__ __forceinline__ float rounded(float value) {
  T out;
  narrow(value, out);
  return widen(out);
}

// V elements that are loaded and stored at once; the address must be a multiple of their bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T element[V];
};

template <class T, int V>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = widen(pack.element[i]);
}

template <class T, int V>
__device__ __forceinline__ void store(const float (&from)[V], T* to) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) narrow(from[i], pack.element[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// One element of a tensor whose dtype is known when the kernel runs: parameters, whose loads stand outside
// the loops.
__device__ __forceinline__ float load(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  if (dtype == DType::kBFloat16) return widen(static_cast<const BFloat16*>(data)[index]);
  return widen(static_cast<const Float16*>(data)[index]);
}
__device__ __forceinline__ float load(const Vector& vector, int64_t index, float missing) {
  return vector.data ? load(vector.data, vector.dtype, index) : missing;
}
__device__ __forceinline__ void store(float value, void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else if (dtype == DType::kBFloat16) {
    narrow(value, static_cast<BFloat16*>(data)[index]);
  } else {
    narrow(value, static_cast<Float16*>(data)[index]);
  }
}

// Quotient and remainder of numbers that are not negative; 64-bit division is a subroutine of some hundred
// instructions, and sizes beyond 32 bits are rare.
struct Divided {
  int64_t quotient, remainder;
};
__device__ __forceinline__ Divided divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t q = uint32_t(a) / uint32_t(b);
    return {int64_t(q), int64_t(uint32_t(a) - q * uint32_t(b))};
  }
  return {a / b, a % b};
}

// Sum over the warp, in every lane and always in the same order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
  return value;
}

template <class T>
struct Element {
  using Type = T;
};

// Call `f(Element<T>{})` with the type of a dtype.
template <class F>
auto with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(Element<BFloat16>{});
    case DType::kFloat16:
      return f(Element<Float16>{});
    default:
      return f(Element<float>{});
  }
}

}  // namespace cnk::cuda
