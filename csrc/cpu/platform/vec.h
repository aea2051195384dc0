// One SIMD register of floats for the instruction set of this compilation, on the compiler's vector types.
//
// Only included by sources that are compiled once per instruction set, inside namespace cnk::cpu::CNK_ISA.
// These sources must not instantiate functions of the standard library: the linker would merge a template
// that is compiled for AVX-512 with the portable copy, and an older CPU would crash.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/dtype.h"
#include "cpu/ops.h"

namespace cnk::cpu::CNK_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef float VecLoose __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

CNK_INLINE Vec splat(float value) { return value - Vec{}; }  // 0 + value needs an addition, because of -0
CNK_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecLoose*>(p); }
CNK_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecLoose*>(p) = v; }
// One aligned cache line, past the caches where the instruction set can: the processor need not read it first.
// `streamed` makes such stores visible before any later one.
CNK_INLINE void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, _mm512_load_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i)
    _mm256_stream_si256((__m256i*)to + i, _mm256_load_si256((const __m256i*)from + i));
#else
  std::memcpy(to, from, 64);
#endif
}
CNK_INLINE void stream_line(void* to, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(to), (__m512)v);
#else
  store(static_cast<float*>(to), v);
#endif
}
CNK_INLINE void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// Loaded once for all its uses: if they are few, g++ would load once per use.
CNK_INLINE Vec in_register(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
// If either is NaN the result is b. Pass the bound first and the data second, so that NaN stays NaN.
// (That is what the instructions of x86 do; g++ makes a comparison and a selection of the conditional.)
#if defined(__AVX512F__)
CNK_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
CNK_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
CNK_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
CNK_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
CNK_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
CNK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif
CNK_INLINE Vec abs(Vec v) { return (Vec)((VecI)v & 0x7fffffff); }

// a * b + c, with one rounding if the instruction set has the instruction. Always explicit: the build forbids
// the compiler to fuse, because whether it does depends on the surrounding code, and the bits of a sum must
// not depend on which of several loops computes it.
CNK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
CNK_INLINE Vec multiply_add(Vec a, Vec b, float c) { return multiply_add(a, b, splat(c)); }
CNK_INLINE Vec multiply_add(Vec a, float b, float c) { return multiply_add(a, splat(b), splat(c)); }

CNK_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

CNK_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// --- 16-bit floats: loads to a register and stores of kLanes of them. ---

#if defined(__AVX512F__)
CNK_INLINE Vec widen_bf16(__m256i v) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16); }
CNK_INLINE __m256i narrow_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
  __m512i bits = (__m512i)v;
#if defined(CNK_EMULATE_BF16)  // the instruction takes subnormal numbers as zero
  const __mmask16 normal = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  bits = _mm512_mask_and_epi32(bits, ~normal, bits, _mm512_set1_epi32(int(0x80000000u)));
