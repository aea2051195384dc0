// Elements of tensors in kernels: loads that widen to fp32 and stores that round to nearest even, each with
// one instruction if the GPU has it.
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

// Rounded to T and widened again, as eager rounds its intermediate tensors.
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
// The same as 32-bit words, the size of a register: with 16-bit elements a pack costs twice the instructions.
template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

// Two 16-bit elements, the first in the lower half.
__device__ __forceinline__ void widen_pair(uint32_t word, float& first, float& second, BFloat16) {
#ifdef __CUDA_ARCH__
  asm("shl.b32 %0, %1, 16;" : "=f"(first) : "r"(word));  // into a float register: no move
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(second) : "r"(word));
#else
  first = bits_float(word << 16);
  second = bits_float(word & 0xffff0000u);
#endif
}
__device__ __forceinline__ void widen_pair(uint32_t word, float& first, float& second, Float16) {
  first = widen(Float16{uint16_t(word)});
  second = widen(Float16{uint16_t(word >> 16)});
}
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float first, float second, T) {
  T low, high;
  narrow(first, low);
  narrow(second, high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}
__device__ __forceinline__ uint32_t narrow_pair(float first, float second, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return narrow_pair<BFloat16>(first, second, BFloat16{});
#endif
}
__device__ __forceinline__ uint32_t narrow_pair(float first, float second, Float16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return narrow_pair<Float16>(first, second, Float16{});
#endif
}

template <int V>
__device__ __forceinline__ void load(const float* from, float (&to)[V]) {
  const Pack<float, V> pack = *reinterpret_cast<const Pack<float, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = pack.element[i];
}
template <class T, int V>
__device__ __forceinline__ void load(const T* from, float (&to)[V]) {
  const Words<V / 2> words = *reinterpret_cast<const Words<V / 2>*>(from);
#pragma unroll
  for (int i = 0; i < V; i += 2) widen_pair(words.word[i / 2], to[i], to[i + 1], T{});
}

template <int V>
__device__ __forceinline__ void store(const float (&from)[V], float* to) {
  Pack<float, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.element[i] = from[i];
  *reinterpret_cast<Pack<float, V>*>(to) = pack;
}
template <class T, int V>
__device__ __forceinline__ void store(const float (&from)[V], T* to) {
  Words<V / 2> words;
#pragma unroll
  for (int i = 0; i < V; i += 2) words.word[i / 2] = narrow_pair(from[i], from[i + 1], T{});
  *reinterpret_cast<Words<V / 2>*>(to) = words;
}

// One element of a tensor whose dtype is known only at run
// time: for parameters, which are loaded outside of the loops.
__device__ __forceinline__ float load(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
}
__device__ __forceinline__ float load(const Vector& vector, int64_t index, float missing) {
  return vector.data ? load(vector.data, vector.dtype, index) : missing;
}
__device__ __forceinline__ void store(float value, void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    BFloat16 bf16;
    Float16 fp16;
    narrow(value, bf16);
    narrow(value, fp16);
    static_cast<uint16_t*>(data)[index] = dtype == DType::kBFloat16 ? bf16.bits : fp16.bits;
  }
}

// Quotient and remainder of numbers that are not negative. Numbers of 32 bits are divided as such: 64-bit
// division is a subroutine of some hundred instructions, and larger numbers are rare.
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
