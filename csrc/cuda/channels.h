// Neighbouring channels of one pixel: 16 bytes at once if the tensor's layout allows it, else one by one.
#pragma once

#include "cuda/element.h"
#include "cuda/runtime.h"
#include "cuda/tensors.h"

namespace cnk::cuda {

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<Float16> = DType::kFloat16;

// 16 bytes of channels, in their own dtype: 16-bit channels then take half the registers.
template <class T>
struct Channels {
  static constexpr int kCount = 16 / int(sizeof(T));
  uint32_t word[4];
};

__device__ __forceinline__ void widen(const Channels<float>& from, float (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = bits_float(from.word[i]);
}
template <class T>
__device__ __forceinline__ void widen(const Channels<T>& from, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) widen_pair(from.word[i / 2], to[i], to[i + 1], T{});
}
__device__ __forceinline__ void narrow(const float (&from)[4], Channels<float>& to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to.word[i] = float_bits(from[i]);
}
template <class T>
__device__ __forceinline__ void narrow(const float (&from)[8], Channels<T>& to) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) to.word[i / 2] = narrow_pair(from[i], from[i + 1], T{});
}

// The same channels, as new values for the compiler. Otherwise it keeps the values that one pass has widened
// for the next pass, which takes twice the registers.
template <class T>
__device__ __forceinline__ Channels<T> again(Channels<T> channels) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (uint32_t& word : channels.word) asm volatile("" : "+r"(word));
#endif
  return channels;
}

__device__ __forceinline__ void set(Channels<float>& to, int i, float value) {
  to.word[i] = float_bits(value);
}
template <class T>
__device__ __forceinline__ void set(Channels<T>& to, int i, T value) {
  to.word[i / 2] |= uint32_t(value.bits) << (i % 2 * 16);
}

// `left` channels from `from` on, zeros after them. `packed`: 16 bytes can be loaded at once (see below).
template <class T>
__device__ __forceinline__ Channels<T> load_channels(const T* from, int64_t stride, int left, bool packed) {
  Channels<T> to{};
  if (left <= 0) return to;
  if (packed) {
    const Words<4> words = *reinterpret_cast<const Words<4>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to.word[i] = words.word[i];
  } else {
#pragma unroll
    for (int i = 0; i < Channels<T>::kCount; ++i) {
      if (i < left) set(to, i, *from);
      from += stride;
    }
  }
  return to;
}

// As fp32, from a tensor of type T. V may differ from the number of elements in 16 bytes.
template <class T, int V>
__device__ __forceinline__ void load_values(const T* from, int64_t stride, int left, bool packed,
                                            float (&to)[V]) {
  if (packed && left > 0) {
    constexpr int kAtOnce = V < 16 / int(sizeof(T)) ? V : 16 / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < V; i += kAtOnce) {
      float part[kAtOnce];
      load(from + i, part);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) to[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      to[i] = i < left ? widen(*from) : 0.0f;
      from += stride;
    }
  }
}
template <class T, int V>
__device__ __forceinline__ void store_values(const float (&from)[V], T* to, int64_t stride, int left,
                                             bool packed) {
  if (packed && left > 0) {
    constexpr int kAtOnce = V < 16 / int(sizeof(T)) ? V : 16 / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < V; i += kAtOnce) {
      float part[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) part[j] = from[i + j];
      store(part, to + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < left) narrow(from[i], *to);
      to += stride;
    }
  }
}

// The same for a dtype that is known only at run time. Both 16-bit types share the code that moves bits, and
// all types share the code for single elements.
template <int V>
__device__ __forceinline__ void load_values(const void* data, DType dtype, int64_t at, int64_t stride,
                                            int left, bool packed, float (&to)[V]) {
  if (!packed || left <= 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      to[i] = i < left ? load(data, dtype, at) : 0.0f;
      at += stride;
    }
  } else if (dtype == DType::kFloat32) {
    load_values(static_cast<const float*>(data) + at, 1, V, true, to);
  } else {
    const auto words = *reinterpret_cast<const Words<V / 2>*>(static_cast<const uint16_t*>(data) + at);
    if (dtype == DType::kBFloat16) {
#pragma unroll
      for (int i = 0; i < V; i += 2) widen_pair(words.word[i / 2], to[i], to[i + 1], BFloat16{});
    } else {
#pragma unroll
      for (int i = 0; i < V; i += 2) widen_pair(words.word[i / 2], to[i], to[i + 1], Float16{});
    }
  }
}
template <int V>
__device__ __forceinline__ void store_values(const float (&from)[V], void* data, DType dtype, int64_t at,
                                             int64_t stride, int left, bool packed) {
  if (!packed || left <= 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < left) store(from[i], data, dtype, at);
      at += stride;
    }
  } else if (dtype == DType::kFloat32) {
    store_values(from, static_cast<float*>(data) + at, 1, V, true);
  } else {
    Words<V / 2> words;
    if (dtype == DType::kBFloat16) {
#pragma unroll
      for (int i = 0; i < V; i += 2) words.word[i / 2] = narrow_pair(from[i], from[i + 1], BFloat16{});
    } else {
#pragma unroll
      for (int i = 0; i < V; i += 2) words.word[i / 2] = narrow_pair(from[i], from[i + 1], Float16{});
    }
    *reinterpret_cast<Words<V / 2>*>(static_cast<uint16_t*>(data) + at) = words;
  }
}

// The offset of a pixel, given as its sample and its place in the sample.
__device__ __forceinline__ int64_t offset(const Rows& rows, const Divided& pixel) {
  return pixel.quotient * rows.stride_n + pixel.remainder * rows.stride_p;
}

// From a tensor of any dtype, rounded to T.
template <class T>
__device__ __forceinline__ Channels<T> load_channels(const void* data, DType dtype, int64_t at,
                                                     int64_t stride, int left, bool packed) {
  if (dtype == kDType<T> && packed) {
    return load_channels(static_cast<const T*>(data) + at, stride, left, true);
  }
  float values[Channels<T>::kCount];
  load_values(data, dtype, at, stride, left, packed, values);
  Channels<T> to;
  narrow(values, to);
  return to;
}
template <class T>
__device__ __forceinline__ void store_channels(const Channels<T>& from, void* data, DType dtype, int64_t at,
                                               int64_t stride, int left, bool packed) {
  if (dtype == kDType<T> && packed) {
    if (left <= 0) return;
    Words<4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.word[i] = from.word[i];
    *reinterpret_cast<Words<4>*>(static_cast<T*>(data) + at) = words;
  } else {
    float values[Channels<T>::kCount];
    widen(from, values);
    store_values(values, data, dtype, at, stride, left, packed);
  }
}
// Whether `count` channels at multiples of `count` can be loaded and stored in packs of up to 16 bytes.
inline bool is_packed(const void* data, DType dtype, int64_t count) {
  return reinterpret_cast<uintptr_t>(data) % uintptr_t(min(int64_t{16}, count * element_size(dtype))) == 0;
}
inline bool is_packed(const Rows& r, int64_t channels, int64_t count) {
  const int64_t bytes = min(int64_t{16}, count * element_size(r.dtype));
  return r.stride_c == 1 && channels % count == 0 && r.stride_n * element_size(r.dtype) % bytes == 0 &&
         r.stride_p * element_size(r.dtype) % bytes == 0 && is_packed(r.data, r.dtype, count);
}

// Whether neighbouring pixels, and not neighbouring channels, are neighbours in memory.
inline bool along_pixels(const Rows& r, int64_t pixels) {
  return r.stride_p == 1 && r.stride_c != 1 && pixels > 1;
}

}  // namespace cnk::cuda