#endif
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
#if defined(CNK_HAS_BF16)
// 32 floats rounded to bf16, in order.
CNK_INLINE Vec pairs_bf16(Vec low, Vec high) {
#if defined(CNK_EMULATE_BF16)
  const __m512i words = _mm512_castsi256_si512(narrow_bf16(low));
  return (Vec)_mm512_inserti64x4(words, narrow_bf16(high), 1);
#else
  return (Vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
}
// sum + the products of both bf16 of each word. The instruction takes subnormals as zero.
CNK_INLINE Vec dot_bf16(Vec sum, Vec a, Vec b) {
#if defined(CNK_EMULATE_BF16)
  const VecI high = (VecI)splat(bits_float(0xffff0000u));
  sum = multiply_add((Vec)((VecI)a & high), (Vec)((VecI)b & high), sum);
  return multiply_add((Vec)((VecI)a << 16), (Vec)((VecI)b << 16), sum);
#else
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
}
#endif
CNK_INLINE Vec load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
CNK_INLINE void store(BFloat16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(v)); }
CNK_INLINE Vec load(const Float16* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
CNK_INLINE void store(Float16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
CNK_INLINE Vec load(const BFloat16* p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
CNK_INLINE void store(BFloat16* p, Vec v) {
  const __m256i bits = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
CNK_INLINE Vec load(const Float16* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
CNK_INLINE void store(Float16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// The conversions of common/dtype.h, lane by lane. Signed
// words will do: no word that is compared is above 0x7fffffff.
typedef uint16_t Words __attribute__((vector_size(kLanes * 2)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
CNK_INLINE VecI load_words(const void* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return __builtin_convertvector(words, VecI);
}
CNK_INLINE void store_words(void* p, VecI v) {
  const Words words = __builtin_convertvector(v, Words);
  std::memcpy(p, &words, sizeof words);
}
CNK_INLINE Vec load(const BFloat16* p) { return (Vec)(load_words(p) << 16); }
CNK_INLINE void store(BFloat16* p, Vec v) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  vst1_u16(&p->bits, vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)v)));
#else
  // Unsigned: the sum overflows for a NaN, which does not take it.
  const VecU bits = (VecU)v, odd = (bits >> 16) & 1;
  store_words(p, (VecI)((v != v ? bits | 0x400000 : bits + 0x7fff + odd) >> 16));
#endif
}
#if defined(__aarch64__)
CNK_INLINE Vec load(const Float16* p) { return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
CNK_INLINE void store(Float16* p, Vec v) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
#else
CNK_INLINE Vec load(const Float16* p) {
  const VecI bits = load_words(p), magnitude = (bits & 0x7fff) << 13;
  const VecI finite = (VecI)((Vec)magnitude * bits_float(0x77800000u));
  return (Vec)((bits & 0x8000) << 16 | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite));
}
CNK_INLINE void store(Float16* p, Vec v) {
  const VecI magnitude = (VecI)v & 0x7fffffff, rebased = magnitude - 0x38000000;
  const VecI normal = (rebased + 0xfff + (rebased >> 13 & 1)) >> 13;
  const VecI subnormal = (VecI)((Vec)magnitude + 0.5f) - 0x3f000000;
  VecI out = magnitude < 0x38800000 ? subnormal : normal;
  out = magnitude >= 0x477ff000 ? VecI{} + 0x7c00 : out;
  out = magnitude > 0x7f800000 ? VecI{} + 0x7e00 : out;
  store_words(p, out | ((VecI)v >> 16 & 0x8000));
}
#endif
#endif

// --- The first n < kLanes elements; the others read as zero and are not written. ---

template <class T>
CNK_INLINE Vec load_partial(const T* p, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    return (Vec)_mm512_maskz_loadu_ps(mask, p);
  } else {
    T lanes[kLanes];
    _mm256_storeu_si256((__m256i*)lanes, _mm256_maskz_loadu_epi16(mask, p));
    return load(lanes);
  }
#else
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

template <class T>
CNK_INLINE void store_partial(T* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  } else {
    T lanes[kLanes];
    store(lanes, v);
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256((const __m256i*)lanes));
  }
#else
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// The elements from c on of a row of `channels`: a whole register, or what is left of the row.
template <class T>
CNK_INLINE Vec load_channels(const T* row, int64_t c, int64_t channels) {
  return c + kLanes <= channels ? load(row + c) : c < channels ? load_partial(row + c, channels - c) : Vec{};
}
template <class T>
CNK_INLINE void store_channels(T* row, int64_t c, int64_t channels, Vec v) {
  if (c + kLanes <= channels) {
    store(row + c, v);
  } else if (c < channels) {
    store_partial(row + c, v, channels - c);
  }
}

// Two neighbouring registers.
template <class T>
CNK_INLINE void store(T* p, Vec low, Vec high) {
#if defined(CNK_HAS_BF16) && !defined(__aarch64__)
  if constexpr (__is_same(T, BFloat16)) return store(reinterpret_cast<float*>(p), pairs_bf16(low, high));
#endif
  store(p, low);
  store(p + kLanes, high);
}

// Ones in the lanes of register c that hold channels, zeros above.
CNK_INLINE Vec channel_mask(int64_t c, int64_t channels) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = c + i < channels ? 1.0f : 0.0f;
  return load(lanes);
}

// Call f with a value of the C++ type of `dtype`.
template <class F>
CNK_INLINE void with_type(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

// The same for kernels without products; instruction sets with bf16 products compile these for bf16 only.
template <class F>
CNK_INLINE void with_own_type([[maybe_unused]] DType dtype, F&& f) {
#if defined(CNK_HAS_BF16)
  f(BFloat16{});
#else
  with_type(dtype, f);
#endif
}

CNK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CNK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
CNK_INLINE int64_t align64(int64_t bytes) { return round_up(bytes, 64); }
CNK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CNK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// The most bytes(t) of t = 1 to `threads`: workspaces do not grow with the team, which may be smaller than requested.
template <class Bytes>
CNK_INLINE int64_t most_bytes(int threads, const Bytes& bytes) {
  int64_t most = 0;
  for (int t = 1; t <= threads; ++t) most = max64(most, bytes(t));
  return most;
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Stands before a loop with constant bounds: unrolls it completely,
// so that arrays that its counter indexes are in registers.
#if defined(__clang__)
#define CNK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CNK_UNROLL _Pragma("GCC unroll 32")
#endif

// Call f(Int<0>), ..., f(Int<N - 1>): a loop whose index is a constant. A fold expression and not a
// recursion: inlining its N nested functions took half of the compile time of dwconv.cpp.
namespace detail {
template <class F, int... I>
CNK_INLINE void unroll(F& f, std::integer_sequence<int, I...>) {
  (f(Int<I>{}), ...);
}
}  // namespace detail

template <int N, class F>
CNK_INLINE void unroll(F&& f) {
  detail::unroll(f, std::make_integer_sequence<int, N>{});
}

// kChannelAlign floats of a row: what operands of the products are written and read by.
struct Block {
  static constexpr int kVecs = kChannelAlign / kLanes;
  Vec v[kVecs];
  CNK_INLINE Block& operator+=(const Block& b) {
    unroll<kVecs>([&](auto i) CNK_INLINE_LAMBDA { v[i.value] += b.v[i.value]; });
    return *this;
  }
  CNK_INLINE Block& operator*=(const Block& b) {
    unroll<kVecs>([&](auto i) CNK_INLINE_LAMBDA { v[i.value] *= b.v[i.value]; });
    return *this;
  }
  CNK_INLINE void add_product(const Block& a, const Block& b) {
    unroll<kVecs>(
        [&](auto i) CNK_INLINE_LAMBDA { v[i.value] = multiply_add(a.v[i.value], b.v[i.value], v[i.value]); });
  }
};
// read(k): the register that is k floats after the first.
template <class Read>
CNK_INLINE Block block_of(const Read& read) {
  Block b;
  unroll<Block::kVecs>([&](auto i) CNK_INLINE_LAMBDA { b.v[i.value] = read(i.value * kLanes); });
  return b;
}
CNK_INLINE Block load_block(const float* p) {
  return block_of([&](int k) CNK_INLINE_LAMBDA { return load(p + k); });
}
template <class T>
CNK_INLINE Block load_block(const T* row, int64_t c, int64_t channels) {
  return block_of([&](int k) CNK_INLINE_LAMBDA { return load_channels(row, c + k, channels); });
}
CNK_INLINE void store(float* p, const Block& b) {
  unroll<Block::kVecs>([&](auto i) CNK_INLINE_LAMBDA { store(p + i.value * kLanes, b.v[i.value]); });
}

// Transpose kLanes registers of kLanes words: log2(kLanes) rounds, each of which interleaves the first half
// of the rows with the second.
namespace detail {
template <int... I>
CNK_INLINE Vec shuffle(Vec a, Vec b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else  // g++ 11
  return __builtin_shuffle(a, b, VecI{I...});
#endif
}
template <int... I>
CNK_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high, std::integer_sequence<int, I...>) {
  *low = shuffle<(I / 2 + I % 2 * kLanes)...>(a, b);
  *high = shuffle<(I / 2 + I % 2 * kLanes + kLanes / 2)...>(a, b);
}
}  // namespace detail

namespace detail {
// In a register lie the parts of kLanes / WIDTH rows, WIDTH lanes each: [a, b] with the halves of each part added.
template <int WIDTH, int HALF, int... I>
CNK_INLINE Vec halves(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return shuffle<(I / (WIDTH / 2) * WIDTH + HALF * WIDTH / 2 + I % (WIDTH / 2))...>(a, b);
}
template <int WIDTH>
CNK_INLINE Vec add_halves(Vec a, Vec b) {
  const auto lanes = std::make_integer_sequence<int, kLanes>{};
  return halves<WIDTH, 0>(a, b, lanes) + halves<WIDTH, 1>(a, b, lanes);
}
}  // namespace detail

CNK_INLINE void transpose(Vec (&rows)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
    unroll<kLanes / 2>([&](auto i) {
      detail::interleave(rows[i.value], rows[i.value + kLanes / 2], &next[2 * i.value],
                         &next[2 * i.value + 1], std::make_integer_sequence<int, kLanes>{});
    });
    unroll<kLanes>([&](auto i) { rows[i.value] = next[i.value]; });
  }
}

}  // namespace cnk::cpu::CNK_ISA
