// Element types that Python and the kernels exchange, and their scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined: sources for different instruction sets include this file, and the linker would merge their
// out-of-line copies into one.
#ifdef __CUDACC__
#define CNK_INLINE __host__ __device__ __forceinline__
#else
#define CNK_INLINE inline __attribute__((always_inline))
#endif
// The same for a lambda; stands after its parameters. When the compiler does not inline a lambda, the
// variables that it captures by reference move from registers to memory.
#define CNK_INLINE_LAMBDA __attribute__((always_inline))

namespace cnk {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

CNK_INLINE int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

CNK_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
CNK_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

CNK_INLINE float to_float(float value) { return value; }
CNK_INLINE float to_float(BFloat16 value) { return bits_float(uint32_t{value.bits} << 16); }
CNK_INLINE float to_float(Float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude << 13));  // Inf, NaN
  // Scaling by 2^112 rebuilds the exponent bias and normalises subnormals, exactly.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * bits_float(0x77800000u)));
}

CNK_INLINE void from_float(float value, float& out) { out = value; }
CNK_INLINE void from_float(float value, BFloat16& out) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = uint16_t((bits >> 16) | 0x40u);  // quiet NaN
  } else {
    out.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
  }
}
CNK_INLINE void from_float(float value, Float16& out) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out.bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    out.bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    out.bits = uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  } else {
    out.bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
}

}  // namespace cnk
